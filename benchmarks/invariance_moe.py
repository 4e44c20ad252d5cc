"""A mixture of experts at a real shape, batch-invariant and stock: its tokens in several batches, its tiles timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from linear_tuning import BEYOND_CACHE, microseconds, random
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import specdec
from specdec.bench.latency import synchronise
from specdec.kernels.linear.expert_groups import group_by_expert, rows_for
from specdec.kernels.linear.expert_linear import TILES, expert_linear
from specdec.kernels.linear.linear_tiles import Tile

# Qwen3-30B-A3B's, and one that a CPU computes in seconds.
REAL = dict(
    vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_experts=128, num_experts_per_tok=8,
    moe_intermediate_size=768, intermediate_size=6144, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
)  # fmt: skip
SMALL = dict(
    vocab_size=512, hidden_size=64, num_hidden_layers=2, num_experts=16, num_experts_per_tok=4,
    moe_intermediate_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)  # fmt: skip
SETTINGS = [(size, k) for size in (1, 32) for k in (0, 5)]
NUM_ALONE = 8  # prompts of the settings of batch 1, which take longest
TOKENS = (1, 8, 32, 192, 1024, 4096)
CANDIDATES = {
    16: [
        Tile(16, 16, 256, True, 4, 4),
        Tile(16, 32, 128, True, 5, 4),
        Tile(16, 32, 256, True, 3, 4),
        Tile(16, 32, 256, True, 4, 4),
        Tile(16, 64, 128, True, 4, 4),
        Tile(16, 64, 128, True, 6, 4),
        Tile(16, 64, 256, True, 3, 4),
        Tile(16, 128, 128, True, 3, 4),
        Tile(16, 128, 64, True, 5, 4),
    ],
    32: [
        Tile(32, 32, 128, True, 4, 4),
        Tile(32, 64, 128, True, 3, 4),
        Tile(32, 64, 128, True, 4, 4),
        Tile(32, 128, 64, True, 4, 4),
        Tile(32, 128, 128, True, 3, 8),
    ],
    64: [
        Tile(64, 64, 128, False, 3, 4),
        Tile(64, 64, 128, False, 4, 4),
        Tile(64, 64, 128, True, 4, 4),
        Tile(64, 128, 64, True, 4, 4),
        Tile(64, 128, 64, False, 4, 4),
        Tile(64, 128, 64, False, 4, 8),
    ],
    128: [
        Tile(128, 64, 64, False, 4, 4),
        Tile(128, 128, 64, False, 3, 8),
        Tile(128, 128, 64, False, 4, 8),
        Tile(128, 128, 64, False, 4, 4),
        Tile(128, 256, 64, False, 3, 8),
    ],
}


def moe_model(device: torch.device, dtype: torch.dtype, num_layers: int | None = None) -> PreTrainedModel:
    """Random weights, built on the device. A CPU gets the small shape."""
    shape = REAL if device.type == "cuda" else SMALL
    shape = shape if num_layers is None else {**shape, "num_hidden_layers": num_layers}
    config = Qwen3MoeConfig(
        **shape, max_position_embeddings=4096, norm_topk_prob=True, tie_word_embeddings=False, eos_token_id=None,
        pad_token_id=0, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def token_records(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    new_tokens: int,
    log: Callable[[str], None],
    transformers_alone: bool = False,
) -> Iterator[dict]:
    """Prompts whose tokens are those of transformers' own `generate` of each alone: by transformers in one batch, and
    by ours per batch size and K (0: plain; drafts come from the prompt).

    prompts: [length] int64 each. Batch 1 decodes the first prompts alone. transformers_alone: without ours.
    """
    prompts = [prompt.to(model.device) for prompt in prompts]
    options = dict(max_new_tokens=new_tokens, pad_token_id=0)

    def by_transformers(ids: Tensor, mask: Tensor) -> Tensor:
        return model.generate(ids, attention_mask=mask, do_sample=False, **options)

    expected = [by_transformers(*left_pad([prompt]))[0, len(prompt) :] for prompt in prompts]

    def record(who: str, size: int, k: int, decode: Callable[[Tensor, Tensor], Tensor]) -> dict:
        chosen = prompts[:NUM_ALONE] if size == 1 else prompts
        equal, begin = 0, time.perf_counter()
        for first in range(0, len(chosen), size):
            ids, mask = left_pad(chosen[first : first + size])
            out = decode(ids, mask)[:, ids.shape[1] :]
            equal += sum(torch.equal(row, want) for row, want in zip(out, expected[first:], strict=False))
        synchronise(model.device)
        entry = {
            "who": who, "batch_size": size, "num_speculative_tokens": k, "num_equal": equal,
            "num_prompts": len(chosen), "new_tokens": new_tokens, "seconds": round(time.perf_counter() - begin, 2),
        }  # fmt: skip
        log(str(entry))
        return entry

    yield record("transformers", 32, 0, by_transformers)
    for size, k in [] if transformers_alone else SETTINGS:
        drafting = dict(drafter="prompt_lookup", num_speculative_tokens=k) if k else {}
        yield record("specdec", size, k, partial(specdec.generate, model, **drafting, **options))


def left_pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.arange(longest, device=p.device) >= longest - len(p) for p in prompts])
    return ids, mask.long()


def expert_speed(log: Callable[[str], None]) -> list[dict]:
    """Microseconds of the two products of one layer's experts, and GB/s of the weights that they must read once."""
    shapes = {
        "gate_up": (2 * REAL["moe_intermediate_size"], REAL["hidden_size"]),
        "down": (REAL["hidden_size"], REAL["moe_intermediate_size"]),
    }
    experts, k = REAL["num_experts"], REAL["num_experts_per_tok"]
    records = []
    for name, (size_out, size_in) in shapes.items():
        generator = torch.Generator(device="cuda").manual_seed(0)
        copies = max(2, BEYOND_CACHE // (2 * experts * size_out * size_in))
        weights = [random((experts, size_out, size_in), generator) / size_in**0.5 for _ in range(copies)]
        for tokens in TOKENS:
            ids = torch.rand(tokens, experts, generator=generator, device="cuda").topk(k, -1)[1].flatten()
            x = random((tokens if name == "gate_up" else tokens * k, size_in), generator)
            used = len(ids.unique())
            timed, different, expected = [], 0, None
            for rows, tiles in CANDIDATES.items():
                if not rows_for(len(ids), experts) / 4 <= rows <= rows_for(len(ids), experts) * 4:
                    continue
                groups = group_by_expert(ids, experts, block_rows=rows)
                for tile in tiles:
                    found = expert_linear(x, weights[0], None, ids, groups, tile=tile)
                    expected = found if expected is None else expected
                    different += int((found != expected).sum())
                    call = lambda w, g=groups, t=tile: expert_linear(x, w, None, ids, g, tile=t)  # noqa: B023, E731
                    timed.append((microseconds(call, weights), tile))
            group_us = microseconds(lambda w: group_by_expert(ids, experts).order, weights)  # noqa: B023
            best_us, best = min(timed)
            table = TILES[rows_for(len(ids), experts)]
            gb = 2e-9 * used * size_out * size_in
            table_us = next((us for us, tile in timed if tile == table), None)
            records.append(
                {
                    "layer": name, "tokens": tokens, "pairs": len(ids), "used_experts": used, "best_us": best_us,
                    "best_tile": list(best), "table_us": table_us, "table_tile": list(table), "group_us": group_us,
                    "best_gb_s": gb / best_us * 1e6, "teraflops": 2e-6 * len(ids) * size_out * size_in / best_us,
                    "different_between_tiles": different, "all_us": [[round(us, 2), list(t)] for us, t in timed],
                }
            )  # fmt: skip
            log(
                f"{name:8} {tokens:4} tokens, {used:3} experts: best {best_us:7.1f} us {gb / best_us * 1e6:5.0f} GB/s "
                f"{tuple(best)}, table {table_us or float('nan'):7.1f} us, grouping {group_us:.1f} us, "
                f"differing {different}"
            )
        del weights
    return records
