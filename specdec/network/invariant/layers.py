"""What the short forward of a batch-invariant model is made of.

Two kinds of layers: those that normalise what attention and MLP take (llama- and gemma-type: nine launches), and those
that normalise what they add, too (gemma2 and gemma3: eleven). Everything else by which the families differ is a
property of one part and read from the model's own: how its norms round, its gated activation or mixture of experts, a
window, a rotation, soft-caps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.kernels.attention.ragged_attention import ragged_attention
from specdec.kernels.attention.rotary_write import HeadNorm, rotary_write
from specdec.kernels.linear.in_order_linear import in_order_linears
from specdec.kernels.linear.norms import add_rms_norm, rms_norm
from specdec.network.invariant.activations import GATED
from specdec.network.invariant.experts import experts_forward, is_experts
from specdec.network.invariant.in_order import forward_in_order
from specdec.network.invariant.step import Step
from specdec.network.invariant.swap import rms_norm_arithmetic
from specdec.network.known_classes import FAMILIES, SANDWICH_NORMS, windows


class Rotation(NamedTuple):
    """cos, sin: [positions, head_dim], in the model's dtype."""

    cos: Tensor
    sin: Tensor


class AttentionOptions(NamedTuple):
    """What a layer's attention does apart from its weights. window, softcap: None where there is none."""

    window: int | None
    rotation: Rotation
    softcap: float | None


class Layer:
    """Normalised input to attention and MLP, as in llama."""

    def __init__(self, layer: Any, options: AttentionOptions):
        block = layer.self_attn
        self.options, self.window, self.scaling = options, options.window, block.scaling
        self.qkv = SharedInput(block.q_proj, block.k_proj, block.v_proj)
        self.out = SharedInput(block.o_proj)
        self.feed_forward = (
            Mixture(layer.mlp) if is_experts(getattr(layer.mlp, "experts", None)) else GatedMLP(layer.mlp)
        )
        self.attention_norm, self.mlp_norm = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.head_norm: HeadNorm | None = None
        if hasattr(block, "q_norm"):
            self.head_norm = HeadNorm(block.q_norm.weight, block.k_norm.weight, *rms_norm_arithmetic(block.q_norm))

    def __call__(self, hidden: Tensor, added: Tensor | None, keys: Tensor, values: Tensor, step: Step):
        """[rows, width, hidden] -> the residual stream without, and apart from it, what this layer's MLP adds."""
        normed, hidden = self.attention_norm.of_sum(hidden, added)
        normed, hidden = self.mlp_norm.of_sum(hidden, self.attention(normed, keys, values, step))
        return hidden, self.mlp(normed)

    def attention(self, normed: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        query = rotary_write(
            self.qkv(normed), step.starts, *self.options.rotation, keys, values, self.head_norm, step.places
        )
        used_keys, used_values = (x[:, : step.used_slots].transpose(1, 2) for x in (keys, values))
        attended = ragged_attention(
            query.transpose(1, 2),
            used_keys,
            used_values,
            step.spans[self.window],
            self.scaling,
            self.options.softcap,
            tree=step.trees.get(self.window),
        )
        return self.out(attended.flatten(2))

    def mlp(self, normed: Tensor) -> Tensor:
        return self.feed_forward(normed)


class SandwichLayer(Layer):
    """Normalised output of attention and MLP too, as in gemma2."""

    def __init__(self, layer: Any, options: AttentionOptions):
        super().__init__(layer, options)
        self.attention_norm, self.mlp_norm = Norm(layer.input_layernorm), Norm(layer.pre_feedforward_layernorm)
        self.behind_attention = Norm(layer.post_attention_layernorm)
        self.behind_mlp = Norm(layer.post_feedforward_layernorm)

    def attention(self, normed: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        return self.behind_attention(super().attention(normed, keys, values, step))

    def mlp(self, normed: Tensor) -> Tensor:
        return self.behind_mlp(super().mlp(normed))


class GatedMLP:
    def __init__(self, mlp: Any):
        self.gate_up, self.down = SharedInput(mlp.gate_proj, mlp.up_proj), SharedInput(mlp.down_proj)
        self.gated = GATED[type(mlp.act_fn)]

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.gated(self.gate_up(x)))


class Mixture:
    """A router and its experts, as when their modules are swapped."""

    def __init__(self, block: Any):
        self.router, self.experts = block.gate, block.experts

    def __call__(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        _, weights, indices = forward_in_order(self.router, tokens)
        return experts_forward(self.experts, tokens, indices, weights).view(x.shape)


class Norm:
    """An RMSNorm with the arithmetic of the swapped module."""

    def __init__(self, module: Any):
        self.module, self.arithmetic = module, rms_norm_arithmetic(module)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.module.weight, *self.arithmetic)

    def of_sum(self, hidden: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalised sum and the sum; `added` is None before the first layer."""
        if added is None:
            return self(hidden), hidden
        return add_rms_norm(added, hidden, self.module.weight, *self.arithmetic)


class SharedInput:
    """Linear layers of one input, computed together: [..., out1 + out2 + ...]."""

    def __init__(self, *linears: nn.Linear):
        self.weights = [linear.weight.detach() for linear in linears]
        biases: list[Tensor | None] = [linear.bias for linear in linears]
        if any(bias is not None for bias in biases):
            # The others get zeros, which change no bit but the sign of a zero.
            zeros = (weight.new_zeros(len(weight)) for weight in self.weights)
            biases = [zero if bias is None else bias.detach() for zero, bias in zip(zeros, biases, strict=True)]
        self.biases = biases

    def __call__(self, x: Tensor) -> Tensor:
        return in_order_linears(x, self.weights, self.biases)


class Head:
    """Logits, soft-capped where the model does it."""

    def __init__(self, model: PreTrainedModel):
        self.linear = SharedInput(model.lm_head)
        self.softcap = model.config.final_logit_softcapping if FAMILIES[type(model)].caps_logits else None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        # Operation by operation, as transformers does it: each rounds to the dtype.
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def layers_of(model: PreTrainedModel, num_positions: int) -> list[Layer]:
    """The layers of a model of a known class, for texts of up to `num_positions` tokens."""
    family = FAMILIES[type(model)]
    kind = SandwichLayer if family.norms == SANDWICH_NORMS else Layer
    layers = []
    for layer, window, rotation in zip(
        model.model.layers, windows(model), rotations(model, num_positions), strict=True
    ):
        softcap = layer.self_attn.attn_logit_softcapping if family.caps_scores else None
        layers.append(kind(layer, AttentionOptions(window, rotation, softcap)))
    return layers


@torch.no_grad()
def rotations(model: PreTrainedModel, num_positions: int) -> list[Rotation]:
    """Each layer's; layers of one type share theirs."""
    rotary, like = model.model.rotary_emb, model.model.embed_tokens.weight[:1]
    positions = torch.arange(num_positions, device=model.device)[None]
    by_type = isinstance(rotary.rope_type, dict)  # one rotation for each type of layers, or one for all
    types = model.config.layer_types if by_type else [None] * model.config.num_hidden_layers
    tables = {}
    for kind in set(types):
        cos, sin = rotary(like, positions, *([kind] if by_type else []))
        tables[kind] = Rotation(cos[0].contiguous(), sin[0].contiguous())
    return [tables[kind] for kind in types]
