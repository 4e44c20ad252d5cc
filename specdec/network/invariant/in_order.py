"""A module's own forward with its products, sums and softmax computed in a fixed order: routers, unusual norms.

Modules that mix their arithmetic with products (the routers of mixtures of experts, of which there are twenty kinds)
are not rewritten. Their forward runs as it is written, and each of torch's operations below gives way to a kernel whose
bits do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from specdec.errors import UnsupportedModelError
from specdec.kernels.linear.expert_groups import group_by_expert
from specdec.kernels.linear.expert_linear import expert_linear
from specdec.kernels.linear.in_order_linear import DTYPES, in_order_linear
from specdec.kernels.linear.norms import layer_norm, rms_norm
from specdec.kernels.linear.per_row import row_softmax, row_sum, row_top_k
from specdec.network.invariant.guard import is_own_arithmetic, own_arithmetic

# What no operation below may go over: a sum over tokens depends on how many there are.
_num_tokens: ContextVar[int | None] = ContextVar("num_tokens", default=None)


@contextmanager
def watching_for_tokens(num_tokens: int) -> Iterator[None]:
    """Within it, an operation over a dimension as long as the text is refused. num_tokens: of a probe, odd."""
    token = _num_tokens.set(num_tokens)
    try:
        yield
    finally:
        _num_tokens.reset(token)


@torch.no_grad()
def forward_in_order(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward; see above."""
    with InOrder(), own_arithmetic(False):
        return type(module).forward(module, *args, **kwargs)


class InOrder(TorchDispatchMode):
    """Computes the `in_order_operations` in order; all others run as they are, for the guard to judge."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_own_arithmetic():
            return func(*args, **kwargs)
        replacement = in_order_operations().get(func)
        if replacement is not None:
            with own_arithmetic():
                return replacement(*args, **kwargs)
        # In inference mode torch hands over whole functions (linear, softmax) that it takes apart elsewhere.
        if torch.is_inference_mode_enabled():
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return func(*args, **kwargs)


def has_order(func: Any) -> bool:
    """Whether there is a kernel in the operation's place."""
    return func in in_order_operations()


@cache
def in_order_operations() -> dict[Any, Callable]:
    aten = torch.ops.aten
    operations: dict[Any, Callable] = {
        aten.mm.default: _mm,
        aten.addmm.default: _addmm,
        aten.bmm.default: _bmm,
        aten._softmax.default: _softmax,
        aten.sum.dim_IntList: _sum,
        aten.mean.dim: _mean,
        aten.std.correction: _std,
        aten.topk.default: _topk,
        aten.native_layer_norm.default: _native_layer_norm,
    }
    if hasattr(aten, "_fused_rms_norm"):  # older versions of torch compute an RMSNorm from the others
        operations[aten._fused_rms_norm.default] = _fused_rms_norm
    return operations


def _mm(a: Tensor, b: Tensor) -> Tensor:
    _check_product(a)
    return in_order_linear(a, b.t())


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1 or bias.dim() != 1:
        raise UnsupportedModelError(
            f"a product with beta={beta}, alpha={alpha} and a bias of shape {list(bias.shape)} has no "
            "batch-invariant kernel; decode this model without batch_invariant, or in float32"
        )
    _check_product(a)
    return in_order_linear(a, b.t(), bias)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """The products of a batch are those of experts: each row of `a` goes through the weights of its own."""
    _check_product(a)
    batch, rows, _ = a.shape
    ids = torch.arange(batch, device=a.device).repeat_interleave(rows)
    groups = group_by_expert(ids, batch)
    out = expert_linear(a.reshape(batch * rows, a.shape[2]), b.transpose(1, 2), None, ids, groups)
    return out.view(batch, rows, b.shape[2])


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _last(x, dim, lambda x: row_softmax(x, torch.float32 if half_to_float else None))


def _sum(x: Tensor, dims: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    if not x.is_floating_point():
        return torch.ops.aten.sum.dim_IntList(x, dims, keepdim, dtype=dtype)  # exact in any order
    out = _last(x, _one(x, dims), lambda x: row_sum(x, dtype))
    return out if keepdim else out.squeeze(_one(x, dims))


def _mean(x: Tensor, dims: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    dim = _one(x, dims)
    out = _last(x, dim, lambda x: (row_sum(x, torch.float32) / x.shape[-1]).to(dtype or x.dtype))
    return out if keepdim else out.squeeze(dim)


def _std(x: Tensor, dims: list[int] | None, *, correction: float = 1, keepdim: bool = False) -> Tensor:
    dim = _one(x, dims)

    def std(x: Tensor) -> Tensor:
        centred = x.float() - row_sum(x, torch.float32) / x.shape[-1]
        return torch.sqrt(row_sum(centred * centred) / (x.shape[-1] - correction)).to(x.dtype)

    out = _last(x, dim, std)
    return out if keepdim else out.squeeze(dim)


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    if not largest:
        raise UnsupportedModelError("the smallest values of a row have no batch-invariant kernel")
    _check_size(x.shape[dim])
    values, indices = row_top_k(x.transpose(dim, -1), k)
    return values.transpose(dim, -1), indices.transpose(dim, -1)


def _native_layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if len(shape) != 1:
        raise UnsupportedModelError(f"a LayerNorm over {len(shape)} dimensions has no batch-invariant kernel")
    statistics = x.new_empty(0)  # of the backward pass, which there is none of
    return layer_norm(x, weight, bias, eps), statistics, statistics


def _fused_rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    if len(shape) != 1:
        raise UnsupportedModelError(f"an RMSNorm over {len(shape)} dimensions has no batch-invariant kernel")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return rms_norm(x, weight, eps, round_first=False), x.new_empty(0)


def _last(x: Tensor, dim: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The function of the last dimension, of another one."""
    _check_size(x.shape[dim])
    return function(x.transpose(dim, -1)).transpose(dim, -1)


def _one(x: Tensor, dims: list[int] | None) -> int:
    dims = list(range(x.dim())) if dims is None else dims
    if len(dims) != 1:
        raise UnsupportedModelError(
            f"a sum over dimensions {dims} of {list(x.shape)} has no batch-invariant kernel; "
            "decode this model without batch_invariant, or in float32"
        )
    return dims[0]


def _check_product(a: Tensor) -> None:
    if a.dtype not in DTYPES:
        raise UnsupportedModelError(f"a product in {a.dtype} has no batch-invariant kernel")
    _check_size(a.shape[-1])


def _check_size(size: int) -> None:
    if size == _num_tokens.get():
        raise UnsupportedModelError(
            f"an operation goes over a dimension of {size}, which is the number of tokens: its bits depend on the "
            "batch; decode this model without batch_invariant, or in float32"
        )
