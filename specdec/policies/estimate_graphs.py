"""An estimate of acceptance as CUDA graphs: a policy waits for it behind every drafted token, and launching a dozen
kernels one by one would take longer than they do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.network.invariant.graphs import capture, row_bucket

if TYPE_CHECKING:
    from specdec.draft import Shown
    from specdec.policies.estimates import Estimate


@dataclass
class CapturedEstimate:
    """shown: to be filled. on_device: the probabilities, overwritten by each replay; on_host: pinned, for a copy."""

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
    """One graph per bucket of rows; those that pad it compute something that nobody reads."""

    def __init__(self) -> None:
        self.captured: dict[tuple, CapturedEstimate] = {}

    @torch.no_grad()
    def replay(self, estimate: Estimate, shown: Shown) -> Tensor:
        """What `estimate` makes of `shown`, [rows] float32 on the host, valid until the next replay.

        estimate: always the same; not kept, for the reason that `StepGraphs.replay` gives.
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

    def _capture(self, estimate: Estimate, shown: Shown) -> CapturedEstimate:
        graph, on_device = capture(lambda: estimate.probabilities(shown))
        on_host = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
        return CapturedEstimate(graph, shown, on_device, on_host)


def room_for(estimate: Estimate, shown: Shown, rows: int) -> Shown:
    """Tensors like those that it sees of what is shown, for more rows."""
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
