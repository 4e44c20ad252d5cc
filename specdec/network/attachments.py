"""What a caller has attached to a model's modules, or put in their place: hooks, adapters, offloading, compiled
forwards, quantised weights.

A model with any of them runs through its own modules: kernels that read the weights, and captured steps, would pass
the attachment by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.errors import UnsupportedModelError
from specdec.network.invariant.swap import is_invariant_forward
from specdec.network.known_classes import HOOKS


def state_of(model: PreTrainedModel) -> tuple:
    """Differs as soon as a module, a hook, a forward, a weight's place or kind, or the config is another one.

    It is asked in every call, so it walks over the modules by itself: torch's own walk also makes up their names.
    """
    found: list[object] = [tuple(len(getattr(torch.nn.modules.module, f"_global{hooks}")) for hooks in HOOKS)]
    left, seen = [model], {id(model)}
    while left:
        module = left.pop()
        own = module.__dict__
        found.append((id(module), id(own.get("forward")), module._compiled_call_impl is None, type(module).forward))
        found += [hooks for hooks in HOOKS if own[hooks]]
        found += [(id(w), w.dtype, w.device) for w in own["_parameters"].values() if w is not None]
        children = [child for child in own["_modules"].values() if child is not None and id(child) not in seen]
        seen.update(map(id, children))
        left += children
    return model.config.to_json_string(use_diff=False), model.config._attn_implementation, *found


def attachment(model: PreTrainedModel) -> str:
    """The first thing that is attached, in words; empty if there is none. The swapped kernels do not count."""
    if any(getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in HOOKS):
        return "hooks are registered for all modules"
    for name, module in model.named_modules():
        found = _attached_to(module)
        if found:
            return f"{name or 'the model'} ({type(module).__name__}) {found}"
    return ""


def _attached_to(module: nn.Module) -> str:
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "has hooks"
    if type(module).__module__.startswith("peft.") or getattr(module, "_hf_peft_config_loaded", False):
        return "is adapted by PEFT"
    if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
        return "is compiled"
    if hasattr(module, "_hf_hook"):
        return "is offloaded or spread over devices by accelerate"
    forward = module.__dict__.get("forward")
    if forward is not None and not is_invariant_forward(forward):
        return "has a replaced forward"
    if hasattr(module, "parametrizations"):
        return "is parametrised"
    return ""


@contextmanager
def dequantised(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, modules multiply what they are given, not a rounded copy of it, by the dequantised weights.

    Rounding to 8 bits turns the last bit of an input into a step of 1/127. Two forwards of a trained model that order
    their sums differently then differ as much as two that use different masks (SmolLM2 with torchao's int8: 0.4 of the
    logits' spread, cached or not), so that a comparison of rounded products says nothing about either.
    """
    replaced = [module for module in model.modules() if _is_quantised(module) and "forward" not in module.__dict__]
    try:
        for module in replaced:
            module.forward = partial(_multiply, module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _is_quantised(module: nn.Module) -> bool:
    """Whether `_weight` knows how to dequantise this module's weight."""
    weight = getattr(module, "weight", None)
    is_linear = isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not is_4_bit(module)
    return is_linear and type(weight).__module__.startswith(("bitsandbytes.", "torchao.", "optimum.quanto."))


def is_4_bit(module: nn.Module) -> bool:
    """Whether bitsandbytes holds its weight in 4 bits. It multiplies in bfloat16 or float16, whatever it is given: in
    its `compute_dtype`, and on a CPU that has such instructions always in bfloat16 (0.50.2)."""
    return type(module).__module__.startswith("bitsandbytes.") and hasattr(module, "compute_dtype")


def rounds_inputs(model: PreTrainedModel) -> str:
    """The name of the first module that rounds each token's inputs to 8 bits; empty if there is none."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_int8 = type(weight).__module__.startswith("bitsandbytes.") and not is_4_bit(module)
        if is_int8 or getattr(weight, "act_quant_kwargs", None) is not None:
            return f"{name} ({type(module).__name__} of {type(weight).__name__})"
    return ""


def _multiply(module: Any, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return nn.functional.linear(x, _weight(module).to(x.dtype), bias)


def _weight(module: Any) -> Tensor:
    """[out, in], of a module of bitsandbytes, torchao or quanto."""
    weight = module.weight
    if not type(weight).__module__.startswith("bitsandbytes."):
        plain: Tensor = weight.dequantize()
        return plain
    is_new = getattr(weight, "SCB", None) is not None  # the first forward moves codes and scales to the state
    codes, scales = (weight.data, weight.SCB) if is_new else (module.state.CB, module.state.SCB)
    rescaled: Tensor = codes.float() * (scales.float() / 127)[:, None]
    return rescaled


def check_tokens_apart(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for modules that scale all tokens of a call together before they round them: what
    becomes of a token then depends on the drafts and on the rows beside it."""
    for name, module in model.named_modules():
        if _scales_together(module):
            raise UnsupportedModelError(
                f"{name} ({type(module).__module__}.{type(module).__name__}) rounds all tokens of a call by one scale, "
                "so that a token's logits depend on the drafts and rows beside it; quantise per token (torchao's "
                "Int8DynamicActivationInt8WeightConfig, or PerRow()), or the weights alone"
            )


def _scales_together(module: nn.Module) -> bool:
    if type(module).__module__.startswith("torch.ao.nn") and "quantized.dynamic" in type(module).__module__:
        packed = getattr(module, "_packed_params", None)
        return getattr(packed, "dtype", torch.qint8) == torch.qint8  # in float16 only the weights are rounded
    activation = getattr(getattr(module, "weight", None), "act_quant_kwargs", None)  # of torchao's tensors
    return type(getattr(activation, "granularity", None)).__name__ == "PerTensor"
