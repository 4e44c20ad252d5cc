"""What sampling costs: a sampled speculative step against the same greedy step, its kernels, and its memory.

Steps are those of `specdec.generate` with a draft model, timed from commit to commit while all rows are being decoded,
with the settings in turn within each repeat. On a GPU the pair is inflated to a large shape (stand_in.py) and runs
batch-invariant. Memory is that of a random model with a large vocabulary and few layers, after its prefill. Every part
is written to the record as soon as it is measured.

    python benchmarks/sampling.py --pair specdec/assets/demo_pair --out sampling.json
    python3 benchmarks/sampling.py --device cuda --pair specdec/assets/demo_pair --out sampling.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import gpu_timing
import torch
from stand_in import SHAPES, inflate
from torch import Tensor
from torch.autograd import DeviceType
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import specdec
from specdec import StepReport
from specdec.files.environment import environment
from specdec.files.loading import read_prompts
from specdec.kernels.commit.distribution import distribution_of
from specdec.kernels.commit.greedy_commit import greedy_commit
from specdec.kernels.commit.sample import sample
from specdec.kernels.commit.sampled_commit import sampled_commit
from specdec.kernels.commit.truncation import NO_TRUNCATION, Truncation, Truncations

PARTS = ("steps", "kernels", "memory")
GREEDY = "greedy"
SAMPLED = {"do_sample": True, "top_k": 0, "seed": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    GREEDY: {"do_sample": False},
    "token": SAMPLED,
    "block": {**SAMPLED, "verification": "block"},
    "token, temperature 0.8": {**SAMPLED, "temperature": 0.8},
    "token, top-k 50": {**SAMPLED, "top_k": 50},
    "token, top-p 0.9": {**SAMPLED, "top_p": 0.9},
    "block, top-k 50, top-p 0.9": {**SAMPLED, "top_k": 50, "top_p": 0.9, "verification": "block"},
    "token, typical 0.9 (transformers' own warper)": {**SAMPLED, "typical_p": 0.9},
    "token, repetition penalty": {**SAMPLED, "repetition_penalty": 1.1},
}


class Record:
    """A JSON file that always holds what has been measured so far."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.content = path, about
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, entry: Any) -> None:
        self.content.setdefault(part, []).append(entry)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        print(part, json.dumps(entry), flush=True)


class Enough(Exception):
    """Ends a generation once its steps have been timed."""


class StepClock:
    """Times between the commits of steps, without the first, which may capture or compile.

    seconds: wall time. cpu_seconds: CPU time of this process, which other processes do not lengthen.
    """

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.committed = 0

    def __call__(self, report: StepReport) -> None:  # a report has been read from the device, so no work is pending
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.committed += int(report.num_committed.sum()) if len(self.wall) > 2 else 0
        if len(self.wall) > self.num_steps + 2:
            raise Enough


def differences(series: Sequence[Sequence[float]]) -> list[list[float]]:
    """Differences of each series, without its first two times."""
    return [[after - before for before, after in pairwise(times[2:])] for times in series]


def median(series: Sequence[Sequence[float]]) -> float:
    return statistics.median(chain.from_iterable(series))


def timed_steps(models: dict[str, PreTrainedModel], ids: Tensor, k: int, num_steps: int, options: dict) -> StepClock:
    clock = StepClock(num_steps)
    with suppress(Enough):
        specdec.generate(
            models["target"], ids, drafter=models["draft"], num_speculative_tokens=k, on_commit=clock, pad_token_id=0,
            max_new_tokens=(k + 1) * (num_steps + 3), **options,
        )  # fmt: skip
    return clock


def step_overheads(
    models: dict[str, PreTrainedModel], ids: Tensor, k: int, num_steps: int, repeats: int, names: Sequence[str],
    add: Callable[[dict], None],
) -> None:  # fmt: skip
    clocks: dict[str, list[StepClock]] = {name: [] for name in names}
    for repeat in range(repeats + 1):  # the first warms up
        for name in names:
            clock = timed_steps(models, ids, k, num_steps, SETTINGS[name])
            if repeat:
                clocks[name].append(clock)
    wall = {name: differences([clock.wall for clock in own]) for name, own in clocks.items()}
    cpu = {name: differences([clock.cpu for clock in own]) for name, own in clocks.items()}
    for name in names:
        entry: dict[str, Any] = {
            "batch_size": len(ids), "K": k, "setting": name,
            "step_ms": round(1e3 * median(wall[name]), 3),
            "cpu_ms": round(1e3 * median(cpu[name]), 3),
            "step_ms_of_repeats": [round(1e3 * statistics.median(one), 3) for one in wall[name]],
            "tokens_per_step": round(
                sum(clock.committed for clock in clocks[name]) / (repeats * num_steps * len(ids)), 2
            ),
        }  # fmt: skip
        if GREEDY in names:
            for what, values in (("overhead_percent", wall), ("cpu_overhead_percent", cpu)):
                entry[what] = round(100 * (median(values[name]) / median(values[GREEDY]) - 1), 1)
        add(entry)


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median time of one call; on a GPU, device time."""
    if device.type == "cuda":
        return gpu_timing.milliseconds(call, repeats)
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        before = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)


def kernel_times(
    batch_size: int, k: int, vocab: int, dtype: torch.dtype, device: torch.device, add: Callable[[dict], None]
) -> None:
    """Times of each kernel alone, on random logits as peaked as a model's."""
    generator = torch.Generator(device).manual_seed(0)
    scores = (4 * torch.randn(batch_size, k + 1, vocab, device=device, generator=generator)).to(dtype)
    probs = torch.softmax(4 * torch.randn(batch_size, k, vocab, device=device, generator=generator), -1)
    draft = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(batch_size, k)
    numbers = torch.rand(batch_size, k + 1, device=device, dtype=torch.float64, generator=generator)
    tokens = torch.zeros(batch_size, 64, dtype=torch.long, device=device)
    start, limits = torch.full((batch_size,), 8, device=device), torch.full((batch_size,), 60, device=device)
    room, ends = torch.empty(batch_size, vocab, device=device), torch.empty(0, dtype=torch.long, device=device)

    def greedy() -> None:
        greedy_commit(scores, draft, ends, tokens, start.clone(), limits)

    timed: dict[str, Callable[[], Any]] = {
        "greedy: argmax of one draft token": lambda: scores[:, 0].argmax(-1),
        "greedy: verification": greedy,
    }
    each = {"plain": NO_TRUNCATION, "top-k 50": Truncation(top_k=50), "top-p 0.9": Truncation(top_p=0.9)}
    for name, one in each.items():
        truncation = Truncations.same(one, batch_size, device)
        found = distribution_of(scores, truncation)
        timed[f"sample of one draft token, {name}"] = lambda t=truncation: sample(scores[:, 0], t, numbers[:, 0], room)
        timed[f"distribution, {name}"] = lambda t=truncation: distribution_of(scores, t)
        for method in ("token", "block"):
            timed[f"{method} verification, {name}"] = lambda d=found, m=method: sampled_commit(
                d, draft, probs, numbers, ends, tokens, start.clone(), limits, m
            )
    for name, call in timed.items():
        add({
            "batch_size": batch_size, "K": k, "vocab": vocab, "dtype": str(dtype).removeprefix("torch."),
            "kernel": name, "ms": round(milliseconds(call, device), 4),
        })  # fmt: skip


def launches_per_step(
    models: dict[str, PreTrainedModel], ids: Tensor, k: int, names: Sequence[str], add: Callable[[dict], None]
) -> None:
    """Kernels and copies per step: the difference between a longer and a shorter generation, with graphs captured
    before.
    """
    for name in names:
        counts = []
        for num_steps in (4, 4, 12):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
                timed_steps(models, ids, k, num_steps, SETTINGS[name])
                torch.cuda.synchronize()
            counts.append(sum(event.device_type == DeviceType.CUDA for event in trace.events()))
        add({"batch_size": len(ids), "K": k, "setting": name, "device_events": (counts[2] - counts[1]) / 8})


def random_model(vocab: int, num_layers: int, hidden: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(num_layers)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=num_layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(device, dtype).eval()


def peak_memory(
    batch_size: int, k: int, vocab: int, dtype: torch.dtype, device: torch.device, names: Sequence[str],
    add: Callable[[dict], None],
) -> None:  # fmt: skip
    """Peak memory of a step beyond the weights. Naive: all logits and both softmaxes in float32."""
    models = {"target": random_model(vocab, 2, 512, dtype, device), "draft": random_model(vocab, 1, 256, dtype, device)}
    ids = torch.randint(3, vocab, (batch_size, 16), device=device)
    logits = batch_size * (k + 1) * vocab
    naive = 4 * logits + 4 * logits + 4 * batch_size * k * vocab
    for name in names:
        timed_steps(models, ids, k, 2, SETTINGS[name])
        held: list[int] = []

        def on_commit(report: StepReport, held: list[int] = held) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
                if len(held) == 1:
                    torch.cuda.reset_peak_memory_stats()
                held.append(torch.cuda.memory_allocated() if len(held) < 3 else torch.cuda.max_memory_allocated())
            else:
                held.append(0)
            if len(held) > 5:
                raise Enough

        with suppress(Enough):
            specdec.generate(
                models["target"], ids, drafter=models["draft"], num_speculative_tokens=k, on_commit=on_commit,
                pad_token_id=0, max_new_tokens=(k + 1) * 8, **SETTINGS[name],
            )  # fmt: skip
        weights = sum(p.nbytes for model in models.values() for p in model.parameters())
        add({
            "batch_size": batch_size, "K": k, "vocab": vocab, "dtype": str(dtype).removeprefix("torch."),
            "setting": name, "weights_mb": round(weights / 1e6, 1),
            **({} if device.type != "cuda" else {
                "held_between_steps_mb": round(held[2] / 1e6, 1),
                "peak_minus_weights_mb": round((held[-1] - weights) / 1e6, 1),
                "peak_minus_held_mb": round((held[-1] - held[2]) / 1e6, 1),
            }),
            "logits_mb": round(logits * dtype.itemsize / 1e6, 1), "naive_mb": round(naive / 1e6, 1),
        })  # fmt: skip


def load(arguments: argparse.Namespace, device: torch.device) -> dict[str, PreTrainedModel]:
    """The pair, inflated if a shape is given; without an end of sequence, so that all rows stay."""
    models = {}
    for role, shape in (("target", arguments.target_shape), ("draft", arguments.draft_shape)):
        model = AutoModelForCausalLM.from_pretrained(arguments.pair / role, dtype=torch.float32)
        models[role] = model.to(device) if shape == "own" else inflate(model, SHAPES[shape], torch.bfloat16, device)
        models[role].generation_config.eos_token_id = None
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--target-shape", choices=("own", *SHAPES), help="by default 8B on a GPU, else the pair's own")
    parser.add_argument("--draft-shape", choices=("own", *SHAPES), help="by default 0.6B on a GPU, else the pair's own")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--settings", help="numbers of settings of steps, 0 = greedy; by default all")
    parser.add_argument("--batch-sizes", help="by default 8 on a GPU, else 1,8")
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=151_936, help="rows of kernels and memory")
    parser.add_argument("--memory-batch-size", type=int, default=32)
    parser.add_argument("--context", type=int, default=64, help="prompt tokens")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device, k = torch.device(arguments.device), arguments.num_speculative_tokens
    on_gpu = device.type == "cuda"
    arguments.target_shape = arguments.target_shape or ("8B" if on_gpu else "own")
    arguments.draft_shape = arguments.draft_shape or ("0.6B" if on_gpu else "own")
    parts = arguments.parts.split(",")
    batch_sizes = [int(size) for size in (arguments.batch_sizes or ("8" if on_gpu else "1,8")).split(",")]
    names = list(SETTINGS)
    if arguments.settings:
        names = [names[int(number)] for number in arguments.settings.split(",")]
    shapes = f"{arguments.pair.name}: target {arguments.target_shape}, draft {arguments.draft_shape} (stand-ins)"
    if arguments.target_shape == arguments.draft_shape == "own":
        shapes = arguments.pair.name
    record = Record(
        arguments.out, {**environment(device, ["python", "benchmarks/sampling.py", *sys.argv[1:]]), "models": shapes}
    )
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if "kernels" in parts:
        for size in batch_sizes:
            kernel_times(size, k, arguments.vocab, dtype, device, lambda entry: record.add("kernels", entry))
    if "memory" in parts:
        peak_memory(
            arguments.memory_batch_size, k, arguments.vocab, dtype, device,
            [name for name in names if "warper" not in name and "penalty" not in name],
            lambda entry: record.add("memory", entry),
        )  # fmt: skip
    if "steps" in parts:
        models = load(arguments, device)
        tokenizer = AutoTokenizer.from_pretrained(arguments.pair / "target")
        texts = read_prompts(arguments.pair / "prompts.json", max(batch_sizes))
        encoded = [tokenizer(text.text)["input_ids"] for text in texts]
        rows = [(ids * -(-arguments.context // len(ids)))[-arguments.context :] for ids in encoded]
        ids = torch.tensor((rows * max(batch_sizes))[: max(batch_sizes)], device=device)
        with ExitStack() as stack:
            if on_gpu:
                for model in models.values():
                    stack.enter_context(specdec.batch_invariant(model))
            for size in batch_sizes:
                step_overheads(
                    models, ids[:size], k, arguments.steps, arguments.repeats, names,
                    lambda entry: record.add("steps", entry),
                )  # fmt: skip
                if on_gpu:
                    launches_per_step(models, ids[:size], k, names[:3], lambda entry: record.add("launches", entry))


if __name__ == "__main__":
    main()
