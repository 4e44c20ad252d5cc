"""What the short forward of a batch-invariant model is made of: layers, and linear layers that share their input."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from specdec.kernels.gated import silu_mul
from specdec.kernels.in_order_linear import in_order_linears
from specdec.kernels.norms import add_rms_norm, rms_norm
from specdec.kernels.ragged_attention import ragged_attention
from specdec.kernels.rotary_write import HeadNorm, rotary_write


class Step(NamedTuple):
    """What the layers of one forward share.

    starts: [rows] int64. spans: per sliding window (None = full attention), [rows, width, 3] int32, as
    `ragged_attention` takes them. cos, sin: [slots, head_dim]. used_slots: slots that attention looks at.
    """

    starts: Tensor
    spans: dict[int | None, Tensor]
    cos: Tensor
    sin: Tensor
    used_slots: int


class InvariantLayer:
    """One decoder layer."""

    def __init__(self, layer: Any, window: int | None):
        block, mlp = layer.self_attn, layer.mlp
        self.window, self.scaling = window, block.scaling
        self.qkv = SharedInput(block.q_proj, block.k_proj, block.v_proj)
        self.out, self.gate_up = SharedInput(block.o_proj), SharedInput(mlp.gate_proj, mlp.up_proj)
        self.down = SharedInput(mlp.down_proj)
        self.attention_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.head_norm: HeadNorm | None = None
        if hasattr(block, "q_norm"):
            self.head_norm = HeadNorm(block.q_norm.weight, block.k_norm.weight, block.q_norm.variance_epsilon)

    def __call__(self, hidden: Tensor, added: Tensor | None, keys: Tensor, values: Tensor, step: Step):
        """[rows, width, hidden] -> the residual stream without, and apart from it, what this layer's MLP adds."""
        normed, hidden = norm(self.attention_norm, hidden, added)
        query = rotary_write(self.qkv(normed), step.starts, step.cos, step.sin, keys, values, self.head_norm)
        used_keys, used_values = (x[:, : step.used_slots].transpose(1, 2) for x in (keys, values))
        spans = step.spans[self.window]
        attended = ragged_attention(query.transpose(1, 2), used_keys, used_values, spans, self.scaling)
        normed, hidden = norm(self.mlp_norm, hidden, self.out(attended.flatten(2)))
        return hidden, self.down(silu_mul(self.gate_up(normed)))


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


def norm(module: Any, hidden: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """The normalised sum and the sum; `added` is None before the first layer."""
    if added is None:
        return rms_norm(hidden, module.weight, module.variance_epsilon), hidden
    return add_rms_norm(added, hidden, module.weight, module.variance_epsilon)
