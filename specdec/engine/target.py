"""The target model as the verifier of a batch of drafts: prefill, verify, commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.layout import Layout, Ragged
from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.draft import Draft, Verified
from specdec.engine.emitted import Emitted, committed
from specdec.errors import DrafterError, NumericalError
from specdec.network.base import NetworkOutput, vocab_size_of
from specdec.network.choose import build_network
from specdec.verify.processors import Processors
from specdec.verify.verification import BAD_SCORES, Verification


class Forward(NamedTuple):
    """A forward over each row's last token and its draft, on its way on the device."""

    draft: Draft
    output: NetworkOutput

    def of_rows(self, index: Tensor) -> Forward:
        """A copy for the rows that are left. index: [rows] int64 on the device."""
        return Forward(self.draft.of_rows(index), self.output.of_rows(index))


Reading = Callable[[], tuple[StepReport, Verified]]  # waits for a step's report; call it once


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
        self.is_free = False  # whether nobody looks at the outputs of the newest forward any more

    def prefill(self, rows: Rows) -> StepReport:
        """Cache the prompts and commit each row's first token."""
        return self.first_tokens(rows, self.network.prefill(rows))

    def first_tokens(self, rows: Rows, logits: Tensor) -> StepReport:
        """Commit the token after each prompt. logits: [rows, vocab]"""
        report, _ = self._commit(rows, Draft.empty(len(rows), rows.device), logits[:, None], is_prefill=True)()
        return report

    def forward(self, rows: Rows, draft: Draft) -> Forward:
        """Launch the forward over each row's last token and its draft."""
        starts, inputs = rows.newest()  # the last committed token has no keys yet
        if draft.token_ids.shape[1]:
            inputs = torch.cat([inputs, draft.token_ids.clamp(min=0)], 1)

        extra = draft.extra_queries
        width = inputs.shape[1] * (1 if extra is None else 1 + extra.num)
        used_slots = rows.max_length - 1 + width
        output = self.network.forward(inputs, starts, used_slots, self.layers, rows.host_lengths - 1, extra)
        return Forward(draft, output)

    def keep_rows(self, index: Tensor) -> None:
        self.network.keep_rows(index)

    def commit(self, rows: Rows, forward: Forward) -> Reading:
        """Verify the draft and append what is committed to `rows`, on the device. Call the result to read the step."""
        draft, output = forward
        return self._commit(rows, draft, output.logits, output.hidden_states, output.extra_logits)

    def _commit(
        self,
        rows: Rows,
        draft: Draft,
        logits: Tensor,
        hidden_states: tuple[Tensor, ...] = (),
        extra_logits: Callable[[Tensor], Tensor] | None = None,
        is_prefill: bool = False,
    ) -> Reading:
        """logits: [rows, k + 1, vocab]"""
        scores = self.processors(rows, draft.token_ids, logits)
        done = self.verification(rows, draft, scores, self.eos_ids)
        # The next forward overwrites logits and hidden states. Logits at extra queries are computed when they are asked
        # for, and may write where the next forward has written keys.
        keeps_logits = self.emitted_scores is not None or self.emitted_logits is not None or scores is not logits
        is_looked_at = keeps_logits or bool(self.layers) or draft.extra_queries is not None
        self.is_free = self.network.runs_ahead and not is_looked_at
        reading = rows.reading(done, is_prefill)

        def read() -> tuple[StepReport, Verified]:
            report = reading()
            if report.fault.any():
                raise_fault(report, logits, scores)
            self._keep_emitted(rows, report, logits, scores)
            lengths = rows.host_lengths.copy()
            return report, Verified(draft, done.num_accepted, done.num_committed, lengths, hidden_states, extra_logits)

        return read

    def _keep_emitted(self, rows: Rows, report: StepReport, logits: Tensor, scores: Tensor) -> None:
        if self.emitted_scores is None and self.emitted_logits is None:
            return
        slots, columns, places = committed(rows, report)
        index = torch.from_numpy(slots).to(rows.device), torch.from_numpy(columns).to(rows.device)
        if self.emitted_logits is not None:
            self.emitted_logits.add(report.row_ids[slots], places, logits[index])
        if self.emitted_scores is not None:
            self.emitted_scores.add(report.row_ids[slots], places, self.processors.warped(scores[index]))


def raise_fault(report: StepReport, logits: Tensor, scores: Tensor) -> None:
    """logits, scores: [rows, k + 1, vocab]; the same tensor where nothing was processed."""
    slot = int((report.fault > 0).argmax())
    row = int(report.row_ids[slot])
    if not report.fault[slot] & BAD_SCORES:
        raise DrafterError(
            f"the drafter's probabilities in row {row} are not a distribution: each must be finite and sum to 1"
        )

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
