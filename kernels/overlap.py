"""Overlapping launches (programmatic dependent launch, Hopper and later).

A kernel's programs may start while the previous kernel is still running; they wait for it before they read its results.
Without overlap, every launch costs an idle microsecond or two, which is a sixth of a decode step of an 8B model and a
third of a 0.6B draft's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.dispatch import nvidia_capability, triton

if triton is not None:
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def overlap_options(tensor: Tensor) -> dict[str, Any]:
    """Launch options of a kernel that calls `wait_for_previous_kernel(OVERLAP)` before it reads or writes memory."""
    return {"OVERLAP": True, "launch_pdl": True} if _can_overlap(tensor.device) else {"OVERLAP": False}


@cache
def _can_overlap(device: torch.device) -> bool:
    return nvidia_capability(device) >= (9, 0)


if triton is not None:

    @triton.jit
    def wait_for_previous_kernel(OVERLAP: tl.constexpr):
        """Lets the next kernel start, and returns when the previous one has finished and its results can be read."""
        if OVERLAP:
            gdc_launch_dependents()
            gdc_wait()
