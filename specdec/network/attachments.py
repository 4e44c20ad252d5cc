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
