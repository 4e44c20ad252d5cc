"""Is a batch-invariant model exact? Bits of the kernels, bits of the logits, tokens, and what the kernels cost.

    python benchmarks/invariance.py --device cuda --pair models/code-qwen3 --output benchmarks/results/invariance.json

Parts: `bits` compares each kernel with itself; `speed` times the in-order linear's tiles against the library;
`logits` and `tokens` run a trained pair, `large` a model of Qwen3-8B's shape with random weights, `moe` one of
Qwen3-30B-A3B's, a mixture of experts, logits and tokens, whose tiles `moe_speed` times. Everything also runs on the
stock modules, where differences must appear; otherwise the test would be too weak to mean anything.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from invariance_bits import attention_bits, linear_bits, logit_bits, norm_bits
from invariance_moe import expert_speed, moe_model, token_records
from invariance_tokens import Job, Setting, compare
from linear_tuning import CANDIDATES, SHAPES, table_source, tune
from pairs import load_pair
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from specdec import batch_invariant
from specdec.bench.measure import log_to_stderr as log
from specdec.files.environment import environment

DRAFTERS = ("draft_model", "prompt_lookup")
PARTS = ("bits", "speed", "logits", "tokens", "large", "moe", "moe_speed")
DEMO_PAIR = Path(__file__).resolve().parent.parent / "specdec" / "assets" / "demo_pair"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--pair", type=Path, default=DEMO_PAIR)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS), choices=DRAFTERS)
    parser.add_argument("--ks", type=int, nargs="+", default=list(range(1, 9)))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 3, 8, 32])
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--layers", type=int, default=36, help="of the large model")
    parser.add_argument("--moe-layers", type=int, help="of the mixture of experts; by default all 48")
    parser.add_argument("--revision", help="recorded if there is no git repository")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


def kernel_bits(device: torch.device, dtype: torch.dtype) -> list[dict]:
    length = 700 if device.type == "cuda" else 40
    checks = [
        *(partial(linear_bits, shape, dtype, device, 300) for shape in ((384, 1024), (1000, 97))),
        *(partial(norm_bits, size, dtype, device, 300) for size in (64, 100, 384, 4096)),
        partial(attention_bits, 6, 2, 64, length, None, dtype, device),
        partial(attention_bits, 4, 4, 80, length, 300, dtype, device),
    ]
    if device.type == "cuda" and dtype == torch.bfloat16:
        shapes = ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288))
        checks += [partial(linear_bits, shape, dtype, device, 512) for shape in shapes]
        checks += [partial(attention_bits, 32, 8, 128, 2100, None, dtype, device)]
    records = []
    for check in checks:
        for entry in check():
            log(f"{entry['what']}: {entry['different']} of {entry['compared']} differ")
            records.append(entry)
    return records


def random_sequences(count: int, longest: int, vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = [longest - 7 * i for i in range(count)]
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in lengths]


def both_ways(model: PreTrainedModel, sequences: list[Tensor], num_checked: int) -> dict:
    log("stock modules")
    found = {"stock": logit_bits(model, sequences, num_checked, log)}
    begin = time.perf_counter()
    with batch_invariant(model):
        log(f"batch-invariant, swapped in {time.perf_counter() - begin:.1f} s")
        found["invariant"] = logit_bits(model, sequences, num_checked, log)
    return found


def large_model(device: torch.device, num_layers: int) -> PreTrainedModel:
    """Qwen3-8B's shape with random weights."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=num_layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=4096,
        tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def mixture(device: torch.device, dtype: torch.dtype, num_layers: int | None, num_prompts: int, new: int) -> dict:
    """Logits and tokens of a mixture of experts, on stock and on invariant modules."""
    model = moe_model(device, dtype, num_layers)
    log(f"mixture of experts, {sum(p.numel() for p in model.parameters()) / 1e9:.2f}e9 parameters")
    longest, vocab_size = (600 if device.type == "cuda" else 60), model.config.vocab_size
    sequences = random_sequences(32 if device.type == "cuda" else 3, longest, vocab_size)
    prompts = [ids[: 40 + 5 * i] for i, ids in enumerate(random_sequences(num_prompts, longest, vocab_size))]
    found: dict = {"config": model.config.to_diff_dict(), "logits": {}, "tokens": {}}
    for name in ("stock", "invariant"):
        log(f"{name} modules")
        alone = name == "stock"
        with nullcontext() if alone else batch_invariant(model):
            found["logits"][name] = logit_bits(model, sequences, 18, log, transformers_alone=alone)
            found["tokens"][name] = list(token_records(model, prompts, new, log, transformers_alone=alone))
    return found


def token_settings(drafters: Sequence[str], batch_sizes: Sequence[int], ks: Sequence[int]) -> list[Setting]:
    return [Setting(name, size, k) for name in drafters for size in batch_sizes for k in ks]


def run(arguments: argparse.Namespace, record: dict) -> None:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if "bits" in arguments.parts:
        record["bits"] = kernel_bits(device, dtype)
    if "speed" in arguments.parts:
        record["speed"] = tune(SHAPES, CANDIDATES, log)
        log(table_source(record["speed"]))
    if "logits" in arguments.parts:
        pair = load_pair(arguments.pair, 32, dtype, device)
        vocab_size = pair.target.config.vocab_size
        longest = 700 if device.type == "cuda" else 60
        count = 32 if device.type == "cuda" else 3
        trained = [torch.cat([prompt] * (1 + longest // len(prompt)))[: longest - 11 * i] for i, prompt in
                   enumerate(pair.prompts[:count])]  # fmt: skip
        log(f"{pair.name}, vocabulary {vocab_size}")
        record["logits"] = both_ways(pair.target, trained, 18)
        del pair
    if "large" in arguments.parts:
        model = large_model(device, arguments.layers)
        record["large"] = both_ways(model, random_sequences(32, 600, 151936), 18)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if "moe" in arguments.parts:
        record["moe"] = mixture(
            device, dtype, arguments.moe_layers, min(32, arguments.num_prompts), min(32, arguments.max_new_tokens)
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if "moe_speed" in arguments.parts:
        record["moe_speed"] = expert_speed(log)
    if "tokens" in arguments.parts:
        record["tokens"] = {}
        for name, settings in (
            ("invariant", token_settings(arguments.drafters, arguments.batch_sizes, arguments.ks)),
            ("stock", token_settings(DRAFTERS, (1, 32), (5,))),
        ):
            log(f"tokens, {name} modules")
            job = Job(
                str(arguments.pair), arguments.num_prompts, arguments.max_new_tokens, arguments.dtype,
                arguments.device, name == "invariant",
            )  # fmt: skip
            record["tokens"][name] = []
            for entry in compare(job, settings, arguments.num_processes):
                log(f"{entry['setting']}: {entry['num_equal']}/{entry['num_prompts']} equal")
                record["tokens"][name].append(entry)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    begin = time.perf_counter()
    record = environment(torch.device(arguments.device), ["python", "benchmarks/invariance.py", *argv])
    record["git_sha"] = record["git_sha"] or arguments.revision
    record["pair"] = arguments.pair.resolve().name
    record["dtype"] = arguments.dtype
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    # A run that is stopped at a time limit keeps its results so far.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        run(arguments, record)
    finally:
        record["seconds"] = round(time.perf_counter() - begin, 1)
        if arguments.output:
            arguments.output.write_text(text_of(record) + "\n")
    print(summary(record))


def text_of(value: object, depth: int = 0) -> str:
    """JSON with one line per record of a list."""
    inside, behind = " " * (depth + 1), " " * depth
    if isinstance(value, dict) and depth < 3:
        entries = [f"{inside}{json.dumps(key)}: {text_of(entry, depth + 1)}" for key, entry in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        entries = [f"{inside}{json.dumps(entry)}" for entry in value]
    else:
        return json.dumps(value)
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    return f"{opening}\n" + ",\n".join(entries) + f"\n{behind}{closing}"


def summary(record: dict) -> str:
    lines = [f"{record['machine'].get('gpu', 'cpu')}, {record['dtype']}, {record['seconds']} s"]
    for part in ("bits",):
        ours = [entry for entry in record.get(part, []) if "library" not in entry["what"]]
        other = [entry for entry in record.get(part, []) if "library" in entry["what"]]
        for name, entries in (("kernels", ours), ("library", other)):
            lines.append(
                f"{name}: {sum(e['different'] for e in entries)} of {sum(e['compared'] for e in entries)} differ"
            )
    moe = record.get("moe", {})
    logits = {"logits": record.get("logits", {}), "large": record.get("large", {}), "moe": moe.get("logits", {})}
    for part, found in logits.items():
        for name, entries in found.items():
            lines += [f"{part}, {name}, {e['what']}: {e['different']} of {e['compared']} differ, "
                      f"{e['argmax_different']} argmaxes" for e in entries]  # fmt: skip
    for part, found in (("tokens", record.get("tokens", {})), ("moe tokens", moe.get("tokens", {}))):
        for name, entries in found.items():
            equal, prompts = sum(e["num_equal"] for e in entries), sum(e["num_prompts"] for e in entries)
            lines.append(f"{part}, {name}: {equal} of {prompts} prompts equal in {len(entries)} settings")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
