"""Finding what in a model's forward could depend on the batch: every operation that is not known to be harmless.

Element-wise operations, data movement, comparisons and integer arithmetic give each element the same bits in any
batch. Everything else that touches floating-point numbers (products, sums, softmax) may not, unless it is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdec.errors import UnsupportedModelError

# Operations on floating-point tensors that move or select elements without computing; views are known by their schema.
MOVES = frozenset(
    (
        "_to_copy", "cat", "clone", "copy", "embedding", "empty", "empty_like", "full", "full_like", "new_empty",
        "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like", "zero", "stack", "index", "index_select",
        "index_put", "_index_put_impl", "index_copy", "gather", "scatter", "masked_fill", "masked_scatter", "where",
        "repeat", "roll", "flip", "constant_pad_nd", "tril", "triu", "max", "min", "amax", "amin", "argmax", "argmin",
        "sort", "any", "all", "isnan", "isinf", "equal", "_local_scalar_dense", "detach", "lift_fresh",
        "resize", "slice_scatter", "select_scatter",
    )
)  # fmt: skip
ELEMENTWISE = frozenset({"polar"})  # those that torch does not tag as pointwise
PRODUCTS = frozenset({"mm", "bmm"})

_own: ContextVar[bool] = ContextVar("own_arithmetic", default=False)


@contextmanager
def own_arithmetic(is_own: bool = True) -> Iterator[None]:
    """What runs inside is invariant by construction: our kernels and their references. False: a module's own code."""
    token = _own.set(is_own)
    try:
        yield
    finally:
        _own.reset(token)


def is_own_arithmetic() -> bool:
    return _own.get()


class BatchDependentError(UnsupportedModelError):
    """func: the operation that may depend on the batch; module: the one whose forward runs it."""

    def __init__(self, message: str, func: Any, module: nn.Module):
        super().__init__(message)
        self.func, self.module = func, module


class InvarianceGuard(TorchDispatchMode):
    """Raises BatchDependentError at the first operation that may depend on the batch, naming its module."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.running: list[tuple[str, nn.Module]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(self._enter(name)))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        return lambda module, args: self.running.append((name, module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _own.get() and not is_harmless(func, args, kwargs):
            name, module = self.running[-1] if self.running else ("", self.model)
            raise BatchDependentError(
                f"{name or 'the model'} ({type(module).__name__}) runs {func}, whose bits may depend on the batch and "
                "which has no batch-invariant kernel; decode this model without batch_invariant, or in float32",
                func,
                module,
            )
        return func(*args, **kwargs)


def is_harmless(func: Any, args: Any, kwargs: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(tensor.is_floating_point() for tensor in tensors):
        return True
    name = func._schema.name.split("::")[1].rstrip("_")
    if torch.Tag.pointwise in func.tags or func.is_view or name in MOVES | ELEMENTWISE or name == "_unsafe_view":
        return True
    # The rotary embeddings' outer product: one factor per element, so there is nothing to order.
    return name in PRODUCTS and tensors[0].shape[-1] == 1
