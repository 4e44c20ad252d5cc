"""Caches and captured steps that stay allocated from one generation to the next, and how they are given back.

A generation takes its model's forward out of here and puts it back when it ends, so that a forward serves one
generation at a time. One is kept per model and kind of network, the last used.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel


class Keepable(Protocol):
    """nbytes: of the cache and of the captured steps' own memory."""

    @property
    def nbytes(self) -> int: ...

    def serves(self, model: PreTrainedModel, max_rows: int, num_slots: int) -> bool:
        """Whether it is large enough and of the same weights."""


Forward = TypeVar("Forward", bound=Keepable)

_kept: WeakKeyDictionary[PreTrainedModel, dict[type, Keepable]] = WeakKeyDictionary()


@contextmanager
def kept_forward(
    model: PreTrainedModel, kind: type, max_rows: int, num_slots: int, make: Callable[[], Forward]
) -> Iterator[Forward]:
    """The forward of an earlier generation if it is free, large enough and of the same weights; else what `make` makes.

    kind: the network that runs it. Its cache stays allocated, as transformers' static cache does.
    """
    kept = _kept.get(model, {}).pop(kind, None)
    if kept is None or not kept.serves(model, max_rows, num_slots):
        del kept  # before the new one takes memory
        with torch.inference_mode(False):  # later calls may be outside of the caller's inference mode
            kept = make()
    yield kept  # type: ignore[misc]
    # Not after an exception: a step may have been interrupted half-way.
    _kept.setdefault(model, {})[kind] = kept


def kept_of(model: PreTrainedModel, kind: type) -> Keepable | None:
    return _kept.get(model, {}).get(kind)


def kept_bytes() -> int:
    """Bytes that all kept forwards hold at present, those of running generations not counted."""
    return sum(forward.nbytes for of_model in _kept.values() for forward in of_model.values())


def release(model: PreTrainedModel | None = None) -> int:
    """Give back the memory that earlier generations left allocated for later ones: caches and captured steps.

    model: of one model, or of all. The next generation allocates and captures anew. What a generation that is running
    uses stays. Returns the number of bytes given back.
    """
    before = kept_bytes()
    if model is None:
        _kept.clear()
    else:
        _kept.pop(model, None)
    freed = before - kept_bytes()
    give_back()
    return freed


def release_others(*models: PreTrainedModel | None) -> bool:
    """Give back what is kept for any model but these. Returns whether there was anything."""
    others = [model for model in list(_kept) if _kept[model] and all(model is not one for one in models)]
    for model in others:
        del _kept[model]
    if others:
        give_back()
    return bool(others)


def give_back() -> None:
    """Return what nothing refers to any more to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
