"""How transformers passes a cache into and out of a model: `past_key_values` until 5.23, `cache` since 5.24."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Cache, PreTrainedModel


def cache_argument(model: PreTrainedModel, cache: Cache | None) -> dict[str, Cache | None]:
    """`cache` under the name that the model's forward gives it."""
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    return {name: cache}


def returned_cache(output: Any) -> Cache:
    """The cache that a model's output holds."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
