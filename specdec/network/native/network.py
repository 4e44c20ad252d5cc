"""The network whose decode and verify steps are one native operation over all layers, and one for the head.

Steps of more tokens than MAX_TOKENS, prompts above all, take the way of `FusedNetwork` over the same cache and weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.batch.layout import Layout
from specdec.kept import kept_with
from specdec.network.free_memory import free_bytes
from specdec.network.fused import FusedNetwork, fingerprint
from specdec.network.native.build import is_switched_on, library
from specdec.network.native.calls import Step, num_threads
from specdec.network.native.weights import NativeWeights
from specdec.network.packed_linear import MAX_SHARE_OF_FREE_MEMORY

MAX_TOKENS = 64  # of a step; more are prompts, which gain by torch's attention and lose little by its small operations
MAX_HEAD_DIM = 512  # of `step.cpp`


def can_run_natively(model: PreTrainedModel) -> bool:
    """Whether a model that `can_fuse` admits is one for the native step: in float32 on a CPU, with memory for a packed
    copy of its weights. Compiles the step if this machine has none yet.
    """
    if not is_switched_on() or model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    if not _is_regular(model):
        return False
    needed = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))
    if needed > MAX_SHARE_OF_FREE_MEMORY * free_bytes(model.device):
        return False
    return library() is not None


def _is_regular(model: PreTrainedModel) -> bool:
    """Whether the layers are all of one size and fit together, as they do in a model that nobody has cut down.

    The native step reads memory by these sizes, so that nothing else would notice.
    """
    hidden, layers = model.model.embed_tokens.embedding_dim, model.model.layers[: model.config.num_hidden_layers]
    sizes = set()
    for layer in layers:
        block, mlp = layer.self_attn, layer.mlp
        linears = (block.q_proj, block.k_proj, block.v_proj, block.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        head_norms = (block.q_norm, block.k_norm) if hasattr(block, "q_norm") else ()
        shapes = [tuple(linear.weight.shape) for linear in linears]
        sizes.add((block.head_dim, *shapes, *(norm.weight.numel() for norm in (*norms, *head_norms))))
    if len(sizes) != 1:
        return False

    dim, query, key, value, out, gate, up, down, *norm_sizes = sizes.pop()
    return (
        dim <= MAX_HEAD_DIM
        and dim % 2 == query[0] % dim == key[0] % dim == query[0] % key[0] == 0
        and key == value
        and {query[1], key[1], out[0], gate[1], down[0], model.lm_head.in_features} == {hidden}
        and (out[1], gate, down[1]) == (query[0], up, gate[0])
        and norm_sizes in ([hidden] * 2, [hidden, hidden, dim, dim])
    )


def native_weights(model: PreTrainedModel) -> NativeWeights:
    return kept_with(model, NativeWeights, lambda: NativeWeights(model), fingerprint(model))


class NativeNetwork(FusedNetwork):
    """Runs the packed weights; the model's own modules are not touched."""

    weights: NativeWeights

    def __init__(
        self,
        model: PreTrainedModel,
        max_rows: int,
        num_slots: int,
        max_length: int | None = None,
        layout: Layout | None = None,
    ):
        super().__init__(model, max_rows, num_slots, max_length, layout)
        self._workspace = torch.empty(0, dtype=torch.float32)
        # A copy, because the structures point to this network's cache: `_keys`, one tensor per layer.
        self._structures = type(self.weights.structures)(*self.weights.structures)
        self._keys: list[Tensor | None] = [None] * len(self._structures)
        self._had_extras = False
        layer = self.weights.layers[0]
        self._step = Step(
            num_layers=len(self.weights.layers),
            hidden=self.embedding.embedding_dim,
            heads=layer.num_heads,
            kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            intermediate=self._structures[0].down.inputs,
            layers=self._structures,
        )

    @staticmethod
    def _weights(model: PreTrainedModel) -> NativeWeights:
        return native_weights(model)

    def _run_layers(
        self, hidden: Tensor, positions: Tensor, asked: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if len(hidden) > MAX_TOKENS:
            return super()._run_layers(hidden, positions, asked)

        states = {0: hidden}
        hidden = hidden.clone()  # the step writes over it
        for number in asked:
            if 0 < number < len(self.weights.layers):
                states[number] = torch.empty_like(hidden)
        slots, positions = self.cache.columns.slots.contiguous(), positions.contiguous()
        masks = self._visible()  # these tensors are pointed to, so they live until the step is done
        self._point_layers(masks, states)

        step = self._step
        step.rows, step.width = positions.shape
        step.first_row, step.num_slots = self.cache.rows.start, self.cache.num_slots
        step.used_slots = self.cache.used_slots
        step.slots, step.positions = slots.data_ptr(), positions.data_ptr()
        step.cos, step.sin = self.cos.data_ptr(), self.sin.data_ptr()
        step.num_threads, step.hidden_states = num_threads(), hidden.data_ptr()
        floats = self.weights.native.workspace_floats(step)
        if self._workspace.numel() < floats:
            self._workspace = torch.empty(floats, dtype=torch.float32)
        step.workspace = self._workspace.data_ptr()
        self.weights.native.layers(step)
        return hidden, states

    def _visible(self) -> dict[int | None, Tensor]:
        """What each column sees, by the layers' windows, [rows, width, used_slots] bool; none for a chain without
        padding, where that follows from the slots."""
        columns, pads = self.cache.columns, self.cache.pads
        if columns.is_chain and pads is None:
            return {}
        masks = {}
        for window in {layer.window for layer in self.weights.layers}:
            visible = columns.mask(self.cache.used_slots, window)
            if pads is not None:
                visible &= torch.arange(self.cache.used_slots) >= pads[:, None, None]
            masks[window] = visible.contiguous()
        return masks

    def _point_layers(self, masks: dict[int | None, Tensor], states: dict[int, Tensor]) -> None:
        """Point the layers' structures to their caches, and to what this step alone gives them."""
        caches = self.cache.layers
        if any(not cache.is_initialized for cache in caches):
            for layer, cache in zip(self.weights.layers, caches, strict=True):
                like = self.zero.expand(1, layer.num_kv_heads, 1, layer.head_dim)
                cache.lazy_initialization(like, like)
        if any(cache.keys is not keys for cache, keys in zip(caches, self._keys, strict=True)):
            for structure, cache in zip(self._structures, caches, strict=True):
                structure.keys, structure.values = cache.keys.data_ptr(), cache.values.data_ptr()
            self._keys = [cache.keys for cache in caches]

        has_extras = bool(masks) or len(states) > 1
        if has_extras or self._had_extras:
            for number, (structure, layer) in enumerate(zip(self._structures, self.weights.layers, strict=True), 1):
                structure.visible = masks[layer.window].data_ptr() if masks else None
                structure.saved = states[number].data_ptr() if number in states else None
        self._had_extras = has_extras
