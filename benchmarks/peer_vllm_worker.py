"""vLLM's side of `peer_vllm.py`: one method in one process. Arguments: options as JSON, the file of the results.

Needs vLLM and nothing of specdec, so that it runs in an environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from call_timing import PREFILLS, CallTimes, digest, equal_rows, timed

# As in vLLM's own examples of n-gram speculation.
NGRAM = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
COUNTERS = {"drafts": "vllm:spec_decode_num_drafts", "accepted": "vllm:spec_decode_num_accepted_tokens"}


def speculative_config(method: str, k: int | None, folder: Path, more: dict[str, Any]) -> dict[str, Any] | None:
    """vLLM's `speculative_config`; None where nothing is drafted."""
    if method == "ngram":
        return {**NGRAM, "num_speculative_tokens": k, **more}
    if method == "draft":
        return {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": k, **more}
    return None


def llm_options(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The arguments of `vllm.LLM`. The user's own come last."""
    length = len(json.loads((folder / "prompts.json").read_text())[0]) + options["new_tokens"]
    return {
        "model": str(folder / "target"), "dtype": "bfloat16", "skip_tokenizer_init": True,
        "max_model_len": 2 * length, "max_num_seqs": max(64, *options["batch_sizes"]),
        "gpu_memory_utilization": 0.85, "enable_prefix_caching": False, "disable_log_stats": False,
        "generation_config": "vllm",
        "speculative_config": speculative_config(options["method"], options["k"], folder, options["speculative"]),
        **options["options"],
    }  # fmt: skip


def counts(metrics: Sequence[Any]) -> dict[str, int]:
    """What speculation has done so far; zeros without it."""
    values = {metric.name: getattr(metric, "value", 0) for metric in metrics}
    return {name: int(values.get(counter, 0)) for name, counter in COUNTERS.items()}


def acceptance_length(before: dict[str, int], after: dict[str, int]) -> float | None:
    """vLLM's own figure between two counts, 1 + accepted / drafts. It counts a bonus token where a row ended
    without one, and no step without a draft. None if nothing was drafted."""
    drafts = after["drafts"] - before["drafts"]
    return round(1 + (after["accepted"] - before["accepted"]) / drafts, 3) if drafts else None


def measure(
    decode: Callable[[int], list[list[int]]], read: Callable[[], dict[str, int]], rows: int, new_tokens: int,
    rounds: int,
) -> tuple[dict[str, Any], list[list[int]]]:  # fmt: skip
    """decode: writes that many tokens for every row, and returns when they are there."""
    times = CallTimes(rows, new_tokens)
    for _ in range(2):
        decode(new_tokens)
    decode(1)
    before, tokens = read(), []
    for _ in range(rounds):
        seconds, tokens = timed(lambda: decode(new_tokens))
        times.whole.append(seconds)
    length = acceptance_length(before, read())
    times.prefill = [timed(lambda: decode(1))[0] for _ in range(PREFILLS)]
    entry = {"batch_size": rows, **times.summary(), "hash": digest(tokens), "vllm_mean_acceptance_length": length}
    return entry, tokens


def expected_tokens(folder: Path, new_tokens: int) -> dict[str, list[list[int]]]:
    """Our plain decoding by batch size; empty if it was not measured for as many tokens."""
    path = folder / "ours.json"
    ours = json.loads(path.read_text()) if path.is_file() else {"new_tokens": None, "plain": {}}
    return ours["plain"] if ours["new_tokens"] == new_tokens else {}


def work(options: dict[str, Any]) -> list[dict[str, Any]]:
    import vllm

    folder = Path(options["folder"])
    rows = json.loads((folder / "prompts.json").read_text())
    begin = time.perf_counter()
    llm = vllm.LLM(**llm_options(options, folder))
    started = round(time.perf_counter() - begin, 1)
    expected, results = expected_tokens(folder, options["new_tokens"]), []
    for batch_size in options["batch_sizes"]:
        prompts = [{"prompt_token_ids": row} for row in rows[:batch_size]]

        def decode(count: int, prompts: list[dict] = prompts) -> list[list[int]]:
            sampling = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            found = llm.generate(prompts, sampling, use_tqdm=False)
            return [list(one.outputs[0].token_ids) for one in found]

        entry, tokens = measure(
            decode, lambda: counts(llm.get_metrics()), batch_size, options["new_tokens"], options["rounds"]
        )
        known = expected.get(str(batch_size))
        results.append({
            "method": options["method"], "K": options["k"], "version": vllm.__version__, "start_seconds": started,
            "equal_to_plain": None if known is None else f"{equal_rows(tokens, known)}/{batch_size}", **entry,
            "options": options["options"], "speculative": options["speculative"],
        })  # fmt: skip
    return results


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(work(json.loads(sys.argv[1]))))
