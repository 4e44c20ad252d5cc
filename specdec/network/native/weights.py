"""A model's weights in the panels that `step.cpp` reads: 32 outputs next to each other for each input in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.network.fused import FusedLayer, FusedWeights
from specdec.network.native.calls import ADD, GATED, WRITE, Layer, Linear, Native

LANES, PANEL = 16, 32  # floats of a vector; outputs of a panel
ALIGNMENT = 16  # floats of a cache line


class NativeLinear:
    """The product of layers that share their input, as `MergedLinear`."""

    def __init__(self, native: Native, structure: Linear):
        self.native, self.structure = native, structure

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out1 + out2 + ...]"""
        return self.native.linear(self.structure, x, x.new_empty(len(x), self.structure.outputs), WRITE)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x), [tokens, out]."""
        return self.native.linear(self.structure, x, residual.clone(), ADD)


class NativeGated(NativeLinear):
    """silu(gate) * up, of one product for both."""

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, intermediate, rounded up to whole vectors]"""
        return self.native.linear(self.structure, x, x.new_empty(len(x), self.structure.outputs // 2), GATED)


class NativeWeights(FusedWeights):
    """The packed weights; `FusedLayer`, for many tokens, multiplies by them too.

    structures: one per layer; a network points a copy of them to its cache. has_large_pages: whether the system
    was willing to give them.
    """

    def __init__(self, model: PreTrainedModel):
        self.native, self.is_packed = Native(), True
        own = model.model.layers[: model.config.num_hidden_layers]
        floats = sum(sum(_layer_sizes(layer)) for layer in own) + _size([model.lm_head])
        # One piece, so that it is in large pages.
        self._memory = torch.empty(floats + ALIGNMENT, dtype=torch.float32)
        self._used = -(self._memory.data_ptr() // self._memory.itemsize) % ALIGNMENT
        self._kept: list[Tensor] = []  # what the structures point to
        self.has_large_pages = self.native.large_pages(self._memory)

        self._merge_all(
            model,
            lambda linears: NativeLinear(self.native, self._packed(linears)),
            lambda linears: NativeGated(self.native, self._packed(linears, gated=True)),
        )
        self.structures = (Layer * len(own))()
        for structure, layer, fused in zip(self.structures, own, self.layers, strict=True):
            self._fill(structure, layer, fused)

    def _fill(self, structure: Layer, layer: Any, fused: FusedLayer) -> None:
        products = {"qkv": fused.qkv, "attention_out": fused.out, "gate_up": fused.gated, "down": fused.down}
        for name, product in products.items():
            assert isinstance(product, NativeLinear)
            setattr(structure, name, product.structure)
        for name, norm in (("attention", fused.attention_norm), ("mlp", fused.mlp_norm)):
            setattr(structure, f"{name}_norm", self._pointer(norm.weight))
            setattr(structure, f"{name}_eps", norm.variance_epsilon)
        if fused.head_norm is not None:
            structure.query_norm = self._pointer(layer.self_attn.q_norm.weight)
            structure.key_norm = self._pointer(layer.self_attn.k_norm.weight)
            structure.head_eps = fused.head_norm_eps
        structure.scaling, structure.window = fused.scaling, fused.window or 0

    def _pointer(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _packed(self, linears: Sequence[nn.Linear], gated: bool = False) -> Linear:
        """gated: two layers, 16 outputs of each by turns, so that a panel holds gates and their ups."""
        join = _by_turns if gated else torch.cat
        weight = join([linear.weight.detach() for linear in linears])
        num_outputs, num_inputs = weight.shape
        num_panels = -(-num_outputs // PANEL)
        packed = self._memory[self._used : self._used + num_panels * PANEL * num_inputs]
        self._used += len(packed)
        panels = packed.view(num_panels, num_inputs, PANEL)
        panels.copy_(_padded(weight, PANEL).view(num_panels, PANEL, num_inputs).transpose(1, 2))

        bias = None
        if any(linear.bias is not None for linear in linears):
            bias = self._pointer(_padded(join([_bias(linear) for linear in linears]), PANEL))
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
