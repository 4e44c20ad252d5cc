"""What the cost model keeps of a target and a drafter between `generate` calls."""

from __future__ import annotations

from collections.abc import Hashable
from weakref import ref

import torch
from transformers import PreTrainedModel

from specdec.drafter import Drafter
from specdec.kept import kept_with
from specdec.policies.cost_model.forecast import StepCosts
from specdec.policies.costs import MAX_TOKENS, CostTable, Curve, Recalibrated, Survival
from specdec.policies.estimates import AcceptanceEstimate

# Tokens that every draft feeds to the drafter's network anyway: the newest one, and the last draft token of a draft
# that was accepted in full. A drafter that has missed no more than these has nothing to catch up on.
TOKENS_FED_ANYWAY = 2
# The share of a draft forward that one missed token of one row is taken to cost before catching up was seen. A guess on
# the high side: a trial that seems too expensive comes later, one that is too expensive loses time.
UNSEEN_CATCH_UP = 0.25


class LossBudget:
    """How much time drafts may still lose against plain decoding, in plain steps.

    Each step adds a little, each draft adds what it gained or takes what it lost. A draft that is expected to lose must
    fit into the budget; drafts that are expected to gain go on until it is down to LOWEST.
    """

    PER_STEP = 0.005  # the loss that each step allows: half a percent, as a drafter that never gains may cost
    AT_START = 1.0  # a new pair's: enough to try a draft or two
    LOWEST = -2.0  # some bad luck is no reason to stop drafts that are expected to gain
    HIGHEST = 16.0  # what drafts have gained long ago must not let them lose for long
    MOST_CARRIED = 6.0  # from earlier calls: a few unlucky drafts at the beginning of a text do not end drafting

    def __init__(self) -> None:
        self.steps = self.AT_START

    def begin_call(self) -> None:
        """A call inherits gains, up to a limit, and no losses."""
        self.steps = min(max(self.steps, self.AT_START), self.MOST_CARRIED)

    def add_step(self) -> None:
        self.steps = min(self.steps + self.PER_STEP, self.HIGHEST)

    def add_gain(self, gain: float) -> None:
        """gain: of one draft, in plain steps; below 0 if it lost."""
        self.steps = min(self.steps + gain, self.HIGHEST)


class Knowledge:
    """What has been learned about a target with a drafter; it outlives the `generate` call.

    catch_up: seconds that a drafter's network takes per row and missed token (of steps that drafted nothing), in
        addition to one more forward; None until that was seen.
    num_explored: how many widths of `planning.EXPLORED` have been asked for.
    """

    def __init__(self) -> None:
        self.verify = CostTable(lambda tokens: 0.95 + 0.05 * tokens)
        self.draft = CostTable(lambda tokens: 0.05 + 0.1 * tokens)
        self.survival = Survival(MAX_TOKENS)
        self.recalibrated = Recalibrated()
        self.catch_up: float | None = None
        self.num_explored = 0
        self.budget = LossBudget()

    def begin_call(self) -> None:
        self.survival.forget_rows()
        self.budget.begin_call()

    def costs(self, num_rows: int, context: int) -> StepCosts:
        """context: tokens of the longest row."""
        return StepCosts(self.verify.curve(num_rows, context), self.draft.curve(num_rows, context))

    def catch_up_seconds(self, draft: Curve, num_rows: int, num_missed: int) -> float:
        """Seconds that the next draft takes longer because the drafter has missed this many tokens of each row."""
        if num_missed <= TOKENS_FED_ANYWAY:
            return 0.0

        one_forward = float(draft.seconds[1])
        per_token = UNSEEN_CATCH_UP * one_forward / num_rows if self.catch_up is None else self.catch_up
        return one_forward + per_token * num_rows * num_missed

    def learn_draft(self, draft: Curve, num_rows: int, num_missed: int, num_drafted: int, seconds: float) -> None:
        """Learn from the time of one draft of `num_drafted` tokens, before which `num_missed` had been missed."""
        # A draft that took less than expected although it had to catch up shows that the expectation was too high.
        if num_missed <= TOKENS_FED_ANYWAY or seconds < draft.seconds[num_drafted]:
            draft.add_warm(num_drafted, seconds)
        elif draft.samples:
            usual = float(draft.seconds[num_drafted] + draft.seconds[1])
            per_token = max(seconds - usual, 0.0) / (num_missed * num_rows)
            self.catch_up = per_token if self.catch_up is None else 0.5 * (self.catch_up + per_token)


def knowledge_of(target: PreTrainedModel, drafter: Drafter, estimate: AcceptanceEstimate | None = None) -> Knowledge:
    """The pair's knowledge, kept as long as the target lives.

    Each kind of estimate has its own: it errs in its own way and takes its own time.
    """
    return kept_with(target, (Knowledge, key_of(target, drafter), type(estimate)), Knowledge)


def key_of(target: PreTrainedModel, drafter: Drafter) -> Hashable:
    """Equal for drafters with which the same was learned."""
    model = drafter.kv_model if drafter.model is None else drafter.model
    drafting = type(drafter), drafter.name, None if model is None else ref(model)
    layout = None if drafter.context is None else drafter.context.layout.name
    return drafting, target.device, target.dtype, layout, torch.get_num_threads()
