"""The experts of a mixture, batch-invariant: for every module that transformers' experts interface serves.

Such a module holds the weights of all experts in one tensor per projection and says in which layout
(`transformers.integrations.moe.use_experts_implementation`): Qwen3-MoE, Mixtral, OLMoE, DeepSeek, gpt-oss and others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from specdec.errors import UnsupportedModelError
from specdec.kernels.linear.expert_groups import group_by_expert
from specdec.kernels.linear.expert_linear import add_experts, expert_linear
from specdec.kernels.linear.per_row import of_each_row
from specdec.network.invariant.activations import GATED
from specdec.network.invariant.guard import own_arithmetic

LAYOUT = ("has_gate", "has_bias", "is_transposed", "num_experts")


def is_experts(module: Any) -> bool:
    return all(hasattr(module, name) for name in LAYOUT) and hasattr(module, "down_proj")


def has_experts(model: nn.Module) -> bool:
    """Whether it is a mixture: in half precision its logits depend on near-ties, where rounding chooses the expert."""
    return any(type(module).__name__.endswith("Experts") for module in model.modules())


def check_experts(name: str, module: Any) -> None:
    """Raise UnsupportedModelError unless the weights are plain and all experts are here."""
    up = getattr(module, up_name(module), None)
    for key, weight in ((up_name(module), up), ("down_proj", module.down_proj)):
        if type(weight) is not nn.Parameter or weight.dim() != 3:
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) keeps {key} as {type(weight).__name__}, not as a plain tensor of "
                "all experts (quantised?); it has no batch-invariant kernel"
            )
        if len(weight) != module.num_experts:
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) holds {len(weight)} of {module.num_experts} experts; "
                "batch_invariant needs the model on one device"
            )


@torch.no_grad()
def check_agreement(name: str, module: Any) -> None:
    """Raise UnsupportedModelError if the module computes something else, on random rows and experts."""
    generator = torch.Generator().manual_seed(0)
    weight, _ = projection(module, up_name(module))
    tokens, k = 5, min(2, module.num_experts)
    x = torch.randn(tokens, weight.shape[2], generator=generator).to(weight)
    scores = torch.rand(tokens, module.num_experts, generator=generator)
    weights, indices = (tensor.to(weight.device) for tensor in scores.topk(k, -1))
    expected = type(module).forward(module, x, indices, weights.to(weight.dtype)).float()
    found = experts_forward(module, x, indices, weights.to(weight.dtype)).float()
    difference = (found - expected).square().mean().sqrt()
    limit = (1e-4 if weight.dtype == torch.float32 else 0.03) * expected.square().mean().sqrt()
    if not difference <= limit:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) computes something else than the kernels of its experts "
            f"(difference {difference:.1e}, limit {limit:.1e}); it cannot be made batch-invariant"
        )


@torch.no_grad()
def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor | None = None,
    top_k_weights: Tensor | None = None,
    *,
    router_indices: Tensor | None = None,
    routing_weights: Tensor | None = None,
) -> Tensor:
    """[tokens, hidden] -> the same. top_k_index: [tokens, k] int64, top_k_weights: [tokens, k], the routers' own.

    Some families call the last two `router_indices` and `routing_weights`. Each product is rounded to the dtype, and
    the experts of a token are added in float32 by rank, as transformers' "grouped_mm" does it.
    """
    indices = router_indices if top_k_index is None else top_k_index
    weights = routing_weights if top_k_weights is None else top_k_weights
    assert indices is not None and weights is not None
    pairs = indices.reshape(-1).long()
    with own_arithmetic():
        groups = group_by_expert(pairs, module.num_experts)
        up = expert_linear(hidden_states, *projection(module, up_name(module)), pairs, groups)
    active = activate(module, up)
    with own_arithmetic():
        down = expert_linear(active, *projection(module, "down_proj"), pairs, groups)
    if getattr(module, "has_post_expert_norm", False):
        down = module.post_expert_norm(down)
    with own_arithmetic():
        return add_experts(down, weights)


def activate(module: Any, up: Tensor) -> Tensor:
    """[pairs, 2 * inner] or [pairs, inner] -> [pairs, inner], by the module's own function: the guard looks at it."""
    if not module.has_gate:
        function = module.act_fn
    elif type(module)._apply_gate is moe._default_apply_gate and type(module.act_fn) in GATED:
        function = GATED[type(module.act_fn)]
    else:
        function = module._apply_gate
    # On a CPU the bits of a vectorised function depend on where in the batch a row lies.
    return function(up) if up.is_cuda else of_each_row(function, up)


def up_name(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def projection(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """The weights as [experts, out, in], read in place, and the biases."""
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    return weight.transpose(1, 2) if module.is_transposed else weight, bias
