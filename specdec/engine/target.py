"""The target model as the verifier of a batch of drafts: prefill, verify, commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.layout import Layout
from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.draft import Draft, Verified
from specdec.drafter import Drafter
from specdec.engine.hooks import Hooks
from specdec.errors import ConfigError, DrafterError, NumericalError
from specdec.network.base import Network, NetworkOutput, vocab_size_of
from specdec.network.choose import build_network
from specdec.verify.processors import Processors
from specdec.verify.verification import BAD_DRAFT, Verification


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
        *,
        layout: Layout,
        layers: tuple[int, ...],
        max_rows: int,
        num_slots: int,
        max_length: int | None,
        processors: Processors,
        verification: Verification,
        hooks: Hooks,
        exact: bool = True,
    ):
        """layers: the hidden states that the drafter wants to see. max_rows, num_slots: of the cache, and the tokens of
        each row. max_length: no row grows longer; None if that is not known. exact: as in `build_network`."""
        self.layout, self.layers = layout, layers
        self.network = build_network(model, max_rows, num_slots, max_length, layout, exact=exact)
        self.processors, self.verification, self.hooks = processors, verification, hooks
        self.vocab_size = vocab_size_of(model)
        self.is_free = False  # whether nobody looks at the outputs of the newest forward any more

    def prefill(self, rows: Rows, drafter: Drafter) -> StepReport:
        """Cache the prompts and commit each row's first token."""
        read = drafter.read if self.layers else None
        return self.first_tokens(rows, self.network.prefill(rows, layers=self.layers, read=read))

    def prefill_columns(self, rows: Rows, begin: int, end: int, drafter: Drafter) -> Tensor:
        """Cache columns begin .. end - 1 of newcomers. Returns [rows, vocab] logits after the last token of each."""
        output = self.network.prefill_columns(rows.token_ids, rows.lengths, rows.first, begin, end, self.layers)
        if self.layers:
            drafter.read(rows, begin, end, output.hidden_states)
        return output.logits[:, 0]

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
        done = self.verification(rows, draft, scores, self.processors.eos_ids(rows))

        # The next forward overwrites logits and hidden states. Logits at extra queries are computed when they are asked
        # for, and may write where the next forward has written keys.
        keeps_logits = self.hooks.keeps_logits(rows)
        is_looked_at = keeps_logits or scores is not logits or bool(self.layers) or draft.extra_queries is not None
        self.is_free = self.network.runs_ahead and not is_looked_at
        reading = rows.reading(done, is_prefill)

        def read() -> tuple[StepReport, Verified]:
            report = reading()
            self.hooks.note_processors(report)
            if report.fault.any():
                self._note_faults(report, logits, scores)
            if keeps_logits:
                self.hooks.keep(rows, report, logits, scores)
            lengths = rows.host_lengths.copy()
            seen = draft, done.num_accepted, done.num_committed, lengths, hidden_states, extra_logits
            return report, Verified(*seen, row_ids=report.row_ids, committed_ids=report.token_ids)

        return read

    def _note_faults(self, report: StepReport, logits: Tensor, scores: Tensor) -> None:
        """A row with unusable scores ends with an error. A drafter that breaks its contract ends the generation.

        logits, scores: [rows, k + 1, vocab]; the same tensor where nothing was processed.
        """
        for slot in report.fault.nonzero()[0].tolist():
            row = int(report.row_ids[slot])
            if report.fault[slot] == BAD_DRAFT:
                raise DrafterError(
                    f"the drafter's probabilities in row {row} are not a distribution: each must be finite and sum to 1"
                )
            error = bad_scores(row, logits[slot], scores[slot], scores is not logits)
            is_bad = scores[slot].isnan().any(-1) | (scores[slot] == float("-inf")).all(-1)
            # A captured forward that was launched early has overwritten the logits: then nothing of the step is kept.
            self.hooks.fail(row, error, int(is_bad.long().argmax()) if is_bad.any() and not self.is_free else 0)


def bad_scores(row: int, logits: Tensor, scores: Tensor, is_processed: bool) -> NumericalError:
    """What to say of a row's scores that hold a NaN or nothing but -inf. logits, scores: [k + 1, vocab]."""
    if is_processed and not logits.isnan().any() and (logits > float("-inf")).any(-1).all():
        return NumericalError(
            f"the processed scores are NaN in row {row} where the target's logits are not; a logits "
            "processor returned NaN or left no token possible (remove_invalid_values=True replaces NaN)"
        )
    return NumericalError(
        f"the target's logits are NaN in row {row}; check the weights and the dtype "
        "(float16 overflows where bfloat16 or float32 do not)"
    )


def check_tree(network: Network, drafter: Drafter, num_speculative_tokens: int) -> None:
    """Extra queries after a draft see only the part of it that was accepted."""
    needed = drafter.num_extra_queries + num_speculative_tokens if drafter.num_extra_queries else 0
    if network.max_tree is not None and needed > network.max_tree:
        raise ConfigError(
            f"drafter {drafter.name!r} takes {drafter.num_extra_queries} extra queries after num_speculative_tokens="
            f"{num_speculative_tokens}: {needed} columns, more than the {network.max_tree} of a batch-invariant step; "
            "lower num_speculative_tokens, or train fewer helpers"
        )
