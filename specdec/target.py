"""The target model as the verifier of a batch of drafts: prefill, verify, commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.compatibility import build_network
from specdec.drafter import NO_TOKEN, Draft, Verified
from specdec.emitted import Emitted, committed
from specdec.errors import DrafterError, NumericalError
from specdec.layout import Layout, Ragged
from specdec.network import vocab_size_of
from specdec.processors import Processors
from specdec.rows import Rows, StepReport
from specdec.verify import BAD_SCORES, Verification


class Target:
    """Runs the target model and commits what it would itself have written."""

    def __init__(
        self,
        model: PreTrainedModel,
        processors: Processors,
        verification: Verification,
        eos_token_ids: Sequence[int],
        max_rows: int,
        num_slots: int,
        max_length: int | None,
        layers: tuple[int, ...] = (),
        layout: Layout | None = None,
        emitted_scores: Emitted | None = None,
        emitted_logits: Emitted | None = None,
    ):
        """eos_token_ids: any of them ends a row. layers: the hidden states that the drafter wants to observe.
        emitted_scores, emitted_logits: where to keep processed scores and raw logits of the emitted tokens.
        """
        self.layout = layout or Ragged()
        self.network = build_network(model, max_rows, num_slots, max_length, self.layout)
        self.processors, self.verification, self.layers = processors, verification, layers
        self.emitted_scores, self.emitted_logits = emitted_scores, emitted_logits
        self.vocab_size = vocab_size_of(model)
        self.eos_ids = torch.tensor(eos_token_ids, dtype=torch.long, device=model.device)

    def prefill(self, rows: Rows) -> StepReport:
        """Cache the prompts and commit each row's first token."""
        return self.first_tokens(rows, self.network.prefill(rows))

    def first_tokens(self, rows: Rows, logits: Tensor) -> StepReport:
        """Commit the token behind each prompt. logits: [rows, vocab]"""
        report, _ = self._commit(rows, Draft.empty(len(rows), rows.device), logits[:, None], ())
        return replace(report, is_prefill=True)

    def verify(self, rows: Rows, draft: Draft) -> tuple[StepReport, Verified]:
        """One forward over each row's last token and its draft, then the commit."""
        starts, inputs = rows.newest()  # the last committed token has no keys yet
        if draft.token_ids.shape[1]:
            inputs = torch.cat([inputs, draft.token_ids.clamp(min=0)], 1)
        extra = draft.extra_queries
        width = inputs.shape[1] * (1 if extra is None else 1 + extra.num)
        used_slots = rows.max_length - 1 + width
        output = self.network.forward(inputs, starts, used_slots, self.layers, rows.host_lengths - 1, extra)
        report, verified = self._commit(rows, draft, output.logits, output.hidden_states)
        return report, verified if extra is None else replace(verified, extra_logits=output.extra_logits)

    def keep_rows(self, index: Tensor) -> None:
        self.network.keep_rows(index)

    def _commit(
        self, rows: Rows, draft: Draft, logits: Tensor, hidden_states: tuple[Tensor, ...]
    ) -> tuple[StepReport, Verified]:
        """logits: [rows, k + 1, vocab]"""
        scores = self.processors(rows, draft.token_ids, logits)
        done = self.verification(rows, draft, scores, self.eos_ids)
        # While the host waits anyway: behind the report the device would wait for it.
        num_accepted, num_committed = done.num_accepted, done.num_committed
        report = rows.read(done)
        if report.fault.any():
            slot = int((report.fault > 0).argmax())
            row = int(report.row_ids[slot])
            if report.fault[slot] & BAD_SCORES:
                own = logits[slot]
                if not own.isnan().any() and (own > float("-inf")).any(-1).all():
                    raise NumericalError(
                        f"the processed scores are NaN in row {row} where the target's logits are not; a logits "
                        "processor returned NaN or left no token possible (remove_invalid_values=True replaces NaN)"
                    )
                raise NumericalError(
                    f"the target's logits are NaN in row {row}; check the weights and the dtype "
                    "(float16 overflows where bfloat16 or float32 do not)"
                )
            raise DrafterError(
                f"the drafter's probabilities in row {row} are no distribution: each must be finite and sum to 1"
            )
        self._keep_emitted(rows, report, logits, scores)
        drafted = report.num_drafted
        all_accepted = draft.token_ids.shape[1] > 0 and bool(((report.num_accepted == drafted) & (drafted > 0)).any())
        return report, Verified(draft, num_accepted, num_committed, all_accepted, hidden_states)

    def _keep_emitted(self, rows: Rows, report: StepReport, logits: Tensor, scores: Tensor) -> None:
        if self.emitted_scores is None and self.emitted_logits is None:
            return
        slots, columns, places = committed(rows, report)
        index = torch.from_numpy(slots).to(rows.device), torch.from_numpy(columns).to(rows.device)
        if self.emitted_logits is not None:
            self.emitted_logits.add(report.row_ids[slots], places, logits[index])
        if self.emitted_scores is not None:
            self.emitted_scores.add(report.row_ids[slots], places, self.processors.warped(scores[index]))


def usable(rows: Rows, draft: Draft, widths: np.ndarray, most: int, vocab_size: int, name: str) -> Draft:
    """The part of a draft that can be verified.

    Cut are tokens beyond `widths`, [rows] integers, tokens that a row's length limit leaves no room for (the target's
    own token needs one place), whatever is no token of the target, and what stands behind any of these. Raises
    DrafterError for a draft of the wrong kind or shape, or of more than `most` tokens.
    """
    check_draft(rows, draft, most, vocab_size, name)
    ids = draft.token_ids
    if not ids.shape[1]:
        return draft
    room = np.minimum(rows.host_limits - rows.host_lengths - 1, widths)
    is_roomy = min(room.tolist()) >= ids.shape[1]
    if is_roomy and draft.is_valid:
        return draft
    unusable = (ids < 0) | (ids >= vocab_size)
    if not is_roomy:
        unusable |= torch.from_numpy(np.arange(ids.shape[1]) >= room[:, None]).to(ids.device)
    return replace(draft, token_ids=ids.masked_fill(unusable.cumsum(1).bool(), NO_TOKEN))


def check_draft(rows: Rows, draft: Draft, max_tokens: int, vocab_size: int, name: str) -> None:
    if not isinstance(draft, Draft):
        raise DrafterError(f"drafter {name!r} proposed a {type(draft).__name__}; propose() must return a Draft")
    ids, probs = draft.token_ids, draft.probs
    if ids.dim() != 2 or len(ids) != len(rows) or ids.shape[1] > max_tokens or ids.dtype != torch.long:
        raise DrafterError(
            f"drafter {name!r} proposed token_ids of {list(ids.shape)} {ids.dtype}; needed are [{len(rows)}, at most "
            f"{max_tokens}] torch.int64"
        )
    if probs is not None and probs.shape != (*ids.shape, vocab_size):
        raise DrafterError(
            f"drafter {name!r} gave probs of {list(probs.shape)}; needed are {[*ids.shape, vocab_size]}, the target's "
            "vocabulary last"
        )
    if draft.parents is not None:
        raise DrafterError(f"drafter {name!r} proposed a tree; only chains are verified yet, leave parents=None")
