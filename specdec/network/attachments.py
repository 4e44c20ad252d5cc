"""What a caller has attached to a model's modules: hooks, adapters, offloading, compiled forwards.

A model with any of them runs through its own modules: kernels that read the weights, and captured steps, would pass
the attachment by.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

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
