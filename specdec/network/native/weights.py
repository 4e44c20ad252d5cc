"""A model's weights in the panels that `step.cpp` reads: 32 outputs next to each other for each input in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.network.fused import FusedLayer, FusedWeights
from specdec.network.native.calls import Layer, Linear, Native

LANES, PANEL = 16, 32  # floats of a vector; outputs of a panel
ALIGNMENT = 16  # floats of a cache line


class NativeWeights(FusedWeights):
    """The packed weights, next to the modules' own, which the forwards over many tokens use.

    layers_native: one structure per layer; the pointers to its cache are set before each step.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, may_pack=False)
        self.native = Native()
        own = list(model.model.layers[: model.config.num_hidden_layers])
        sizes = [_layer_sizes(layer) for layer in own]
        needed = sum(map(sum, sizes)) + _size([model.lm_head])
        # One piece, so that it is in large pages.
        self._memory, self._used = torch.empty(needed + ALIGNMENT, dtype=torch.float32), 0
        self._used = -(self._memory.data_ptr() // 4) % ALIGNMENT
        self._kept: list[Tensor] = []  # what the structures point to
        self.has_large_pages = self.native.large_pages(self._memory)

        self.native_layers = (Layer * len(own))()
        for structure, layer, fused in zip(self.native_layers, own, self.layers, strict=True):
            self._fill(structure, layer, fused)
        self.native_head = self._linear([model.lm_head])

    @property
    def nbytes(self) -> int:
        """Of the packed copy."""
        return self._memory.nbytes

    def _fill(self, structure: Layer, layer: Any, fused: FusedLayer) -> None:
        block, mlp = layer.self_attn, layer.mlp
        structure.qkv = self._linear([block.q_proj, block.k_proj, block.v_proj])
        structure.attention_out, structure.down = self._linear([block.o_proj]), self._linear([mlp.down_proj])
        structure.gate_up = self._linear([mlp.gate_proj, mlp.up_proj], gated=True)
        for name, norm in (("attention", layer.input_layernorm), ("mlp", layer.post_attention_layernorm)):
            setattr(structure, f"{name}_norm", self._pointer(norm.weight))
            setattr(structure, f"{name}_eps", norm.variance_epsilon)
        if fused.head_norm is not None:
            structure.query_norm = self._pointer(block.q_norm.weight)
            structure.key_norm = self._pointer(block.k_norm.weight)
            structure.head_eps = fused.head_norm_eps
        structure.scaling, structure.window = fused.scaling, fused.window or 0

    def _pointer(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _linear(self, linears: Sequence[nn.Linear], gated: bool = False) -> Linear:
        """gated: two layers, 16 outputs of each by turns, so that a panel holds gates and their ups."""
        parts = [linear.weight.detach() for linear in linears]
        biases = [_bias(linear) for linear in linears] if any(x.bias is not None for x in linears) else None
        weight = _by_turns(parts) if gated else torch.cat(parts)
        num_outputs, num_inputs = weight.shape
        num_panels = -(-num_outputs // PANEL)
        packed = self._memory[self._used : self._used + num_panels * PANEL * num_inputs]
        self._used += len(packed)
        panels = packed.view(num_panels, num_inputs, PANEL)
        panels.copy_(_padded(weight, PANEL).view(num_panels, PANEL, num_inputs).transpose(1, 2))

        bias = None
        if biases is not None:
            bias = self._pointer(_padded(_by_turns(biases) if gated else torch.cat(biases), PANEL))
        return Linear(packed.data_ptr(), bias, num_inputs, num_outputs)


def _layer_sizes(layer: Any) -> list[int]:
    block, mlp = layer.self_attn, layer.mlp
    merged = ([block.q_proj, block.k_proj, block.v_proj], [block.o_proj], [mlp.down_proj])
    gated = 2 * (-(-mlp.gate_proj.out_features // LANES) * LANES) * mlp.gate_proj.in_features
    return [*map(_size, merged), gated]


def _size(linears: Sequence[nn.Linear]) -> int:
    """Floats of these layers in panels."""
    outputs = sum(linear.out_features for linear in linears)
    return -(-outputs // PANEL) * PANEL * linears[0].in_features


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()


def _padded(x: Tensor, multiple: int) -> Tensor:
    """Zeros after the last of the first dimension, up to a multiple."""
    missing = -len(x) % multiple
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


def _by_turns(parts: Sequence[Tensor]) -> Tensor:
    """Two of [outputs, ...] -> [padded outputs of both, ...]: 16 of the first, 16 of the second, and so on."""
    padded = [_padded(part, LANES).unflatten(0, (-1, LANES)) for part in parts]
    return torch.stack(padded, 1).flatten(0, 2)
