"""Filling in any positions of a text with an any-subset model, exactly and with fewer network calls than tokens (ASSD).

The loop of `decode.py` in rank order: a drafter proposes the tokens of the next ranks, one call gives the joint density
of all of them, and the shared verification keeps the tokens that the model itself would have written one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.draft import Draft
from specdec.engine.metrics import Speculation
from specdec.engine.output import SpeculativeOutput
from specdec.errors import ConfigError, NumericalError
from specdec.infill.checks import (
    check_drafting,
    check_visible_tokens,
    checked_mask_token,
    checked_order,
    checked_truncation,
)
from specdec.network.any_subset.model import AnySubsetModel, Conditionals, Order, XLNet, conditionals_of
from specdec.options.speculation import Randomness
from specdec.verify.lossy import Lossy
from specdec.verify.truncations import SameForAllRows
from specdec.verify.verification import GreedyVerification, SampledVerification, Verification

if TYPE_CHECKING:
    from specdec.drafters.any_subset import InfillDrafter, Sampling


def infill(
    model: PreTrainedModel | AnySubsetModel,
    input_ids: Tensor,
    mask: Tensor,
    attention_mask: Tensor | None = None,
    *,
    drafter: str | None = "self",
    num_speculative_tokens: int = 5,
    bonus_token: bool = True,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    verification: str = "token",
    mask_token_id: int | None = None,
    return_dict_in_generate: bool = False,
) -> Tensor | SpeculativeOutput:
    """Fill in the masked positions of every row: greedily, token for token as the model writes them one by one in
    ascending order, or with `do_sample=True` by exact samples of its joint distribution.

    model: an XLNetLMHeadModel, or your own AnySubsetModel.
    input_ids: [rows, columns] integers; values at masked positions are not read. mask: the same shape, bool, True at
    the positions to fill, which may differ from row to row in number and place. attention_mask: the same shape, 0 for
    padding on either side.
    drafter: "self" drafts by the model's own marginals, in a separate call; "ahead" by marginals requested in the
    call that verifies the previous draft; "ngram" by bigrams of the row; None fills in one token per call.
    num_speculative_tokens: tokens drafted per row and step, 1 to 32.
    bonus_token: after a fully accepted draft, commit one more token of the same call. Without it, as in the paper,
    drafts of one token gain nothing and are not made. Either way there are never more calls than tokens. temperature,
    top_k, top_p: for sampling, applied to the model's conditionals.
    seed: an int, or one per row; with the same seed a row's sample does not depend on its batch. generator: the source
    of a seed if none is given, by default torch's global generator.
    verification: of sampled drafts, "token" or "block".
    mask_token_id: the token that must never be written, by default `config.mask_token_id`.

    Returns [rows, columns] int64; with `return_dict_in_generate=True` a `SpeculativeOutput` with `.sequences` and
    `.speculation`, where `num_target_calls + num_draft_calls` is the number of all network calls.

    Raises SpecDecError (a ValueError) before any call of the network if something cannot be served, and NumericalError
    if the model's logits become NaN.
    """
    from specdec.drafters.any_subset import Sampling

    served = model if isinstance(model, AnySubsetModel) else XLNet(model)
    if getattr(model, "training", False):
        raise ConfigError("the model is in training mode, where dropout changes every call; call model.eval() first")
    order = checked_order(served, input_ids, mask, attention_mask)
    mask_token = checked_mask_token(served, mask_token_id)
    check_visible_tokens(input_ids, order, mask_token)
    check_drafting(drafter, num_speculative_tokens)
    truncation = checked_truncation(do_sample, temperature, top_k, top_p)
    randomness = Randomness(seed, generator, verification).checked(do_sample)
    if isinstance(verification, Lossy):
        raise ConfigError(f"verification={verification} is lossy, and infilling is exact; pass 'token' or 'block'")
    order = Order(*(part.to(served.device) for part in (order.positions, order.num_visible, order.lengths)))
    rows = rows_of(input_ids.to(served.device).long(), order, num_speculative_tokens)
    conditionals = Forbidding(conditionals_of(model, order, rows), mask_token)
    sampling, verify = None, cast(Verification, GreedyVerification())
    if do_sample:
        sampling = Sampling(randomness.streams(len(rows), rows.device), SameForAllRows(truncation))
        verify = SampledVerification(sampling.streams, sampling.processors, verification)
    by = drafter_of(drafter, conditionals, order, rows, sampling, served.vocab_size, num_speculative_tokens)
    speculation = fill(rows, Filling(conditionals, by, verify, num_speculative_tokens, bonus_token))
    sequences = sequences_of(rows, order, input_ids)
    if return_dict_in_generate:
        return SpeculativeOutput(sequences=sequences, speculation=speculation)
    return sequences


@dataclass(frozen=True)
class Filling:
    """The state of one `fill`."""

    conditionals: Conditionals
    drafter: InfillDrafter | None
    verification: Verification
    num_speculative_tokens: int
    bonus_token: bool = True


@torch.no_grad()
def fill(rows: Rows, filling: Filling) -> Speculation:
    """Fill all rows to their limits."""
    speculation = Speculation(verification=filling.verification.name)
    drafter, no_ends = filling.drafter, rows.token_ids.new_empty(0)
    while len(rows):
        draft, first = proposal(rows, filling)
        num_ahead = drafter.num_ahead if drafter is not None else 0
        scores = filling.conditionals.logits(rows, draft.token_ids, 1 + num_ahead)
        density = scores[:, :, 0]
        if first is not None:  # equal to the last bit: then the first draft token is certain to be accepted
            density[:, 0] = first
        done = filling.verification(within_step(rows, draft, filling.bonus_token), draft, density, no_ends)
        report = rows.reading(done)()
        check_report(report)
        speculation.add(report)
        if drafter is not None:
            drafter.observe(scores, done)
        finished = rows.host_lengths >= rows.host_limits
        if finished.any():
            kept = rows.retire(finished)
            filling.conditionals.keep_rows(kept)
            if drafter is not None:
                drafter.keep_rows(kept)
    speculation.num_draft_calls = drafter.num_calls if drafter is not None else 0
    return speculation


def proposal(rows: Rows, filling: Filling) -> tuple[Draft, Tensor | None]:
    """The step's draft, and the scores of its first position if drafting has computed them ([rows, vocab])."""
    # A verifying call writes one token more than it accepts, or at most as many as were drafted.
    least = 1 if filling.bonus_token else 2
    remaining = rows.limits - rows.lengths
    room = remaining - 1 if filling.bonus_token else remaining.masked_fill(remaining < 2, 0)
    max_tokens = min(filling.num_speculative_tokens, rows.max_remaining - (1 if filling.bonus_token else 0))
    if filling.drafter is None or max_tokens < least:
        return Draft.empty(len(rows), rows.device), None
    return filling.drafter.propose(rows, room, max_tokens)


def within_step(rows: Rows, draft: Draft, bonus_token: bool) -> Rows:
    """The same rows, with limits that leave no room for a bonus token unless it is enabled."""
    if bonus_token:
        return rows
    num_drafted = (draft.token_ids >= 0).sum(1)
    limited = copy.copy(rows)
    limited.limits = torch.minimum(rows.limits, rows.lengths + num_drafted.clamp(min=1))
    return limited


def check_report(report: StepReport) -> None:
    if report.fault.any():
        raise NumericalError(
            f"the model's logits are NaN in row {report.row_ids[int(report.fault.argmax())]}; check the weights and "
            "the dtype (float16 overflows where bfloat16 or float32 do not)"
        )


def rows_of(input_ids: Tensor, order: Order, spare: int) -> Rows:
    """The visible tokens as prompts, to be continued in rank order to each row's length."""
    tokens = input_ids.gather(1, order.positions)
    num_visible, lengths = order.num_visible.tolist(), order.lengths.tolist()
    prompts = [row[:count].cpu() for row, count in zip(tokens, num_visible, strict=True)]
    missing = [length - count for length, count in zip(lengths, num_visible, strict=True)]
    # All columns have a slot, padding too, so that rows and their order have one width.
    return Rows(prompts, missing, spare + 1 + tokens.shape[1] - max(lengths), input_ids.device)


def sequences_of(rows: Rows, order: Order, input_ids: Tensor) -> Tensor:
    """The filled texts in the positions of `input_ids`, [rows, columns] int64; padding stays unchanged."""
    rank = torch.arange(input_ids.shape[1], device=rows.device)
    assert rows.output_ids is not None
    filled = rows.output_ids[:, : input_ids.shape[1]]
    given = input_ids.to(rows.device).long()
    chosen = torch.where(rank < order.lengths[:, None], filled, given.gather(1, order.positions))
    return given.scatter(1, order.positions, chosen).to(input_ids.device)


class Forbidding:
    """Conditionals without the mask token, which is excluded before normalising: if its probability were removed
    afterwards, p and q would not sum to the same value and samples would be biased."""

    def __init__(self, conditionals: Conditionals, mask_token_id: int):
        self.conditionals, self.mask_token_id = conditionals, mask_token_id

    def logits(self, rows: Rows, draft_ids: Tensor, width: int) -> Tensor:
        logits = self.conditionals.logits(rows, draft_ids, width)
        logits[..., self.mask_token_id] = float("-inf")
        return logits

    def keep_rows(self, index: Tensor) -> None:
        self.conditionals.keep_rows(index)


def drafter_of(
    name: str | None,
    conditionals: Conditionals,
    order: Order,
    rows: Rows,
    sampling: Sampling | None,
    vocab_size: int,
    num_speculative_tokens: int,
) -> InfillDrafter | None:
    from specdec.drafters.any_subset import AheadDraft, NgramDraft, SelfDraft

    if name is None:
        return None
    if name == "self":
        return SelfDraft(conditionals, sampling)
    if name == "ahead":
        return AheadDraft(num_speculative_tokens, sampling)
    return NgramDraft(order, rows, vocab_size, sampling)
