"""Bitwise comparisons on one device: each kernel with itself across batches, and a model's logits across forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from linear_tuning import CANDIDATES
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec.batch.rows import Rows
from specdec.kernels.attention.ragged_attention import ragged_attention
from specdec.kernels.linear.in_order_linear import in_order_linear
from specdec.kernels.linear.linear_tiles import Tile
from specdec.kernels.linear.norms import layer_norm, rms_norm
from specdec.network.choose import build_network
from specdec.network.model_cache import cache_argument

ROW_COUNTS = (1, 2, 3, 5, 8, 16, 17, 33, 40, 64, 100, 160, 256)
WIDTHS = (1, 2, 5, 6, 9, 33)  # tokens of a row in one forward


class Tally:
    """Elements compared and elements that differ."""

    def __init__(self, name: str):
        self.name, self.compared, self.different = name, 0, 0

    def add(self, found: Tensor, expected: Tensor) -> None:
        self.compared += expected.numel()
        self.different += int((found != expected).sum()) + int(found.isnan().sum())

    def record(self) -> dict:
        return {"what": self.name, "compared": self.compared, "different": self.different}


def randn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def linear_bits(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, most: int) -> list[dict]:
    """shape: (out, in). `most` rows at once against fewer, with every tile, and the library's product for contrast."""
    name = f"linear {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
    x = randn(most, shape[1], dtype=dtype, device=device)
    weight = randn(*shape, dtype=dtype, device=device) / shape[1] ** 0.5
    bias = randn(shape[0], dtype=dtype, device=device)
    tallies = [Tally(f"{name}: rows"), Tally(f"{name}: tiles"), Tally(f"{name}: library, rows")]
    expected, library = in_order_linear(x, weight, bias), F.linear(x, weight, bias)
    for rows in (n for n in ROW_COUNTS if n < most):
        tallies[0].add(in_order_linear(x[:rows], weight, bias), expected[:rows])
        tallies[2].add(F.linear(x[:rows], weight, bias), library[:rows])
    tiles = {tile for tiles in CANDIDATES.values() for tile in tiles}
    if dtype == torch.float16:
        tiles = {tiles[0] for tiles in CANDIDATES.values()}
    elif dtype == torch.float32:
        tiles = {Tile(16, 32, 32, False, 2, 4), Tile(32, 32, 16, False, 2, 4), Tile(16, 32, 32, True, 2, 4)}
    for tile in tiles if device.type == "cuda" else ():
        tallies[1].add(in_order_linear(x, weight, bias, tile=tile), expected)
    return [tally.record() for tally in tallies]


def norm_bits(size: int, dtype: torch.dtype, device: torch.device, most: int) -> list[dict]:
    x, weight = randn(most, size, dtype=dtype, device=device), randn(size, dtype=dtype, device=device)
    tallies = []
    for name, norm in (
        ("rms_norm", lambda x: rms_norm(x, weight, 1e-6)),
        ("rms_norm, gemma", lambda x: rms_norm(x, weight, 1e-6, True, False)),
        ("layer_norm", lambda x: layer_norm(x, weight, weight, 1e-6)),
    ):
        tally = Tally(f"{name} {size} {str(dtype).removeprefix('torch.')}: rows")
        expected = norm(x)
        for rows in (n for n in ROW_COUNTS if n < most):
            tally.add(norm(x[-rows:]), expected[-rows:])
        tallies.append(tally.record())
    return tallies


def attention_bits(
    heads: int, kv_heads: int, dim: int, length: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> list[dict]:
    """One prefill of `length` tokens against every width, fewer rows, padding in front and a longer buffer."""
    rows, scaling = 3, dim**-0.5
    query = randn(rows, heads, length, dim, dtype=dtype, device=device)
    key, value = (
        randn(rows, length, kv_heads, dim, dtype=dtype, device=device, seed=i).transpose(1, 2) for i in (1, 2)
    )
    high = torch.arange(1, length + 1, dtype=torch.int32, device=device).expand(rows, length)
    low = torch.zeros_like(high) if window is None else (high - window).clamp(min=0)
    spans = torch.stack([low, high, torch.zeros_like(high)], -1).contiguous()
    expected = ragged_attention(query, key, value, spans, scaling)
    name = f"attention {heads}/{kv_heads} heads of {dim}, window {window}, {str(dtype).removeprefix('torch.')}"
    tallies = {what: Tally(f"{name}: {what}") for what in ("width", "rows", "padding", "library, width")}
    library = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=scaling)
    for width in WIDTHS:
        for begin in sorted({0, length // 3, length // 2 - 1, length - width}):
            columns = slice(begin, begin + width)
            some = spans[:, columns].contiguous()
            tallies["width"].add(
                ragged_attention(query[:, :, columns], key, value, some, scaling), expected[:, columns]
            )
            alone = ragged_attention(query[1:2, :, columns], key[1:2], value[1:2], some[1:2], scaling)
            tallies["rows"].add(alone, expected[1:2, columns])
            padded = [F.pad(x, (0, 0, 41, 7), value=2.0) for x in (key, value)]
            shifted = ragged_attention(query[:, :, columns], *padded, some + 41, scaling)
            tallies["padding"].add(shifted, expected[:, columns])
            if window is None:
                mask = torch.arange(length, device=device) < some[0, :, 1:2]
                out = F.scaled_dot_product_attention(
                    query[:, :, columns], key, value, attn_mask=mask, enable_gqa=True, scale=scaling
                )
                tallies["library, width"].add(out, library[:, :, columns])
    return [tally.record() for tally in tallies.values() if tally.compared]


@torch.no_grad()
def logit_bits(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    num_checked: int,
    log: Callable[[str], None],
    transformers_alone: bool = False,
) -> list[dict]:
    """Logits of each sequence's last `num_checked` tokens: from one forward alone, against every other way to get them.

    sequences: [length] int64 each, of different lengths. The stock modules differ here; invariant ones must not.
    transformers_alone: without our networks, which refuse models whose stock logits differ too far.
    """
    sequences = sorted((ids.to(model.device) for ids in sequences), key=len, reverse=True)
    expected = [model(input_ids=ids[None], use_cache=False, logits_to_keep=num_checked).logits[0] for ids in sequences]
    records = []
    for what, logits in other_ways(model, sequences, num_checked, transformers_alone):
        tally = Tally(f"logits: {what}")
        flips = 0
        for row, begin, found in logits:
            wanted = expected[row][begin : begin + len(found)]
            tally.add(found, wanted)
            flips += int((found.argmax(-1) != wanted.argmax(-1)).sum())
        records.append({**tally.record(), "argmax_different": flips})
        log(f"{what}: {tally.different} of {tally.compared} logits differ, {flips} argmaxes")
    return records


Found = Iterator[tuple[int, int, Tensor]]  # row, first of its checked tokens, logits [tokens, vocab]


def other_ways(
    model: PreTrainedModel, sequences: Sequence[Tensor], num_checked: int, transformers_alone: bool
) -> Iterator[tuple[str, Found]]:
    yield "decoded one by one, batch 1, transformers' cache", decoded(model, sequences[:2], num_checked)
    yield f"left-padded prefill, batch {len(sequences)}, no cache", padded(model, sequences, num_checked)
    for width in () if transformers_alone else (1, 4, 9):
        for batch in sorted({1, len(sequences)}):
            what = "decoded one by one" if width == 1 else f"verified {width} at a time"
            chosen = sequences[:batch]
            yield f"{what}, batch {batch}, ragged cache", verified(model, chosen, num_checked, width)


def decoded(model: PreTrainedModel, sequences: Sequence[Tensor], num_checked: int) -> Found:
    for row, ids in enumerate(sequences):
        cache = DynamicCache(config=model.config)
        begin = len(ids) - num_checked
        model(input_ids=ids[None, :begin], logits_to_keep=1, **cache_argument(model, cache))
        for i in range(num_checked):
            yield (
                row,
                i,
                model(input_ids=ids[None, begin + i : begin + i + 1], **cache_argument(model, cache)).logits[0],
            )


def padded(model: PreTrainedModel, sequences: Sequence[Tensor], num_checked: int) -> Found:
    longest = len(sequences[0])
    ids = torch.stack([F.pad(s, (longest - len(s), 0)) for s in sequences])
    mask = torch.stack([torch.arange(longest, device=s.device) >= longest - len(s) for s in sequences]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=num_checked
    ).logits
    for row in range(len(sequences)):
        yield row, 0, logits[row]


def verified(model: PreTrainedModel, sequences: Sequence[Tensor], num_checked: int, width: int) -> Found:
    rows = Rows([ids[: len(ids) - num_checked].cpu() for ids in sequences], num_checked, 0, model.device)
    network = build_network(model, len(rows), rows.capacity)
    lengths = torch.tensor([len(ids) - num_checked for ids in sequences], device=model.device)
    with network.running():
        network.prefill(rows)
        for begin in range(0, num_checked, width):
            count = min(width, num_checked - begin)
            place = [len(ids) - num_checked + begin for ids in sequences]
            tokens = torch.stack([ids[p : p + count] for ids, p in zip(sequences, place, strict=True)])
            logits = network.forward(tokens, lengths + begin, max(place) + count).logits
            for row in range(len(sequences)):
                yield row, begin, logits[row]
