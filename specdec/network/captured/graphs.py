"""Decode steps as CUDA graphs: captured once per shape, replayed by one launch.

A graph fixes shapes and addresses, so rows, width and the slots that attention looks at are rounded up to buckets and
the inputs are copied into place. A bucket that is seldom asked for is served by a larger one. Rows and columns that pad
a bucket compute something that nobody reads; their keys go to slots after the texts, and no other row's bits depend on
them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from specdec.batch.cache import RaggedCache
from specdec.kernels.compile_ahead import wait_for_background
from specdec.limits import MAX_STEP_WIDTH
from specdec.network.base import NetworkOutput
from specdec.network.captured.seconds import TOKEN_SHARE, StepSeconds

ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
ROWS_BEYOND = 32  # larger batches are rounded up to a multiple of it
WIDTH_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, MAX_STEP_WIDTH)
FEWEST_SLOTS = 1024
SLOTS_ROUNDING = 256  # of caches that are kept, so that a slightly longer text finds room
# A capture takes a model of 8 billion parameters on an H200 as long as reading its weights this many times. Larger
# steps serve in place of one that was not captured until they have wasted as much.
WORTH_A_CAPTURE, LEAST_WASTE = 8.0, 0.25

logger = logging.getLogger(__name__)

Output = TypeVar("Output")
Forward = Callable[[Tensor, Tensor, int, tuple[int, ...]], NetworkOutput]


class Key(NamedTuple):
    """The bucket of a step."""

    rows: int
    width: int
    slots: int
    layers: tuple[int, ...] = ()


@dataclass
class CapturedStep:
    """token_ids: [rows, width] int64 and starts: [rows] int64, to be filled; output: overwritten by each replay.

    num_starts: how many of the starts may lie in a text; the others are those of padding.
    """

    graph: torch.cuda.CUDAGraph
    token_ids: Tensor
    starts: Tensor
    output: NetworkOutput
    num_starts: int = 0


class StepGraphs:
    """The graphs of one network over one cache; they share one pool of memory.

    seconds: what those that were timed take on the device (`timings.py`).
    """

    def __init__(self, cache: RaggedCache, seconds: StepSeconds | None = None):
        """cache: its last MAX_STEP_WIDTH slots hold no text. seconds: what is known of steps over an earlier cache."""
        self.cache = cache
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[Key, CapturedStep] = {}
        self.wasted: dict[Key, float] = {}  # by larger steps that served in place of each
        self.seconds = StepSeconds() if seconds is None else seconds.taken_over()
        self.nbytes = 0  # of device memory that the captures have taken

    def replay(
        self, forward: Forward, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...]
    ) -> NetworkOutput:
        """As `Network.forward`. The result is valid until the next replay of the same shape.

        forward: (token_ids, starts, used_slots, layers) of the cache's first rows, free of synchronisation; always
            the same. It is not kept, since it owns these graphs: a cycle would be freed at any time, within a capture
            too, which that would break.
        """
        rows, width = token_ids.shape
        step = self.step_of(forward, rows, width, used_slots, layers)
        step.token_ids[:rows, :width] = token_ids
        step.starts[:rows] = starts
        if rows < step.num_starts:
            step.starts[rows : step.num_starts] = self.cache.num_slots - MAX_STEP_WIDTH
        step.num_starts = rows
        step.graph.replay()
        logits, states, _ = step.output
        return NetworkOutput(logits[:rows, :width], tuple(state[:rows, :width] for state in states))

    def step_of(
        self, forward: Forward, rows: int, width: int, used_slots: int, layers: tuple[int, ...] = ()
    ) -> CapturedStep:
        """The step that serves this shape. forward: as in `replay`."""
        key = Key(row_bucket(rows), width_bucket(width), self.slots_of(used_slots), layers)
        step = self.captured.get(key)
        if step is not None:
            return step
        serving = serving_key(key, self.captured)
        if serving is not None:
            self.wasted[key] = self.wasted.get(key, 0.0) + waste(key, serving)
            if self.wasted[key] < WORTH_A_CAPTURE:
                return self.captured[serving]
        return self.exact_step(forward, key)

    def exact_step(self, forward: Forward, key: Key) -> CapturedStep:
        """The step of this bucket and no larger one, captured if it was not yet."""
        return self.captured.get(key) or self._capture(forward, *key)

    def slots_of(self, used_slots: int) -> int:
        """The slots that a captured step looks at."""
        return min(slot_bucket(used_slots), self.cache.num_slots)

    def _capture(self, forward: Forward, rows: int, width: int, slots: int, layers: tuple[int, ...]) -> CapturedStep:
        shape = f"{rows} rows x {width} tokens over {slots} slots"
        logger.info("capturing step %d: %s; new kernels are compiled first", len(self.captured) + 1, shape)
        begin = time.perf_counter()
        reserved = reserved_bytes(self.cache.device)
        with outliving_inference_mode():
            token_ids = torch.zeros(rows, width, dtype=torch.long, device=self.cache.device)
            # The last slots of every row lie after any text, so trying the step out leaves no trace.
            beyond = self.cache.num_slots - MAX_STEP_WIDTH
            starts = torch.full((rows,), beyond, dtype=torch.long, device=self.cache.device)
            graph, output = capture(lambda: forward(token_ids, starts, slots, layers), self.pool)
        self.nbytes += max(reserved_bytes(self.cache.device) - reserved, 0)
        self.seconds.num_changes += 1
        step = self.captured[Key(rows, width, slots, layers)] = CapturedStep(graph, token_ids, starts, output)
        logger.info("captured in %.1f s", time.perf_counter() - begin)
        return step


_refuses_syncs: ContextVar[bool] = ContextVar("refuses_syncs", default=False)


@contextmanager
def syncs_refused() -> Iterator[None]:
    """Captures inside raise RuntimeError, before they begin, if the call waits for the device."""
    token = _refuses_syncs.set(True)
    try:
        yield
    finally:
        _refuses_syncs.reset(token)


@contextmanager
def _sync_errors() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def outliving_inference_mode() -> Iterator[None]:
    """What is made inside can be written to later, within inference mode and outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def capture(call: Callable[[], Output], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Output]:
    """The call as a graph, in that pool of memory, and its result, which each replay overwrites."""
    wait_for_background()  # whose allocations would break the capture
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles what is not compiled yet
        if _refuses_syncs.get():
            with _sync_errors():
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = call()
    return graph, output


def serving_key(key: Key, captured: Iterable[Key]) -> Key | None:
    """The smallest captured step that can serve in place of this one, the same if it was captured; None if none can.

    Rows leave and texts end, so most shapes are asked for a few times only, and capturing each would take longer than
    computing what a larger one does in vain.
    """
    able = [other for other in captured if other.rows >= key.rows and other.width >= key.width and other[2:] == key[2:]]
    return min(able, key=lambda other: other.rows * other.width, default=None)


def waste(key: Key, serving: Key) -> float:
    """What the larger step computes in vain, in times of reading the weights; at least so much that a shape that is
    asked for often is captured soon."""
    return LEAST_WASTE + TOKEN_SHARE * (serving.rows * serving.width - key.rows * key.width)


@cache
def row_bucket(rows: int) -> int:
    """
    >>> [row_bucket(rows) for rows in (1, 5, 33, 65)]
    [1, 8, 48, 96]
    """
    return next((bucket for bucket in ROW_BUCKETS if bucket >= rows), -(-rows // ROWS_BEYOND) * ROWS_BEYOND)


@cache
def width_bucket(width: int) -> int:
    """
    >>> [width_bucket(width) for width in (1, 6, 10)]
    [1, 6, 12]
    """
    return next(bucket for bucket in WIDTH_BUCKETS if bucket >= width)


def slot_bucket(used_slots: int) -> int:
    """A power of two: a text that grows meets few of them.

    >>> [slot_bucket(slots) for slots in (7, 1024, 1025)]
    [1024, 1024, 2048]
    """
    return max(FEWEST_SLOTS, 1 << (used_slots - 1).bit_length())


def reserved_bytes(device: torch.device) -> int:
    """What torch holds of the device's memory."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def rounded_up(num_slots: int) -> int:
    """
    >>> rounded_up(257)
    512
    """
    return -(-num_slots // SLOTS_ROUNDING) * SLOTS_ROUNDING


def addresses(model: nn.Module) -> list[int]:
    """Where the weights lie: captured steps read them there."""
    modules = model.modules()
    # `parameters()` walks three times as long, to name them and to leave out those that are shared.
    return [weight.data_ptr() for module in modules for weight in module._parameters.values() if weight is not None]
