"""Chooses the implementation of a kernel for a call."""

from __future__ import annotations

import os

from torch import Tensor

try:
    import triton
except ImportError:  # Triton exists for Linux only; the references run everywhere
    triton = None


def uses_triton(implementation: str, tensor: Tensor) -> bool:
    """implementation: "torch", "triton", or "auto": Triton for CUDA tensors, the torch reference elsewhere.

    Raises RuntimeError if Triton is needed and unavailable; there is no silent fallback, since a reference on a GPU
    would be slow and would not give the kernel's bits.
    """
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(f"implementation={implementation!r}; choose 'auto', 'torch' or 'triton'")
    if implementation == "torch" or (implementation == "auto" and not tensor.is_cuda):
        return False
    if triton is None:
        raise RuntimeError(f"implementation={implementation!r} on {tensor.device} needs the triton package; install it")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"implementation='triton' needs CUDA tensors, not {tensor.device}; pass 'torch'")
    return True
