"""Chooses the implementation of a kernel for a call, and makes kernels out of functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # Triton exists for Linux only; the references run everywhere
    triton = None

# What Triton raises where a GPU, or this version of it, cannot run a kernel.
KERNEL_ERRORS: tuple[type[Exception], ...] = ()
if triton is not None:
    from triton.errors import TritonError

    KERNEL_ERRORS = (TritonError,)

_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)

if triton is not None:

    class Kernel(triton.JITFunction):
        """A kernel that runs where its operands lie, whatever CUDA's current device is, and that is compiled and not
        run where it is launched within `compiling_only`."""

        def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            warmup = warmup or _compiles_only.get()
            device = _device_of(args or options.values())
            if device < 0 or device == torch.cuda.current_device():
                return super().run(*args, grid=grid, warmup=warmup, **options)
            with torch.cuda.device(device):
                return super().run(*args, grid=grid, warmup=warmup, **options)


@cache
def nvidia_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; (0, 0) of anything else. AMD's GPUs call themselves CUDA devices, too,
    with numbers of their own."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)


HOPPER, HOPPERS_SHARED_MEMORY = (9, 0), 232448  # bytes that a program may take


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take; a kernel that needs more cannot be launched."""
    if device.type != "cuda" or nvidia_capability(device) == HOPPER:
        return HOPPERS_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    # The second name is what AMD's GPUs have, and less than what can be asked for on NVIDIA's.
    names = ("shared_memory_per_block_optin", "shared_memory_per_block")
    return next((getattr(properties, name) for name in names if hasattr(properties, name)), 49152)


def _device_of(operands: Iterable[Any]) -> int:
    """The number of the GPU that the first tensor, or tensor described, among them is on; -1 without one."""
    for operand in operands:
        tensor = operand if isinstance(operand, Tensor) else getattr(operand, "base", None)
        if isinstance(tensor, Tensor):
            return tensor.get_device()
    return -1


def kernel(do_not_specialize: Sequence[str] = ()) -> Callable[[Callable], Any]:
    """`triton.jit` for what is launched. do_not_specialize: arguments of which every value takes the same code."""

    def decorate(function: Callable) -> Any:
        names = list(do_not_specialize)
        if os.environ.get("TRITON_INTERPRET") == "1":
            return triton.jit(function, do_not_specialize=names)
        return Kernel(function, do_not_specialize=names)

    return decorate


@contextmanager
def compiling_only() -> Iterator[None]:
    """Launches inside compile their kernels and do not run them."""
    token = _compiles_only.set(True)
    try:
        yield
    finally:
        _compiles_only.reset(token)


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
