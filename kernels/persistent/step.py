"""A whole decode step of a llama-, qwen2-, qwen3- or mistral-type model in one launch.

A step of few tokens through a small model is bound by its launches, not by its arithmetic or its memory. Here one
program per multiprocessor stays for the whole step, and a barrier among all of them stands where a launch would.
Weights depend on no other program, so each program's next tile is on its way into registers while it waits, and the
tiles after that are on their way into the cache. Nothing is summed by atomics and every sum has a fixed order, so equal
inputs give equal bits. They are not the bits of `in_order_linear`, so models whose output must be exact do not use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.attention.ragged_attention import ragged_attention_reference
from specdec.kernels.attention.rotary_write import HeadNorm, rotary_write_reference
from specdec.kernels.dispatch import triton, uses_triton
from specdec.kernels.linear.norms import rms_norm_reference

if triton is not None:
    from specdec.kernels.persistent.step_triton import persistent_step_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TOKENS = 32  # rows * width
# Where it was measured to be faster than the step layer by layer: up to this many tokens (rows * width) and this many
# slots that attention looks at, because no two programs share slots here. A single token may have twice as many slots.
FASTER_UP_TO = 8
FASTER_SLOTS = 1024
MAX_ROW_BYTES = 4096  # of a hidden state: a program holds whole rows of weights and all tokens
TILE_BYTES = 65536  # of such rows: 64 registers a thread, or shared memory
MAX_INNER = 4096
MANY_TOKENS = 16  # more than these take the registers that large tiles after a norm would need
ROWS_FOR_MANY = 16  # rows of such a tile, at most, for many tokens


def is_faster(num_tokens: int, used_slots: int) -> bool:
    """
    >>> is_faster(1, 2048), is_faster(2, 2048), is_faster(8, 1024), is_faster(9, 1024)
    (True, False, True, False)
    """
    return num_tokens <= FASTER_UP_TO and used_slots <= FASTER_SLOTS * (2 if num_tokens == 1 else 1)


class LayerTensors(NamedTuple):
    """One decoder layer: weights [out, in], norms [in], one dtype.

    biases: of query, key and value, or None. head_norm: before the rotation, or None. window: how many slots a query
    sees, its own among them; None = all. keys, values: [rows or more, slots, kv_heads, head_dim], contiguous.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    biases: tuple[Tensor, ...] | None
    out: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor
    head_norm: HeadNorm | None
    window: int | None
    keys: Tensor
    values: Tensor


class StepTensors(NamedTuple):
    """A model and its cache. embedding, head: [vocab, hidden]; norm: [hidden]; cos, sin: [slots, head_dim].

    eps: of every norm over the hidden state. num_text_slots: rows that start there or later pad the batch. They see
    nothing, and their results mean nothing.
    """

    layers: Sequence[LayerTensors]
    embedding: Tensor
    norm: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor
    eps: float
    scaling: float
    num_text_slots: int


class Tuning(NamedTuple):
    """Settings that change the speed and the order of sums, but not what is computed.

    Rows of weights per tile, powers of two from 8 on (block_gate: any multiple of 8); keys per tile; elements of the
    attention's splits that a program may have to merge; elements of a product's input (half as many in float32) that
    it takes at a time; num_warps of a program, among which a tile's inner dimension is split.
    least_tokens: to which fewer are padded; 8 fill a tensor core's operand, 1 leaves a single token to plain sums.
    num_programs: None = one per multiprocessor.
    """

    block_qkv: int = 32
    block_out: int = 8
    block_gate: int = 24
    block_down: int = 8
    block_head: int = 16
    block_keys: int = 64
    merged_elements: int = 32768
    inner_elements: int = 32768
    max_splits: int = 4
    num_warps: int = 8
    attention_stages: int = 2
    least_tokens: int = 1
    num_programs: int | None = None


class Pointers(NamedTuple):
    """What the kernel reads and writes, under the names of its parameters."""

    # The batch, and where a row's new tokens begin.
    token_ids_ptr: Tensor  # [rows, width] int64
    starts_ptr: Tensor  # [rows] int64
    # The model: addresses of the layers' tensors, and the tensors that stand outside the layers.
    table_ptr: Tensor  # [layers, entries] int64
    embedding_ptr: Tensor  # [vocab, hidden]
    norm_ptr: Tensor  # [hidden]
    head_ptr: Tensor  # [vocab, hidden]
    cos_ptr: Tensor  # [slots, head_dim]
    sin_ptr: Tensor  # [slots, head_dim]
    # Buffers that programs pass results through.
    arrived_ptr: Tensor  # [1] int64, arrivals at barriers
    hidden_ptr: Tensor  # [MAX_TOKENS, hidden]
    qkv_ptr: Tensor  # [MAX_TOKENS, heads of query, key and value * head_dim]
    partial_ptr: Tensor  # [tokens, splits, heads, head_dim]
    weights_ptr: Tensor  # [2, tokens, splits, heads] float32: maxima and sums
    gated_ptr: Tensor  # [MAX_TOKENS, inner]
    # Results.
    normed_ptr: Tensor  # [rows, width, hidden]
    logits_ptr: Tensor  # [rows, width, vocab]


class Numbers(NamedTuple):
    """Numbers that do not compile the kernel anew, under the names of its parameters. cache_row: elements of a row."""

    rows: int
    width: int
    num_layers: int
    num_text_slots: int
    cache_row: int
    vocab: int
    eps: float
    head_eps: float
    scaling: float


class Constants(NamedTuple):
    """What the kernel is compiled for, under the names of its parameters. BLOCK_: elements of a tile."""

    HAS_BIAS: bool
    HAS_HEAD_NORM: bool
    NUM_ENTRIES: int
    SIZE: int
    SIZE_GATE: int
    NUM_HEADS: int
    NUM_KV_HEADS: int
    DIM: int
    TOKENS: int
    BLOCK_WIDTH: int
    BLOCK_PAIRS: int
    BLOCK: int
    BLOCK_DIM: int
    SPLITS: int
    BLOCK_HEADS: int
    BLOCK_INNER: int
    BLOCK_QKV: int
    BLOCK_OUT: int
    BLOCK_GATE: int
    BLOCK_DOWN: int
    BLOCK_HEAD: int
    BLOCK_KEYS: int
    ATTENTION_STAGES: int
    PREFETCH: bool
    POLLS: bool
    NUM_WARPS: int


class PersistentStep:
    """The step of one model over one cache: addresses and buffers, made once; the tensors are read where they lie."""

    def __init__(self, tensors: StepTensors, implementation: str = "auto", tuning: Tuning | None = None):
        """Raises ValueError for tensors that the kernel does not serve; see `refusal`."""
        reason = refusal(tensors)
        if reason is not None:
            raise ValueError(reason)
        self.tensors, self.tuning = tensors, tuning or Tuning()
        like = tensors.embedding
        self.uses_triton = uses_triton(implementation, like)
        self.num_programs = self.tuning.num_programs or _num_multiprocessors(like.device)
        layer = tensors.layers[0]
        qkv_size = len(layer.query) + len(layer.key) + len(layer.value)
        self.table = torch.tensor([_addresses(layer) for layer in tensors.layers], device=like.device)
        # Counts arrivals at barriers and never starts again: a multiple of num_programs between launches.
        self.arrived = torch.zeros(1, dtype=torch.long, device=like.device)
        attended = MAX_TOKENS * self.tuning.max_splits * len(layer.query)
        self.hidden, self.qkv = like.new_empty(MAX_TOKENS, like.shape[1]), like.new_empty(MAX_TOKENS, qkv_size)
        self.partial, self.gated = like.new_empty(attended), like.new_empty(MAX_TOKENS, len(layer.gate))
        self.weights = torch.empty(2, attended // layer.keys.shape[3], dtype=torch.float32, device=like.device)

    def __call__(self, token_ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """token_ids: [rows, width] int64, at most MAX_TOKENS; row b's follow its first starts[b] ([rows] int64) slots.

        Writes their keys and values after those slots. Returns logits, [rows, width, vocab], and the states after the
        final norm, [rows, width, hidden].
        """
        if token_ids.dim() != 2 or starts.shape != token_ids.shape[:1] or not 0 < token_ids.numel() <= MAX_TOKENS:
            raise ValueError(
                f"token_ids {list(token_ids.shape)} and starts {list(starts.shape)} do not fit; need [rows, width] and "
                f"[rows] of 1 to {MAX_TOKENS} tokens"
            )
        if len(token_ids) > len(self.tensors.layers[0].keys):
            raise ValueError(f"{len(token_ids)} rows exceed the cache's {len(self.tensors.layers[0].keys)}")
        if not self.uses_triton:
            return persistent_step_reference(token_ids, starts, self.tensors)
        return self._launch(token_ids.contiguous(), starts.contiguous())

    def num_splits(self, rows: int, tokens: int, size: int) -> int:
        """Into how many parts the keys of a row are split. size: of all heads of a token, padded."""
        tuning, num_items = self.tuning, rows * self.tensors.layers[0].keys.shape[2]
        # Every program merges all splits after attention, so many tokens can afford only a few splits.
        affordable = tuning.merged_elements // (tokens * size)
        return _floor_power(max(1, min(tuning.max_splits, affordable, self.num_programs // num_items)))

    def _launch(self, token_ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        tensors, layer = self.tensors, self.tensors.layers[0]
        rows, width = token_ids.shape
        logits = tensors.head.new_empty(rows, width, len(tensors.head))
        normed = tensors.head.new_empty(rows, width, tensors.embedding.shape[1])

        pointers = Pointers(
            token_ids_ptr=token_ids,
            starts_ptr=starts,
            table_ptr=self.table,
            embedding_ptr=tensors.embedding,
            norm_ptr=tensors.norm,
            head_ptr=tensors.head,
            cos_ptr=tensors.cos,
            sin_ptr=tensors.sin,
            arrived_ptr=self.arrived,
            hidden_ptr=self.hidden,
            qkv_ptr=self.qkv,
            partial_ptr=self.partial,
            weights_ptr=self.weights,
            gated_ptr=self.gated,
            normed_ptr=normed,
            logits_ptr=logits,
        )
        numbers = Numbers(
            rows=rows,
            width=width,
            num_layers=len(tensors.layers),
            num_text_slots=tensors.num_text_slots,
            cache_row=layer.keys.stride(0),
            vocab=len(tensors.head),
            eps=tensors.eps,
            head_eps=layer.head_norm.eps if layer.head_norm else 0.0,
            scaling=tensors.scaling,
        )
        constants = self._constants(rows, width)

        # Programs that cannot all be resident are then an error in place of a hang. The interpreter has no such launch.
        cooperative = {"launch_cooperative_grid": True} if token_ids.is_cuda else {}
        persistent_step_kernel[(self.num_programs,)](
            **pointers._asdict(),
            **numbers._asdict(),
            **constants._asdict(),
            num_warps=constants.NUM_WARPS,
            num_stages=1,
            **cooperative,
        )
        return logits, normed

    def _constants(self, rows: int, width: int) -> Constants:
        """The shapes and tiles of a step over [rows, width] tokens."""
        tensors, tuning, layer = self.tensors, self.tuning, self.tensors.layers[0]
        on_gpu, element_size = tensors.embedding.is_cuda, tensors.embedding.element_size()
        size, power = tensors.embedding.shape[1], triton.next_power_of_2
        num_kv_heads, dim = layer.keys.shape[2:]
        num_heads = len(layer.query) // dim
        block_dim, block = max(32, power(dim)), max(32, power(size))

        tokens = power(rows * width)
        splits = self.num_splits(rows, tokens, num_heads * block_dim)
        if tokens > 1 or tuning.least_tokens > 1:
            tokens = max(8, tokens)

        inner_elements = tuning.inner_elements * 2 // element_size
        held = max(8, tokens) * block_dim  # of a head; all splits are in registers at once
        block_heads = max(1, min(power(num_heads), inner_elements // held, 2 * inner_elements // (held * splits)))
        block_inner = max(32, min(power(len(layer.gate)), inner_elements // tokens, MAX_INNER))
        most_rows = TILE_BYTES // (block * element_size)
        rows_of_norms = min(most_rows, ROWS_FOR_MANY) if tokens > MANY_TOKENS else most_rows

        return Constants(
            HAS_BIAS=layer.biases is not None,
            HAS_HEAD_NORM=layer.head_norm is not None,
            NUM_ENTRIES=self.table.shape[1],
            SIZE=size,
            SIZE_GATE=len(layer.gate),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            DIM=dim,
            TOKENS=tokens,
            BLOCK_WIDTH=power(width),
            BLOCK_PAIRS=max(16, power(width * (num_heads // num_kv_heads))),
            BLOCK=block,
            BLOCK_DIM=block_dim,
            SPLITS=splits,
            BLOCK_HEADS=block_heads,
            BLOCK_INNER=block_inner,
            BLOCK_QKV=min(tuning.block_qkv, rows_of_norms),
            BLOCK_OUT=tuning.block_out,
            BLOCK_GATE=min(tuning.block_gate, rows_of_norms),
            BLOCK_DOWN=tuning.block_down,
            BLOCK_HEAD=min(tuning.block_head, 2 * most_rows),
            BLOCK_KEYS=tuning.block_keys,
            ATTENTION_STAGES=tuning.attention_stages,
            PREFETCH=on_gpu,
            POLLS=on_gpu,
            NUM_WARPS=tuning.num_warps,
        )


def refusal(tensors: StepTensors) -> str | None:
    """Why the kernel does not serve these tensors, None if it does."""
    first = tensors.layers[0]
    if tensors.embedding.dtype not in DTYPES:
        return f"the weights are {tensors.embedding.dtype}; the kernel serves bfloat16, float16 and float32"
    row_bytes = tensors.embedding.shape[1] * tensors.embedding.element_size()
    if row_bytes > MAX_ROW_BYTES:
        return f"a hidden state of {row_bytes} bytes exceeds {MAX_ROW_BYTES}; it does not fit into a program"
    groups = [tensors, *tensors.layers, *(layer.biases or () for layer in tensors.layers)]
    groups += [layer.head_norm or () for layer in tensors.layers]
    for x in (x for group in groups for x in group if isinstance(x, Tensor)):
        if not x.is_contiguous() or x.dtype != tensors.embedding.dtype or x.data_ptr() % 16:
            return "a tensor is not contiguous, not aligned to 16 bytes or of another dtype"
    for layer in tensors.layers:
        shapes = [[x.shape for x in of if isinstance(x, Tensor)] for of in (layer, first)]
        norms = [of.head_norm and of.head_norm.eps for of in (layer, first)]
        if shapes[0] != shapes[1] or (layer.biases is None) != (first.biases is None) or norms[0] != norms[1]:
            return "layers differ in their shapes, biases or head norms"
    return None


def _addresses(layer: LayerTensors) -> list[int]:
    """A row of the kernel's table; the order is the kernel's."""
    biases = layer.biases or (layer.query,) * 3
    norms = layer.head_norm[:2] if layer.head_norm else (layer.query,) * 2
    tensors = (
        layer.query, layer.key, layer.value, *biases, layer.out, layer.gate, layer.up, layer.down,
        layer.attention_norm, layer.mlp_norm, *norms, layer.keys, layer.values,
    )  # fmt: skip
    return [*(x.data_ptr() for x in tensors), layer.window or 0]


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _floor_power(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def persistent_step_reference(token_ids: Tensor, starts: Tensor, tensors: StepTensors) -> tuple[Tensor, Tensor]:
    """The contract of `PersistentStep` in plain torch."""
    (rows, width), is_text = token_ids.shape, (starts < tensors.num_text_slots)[:, None]
    end = (starts[:, None] + torch.arange(1, width + 1, device=starts.device)).int()
    hidden = F.embedding(token_ids, tensors.embedding)
    for layer in tensors.layers:
        normed = rms_norm_reference(hidden, layer.attention_norm, tensors.eps)
        projections = zip((layer.query, layer.key, layer.value), layer.biases or (None,) * 3, strict=True)
        qkv = torch.cat([F.linear(normed, weight, bias) for weight, bias in projections], -1)
        keys, values = layer.keys[:rows], layer.values[:rows]
        query = rotary_write_reference(qkv, starts, tensors.cos, tensors.sin, keys, values, layer.head_norm)
        low = torch.zeros_like(end) if layer.window is None else (end - layer.window).clamp(min=0)
        spans = torch.stack([torch.where(is_text, low, end), end, torch.zeros_like(end)], -1)
        attended = ragged_attention_reference(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), spans, tensors.scaling
        )
        hidden = hidden + F.linear(attended.flatten(2), layer.out)
        normed = rms_norm_reference(hidden, layer.mlp_norm, tensors.eps)
        gated = F.silu(F.linear(normed, layer.gate)) * F.linear(normed, layer.up)
        hidden = hidden + F.linear(gated, layer.down)
    normed = rms_norm_reference(hidden, tensors.norm, tensors.eps)
    return F.linear(normed, tensors.head), normed
