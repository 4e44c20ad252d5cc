"""The JSON record of a run and the tables made from it. Neither names a path of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
import transformers
from loops import ends_in_loop
from measure import Result, Spread, speedup
from methods import ASSISTED, ASSISTED_K, PLAIN, Pair
from transformers import PreTrainedModel

import specdec

REPOSITORY = Path(__file__).resolve().parent.parent


def environment(device: torch.device, script: str, argv: Sequence[str]) -> dict:
    """Machine, versions, revision and command line; `script` is its path in the repository."""
    sha, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {
        "machine": machine(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "specdec": specdec.__version__,
        },
        "git_sha": sha,
        "git_dirty": None if changes is None else bool(changes),
        "command": " ".join(["python", script, *map(without_folders, argv)]),
    }


def machine(device: torch.device) -> dict:
    found = {
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "processor": processor(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average_1min": round(psutil.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git(*arguments: str) -> str | None:
    """git's answer in this repository; None where there is no git or no repository."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def without_folders(argument: str) -> str:
    """A command-line argument with each path reduced to its last part."""
    return "=".join(Path(part).name if "/" in part else part for part in argument.split("="))


def describe_model(model: PreTrainedModel) -> dict:
    config = model.config.get_text_config(decoder=True)
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "model_type": config.model_type,
        "num_parameters": model.num_parameters(),
        **{name: getattr(config, name, None) for name in (*sizes, "vocab_size")},
    }


def describe_pair(pair: Pair) -> dict:
    lengths = [len(prompt) for prompt in pair.prompts]
    return {
        "models": {"name": pair.name, "target": describe_model(pair.target), "draft": describe_model(pair.draft)},
        "num_prompts": len(lengths),
        "prompt_tokens": {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)},
    }


def describe_result(result: Result, results: Sequence[Result]) -> dict:
    """One entry of the record. Speedups are None where there is nothing to compare with, or nothing was timed."""
    method, speculation = result.method, result.speculation
    plain = find(results, PLAIN, None, method.batch_size)
    assisted = find(results, ASSISTED, ASSISTED_K, method.batch_size)
    looping = [ends_in_loop(tokens) for tokens in result.outputs]
    entry = {
        "method": method.name,
        "batch_size": method.batch_size,
        "num_speculative_tokens": method.num_speculative_tokens,
        "num_equal": result.num_equal,
        "num_prompts": len(result.outputs),
        "timed": bool(result.seconds),
        "num_new_tokens": sum(len(tokens) for tokens in result.outputs),
        "tokens_per_second": as_dict(Spread.of(result.tokens_per_second())),
        "speedup_over_plain": as_dict(speedup(result, plain)),
        "speedup_over_assisted": None if assisted is None else as_dict(speedup(result, assisted)),
        "foreign_cores": result.foreign_cores,
        "looping_share": sum(looping) / len(looping),
        "speedup_over_plain_without_loops": None,
    }
    if method.batch_size == 1:
        # The reference's loops, so that every method is judged on the same prompts.
        kept = [i for i, tokens in enumerate(plain.outputs) if not ends_in_loop(tokens)]
        entry["speedup_over_plain_without_loops"] = as_dict(speedup(result, plain, kept)) if kept else None
    return entry | ({} if speculation is None else speculation.to_dict())


def find(results: Sequence[Result], name: str, k: int | None, batch_size: int) -> Result | None:
    wanted = (name, k, batch_size)
    for result in results:
        if (result.method.name, result.method.num_speculative_tokens, result.method.batch_size) == wanted:
            return result
    return None


def as_dict(spread: Spread | None) -> dict | None:
    return None if spread is None else asdict(spread)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: float | dict | None, spec: str = ".2f", spread: bool = False) -> str:
    """A number, or a spread's median with its range."""
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return format(value, spec)
    text = format(value["median"], spec)
    return f"{text} ({value['min']:{spec}}-{value['max']:{spec}})" if spread else text


def speed_table(entries: Sequence[dict]) -> str:
    header = ("method", "batch", "K", "equal", "tokens/s (range)", "x plain (range)", "x assisted", "x plain, no loops",
              "acceptance length", "acceptance rate")  # fmt: skip
    rows = []
    for entry in entries:
        speed = cell(entry["tokens_per_second"], ".0f", spread=True) if entry["timed"] else "NOT EQUAL, not timed"
        rows.append(
            (
                entry["method"],
                str(entry["batch_size"]),
                cell(entry["num_speculative_tokens"], "d"),
                f"{entry['num_equal']}/{entry['num_prompts']}",
                speed,
                cell(entry["speedup_over_plain"], spread=True),
                cell(entry["speedup_over_assisted"]),
                cell(entry["speedup_over_plain_without_loops"]),
                cell(entry.get("mean_acceptance_length")),
                cell(entry.get("draft_acceptance_rate")),
            )
        )
    return markdown(header, rows)


def stage_table(profiles: Sequence[dict]) -> str:
    """Shares in percent of the time of `specdec.generate`; milliseconds per forward behind them."""
    stages = list(profiles[0]["share"])
    header = ("method", "batch", "K", *(f"{stage} %" for stage in stages), "ms per verify", "ms per draft token")
    rows = [
        (
            found["method"],
            str(found["batch_size"]),
            cell(found["num_speculative_tokens"], "d"),
            *(format(100 * found["share"][stage], ".1f") for stage in stages),
            cell(found["verify_ms_per_call"]),
            cell(found["draft_ms_per_call"]),
        )
        for found in profiles
    ]
    return markdown(header, rows)


def best_of(results: Sequence[Result], key: Callable[[Result], tuple]) -> list[Result]:
    """Of our timed results, the fastest of each kind."""
    best: dict[tuple, Result] = {}
    for result in results:
        if not result.method.is_ours or not result.seconds:
            continue
        known = best.get(key(result))
        if known is None or median_speed(result) > median_speed(known):
            best[key(result)] = result
    return list(best.values())


def median_speed(result: Result) -> float:
    return Spread.of(result.tokens_per_second()).median
