"""The short forward of a batch-invariant llama-, qwen2-, qwen3- or mistral-type model: nine launches a layer.

Its bits are those of the model's own modules with the kernels swapped in (`batch_invariant`), so transformers' own
`generate` on that model stays the oracle. Weights are read where they lie. On a GPU the steps are replayed as CUDA
graphs (`step_graphs.py`), because the host cannot launch a step's kernels as fast as the device runs them.

A draft model's bits do not matter, since what is accepted is the target's own. Where the caller says so
(`must_be_exact=False`) its steps of few tokens are a single launch (`one_launch.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.branches import ExtraQueries
from specdec.cache import RaggedCache
from specdec.fused import is_known_class, is_plain, windows
from specdec.invariant import is_batch_invariant, is_invariant_forward
from specdec.invariant_guard import own_arithmetic
from specdec.kernels import persistent_step
from specdec.kernels.gated import silu_mul
from specdec.kernels.in_order_linear import in_order_linears
from specdec.kernels.norms import add_rms_norm, rms_norm
from specdec.kernels.ragged_attention import ragged_attention
from specdec.kernels.rotary_write import HeadNorm, rotary_write
from specdec.layout import Layout
from specdec.network import CachePlan, Network, NetworkOutput
from specdec.one_launch import one_launch_step
from specdec.step_graphs import MAX_STEP_WIDTH, StepGraphs, row_bucket


def can_shorten(model: PreTrainedModel) -> bool:
    """Whether `model` is batch-invariant and exactly one of the known classes, with nothing else attached."""
    return is_batch_invariant(model) and is_known_class(model) and all(map(is_plain_or_swapped, model.modules()))


def is_plain_or_swapped(module: nn.Module) -> bool:
    return is_plain(module, may_be_replaced=is_invariant_forward(module.__dict__.get("forward")))


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


class InvariantForward:
    """The layers, a cache and the captured steps: all that is worth keeping from one generation to the next."""

    def __init__(self, model: PreTrainedModel, max_rows: int, num_slots: int, must_be_exact: bool = True):
        """must_be_exact: whether steps have the bits of the model's own modules; a draft model's need not."""
        self.max_rows, self.num_slots = max_rows, num_slots
        self.weights = addresses(model)
        self.layers = [
            InvariantLayer(layer, window) for layer, window in zip(model.model.layers, windows(model), strict=True)
        ]
        self.windows = {layer.window for layer in self.layers}
        self.embedding, self.norm, self.head = model.model.embed_tokens, model.model.norm, SharedInput(model.lm_head)
        # What pads a graph's rows and columns is written behind the texts.
        self.cache = RaggedCache(len(self.layers), max_rows, num_slots + MAX_STEP_WIDTH, model.device)
        with torch.no_grad():
            positions = torch.arange(self.cache.num_slots, device=model.device)[None]
            cos, sin = model.model.rotary_emb(self.embedding.weight[:1], positions)
            self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()
            self.cache.allocate(
                model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim, self.cos.dtype
            )
        self.graphs = StepGraphs(self.cache) if model.device.type == "cuda" else None
        self.one_launch = None
        if not must_be_exact:
            self.one_launch = one_launch_step(model, self.cache, self.cos, self.sin, num_slots)

    def serves(self, model: PreTrainedModel, max_rows: int, num_slots: int) -> bool:
        """Whether it is large enough and of the same weights."""
        return max_rows <= self.max_rows and num_slots <= self.num_slots and self.weights == addresses(model)

    def __call__(self, token_ids: Tensor, starts: Tensor, used_slots: int, layers: tuple[int, ...]) -> NetworkOutput:
        """A step of the cache's first rows: launches alone, nothing waits for the device."""
        if self.one_launch is not None and token_ids.numel() <= persistent_step.FASTER_UP_TO and set(layers) <= {-1}:
            logits, hidden = self.one_launch(token_ids, starts)
            return NetworkOutput(logits, (hidden,) * len(layers))
        hidden, states = self.run(token_ids, starts, used_slots, slice(0, len(token_ids)), layers)
        return NetworkOutput(self.logits(hidden), states)

    @torch.no_grad()
    def run(
        self, token_ids: Tensor, starts: Tensor, used_slots: int, rows: slice, layers: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The states behind the final norm, and those that were asked for, [rows, width, hidden] each."""
        with own_arithmetic():
            step = Step(starts, self._spans(starts, token_ids.shape[1], used_slots), self.cos, self.sin, used_slots)
            hidden, added = F.embedding(token_ids, self.embedding.weight), None
            states = [hidden]
            for layer, cached in zip(self.layers, self.cache.layers, strict=True):
                hidden, added = layer(hidden, added, cached.keys[rows], cached.values[rows], step)
                if layers:
                    states.append(hidden + added)
            hidden, _ = norm(self.norm, hidden, added)
            states[-1] = hidden
        return hidden, tuple(states[i] for i in layers)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        with own_arithmetic():
            return self.head(hidden)

    def _spans(self, starts: Tensor, width: int, used_slots: int) -> dict[int | None, Tensor]:
        position = starts[:, None] + torch.arange(width, device=starts.device)
        end = (position + 1).clamp(max=used_slots).int()
        spans = {}
        for window in self.windows:
            low = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
            # Padding stands behind the texts and sees nothing.
            low = torch.where(position < self.num_slots, low, end)
            spans[window] = torch.stack([low, end, torch.zeros_like(end)], -1)
        return spans


# By whether the bits must be those of the model's modules: the target's must, a draft model's need not.
_kept: dict[bool, WeakKeyDictionary[PreTrainedModel, InvariantForward]] = {
    True: WeakKeyDictionary(),
    False: WeakKeyDictionary(),
}
SLOTS_ROUNDING = 256


@contextmanager
def kept_forward(
    model: PreTrainedModel, max_rows: int, num_slots: int, must_be_exact: bool = True
) -> Iterator[InvariantForward]:
    """The model's forward from an earlier generation if it is free, large enough and of the same weights.

    One is kept per model and exactness, the last used: its cache stays allocated, as transformers' static cache does.
    """
    kept = _kept[must_be_exact].pop(model, None)
    if kept is None or not kept.serves(model, max_rows, num_slots):
        del kept  # before the new one takes memory
        kept = InvariantForward(model, row_bucket(max_rows), rounded_up(num_slots), must_be_exact)
    yield kept
    _kept[must_be_exact][model] = kept  # not after an exception: a step may have been interrupted half-way


def rounded_up(num_slots: int) -> int:
    return -(-num_slots // SLOTS_ROUNDING) * SLOTS_ROUNDING


def addresses(model: PreTrainedModel) -> list[int]:
    """Where the weights lie: graphs read them there."""
    return [parameter.data_ptr() for parameter in model.parameters()]


class InvariantNetwork(Network):
    """Runs the kernels over the model's own weights in the ragged layout; the modules are not touched."""

    must_be_exact = True  # whether the output depends on this model's bits, as it does on a target's

    def __init__(
        self,
        model: PreTrainedModel,
        max_rows: int,
        num_slots: int,
        max_length: int | None = None,
        layout: Layout | None = None,
    ):
        super().__init__(model, 0, max_rows, num_slots)

    @classmethod
    def plan(cls, model: PreTrainedModel, max_rows: int, num_slots: int) -> CachePlan:
        kept = _kept[cls.must_be_exact].get(model)
        if kept is not None and kept.serves(model, max_rows, num_slots):
            return CachePlan(0, 0)
        freed = 0 if kept is None else kept.cache.nbytes
        return CachePlan(row_bucket(max_rows), rounded_up(num_slots) + MAX_STEP_WIDTH, freed)

    @contextmanager
    def running(self) -> Iterator[None]:
        size = self.cache.max_rows, self.cache.num_slots
        with kept_forward(self.model, *size, self.must_be_exact) as self.kept:
            self.cache = self.kept.cache
            self.cache.num_filled = 0  # of an earlier generation nothing is left
            yield

    def resize(self, max_rows: int, num_slots: int) -> None:
        if max_rows > self.kept.max_rows or num_slots > self.kept.num_slots:
            size = row_bucket(max(max_rows, self.kept.max_rows)), max(num_slots, self.kept.num_slots)
            self.kept = InvariantForward(self.model, size[0], rounded_up(size[1]), self.must_be_exact)
            self.kept.cache.copy_from(self.cache)
            self.cache = self.kept.cache

    def forward(
        self,
        token_ids: Tensor,
        starts: Tensor,
        used_slots: int,
        layers: tuple[int, ...] = (),
        host_starts: np.ndarray | None = None,
        extra_queries: ExtraQueries | None = None,
    ) -> NetworkOutput:
        assert extra_queries is None, "the kernels see one interval of slots; build_network chooses another network"
        kept = self.kept
        if (kept.graphs is None and kept.one_launch is None) or token_ids.shape[1] > MAX_STEP_WIDTH:
            return super().forward(token_ids, starts, used_slots, layers, host_starts)
        self.cache.num_filled = max(self.cache.num_filled, used_slots)  # a replay announces no forward to the cache
        if kept.graphs is None:
            return kept(token_ids, starts, used_slots, layers)
        return kept.graphs.replay(kept, token_ids, starts, used_slots, layers)

    def _run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logits_at: Tensor | None,
        layers: tuple[int, ...],
        extra_queries: ExtraQueries | None = None,
    ) -> NetworkOutput:
        cache = self.cache
        hidden, states = self.kept.run(token_ids, cache.starts, cache.used_slots, cache.rows, layers)
        if logits_at is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), logits_at][:, None]
        return NetworkOutput(self.kept.logits(hidden), states)


class InvariantDraftNetwork(InvariantNetwork):
    """Of a draft model, whose bits the output does not depend on: a step of few tokens is one launch."""

    must_be_exact = False
