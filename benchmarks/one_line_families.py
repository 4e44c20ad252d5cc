"""Families of models: is the one-line call as fast as transformers, and is its output exact? See `one_line.py`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from call_timing import digest, equal_rows, ratio, timed
from random_models import FAMILIES, Size, random_family, random_prompts
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.bench.latency import synchronise
from specdec.errors import SpecDecError
from specdec.network.choose import service_of

LOOKUP_K = 5
OURS = ("plain", "lookup")


def check_families(families: Sequence[str]) -> None:
    """Raises ValueError for a family without a configuration here."""
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ValueError(f"unknown families {', '.join(unknown)}; choose among {', '.join(FAMILIES)}")


def service(model: PreTrainedModel) -> dict[str, Any]:
    """What `specdec doctor` says of the model."""
    found = service_of(model)
    return {"network": found.network_type.__name__, "is_exact": found.is_exact, "reason": found.reason}


def decode(model: PreTrainedModel, method: str, ids: Tensor, new_tokens: int) -> tuple[Tensor, Any]:
    """The output and, of ours, what was drafted."""
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    mask = torch.ones_like(ids)
    if method == "transformers":
        return model.generate(ids, attention_mask=mask, **options), None
    if method == "lookup":
        options.update(drafter="prompt_lookup", num_speculative_tokens=LOOKUP_K)
    out = specdec.generate(model, ids, mask, return_dict_in_generate=True, **options)
    return out.sequences, out.speculation


def measure_batch(model: PreTrainedModel, ids: Tensor, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second with the prefill, medians of calls that take turns, and which outputs are equal."""
    calls = {method: partial(decode, model, method, ids, new_tokens) for method in ("transformers", *OURS)}
    decode(model, "transformers", ids, 8)  # warm; it keeps nothing between calls
    out: dict[str, Any] = {method: calls[method]() for method in OURS}
    seconds: dict[str, list[float]] = {method: [] for method in calls}
    for _ in range(rounds):
        for method, call in calls.items():
            took, out[method] = timed(call, partial(synchronise, ids.device))
            seconds[method].append(took)

    new = {method: tokens[:, ids.shape[1] :].tolist() for method, (tokens, _) in out.items()}
    speeds = {method: len(ids) * new_tokens / statistics.median(took) for method, took in seconds.items()}
    rows = len(ids)
    return {
        "tokens_per_second_with_prefill": {method: round(speed, 1) for method, speed in speeds.items()},
        "over_transformers": {method: ratio(speeds[method], speeds["transformers"]) for method in OURS},
        "lookup_equal_to_plain": f"{equal_rows(new['lookup'], new['plain'])}/{rows}",
        "transformers_equal_to_plain": f"{equal_rows(new['transformers'], new['plain'])}/{rows}",
        "hashes": {method: digest(tokens) for method, tokens in new.items()},
        "different_tokens_per_row": round(statistics.mean(len(set(row)) for row in new["plain"]), 1),
        "mean_acceptance_length": round(out["lookup"][1].mean_acceptance_length, 3),
        "seconds": {method: [round(one, 4) for one in took] for method, took in seconds.items()},
    }


def measure(
    families: Sequence[str], size: Size, dtype: torch.dtype, device: torch.device, batch_sizes: Sequence[int],
    context: int, new_tokens: int, rounds: int, add: Callable[[dict], None], deadline: float = math.inf,
) -> None:  # fmt: skip
    """Add an entry for every family; begin none after the deadline."""
    for family in families:
        if time.perf_counter() > deadline:
            return
        begin = time.perf_counter()
        model = random_family(family, size, dtype, device)
        entry: dict[str, Any] = {
            "family": family, "size": asdict(size), "parameters": sum(p.numel() for p in model.parameters()),
            "context": context, "new_tokens": new_tokens, "num_speculative_tokens": LOOKUP_K,
        }  # fmt: skip
        try:
            entry["service"] = service(model)
            for batch_size in batch_sizes:
                ids = random_prompts(batch_size, context, size, device)
                entry[f"batch {batch_size}"] = measure_batch(model, ids, new_tokens, rounds)
        except (torch.OutOfMemoryError, SpecDecError) as error:
            entry["not_served"] = f"{type(error).__name__}: {error}"[:400]
        add({**entry, "family_seconds": round(time.perf_counter() - begin, 1)})
        let_go(model)
        del model


def let_go(*models: PreTrainedModel) -> None:
    """Give back what is kept with the models."""
    for model in models:
        specdec.release(model)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def batches(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: found for name, found in entry.items() if name.startswith("batch ")}


def wrong(entries: Sequence[dict]) -> list[str]:
    """Families that are said to be exact although lookup changed a token."""
    return [
        entry["family"]
        for entry in entries
        if entry.get("service", {}).get("is_exact")
        and any(len(set(found["lookup_equal_to_plain"].split("/"))) > 1 for found in batches(entry).values())
    ]


def slower(entries: Sequence[dict]) -> list[str]:
    """Where ours is slower than transformers: "family batch N method ratio"."""
    return [
        f"{entry['family']} {name} {method} {found['over_transformers'][method]}"
        for entry in entries
        for name, found in batches(entry).items()
        for method in OURS
        if found["over_transformers"][method] < 1
    ]


def table(entries: Sequence[dict]) -> str:
    """Speed over transformers' generate, plain / lookup, one line per family."""
    names = sorted({name for entry in entries for name in batches(entry)}, key=lambda name: int(name.split()[1]))
    head = ["| family | network | exact | " + " | ".join(names) + " | lookup equal to plain | why not exact |"]
    head.append("|---|---|---|" + "--:|" * len(names) + "---|---|")
    lines = []
    for entry in entries:
        found, said = batches(entry), entry.get("service", {"network": None, "is_exact": None, "reason": ""})
        exact = {True: "yes", False: "no", None: "not said"}[said["is_exact"]]
        faster = [" / ".join(str(found[n]["over_transformers"][m]) for m in OURS) if n in found else "" for n in names]
        equal = ", ".join(one["lookup_equal_to_plain"] for one in found.values())
        reason = entry.get("not_served") or ("" if said["is_exact"] else said["reason"])
        network = said["network"] or ""
        lines.append("| " + " | ".join([entry["family"], network, exact, *faster, equal, reason]) + " |")
    return "\n".join(head + lines)
