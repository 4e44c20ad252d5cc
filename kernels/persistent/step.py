"""A whole decode step of a llama-, qwen2-, qwen3- or mistral-type model in one launch.

A step of few tokens through a small model is bound by its launches, not by its arithmetic or its memory. Here one
program per multiprocessor stays for the whole step, and a barrier among all of them stands where a launch would.
Weights depend on no other program, so each program's next tile is on its way into registers while it waits, and the
cache is asked for the ones behind it. Nothing is summed by atomics and every sum has a fixed order, so equal inputs
give equal bits; but they are not the bits of `in_order_linear`, so a model whose output must be exact is not run
through it.
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
# Where it was measured to be faster than the step layer by layer: up to so many tokens (rows * width), and slots that
# attention looks at, which no two programs share here; a single token may have twice as many.
FASTER_UP_TO = 8
FASTER_SLOTS = 1024
MAX_ROW_BYTES = 4096  # of a hidden state: a program holds whole rows of weights, and all tokens beside them
TILE_BYTES = 65536  # of such rows: 64 registers a thread, or shared memory
MAX_INNER = 4096


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

    eps: of every norm over the hidden state. num_text_slots: rows that start there or behind pad the batch; they see
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
    """What changes the speed, and the order of sums.

    Rows of weights per tile, powers of two from 8 on (block_gate: any multiple of 8); keys per tile; elements of the
    attention's splits that a program may have to merge; elements of a product's input (half as many in float32) that
    it takes at a time; num_warps of a program, among which a tile's inner dimension is split.
    least_tokens: to which fewer are padded; 8 fill a tensor core's operand, 1 leaves a single token to plain sums.
    crowded_rows: of the tiles behind a norm, at most, if there are more than 16 tokens, which take the registers.
    polls: whether barriers are waited for by plain reads in place of atomics. prefetch: whether later tiles are asked
    into the cache. num_programs: None = one per multiprocessor.
    cooperative: launched such that programs that cannot all be resident are an error in place of a hang.
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
    crowded_rows: int = 16
    polls: bool = True
    prefetch: bool = True
    num_programs: int | None = None
    cooperative: bool = True


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

        Writes their keys and values behind those. Returns logits, [rows, width, vocab], and the states behind the
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
        # Every program merges all splits behind the attention, so many tokens afford few of them.
        affordable = tuning.merged_elements // (tokens * size)
        return _floor_power(max(1, min(tuning.max_splits, affordable, self.num_programs // num_items)))

    def _launch(self, token_ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        tensors, tuning, layer = self.tensors, self.tuning, self.tensors.layers[0]
        (rows, width), size = token_ids.shape, tensors.embedding.shape[1]
        num_kv_heads, dim = layer.keys.shape[2:]
        num_heads = len(layer.query) // dim
        logits = tensors.head.new_empty(rows, width, len(tensors.head))
        normed = tensors.head.new_empty(rows, width, size)
        power = triton.next_power_of_2
        block_dim, block = max(32, power(dim)), max(32, power(size))
        splits = self.num_splits(rows, power(rows * width), num_heads * block_dim)
        tokens = power(rows * width)
        if tokens > 1 or tuning.least_tokens > 1:
            tokens = max(8, tokens)
        inner_elements = tuning.inner_elements * 2 // tensors.embedding.element_size()
        held = max(8, tokens) * block_dim  # of a head; all splits are in registers at once
        block_heads = max(1, min(power(num_heads), inner_elements // held, 2 * inner_elements // (held * splits)))
        block_inner = max(32, min(power(len(layer.gate)), inner_elements // tokens, MAX_INNER))
        most_rows = TILE_BYTES // (block * tensors.embedding.element_size())
        rows_of_norms = min(most_rows, tuning.crowded_rows) if tokens > 16 else most_rows
        persistent_step_kernel[(self.num_programs,)](
            token_ids,
            starts,
            self.table,
            self.arrived,
            tensors.embedding,
            tensors.norm,
            tensors.head,
            tensors.cos,
            tensors.sin,
            self.hidden,
            self.qkv,
            self.partial,
            self.weights,
            self.gated,
            normed,
            logits,
            rows,
            width,
            len(tensors.layers),
            tensors.num_text_slots,
            layer.keys.stride(0),
            len(tensors.head),
            tensors.eps,
            layer.head_norm.eps if layer.head_norm else 0.0,
            tensors.scaling,
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
            PREFETCH=tuning.prefetch and token_ids.is_cuda,
            POLLS=tuning.polls and token_ids.is_cuda,
            NUM_WARPS=tuning.num_warps,
            num_warps=tuning.num_warps,
            num_stages=1,
            **({"launch_cooperative_grid": True} if tuning.cooperative and token_ids.is_cuda else {}),
        )
        return logits, normed


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
