"""The length policy that measures: as many draft tokens as give the most tokens per second, which may be none.

What a draft and a verification cost is timed while they happen; how far a draft is accepted is learned from what became
of earlier ones and, while drafting, from an acceptance head or the drafter's own probability. Drafting w tokens is
expected to give G(w) = sum over rows of 1 + P(1 accepted) + ... + P(w accepted) tokens in T(w) seconds; the best rate
is the largest G(w) / T(w), and w = 0 is plain decoding. An estimate refines this token by token: drafting goes on while
what it is expected to add is worth more than the seconds it adds at that rate (the marginal value theorem).

Not slower than plain decoding, whatever the drafter: every step that drafts is booked. One that gave each row g tokens
gains g - T(w) / T(0) plain steps, by the medians of what was timed and with catching up; the account holds the sum of
that and of SHARE for every step taken, at most MOST, and begins with FIRST, or with what earlier calls of the pair have
gained, at most CARRIED. To try what is not expected to pay, it must hold the expected loss; what is expected to pay
goes on until the account is down to LEAST. So a drafter that never
gains loses in n steps at most SHARE n + FIRST - LEAST plain steps and one step's excess: of 128 steps 3 %, of 500 about
1 %, and less where nothing is worth a trial. What drafts have gained they may lose again, up to MOST. Plain steps are
taken in runs that are neither thought about nor timed. Not booked are the few steps of EXPLORED, once a pair.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from weakref import ref

import numpy as np
import torch
from transformers import PreTrainedModel

from specdec.batch.rows import Rows, StepReport
from specdec.drafter import Draft, Drafter
from specdec.engine.metrics import decided
from specdec.kept import kept_with
from specdec.policies.costs import MAX_TOKENS, Clock, CostTable, CudaClock, Curve, HostClock, Recalibrated, Survival
from specdec.policies.estimates import DiscoEstimate, DraftProbability, Estimate, HeadEstimate, estimate_beside
from specdec.policies.heads.acceptance_head import AcceptanceHead
from specdec.policies.heads.disco import Disco
from specdec.policies.length import LengthPolicy, Shown, with_predictions

# Draft tokens of the first steps with a pair, whose costs are unknown: few and short, so that a drafter that loses has
# lost little, and each twice, because the first time of a shape tells little. What they show decides from then on.
EXPLORED = (1, 0, 1, 0, 3, 3)
WORTH = 1.05  # of plain decoding's speed: drafts that are not expected to reach it are not worth the doubt
# The account, in plain steps.
SHARE = 0.005
FIRST, LEAST, MOST = 1.0, -2.0, 16.0
CARRIED = 6.0  # of what earlier calls have gained: some unlucky drafts at a text's beginning do not end drafting
TIMED_PLAIN_STEPS = 4  # behind the last draft: the machine may have become slower, and not the drafts
PLAIN_STEPS = 16  # without a thought, once plain decoding is faster; twice as many behind each probe in vain
MOST_PLAIN_STEPS = 256
PLAIN_IS_OLD = 8  # steps after which plain decoding is timed again, if that loses little
SHARE_OF_PLAIN = 0.01  # of the time of drafts: what timing plain decoding may lose
ROWS_ALIKE = 1.5  # a plain step of so many times more or fewer rows says enough about these
KNOWN_LAG = 2  # tokens that every draft feeds anyway


class Knowledge:
    """What has been learned about a target with a drafter; it outlives the `generate` call.

    catch_up: seconds that a drafter's network takes per row and token of steps that drafted nothing, beside those of
    one more forward; None before it was seen.
    """

    def __init__(self) -> None:
        self.verify = CostTable(lambda tokens: 0.95 + 0.05 * tokens)
        self.draft = CostTable(lambda tokens: 0.05 + 0.1 * tokens)
        self.survival = Survival(MAX_TOKENS)
        self.recalibrated = Recalibrated()
        self.catch_up: float | None = None
        self.num_explored = 0
        self.account = FIRST


def knowledge_of(target: PreTrainedModel, drafter: Drafter, estimate: Estimate | None = None) -> Knowledge:
    """Kept as long as the target lives. Each kind of estimate has its own errors, and takes its own time."""
    drafting: Hashable = type(drafter) if drafter.model is None else ref(drafter.model)
    layout = None if drafter.layout is None else drafter.layout.name
    key = (Knowledge, drafting, type(estimate), target.device, target.dtype, layout, torch.get_num_threads())
    return kept_with(target, key, Knowledge)


class CostModel(LengthPolicy):
    """Works with every drafter; the output of greedy decoding does not depend on what it picks."""

    name = "cost_model"

    def __init__(
        self,
        head: AcceptanceHead | Disco | str | Path | None = "beside",
        clock: Clock | None = None,
        knowledge: Knowledge | None = None,
    ):
        """head: what estimates acceptance while drafting: a head, an acceptance head's folder, or None for the
            drafter's own probability; by default the acceptance head in the draft model's folder, if there is one
            for this pair. A drafter that shows no tokens is used without.
        clock: in place of the real one. knowledge: in place of what earlier calls have learned about the pair.
        """
        self.head, self._given_clock, self._given_knowledge = head, clock, knowledge
        self._estimate: Estimate | None = None

    def check(self, target: PreTrainedModel, drafter: Drafter) -> None:
        self._estimate, self.sees = self._find_estimate(target, drafter)
        super().check(target, drafter)

    def _find_estimate(self, target: PreTrainedModel, drafter: Drafter) -> tuple[Estimate | None, frozenset[str]]:
        if not drafter.shows:
            return None, frozenset()
        if self.head == "beside" and (estimate := estimate_beside(self.name, target, drafter)):
            return estimate, estimate.sees
        head = None if self.head == "beside" else self.head
        if head is None:
            return DraftProbability.of(drafter), DraftProbability.sees
        kind = DiscoEstimate if isinstance(head, Disco) else HeadEstimate
        return kind.of(self.name, head, target, drafter), kind.sees

    def start(self, target: PreTrainedModel, drafter: Drafter, max_tokens: int) -> None:
        on_cuda = target.device.type == "cuda"
        self._clock: Clock = self._given_clock or (CudaClock() if on_cuda else HostClock())
        self._known = self._given_knowledge or knowledge_of(target, drafter, self._estimate)
        self._known.survival.forget_rows()
        self._known.account = min(max(self._known.account, FIRST), CARRIED)
        self._max_tokens = max_tokens
        self._hold = 0  # plain steps to take without a thought
        self._is_held = self._is_promised = False
        self._plain_steps = PLAIN_STEPS  # of the next hold
        self._lag = 0  # plain steps since the last draft
        self._since_plain = 0
        self._num_rows, self._is_plain_known = 0, False
        self._rows_at_reset = 0  # of _plain_steps
        self._achieved = np.zeros(2)  # tokens and seconds of late, by drafts that an estimate stopped

    # ---- before drafting

    def widths(self, rows: Rows, max_tokens: int) -> np.ndarray:
        if len(rows) != self._num_rows:
            self._meet(len(rows))
        if self._is_promised:  # its forward may have begun, so that its time would say nothing
            self._hold, self._is_promised = max(self._hold, 1), False
        self._is_held = self._hold > 0
        if self._is_held:
            self._hold -= 1
            self._lag += 1
            return np.zeros(len(rows), dtype=np.int64)
        self._begin = self._clock.mark()
        self._predicted: list[np.ndarray] = []
        self._is_probe = self._is_explored = self._follows_estimate = False
        tokens = self._choose(rows, max_tokens)
        # An estimate decides while drafting how far to go.
        self._asked = max_tokens if self._follows_estimate else tokens
        return np.full(len(rows), self._asked)

    def next_width(self, max_tokens: int) -> int | None:
        self._is_promised = self._is_held and self._hold > 0
        return 0 if self._is_promised else None

    def _meet(self, num_rows: int) -> None:
        """Another number of rows: other costs."""
        self._num_rows, self._hold, self._is_plain_known = num_rows, 0, False
        self._achieved[:] = 0
        if not are_alike(num_rows, self._rows_at_reset):
            self._rows_at_reset, self._plain_steps = num_rows, PLAIN_STEPS

    def _choose(self, rows: Rows, max_tokens: int) -> int:
        known = self._known
        self._curves = known.verify.curve(len(rows), rows.max_length), known.draft.curve(len(rows), rows.max_length)
        # A row that has room for r tokens gets the target's own as one of them.
        self._room = rows.host_limits - rows.host_lengths - 1
        if max_tokens < 1:
            return 0
        if known.num_explored < len(EXPLORED):
            return self._explore(max_tokens)
        self._expect(rows, max_tokens)
        self._is_plain_known = self._is_plain_known or self._was_plain_timed(len(rows))
        if not self._is_plain_known:
            return 0
        rates = self._gains / self._times
        best = int(rates.argmax())
        tokens, seconds = self._achieved
        achieved = tokens / seconds if seconds > 0 else 0.0
        self._rate = max(float(rates[best]), achieved)
        catch_up = self._catch_up_seconds(self._curves[1])
        if self._rate > WORTH * rates[0] and self._known.account - catch_up / self._times[0] > LEAST:
            if self._is_plain_old(best):
                return 0
            self._plain_steps = PLAIN_STEPS
            self._follows_estimate = self._estimate is not None
            return best
        if self._lag < TIMED_PLAIN_STEPS:
            return 0
        other = 1 + int(rates[1:].argmax())
        # What catching up costs is to be seen early: it grows with every plain step.
        missing = 0 if known.catch_up is None else self._plain_steps - self._lag
        if missing <= 0 and self._may_probe(other, catch_up):
            self._is_probe = True
            return other
        self._hold = missing if missing > 0 else self._plain_steps
        self._known.account = min(self._known.account + SHARE * self._hold, MOST)
        return 0

    def _explore(self, max_tokens: int) -> int:
        """The next of EXPLORED; at the very end of a text, where it does not fit, nothing."""
        tokens = min(EXPLORED[self._known.num_explored], self._max_tokens)
        if tokens > max_tokens:
            return 0
        self._known.num_explored += 1
        self._is_explored = True
        return tokens

    def _expect(self, rows: Rows, max_tokens: int) -> None:
        """Tokens and seconds of a step by how many are drafted, [max_tokens + 1] each, without catching up."""
        verify, draft = self._curves
        self._conditional = self._known.survival.conditional(rows.row_ids, max_tokens)  # [rows, max_tokens]
        reached = self._conditional.cumprod(1) * (np.arange(max_tokens) < self._room[:, None])
        self._accepted = reached.cumsum(1)  # [rows, max_tokens], of so many tokens and one more
        self._gains = len(rows) + np.concatenate([[0.0], self._accepted.sum(0)])
        self._times = verify.seconds[1 : max_tokens + 2].copy()
        # Of more tokens a forward takes no less time. Where plain steps seem slower that is noise, which would make
        # drafts look worth it.
        self._times[0] = self._times.min()
        self._times[1:] += draft.seconds[1 : max_tokens + 1]
        self._odds = np.ones(len(rows))  # that the tokens shown so far are accepted, by what was expected before

    def _catch_up_seconds(self, draft: Curve) -> float:
        """One more forward, and what each token adds: before that was seen, a quarter of a forward."""
        if self._lag <= KNOWN_LAG:
            return 0.0
        per_token = self._known.catch_up
        if per_token is None:
            per_token = 0.25 * float(draft.seconds[1]) / self._num_rows
        return float(draft.seconds[1]) + per_token * self._num_rows * self._lag

    def _was_plain_timed(self, num_rows: int) -> bool:
        """With about as many rows."""
        return any(
            1 in curve.samples and are_alike(rows, num_rows) for (rows, _), curve in self._known.verify.curves.items()
        )

    def _is_plain_old(self, best: int) -> bool:
        """Whether it is time to see again how long a plain step takes, of what the drafts since then have taken."""
        loss = self._times[0] - self._gains[0] / self._rate
        return self._since_plain >= PLAIN_IS_OLD and loss <= SHARE_OF_PLAIN * self._since_plain * self._times[best]

    def _may_probe(self, other: int, catch_up: float) -> bool:
        loss = (self._times[other] + catch_up) / self._times[0] - self._gains[other] / self._gains[0]
        return self._known.account >= max(loss, 0.0)

    # ---- while drafting

    def goes_on(self, rows: Rows, shown: Shown) -> np.ndarray:
        assert self._estimate is not None
        predicted, width = self._estimate(shown), shown.place + 1
        self._predicted.append(predicted)
        if not self._follows_estimate:
            return np.full(len(rows), width < self._asked)
        self._odds = self._odds * self._known.recalibrated(predicted) / self._conditional[:, shown.place]
        worth = self._odds @ self._accepted[:, shown.place :] - self._rate * self._times[width:]
        return np.full(len(rows), worth[1:].max() > worth[0])

    def drafted(self, draft: Draft) -> None:
        if not self._is_held:
            self._drafted = self._clock.mark()

    # ---- afterwards

    def learn(self, report: StepReport) -> StepReport:
        if report.is_prefill or self._is_held:
            return report
        end = self._clock.mark()
        draft_seconds = self._clock.seconds(self._begin, self._drafted)
        verify_seconds = self._clock.seconds(self._drafted, end)
        width = report.token_ids.shape[1]
        verify, draft = self._curves
        verify.add_warm(width, verify_seconds)
        self._known.account = min(self._known.account + SHARE, MOST)
        if width == 1:
            self._lag, self._since_plain = self._lag + 1, 0
        else:
            self._learn_draft(draft, width - 1, draft_seconds)
            usual = float(verify.seconds[width] + draft.seconds[width - 1]) + self._catch_up_seconds(draft)
            self._book(report, usual, draft_seconds + verify_seconds)
            report = with_predictions(report, self._predicted)
            self._learn_acceptance(report)
            self._lag, self._since_plain = 0, self._since_plain + 1
        return report

    def _book(self, report: StepReport, usual: float, seconds: float) -> None:
        """A step that drafted, with what it usually takes, as for plain steps: a compilation or a busy machine says
        nothing about drafts. What exploring gained counts, what it lost does not."""
        tokens = float(report.num_committed.sum())
        plain = float(self._curves[0].seconds[1 : report.token_ids.shape[1] + 1].min())
        gain = tokens / len(report.row_ids) - usual / plain
        self._known.account = min(self._known.account + (max(gain, 0.0) if self._is_explored else gain), MOST)
        if self._is_probe:
            self._plain_steps = PLAIN_STEPS if gain > 0 else min(2 * self._plain_steps, MOST_PLAIN_STEPS)
        elif self._follows_estimate:
            self._achieved = 0.95 * self._achieved + (tokens, seconds)

    def _learn_draft(self, draft: Curve, tokens: int, seconds: float) -> None:
        if self._lag <= KNOWN_LAG or seconds < draft.seconds[tokens]:  # less than was thought, and with catching up
            draft.add_warm(tokens, seconds)
        elif draft.samples:
            extra = max(seconds - float(draft.seconds[tokens] + draft.seconds[1]), 0.0) / (self._lag * self._num_rows)
            known = self._known.catch_up
            self._known.catch_up = extra if known is None else 0.5 * (known + extra)

    def _learn_acceptance(self, report: StepReport) -> None:
        asked = report.num_drafted
        if not self.sees:  # the drafter alone decides to propose less than it was asked for
            asked = np.minimum(self._asked, self._room)
        asked = np.where(report.finished, report.num_accepted, asked)
        self._known.survival.learn(report.row_ids, asked, report.num_accepted)
        if report.predicted is not None:
            is_decided, is_accepted = decided(report, report.predicted.shape[1])
            counted = is_decided & ~np.isnan(report.predicted)
            self._known.recalibrated.learn(report.predicted[counted], is_accepted[counted])


def are_alike(num_rows: int, others: int) -> bool:
    return max(num_rows, others) <= ROWS_ALIKE * min(num_rows, others)
