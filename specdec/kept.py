"""Things that are made once for a model and kept as long as it lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Made = TypeVar("Made")

_kept: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[Any, Any]]] = WeakKeyDictionary()


def kept_with(model: nn.Module, key: Hashable, make: Callable[[], Made], state: object = None) -> Made:
    """What `make` returned for this model and key, from the first call or from this one.

    key: what is made, and all that several of its kind, kept next to each other, depend on. state: what one of them was
    made from; once it differs, `make` is called again and the old one is let go. An error of `make` keeps nothing.
    What is made must not refer to the model, or neither would ever be freed.
    """
    of_model = _kept.setdefault(model, {})
    if key in of_model:
        made_from, made = of_model[key]
        if made_from == state:
            return made

    made = make()
    of_model[key] = state, made
    return made
