"""The target model as the verifier of a batch of drafts: prefill, verify, commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.layout import Layout, Ragged
from specdec.batch.rows import Rows, StepReport
from specdec.batch.slots import to_device
from specdec.drafter import Draft, Verified
from specdec.engine.emitted import Emitted, committed
from specdec.errors import DrafterError, NumericalError
from specdec.network.base import NetworkOutput, vocab_size_of
from specdec.network.choose import build_network
from specdec.verify.processors import Processors
from specdec.verify.verification import BAD_SCORES, Verification


class Begun(NamedTuple):
    """A forward that was launched ahead: for the step behind so many others of its rows, in which so many tokens a row
    are asked of the drafter."""

    num_steps: int
    asked: int
    draft: Draft
    output: NetworkOutput


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
        self.can_begin = False  # whether nobody looks at the forward of the step that is being read any more
        self._begun: Begun | None = None

    def prefill(self, rows: Rows) -> StepReport:
        """Cache the prompts and commit each row's first token."""
        return self.first_tokens(rows, self.network.prefill(rows))

    def first_tokens(self, rows: Rows, logits: Tensor) -> StepReport:
        """Commit the token behind each prompt. logits: [rows, vocab]"""
        report, _ = self._commit(rows, Draft.empty(len(rows), rows.device), logits[:, None], ())
        return replace(report, is_prefill=True)

    def begin(self, rows: Rows, draft: Draft, asked: int) -> None:
        """Launch the forward of the next `verify`, while a report is on its way; only if `can_begin`.

        asked: tokens a row that the drafter was asked for. A draft with extra queries is not begun: its rows may move,
            and what is behind the queries is asked for before they do.
        """
        if draft.extra_queries is not None:
            return
        self._begun = Begun(rows.num_steps + 1, asked, draft, self._forward(rows, draft))

    def begun_draft(self, rows: Rows, widths: np.ndarray, max_tokens: int) -> Draft | None:
        """The draft of a forward launched ahead, if as many tokens were asked for as are asked for now."""
        begun = self._begun
        if begun is None or begun.num_steps != rows.num_steps:
            return None
        is_asked = (np.minimum(widths, max_tokens) == min(begun.asked, max_tokens)).all()
        return begun.draft if is_asked else None

    def verify(
        self, rows: Rows, draft: Draft, meanwhile: Callable[[], None] | None = None
    ) -> tuple[StepReport, Verified]:
        """One forward over each row's last token and its draft, then the commit.

        meanwhile: called before the report is waited for, see `Rows.read`.
        """
        begun, self._begun = self._begun, None
        output = begun.output if begun is not None and begun.draft is draft else self._forward(rows, draft)
        report, verified = self._commit(rows, draft, output.logits, output.hidden_states, meanwhile)
        return report, verified if draft.extra_queries is None else replace(verified, extra_logits=output.extra_logits)

    def _forward(self, rows: Rows, draft: Draft) -> NetworkOutput:
        starts, inputs = rows.newest()  # the last committed token has no keys yet
        if draft.token_ids.shape[1]:
            inputs = torch.cat([inputs, draft.token_ids.clamp(min=0)], 1)
        extra = draft.extra_queries
        width = inputs.shape[1] * (1 if extra is None else 1 + extra.num)
        used_slots = rows.max_length - 1 + width
        return self.network.forward(inputs, starts, used_slots, self.layers, rows.host_lengths - 1, extra)

    def keep_rows(self, index: Tensor) -> None:
        self.network.keep_rows(index)
        if self._begun is not None:
            kept, begun = to_device(index.numpy(), self.eos_ids.device), self._begun
            self._begun = begun._replace(draft=begun.draft.of_rows(kept), output=begun.output.of_rows(kept))

    def _commit(
        self,
        rows: Rows,
        draft: Draft,
        logits: Tensor,
        hidden_states: tuple[Tensor, ...],
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[StepReport, Verified]:
        """logits: [rows, k + 1, vocab]"""
        scores = self.processors(rows, draft.token_ids, logits)
        done = self.verification(rows, draft, scores, self.eos_ids)
        # While the host waits anyway: behind the report the device would wait for it.
        num_accepted, num_committed = done.num_accepted, done.num_committed
        # A forward overwrites the logits and hidden states of the one before; what is behind extra queries is computed
        # when it is asked for, and may write where the next forward has written keys.
        keeps_logits = self.emitted_scores is not None or self.emitted_logits is not None or scores is not logits
        is_looked_at = keeps_logits or self.layers or draft.extra_queries is not None
        self.can_begin = self.network.runs_ahead and not is_looked_at
        report = rows.read(done, meanwhile)
        if report.fault.any():
            slot = int((report.fault > 0).argmax())
            row = int(report.row_ids[slot])
            if report.fault[slot] & BAD_SCORES:
                own = logits[slot]
                if scores is not logits and not own.isnan().any() and (own > float("-inf")).any(-1).all():
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
        lengths = rows.host_lengths.copy()
        return report, Verified(draft, num_accepted, num_committed, all_accepted, lengths, hidden_states)

    def _keep_emitted(self, rows: Rows, report: StepReport, logits: Tensor, scores: Tensor) -> None:
        if self.emitted_scores is None and self.emitted_logits is None:
            return
        slots, columns, places = committed(rows, report)
        index = torch.from_numpy(slots).to(rows.device), torch.from_numpy(columns).to(rows.device)
        if self.emitted_logits is not None:
            self.emitted_logits.add(report.row_ids[slots], places, logits[index])
        if self.emitted_scores is not None:
            self.emitted_scores.add(report.row_ids[slots], places, self.processors.warped(scores[index]))
