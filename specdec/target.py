"""The target model as the verifier of a batch of drafts: prefill, verify, greedy choice."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.compatibility import build_network
from specdec.drafter import NO_TOKEN, Draft, Verified
from specdec.errors import NumericalError
from specdec.kernels.greedy_commit import greedy_commit
from specdec.processors import Processors
from specdec.rows import Rows, StepReport


@dataclass(frozen=True)
class GreedyRule:
    """eos_token_ids: any of them ends a row. min_new_tokens: no end of sequence before a row has that many."""

    eos_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0


class Target:
    """Runs the target model and commits what it would itself have written."""

    def __init__(
        self,
        model: PreTrainedModel,
        rule: GreedyRule,
        processors: Processors,
        max_rows: int,
        num_slots: int,
        layers: tuple[int, ...] = (),
    ):
        """layers: the hidden states that the drafter wants to observe."""
        self.network = build_network(model, max_rows, num_slots)
        self.rule, self.processors, self.layers = rule, processors, layers
        vocab_size = model.get_output_embeddings().weight.shape[0]
        # Ids outside the vocabulary (-1 is in use) mean that there is no such token.
        eos_ids = [token for token in rule.eos_token_ids if 0 <= token < vocab_size]
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.long, device=model.device)

    def prefill(self, rows: Rows) -> StepReport:
        """Cache the prompts and commit each row's first token."""
        logits = self.network.prefill(rows)[:, None]
        report, _ = self._commit(rows, Draft.empty(len(rows), rows.device), logits, ())
        return replace(report, is_prefill=True)

    def verify(self, rows: Rows, draft: Draft) -> tuple[StepReport, Verified]:
        """One forward over each row's last token and its draft, then the greedy commit."""
        width = draft.token_ids.shape[1] + 1
        inputs = torch.cat([rows.last_tokens(1), draft.token_ids.clamp(min=0)], 1)
        # The last committed token has no keys yet, so a row's cache is one shorter than the row.
        output = self.network.forward(inputs, rows.lengths - 1, rows.max_length - 1 + width, self.layers)
        return self._commit(rows, draft, output.logits, output.hidden_states)

    def keep_rows(self, index: Tensor) -> None:
        self.network.keep_rows(index)

    def _commit(
        self, rows: Rows, draft: Draft, logits: Tensor, hidden_states: tuple[Tensor, ...]
    ) -> tuple[StepReport, Verified]:
        """logits: [rows, k + 1, vocab]"""
        # transformers' order: the minimum length before whatever ranks or counts the remaining tokens.
        logits = self.processors(rows, draft.token_ids, self._forbid_early_end(rows, logits))
        best, target_ids = logits.max(-1)  # a NaN anywhere in a row of logits is its maximum
        nan = torch.isnan(best).any(1)
        done = greedy_commit(target_ids, draft.token_ids, self.eos_ids, rows.token_ids, rows.lengths, rows.limits)
        report = rows.read(done.num_committed, done.num_accepted, done.finished, nan, draft.token_ids, done.token_ids)
        if report.nan.any():
            row = int(report.row_ids[report.nan.argmax()])
            raise NumericalError(
                f"the target's logits are NaN in row {row}; check the weights and the dtype "
                "(float16 overflows where bfloat16 or float32 do not)"
            )
        drafted = report.num_drafted
        all_accepted = bool(((report.num_accepted == drafted) & (drafted > 0)).any())
        return report, Verified(draft, done.num_accepted, done.num_committed, all_accepted, hidden_states)

    def _forbid_early_end(self, rows: Rows, logits: Tensor) -> Tensor:
        """-inf for the end-of-sequence tokens wherever a row would end with fewer than min_new_tokens."""
        if not len(self.eos_ids) or not (rows.num_new_tokens < self.rule.min_new_tokens).any():
            return logits
        column = torch.arange(logits.shape[1], device=logits.device)
        too_early = (rows.lengths - rows.prompt_lengths)[:, None] + column < self.rule.min_new_tokens
        is_eos = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_eos[self.eos_ids] = True
        return logits.masked_fill(too_early[..., None] & is_eos, float("-inf"))


def within_limits(rows: Rows, draft: Draft) -> Draft:
    """The draft without tokens that a row's length limit leaves no room for; the target's own token needs one place."""
    room = (rows.limits - rows.lengths - 1)[:, None]
    column = torch.arange(draft.token_ids.shape[1], device=draft.token_ids.device)
    return Draft(draft.token_ids.masked_fill(column >= room, NO_TOKEN), draft.probs, draft.parents)
