"""A short forward for llama-, qwen2-, qwen3- and mistral-type models: few calls per layer, weights merged.

The stock modules spend most of a small decode step in Python and in dispatching some forty small operations per layer.
Here a layer is: norm, one qkv product, rotation, cache write, SDPA, one product with the residual, norm, one gate-up
product, SiLU, one product with the residual. Masks are made once per step and shared by all layers; single rows and
first prefill chunks need none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.batch.cache import RaggedLayer
from specdec.batch.columns import Columns
from specdec.batch.layout import Layout
from specdec.draft import ExtraQueries
from specdec.kept import kept_with
from specdec.network.base import Network, NetworkOutput, layer_numbers
from specdec.network.known_classes import LLAMA_LIKE, head_norm_eps, is_known_class, is_plain, windows
from specdec.network.packed_linear import MergedLinear, can_pack


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether `model` is exactly one of the known classes, without attachments that its own forward would respect."""
    if not is_known_class(model, LLAMA_LIKE):
        return False
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return False
    if len({parameter.dtype for parameter in model.parameters()}) != 1:
        return False
    return all(is_plain(module) for module in model.modules())


class Attend(NamedTuple):
    """Inputs shared by all layers of one forward.

    cos, sin: [rows * width, 1, head_dim], sin signed for the rotation of halves. masks: additive, per sliding window
    (None = full attention), [rows, 1, width * group, slots] in the model's dtype; empty if none is needed.
    """

    num_rows: int
    width: int
    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor]
    is_causal: bool


class Product(Protocol):
    """Linear layers that share their input, as one; see `MergedLinear`."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor: ...


Merge = Callable[[Sequence[nn.Linear]], Product]
MergeGated = Callable[[Sequence[nn.Linear]], Callable[[Tensor], Tensor]]  # of a gate and its up


class GatedLinear:
    """silu(gate) * up, of one product for both."""

    def __init__(self, gate_up: Product):
        self.gate_up = gate_up

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, intermediate]"""
        gate, up = self.gate_up(x).chunk(2, -1)
        return F.silu(gate) * up


class FusedLayer:
    """One decoder layer."""

    def __init__(self, layer: Any, window: int | None, merge: Merge, merge_gated: MergeGated):
        block = layer.self_attn
        self.window, self.scaling, self.head_dim = window, block.scaling, block.head_dim
        self.num_heads = block.q_proj.out_features // block.head_dim
        self.num_kv_heads = block.k_proj.out_features // block.head_dim
        self.qkv = merge([block.q_proj, block.k_proj, block.v_proj])
        self.out, self.down = merge([block.o_proj]), merge([layer.mlp.down_proj])
        self.gated = merge_gated([layer.mlp.gate_proj, layer.mlp.up_proj])
        self.attention_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.head_norm: Tensor | None = None
        if hasattr(block, "q_norm"):
            weights = [
                block.q_norm.weight.expand(self.num_heads, -1),
                block.k_norm.weight.expand(self.num_kv_heads, -1),
            ]
            self.head_norm = torch.cat(weights).detach()  # [heads + kv_heads, head_dim]
            self.head_norm_eps = head_norm_eps(block)[0]

    def __call__(self, hidden: Tensor, cache: RaggedLayer, shared: Attend) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]"""
        qkv = self.qkv(rms_norm(hidden, self.attention_norm.weight, self.attention_norm.variance_epsilon))
        hidden = self.out.add_to(hidden, self._attention(qkv, cache, shared))
        normed = rms_norm(hidden, self.mlp_norm.weight, self.mlp_norm.variance_epsilon)
        return self.down.add_to(hidden, self.gated(normed))

    def _attention(self, qkv: Tensor, cache: RaggedLayer, shared: Attend) -> Tensor:
        """[tokens, (heads + 2 kv_heads) * head_dim] -> [tokens, heads * head_dim]"""
        heads = qkv.view(len(qkv), -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        rotated = heads[:, :num_rotated]
        if self.head_norm is not None:
            rotated = rms_norm(rotated, self.head_norm, self.head_norm_eps)
        rotated = rotate(rotated, shared.cos, shared.sin)
        query, key, value = rotated[:, : self.num_heads], rotated[:, self.num_heads :], heads[:, num_rotated:]
        if not cache.is_initialized:
            cache.lazy_initialization(key[:, :, None], value[:, :, None])
        keys, values = cache.write(key, value)
        rows, width = shared.num_rows, shared.width
        if shared.is_causal:
            query = query.view(rows, width, self.num_heads, -1).transpose(1, 2)
            out = F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=self.scaling, enable_gqa=True
            )
            return out.transpose(1, 2).reshape(len(qkv), -1)
        # All queries of a key head in one block: each key is read once for the group.
        group = self.num_heads // self.num_kv_heads
        query = query.view(rows, width, self.num_kv_heads, group, -1).transpose(1, 2).flatten(2, 3)
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=shared.masks.get(self.window), scale=self.scaling
        )
        return out.unflatten(2, (width, group)).transpose(1, 2).reshape(len(qkv), -1)


class FusedWeights:
    """The merged and packed weights of one model, made once and kept while the model lives and does not change."""

    def __init__(self, model: PreTrainedModel):
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.is_packed = pack = can_pack([linear.weight for linear in linears])
        self._merge_all(
            model, lambda linears: MergedLinear(linears, pack), lambda linears: GatedLinear(MergedLinear(linears, pack))
        )

    def _merge_all(self, model: PreTrainedModel, merge: Merge, merge_gated: MergeGated) -> None:
        layers = zip(model.model.layers[: model.config.num_hidden_layers], windows(model), strict=True)
        self.layers = [FusedLayer(layer, window, merge, merge_gated) for layer, window in layers]
        self.head = merge([model.lm_head])


def fingerprint(model: PreTrainedModel) -> list[tuple]:
    """Changes when any weight is replaced or written to (even through `.data`, which does not change the version), and
    when an attribute that the layers were built from is edited."""
    layers = model.model.layers[: model.config.num_hidden_layers]
    settings = []
    for window, layer in zip(windows(model), layers, strict=True):
        block = layer.self_attn
        sizes = block.head_dim, block.q_proj.out_features, block.k_proj.out_features
        eps = [layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon]
        settings.append((window, block.scaling, *sizes, *eps, *head_norm_eps(block)))
    weights = []
    for parameter in model.parameters():
        version = None if parameter.is_inference() else parameter._version
        weights.append((parameter.data_ptr(), version, checksum(parameter.detach())))
    return [*settings, *weights]


def checksum(weight: Tensor) -> float:
    """Products with fixed pseudo-random vectors: changes with values and their order, within the dtype's rounding."""
    matrix = weight.reshape(len(weight), -1)
    return (matrix @ _direction(matrix.shape[1], weight) @ _direction(len(weight), weight)).item()


def _direction(size: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(size, generator=generator).to(like)


def fused_weights(model: PreTrainedModel) -> FusedWeights:
    return kept_with(model, FusedWeights, lambda: FusedWeights(model), fingerprint(model))


class FusedNetwork(Network):
    """Runs the merged weights; the model's own modules are not touched."""

    def __init__(
        self,
        model: PreTrainedModel,
        max_rows: int,
        num_slots: int,
        max_length: int | None = None,
        layout: Layout | None = None,
    ):
        super().__init__(model, model.config.num_hidden_layers, max_rows, num_slots, layout)
        self.weights = self._weights(model)
        self.embedding, self.norm = model.model.embed_tokens, model.model.norm
        self.zero, self.minus_infinity = (self.norm.weight.new_tensor(value) for value in (0.0, float("-inf")))
        self._make_rotation(num_slots)

    @staticmethod
    def _weights(model: PreTrainedModel) -> FusedWeights:
        return fused_weights(model)

    def resize(self, max_rows: int, num_slots: int) -> None:
        super().resize(max_rows, num_slots)
        self._make_rotation(num_slots)

    @torch.no_grad()
    def _make_rotation(self, num_slots: int) -> None:
        positions = torch.arange(num_slots, device=self.model.device)[None]
        cos, sin = self.model.model.rotary_emb(self.embedding.weight[:1], positions)
        self.cos, self.sin = cos[0], torch.cat(sin[0].chunk(2, -1), -1)
        half = self.sin.shape[-1] // 2
        self.sin[:, :half] *= -1

    @torch.inference_mode()
    def _run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logits_at: Tensor | None,
        layers: tuple[int, ...],
        extra_queries: ExtraQueries | None = None,
    ) -> NetworkOutput:
        rows, width = positions.shape
        hidden = F.embedding(token_ids.flatten(), self.embedding.weight)
        if extra_queries is not None:
            text = hidden.view(rows, token_ids.shape[1], -1)
            branches = extra_queries.embeddings.repeat(token_ids.shape[1], 1).expand(rows, -1, -1)
            hidden = torch.cat([text, branches], 1).flatten(0, 1)

        last = len(self.weights.layers)
        asked = layer_numbers(layers, last)
        hidden, states = self._run_layers(hidden, positions, asked)

        # A prefill needs the logits of each row's last column alone.
        at_logits = hidden
        if logits_at is not None:
            at_logits = hidden.view(rows, width, -1)[torch.arange(rows, device=hidden.device), logits_at]
        normed = self._normed(at_logits)
        if last in asked:
            states[last] = normed if logits_at is None else self._normed(hidden)

        kept = tuple(states[number].view(rows, width, -1) for number in asked)
        if extra_queries is not None:
            return self._with_extra(normed.view(rows, width, -1), kept, token_ids.shape[1])
        return NetworkOutput(self._logits(normed, rows), kept)

    def _run_layers(
        self, hidden: Tensor, positions: Tensor, asked: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """All layers, from [tokens, hidden] embeddings. The output of the last, and that of each number asked for."""
        shared = self._shared(positions)
        states = {0: hidden}
        for number, (layer, cache) in enumerate(zip(self.weights.layers, self.cache.layers, strict=True), 1):
            hidden = layer(hidden, cache, shared)
            if number in asked:
                states[number] = hidden
        return hidden, states

    def _normed(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.norm.weight, self.norm.variance_epsilon)

    def _logits(self, hidden: Tensor, rows: int) -> Tensor:
        return self.weights.head(hidden).view(rows, -1, self.model.lm_head.out_features)

    def _with_extra(self, hidden: Tensor, states: tuple[Tensor, ...], num_tokens: int) -> NetworkOutput:
        """hidden, states: [rows, width, hidden], the first columns of text."""
        rows = len(hidden)
        branches = hidden[:, num_tokens:].unflatten(1, (num_tokens, -1))

        @torch.inference_mode()
        def extra_logits(columns: Tensor) -> Tensor:
            chosen = branches[torch.arange(rows, device=columns.device), columns]
            return self._logits(chosen.flatten(0, 1), rows)

        logits = self._logits(hidden[:, :num_tokens].flatten(0, 1), rows)
        return NetworkOutput(logits, tuple(state[:, :num_tokens] for state in states), extra_logits)

    def _shared(self, positions: Tensor) -> Attend:
        rows, width = positions.shape
        used = self.cache.used_slots
        flat = positions.flatten()
        windowed = any(layer.window is not None and layer.window < used for layer in self.weights.layers)
        columns, pads = self.cache.columns, self.cache.pads
        # used == starts + width for the longest row, so used == width says that every row starts at slot 0.
        is_causal = used == width and not windowed and columns.is_chain
        masks = {}
        if not is_causal and (rows > 1 or width > 1 or windowed or pads is not None):
            for layer in self.weights.layers:
                if layer.window not in masks:
                    masks[layer.window] = self._mask(columns, pads, layer)
        return Attend(rows, width, self.cos[flat, None], self.sin[flat, None], masks, is_causal)

    def _mask(self, columns: Columns, pads: Tensor | None, layer: FusedLayer) -> Tensor:
        visible = columns.mask(self.cache.used_slots, layer.window)  # [rows, width, slots]
        if pads is not None:
            visible &= torch.arange(self.cache.used_slots, device=pads.device) >= pads[:, None, None]
        mask = torch.where(visible, self.zero, self.minus_infinity)
        return mask.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1)[:, None]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., dim], normalised in float32 or better and rounded before the weight, as transformers does.

    torch's own rms_norm is eight small operations on a CPU; these are five.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (wide * scale).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x cos + rotate_half(x) sin, with the half's sign folded into `sin`. x: [tokens, heads, dim]"""
    return torch.addcmul(x * cos, x.unflatten(-1, (2, -1)).flip(-2).flatten(-2), sin)
