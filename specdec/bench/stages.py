"""Where the time of our decoding goes: a clock around the stages of `specdec.generate`.

The clock replaces methods while it is installed and restores them, so the product needs no hooks. A stage's time
excludes the stages inside it; time outside all stages is "other".
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch

import specdec.drafters.draft_model
import specdec.engine.target
from specdec.batch.cache import RaggedCache
from specdec.batch.layout.repad import RepadCache
from specdec.bench.latency import synchronise
from specdec.bench.measure import run
from specdec.bench.methods import Method, Pair
from specdec.drafters.registry import DRAFTERS, drafter_class
from specdec.engine.target import Target

OTHER = "other"


def own_methods(name: str) -> list[tuple[Any, str]]:
    """That method of every registered drafter that defines its own."""
    classes: list[Any] = [drafter_class(drafter) for drafter in DRAFTERS]
    return [(owner, name) for owner in classes if name in vars(owner)]


# stage -> (owner, attribute) of the timed methods
STAGES: dict[str, list[tuple[Any, str]]] = {
    "set-up": [(specdec.engine.target, "build_network"), (specdec.drafters.draft_model, "build_network")],
    "target prefill": [(Target, "prefill")],
    "draft prefill": own_methods("start"),
    "draft": own_methods("propose") + own_methods("begin") + own_methods("observe"),
    "verify": [(Target, "forward")],
    "commit": [(Target, "commit")],
    "realign": [(RepadCache, "realign")],
    "move rows": [(RaggedCache, "keep_rows")],
}


class StageClock:
    """seconds: by stage, each without the stages inside it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        """Add the time since the last switch to the innermost open stage."""
        synchronise(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, stage: str, function: Callable) -> Callable:
        @wraps(function)
        def wrapper(*args, **kwargs):
            self._switch()
            self._open.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        return wrapper

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for stage, places in STAGES.items():
                for owner, name in places:
                    replacement = self.timed(stage, getattr(owner, name))
                    stack.enter_context(mock.patch.object(owner, name, replacement))
            yield


def profile(pair: Pair, method: Method, num_repeats: int) -> dict:
    """Seconds and shares by stage, over `num_repeats` runs of all prompts, and milliseconds per forward."""
    clock = StageClock(pair.target.device)
    total_seconds = 0.0
    with clock.installed():
        for _ in range(num_repeats):
            _, seconds, speculation = run(pair, method)
            total_seconds += sum(seconds)

    stages = {stage: clock.seconds[stage] for stage in STAGES}
    stages[OTHER] = total_seconds - sum(stages.values())

    assert speculation is not None
    num_steps = max(speculation.num_target_calls * num_repeats, 1)
    num_draft_calls = speculation.num_draft_calls * num_repeats

    return {
        "seconds": stages,
        "share": {stage: seconds / total_seconds for stage, seconds in stages.items()},
        "verify_ms_per_call": 1e3 * stages["verify"] / num_steps,
        "commit_ms_per_call": 1e3 * stages["commit"] / num_steps,
        "draft_ms_per_call": 1e3 * stages["draft"] / num_draft_calls if num_draft_calls else None,
        "set_up_ms_per_generate": 1e3 * stages["set-up"] * method.batch_size / (len(pair.prompts) * num_repeats),
    }
