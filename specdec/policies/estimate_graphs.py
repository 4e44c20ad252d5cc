"""An estimate of acceptance as CUDA graphs.

A policy waits for the estimate after every drafted token, and launching its dozen kernels one by one would take longer
than running them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from specdec.network.captured.graphs import capture, row_bucket

if TYPE_CHECKING:
    from specdec.draft import Shown


class Capturable(Protocol):
    """The part of an acceptance estimate that a graph needs, see `specdec/policies/estimates.py`."""

    sees: ClassVar[frozenset[str]]
    sees_place: ClassVar[bool]

    def probabilities(self, shown: Shown) -> Tensor:
        """[rows] float32."""


@dataclass
class CapturedEstimate:
    """A graph and its tensors.

    shown: the graph's inputs, overwritten before each replay.
    on_device: [rows] float32, the probabilities, overwritten by each replay. on_host: pinned, for their copy.
    """

    graph: torch.cuda.CUDAGraph
    shown: Shown
    on_device: Tensor
    on_host: Tensor

    def fill(self, shown: Shown) -> None:
        rows = len(shown.token_ids)
        self.shown.token_ids[:rows] = shown.token_ids
        self.shown.logits[:rows] = shown.logits
        if self.shown.hidden_states is not None and shown.hidden_states is not None:
            self.shown.hidden_states[:rows] = shown.hidden_states
        if isinstance(self.shown.place, Tensor):
            self.shown.place.fill_(shown.place)


class EstimateGraphs:
    """One graph per bucket of rows. The results of padding rows are never read."""

    def __init__(self) -> None:
        self.captured: dict[tuple, CapturedEstimate] = {}

    @torch.no_grad()
    def replay(self, estimate: Capturable, shown: Shown) -> Tensor:
        """`estimate.probabilities(shown)`, [rows] float32 on the host, valid until the next replay.

        estimate: the same one in every call. It is not kept here, for the reason that `StepGraphs.replay` gives.
        """
        rows, vocab_size = shown.logits.shape
        key = row_bucket(rows), vocab_size, shown.logits.dtype, shown.logits.device
        step = self.captured.get(key)
        if step is None:
            step = self.captured[key] = self._capture(estimate, room_for(estimate, shown, key[0]))
        step.fill(shown)
        step.graph.replay()
        step.on_host.copy_(step.on_device, non_blocking=True)
        torch.cuda.current_stream(step.on_device.device).synchronize()
        return step.on_host[:rows]

    def _capture(self, estimate: Capturable, shown: Shown) -> CapturedEstimate:
        graph, on_device = capture(lambda: estimate.probabilities(shown))
        on_host = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
        return CapturedEstimate(graph, shown, on_device, on_host)


def room_for(estimate: Capturable, shown: Shown, rows: int) -> Shown:
    """Zeros for this many rows, in the shapes and dtypes of what the estimate looks at."""
    hidden = shown.hidden_states if "hidden_states" in estimate.sees else None
    token_ids, logits = (given.new_zeros(rows, *given.shape[1:]) for given in (shown.token_ids, shown.logits))
    place = torch.zeros((), device=logits.device) if estimate.sees_place else shown.place
    return replace(
        shown,
        place=place,
        token_ids=token_ids,
        logits=logits,
        hidden_states=None if hidden is None else hidden.new_zeros(rows, *hidden.shape[1:]),
    )
