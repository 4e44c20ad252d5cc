"""From the target's scores and a draft to committed tokens: by argmax, or by samples of the target's distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specdec.batch.rows import Rows
from specdec.draft import NO_TOKEN, Draft
from specdec.kernels.commit.distribution import Distribution, distribution_of, row_sums
from specdec.kernels.commit.greedy_commit import BAD_SCORES, Committed, greedy_commit
from specdec.kernels.commit.sampled_commit import sampled_commit
from specdec.kernels.commit.truncation import NO_TRUNCATION
from specdec.verify.lossy import Lenient, Lossy, TopBeta, Typical
from specdec.verify.processors import Processors
from specdec.verify.random_streams import Purpose, Streams
from specdec.verify.truncations import HasTruncations, SameForAllRows

BAD_DRAFT = 2 * BAD_SCORES  # a fault: the drafter's probabilities are not a distribution


class Verification(Protocol):
    """name: what reports call it. is_lossless: whether the output is the target's, or follows its distribution."""

    @property
    def name(self) -> str: ...

    @property
    def is_lossless(self) -> bool: ...

    def __call__(self, rows: Rows, draft: Draft, scores: Tensor, eos_ids: Tensor) -> Committed:
        """scores: [rows, k + 1, vocab], processed logits. Appends to `rows`.

        Faults are BAD_SCORES, of the target, and BAD_DRAFT, of the drafter, or their sum.
        """


@dataclass(frozen=True)
class GreedyVerification:
    """Commits what greedy decoding of the target writes; with a lossy rule, drafts that it lets pass as well."""

    rule: Lenient | TopBeta | None = None

    @property
    def name(self) -> str:
        return "greedy" if self.rule is None else str(self.rule)

    @property
    def is_lossless(self) -> bool:
        return self.rule is None

    def __call__(self, rows: Rows, draft: Draft, scores: Tensor, eos_ids: Tensor) -> Committed:
        passes = None
        if self.rule is not None and draft.token_ids.shape[1]:
            passes = lets_pass(self.rule, draft.token_ids, scores[:, :-1])
        return greedy_commit(scores, draft.token_ids, eos_ids, rows.token_ids, rows.lengths, rows.limits, passes)


@dataclass(frozen=True)
class SampledVerification:
    """Commits samples of the target's distribution, whatever the drafter's. A row at temperature 0 commits what
    `GreedyVerification` would commit for it.

    processors: knows each row's truncation.
    method: "token" (rejection sampling) or "block" (block verification), see `kernels/commit/sampled_commit.py`; or a
        lossy rule, and then the committed tokens follow another distribution.
    """

    streams: Streams
    processors: HasTruncations = field(default_factory=lambda: SameForAllRows(NO_TRUNCATION))
    method: str | Lenient | Typical = "token"

    @property
    def name(self) -> str:
        return str(self.method)

    @property
    def is_lossless(self) -> bool:
        return isinstance(self.method, str)

    def __call__(self, rows: Rows, draft: Draft, scores: Tensor, eos_ids: Tensor) -> Committed:
        target = distribution_of(scores, self.processors.truncations(rows))
        uniforms = self.streams.uniforms(rows.row_ids, rows.host_lengths, scores.shape[1], Purpose.VERIFY)
        draft_ids, draft_probs = draft.token_ids, draft.probs

        passes = None
        if isinstance(self.method, Typical):  # all that is left of the draft is accepted, and a sample of p follows
            draft_ids, draft_probs = typical_prefix(self.method, target, draft_ids), None
            uniforms[:, 1:] = 0
        elif isinstance(self.method, Lenient) and target.best is not None and draft_ids.shape[1]:
            passes = lets_pass(self.method, draft_ids, scores[:, :-1])

        done = sampled_commit(
            target,
            draft_ids,
            draft_probs,
            uniforms,
            eos_ids,
            rows.token_ids,
            rows.lengths,
            rows.limits,
            self.method if isinstance(self.method, str) else "token",
            lenience=self.method.lenience if isinstance(self.method, Lenient) else 1.0,
            passes=passes,
        )
        if not draft.is_normalised and draft.probs is not None:
            # Half precision sums to 1 within a percent; NaN compares false.
            sums_to_one = (draft.probs.sum(-1, dtype=torch.float32) - 1).abs() < 0.02
            is_bad = ((draft.token_ids >= 0) & ~sums_to_one).any(1)
            if target.best is not None:  # greedy rows do not read the probabilities
                is_bad &= target.best[:, 0] == NO_TOKEN
            done.fault.add_(is_bad * BAD_DRAFT)
        return done


class MixedVerification:
    """Greedy and sampled rows in one batch. A step without sampled rows takes the greedy kernel, which is cheaper."""

    def __init__(self, streams: Streams, processors: Processors, method: str | Lossy = "token"):
        """method: as in `SampledVerification`, or `TopBeta` where all rows are greedy."""
        self.name, self.processors, self.is_lossless = str(method), processors, isinstance(method, str)
        self.greedy = GreedyVerification(method if isinstance(method, Lenient | TopBeta) else None)
        self.sampled = SampledVerification(streams, processors, "token" if isinstance(method, TopBeta) else method)

    def __call__(self, rows: Rows, draft: Draft, scores: Tensor, eos_ids: Tensor) -> Committed:
        verify = self.sampled if self.processors.any_sampled(rows) else self.greedy
        return verify(rows, draft, scores, eos_ids)


def lets_pass(rule: Lenient | TopBeta, draft_ids: Tensor, scores: Tensor) -> Tensor:
    """Which drafts a greedy rule accepts besides the argmax, [rows, k] bool.

    draft_ids: [rows, k] int64. scores: [rows, k, vocab].
    """
    index = draft_ids.clamp(min=0)[..., None]
    drafted = scores.gather(2, index)
    gap = (scores.amax(-1).double() - drafted[..., 0].double()).masked_fill(draft_ids == NO_TOKEN, torch.inf)
    if isinstance(rule, Lenient):
        return gap <= -math.log(rule.lenience)
    # As in argmax, of equal scores the lower index ranks first, so that the first rank is greedy decoding.
    is_ahead = (scores > drafted) | ((scores == drafted) & (torch.arange(scores.shape[2], device=index.device) < index))
    return (gap <= rule.tau) & (is_ahead.sum(2) < rule.beta)


def typical_prefix(rule: Typical, target: Distribution, draft_ids: Tensor) -> Tensor:
    """The drafts with every one from the first untypical on taken out, [rows, k] int64. Greedy rows keep theirs."""
    p = target.of_tokens(draft_ids.clamp(min=0))
    threshold = torch.empty_like(p)
    for place in range(draft_ids.shape[1]):
        probs = target.at(torch.full_like(draft_ids[:, 0], place))
        entropy = row_sums(torch.special.entr(probs))
        threshold[:, place] = (rule.delta * (-entropy).exp()).clamp(max=rule.epsilon)
    is_typical = (p >= threshold) & (p > 0) & (draft_ids != NO_TOKEN)
    if target.best is not None:
        is_typical |= target.best[:, :-1] != NO_TOKEN
    return draft_ids.masked_fill(is_typical.long().cumprod(1) == 0, NO_TOKEN)
