"""How transformers passes a cache into and out of a model: `past_key_values` until 5.23, `cache` since 5.24."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

OLD = "past_key_values"
NAME = "cache" if any(field.name == "cache" for field in dataclasses.fields(CausalLMOutputWithPast)) else OLD


def cache_argument(model: PreTrainedModel, cache: Cache | None) -> dict[str, Cache | None]:
    """`cache` under the name that the model's forward uses; a model's custom code may keep the old name."""
    return {OLD if OLD in inspect.signature(type(model).forward).parameters else NAME: cache}


def returned_cache(output: Any) -> Cache:
    """The cache in a model's output."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
