"""How far a long run has come, and how long it has taken."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

OnProgress = Callable[[str, int], None]  # stage ("plain", "speculative" or "judging"), prompts done since the last call


def tell(on_progress: OnProgress | None, stage: str, num_done: int) -> None:
    """Report `num_done` more prompts of a stage, if anybody asked."""
    if on_progress is not None:
        on_progress(stage, num_done)


def now(model: PreTrainedModel) -> float:
    """Seconds on a clock, read once the device has finished its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
