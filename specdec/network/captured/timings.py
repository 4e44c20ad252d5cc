"""The captured steps of a network, timed on the device by themselves: each shape once, in nobody's step."""

from __future__ import annotations

import logging

import numpy as np
import torch

from specdec.limits import MAX_STEP_WIDTH
from specdec.network.captured.graphs import Forward, Key, StepGraphs, row_bucket, serving_key, width_bucket

logger = logging.getLogger(__name__)

# A captured step is timed over a context of this share of the slots that it looks at: the slots of a bucket are a power
# of two, so a text that needs it fills between a half and all of them.
CONTEXT_SHARE = 0.75


class CapturedTimings:
    """As `specdec.network.base.Timings` describes it."""

    def __init__(self, graphs: StepGraphs, forward: Forward, num_text_slots: int):
        """forward: as `StepGraphs.replay` takes it. num_text_slots: rows that start there or later see nothing."""
        self.graphs, self.forward, self.num_text_slots = graphs, forward, num_text_slots

    @property
    def version(self) -> int:
        return self.graphs.seconds.num_changes

    def seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        return self.graphs.seconds.curve((row_bucket(num_rows), self.graphs.slots_of(used_slots)))

    def has(self, num_rows: int, width: int, used_slots: int) -> bool:
        key = self._key(num_rows, width, used_slots)
        return key in self.graphs.captured and self._is_timed(key)

    def ready_seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        shape = row_bucket(num_rows), self.graphs.slots_of(used_slots)
        found = self.graphs.seconds.ready.get(shape)
        if found is None or found[0] != len(self.graphs.captured):
            found = self.graphs.seconds.ready[shape] = len(self.graphs.captured), self._ready_seconds(*shape)
        return found[1]

    def _ready_seconds(self, rows: int, slots: int) -> np.ndarray:
        seconds = np.full(MAX_STEP_WIDTH + 1, np.inf)
        for width in range(1, MAX_STEP_WIDTH + 1):
            serving = serving_key(Key(rows, width_bucket(width), slots), self.graphs.captured)
            if serving is not None:
                seconds[width] = self.graphs.seconds.curve((serving.rows, slots))[serving.width]
        return seconds

    def measure(self, num_rows: int, width: int, used_slots: int) -> None:
        if self.has(num_rows, width, used_slots):
            return
        key = self._key(num_rows, width, used_slots)
        step = self.graphs.exact_step(self.forward, key)
        if self._is_timed(key):  # with an earlier cache
            return
        # The whole bucket computes, over texts of a length that is usual for these slots.
        context = max(min(int(CONTEXT_SHARE * key.slots), self.num_text_slots - 1, key.slots - key.width), 0)
        with self.graphs.cache.restored(key.rows, context, context + key.width):
            step.starts.fill_(context)
            step.num_starts = key.rows
            seconds = seconds_of(step.graph)
        self.graphs.seconds.add((key.rows, key.slots), key.width, seconds)
        logger.info("a step of %d rows x %d tokens over %d slots takes %.3f ms", *key[:3], 1e3 * seconds)

    def _is_timed(self, key: Key) -> bool:
        return key.width in self.graphs.seconds.timed.get((key.rows, key.slots), ())

    def _key(self, num_rows: int, width: int, used_slots: int) -> Key:
        return Key(row_bucket(num_rows), width_bucket(width), self.graphs.slots_of(used_slots))


def seconds_of(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds on the device of the second of two replays: the first one uploads the graph while the device waits."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
