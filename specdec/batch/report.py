"""One step as the host sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class StepReport:
    """One step, read in a single copy.

    row_ids: [rows] int64, the index of each row in the caller's batch.
    num_committed, num_accepted, num_drafted: [rows] int64.
    finished: [rows] bool. fault: [rows] int64, 0 if all is well, see `verify/verification.py`.
    token_ids: [rows, k + 1] int64, `NO_TOKEN` after the committed ones.
    is_prefill: the tokens come from the prefill, not from a verify forward.
    predicted: [rows, places] float64, the length policy's predicted acceptance of drafted tokens, if all before them
    are accepted; NaN where it predicted nothing. None if it makes no predictions.
    """

    row_ids: np.ndarray
    num_committed: np.ndarray
    num_accepted: np.ndarray
    num_drafted: np.ndarray
    finished: np.ndarray
    fault: np.ndarray
    token_ids: np.ndarray
    is_prefill: bool = False
    predicted: np.ndarray | None = None


def decided(report: StepReport, num_places: int) -> tuple[np.ndarray, np.ndarray]:
    """Which drafted tokens the target decided (all before them were accepted), and which it accepted.

    [rows, places] bool each. Tokens past the end of a row were not decided. A row that ends with the target's own token
    rejected the draft at that place.
    """
    place = np.arange(num_places)
    accepted = place < report.num_accepted[:, None]
    first_rejected = (place == report.num_accepted[:, None]) & ~ended_in_draft(report)[:, None]
    return (accepted | first_rejected) & (place < report.num_drafted[:, None]), accepted


def ended_in_draft(report: StepReport) -> np.ndarray:
    """[rows] bool: rows whose last committed token was drafted; nothing was decided about the tokens after it."""
    ended: np.ndarray = report.num_committed == report.num_accepted
    return ended


def on_its_way(values: Tensor) -> Callable[[], np.ndarray]:
    """Start copying a tensor to the host; call the returned function to wait for the copy.

    Later launches do not delay it.
    """
    if not values.is_cuda:
        return values.cpu().numpy
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    has_arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    has_arrived.record(torch.cuda.current_stream(values.device))

    def arrive() -> np.ndarray:
        has_arrived.synchronize()
        return host.numpy().copy()  # pinned memory is reused for the next step

    return arrive
