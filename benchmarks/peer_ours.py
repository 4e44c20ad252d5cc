"""Our side of `peer_vllm.py`: the one-line call on the checkpoints as they are loaded. Arguments: options as JSON, the
file of the results."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from call_timing import PREFILLS, CallTimes, digest, equal_rows, timed
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import specdec
from specdec.bench.latency import synchronise


def methods_of(draft: PreTrainedModel, ks: list[int]) -> list[tuple[str, int | None, dict[str, Any]]]:
    """Name, number of draft tokens and options of each; plain decoding, which the others are compared with, first."""
    found: list[tuple[str, int | None, dict[str, Any]]] = [("plain", None, {})]
    for name, drafter in (("draft", draft), ("lookup", "prompt_lookup")):
        found += [(name, k, {"drafter": drafter, "num_speculative_tokens": k}) for k in ks]
    return [*found, ("cost_model", None, {"drafter": draft, "length_policy": "cost_model"})]


def measure(target: PreTrainedModel, ids: Tensor, new_tokens: int, rounds: int, **options: Any) -> dict[str, Any]:
    """An entry of one method and batch, with `tokens`, the new ones of every row."""

    def decode(count: int) -> Any:
        return specdec.generate(
            target, ids, torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
            pad_token_id=0, return_dict_in_generate=True, **options,
        )  # fmt: skip

    wait, times = partial(synchronise, ids.device), CallTimes(len(ids), new_tokens)
    for _ in range(2):
        out = decode(new_tokens)
    decode(1)
    for _ in range(rounds):
        seconds, out = timed(partial(decode, new_tokens), wait)
        times.whole.append(seconds)
    times.prefill = [timed(partial(decode, 1), wait)[0] for _ in range(PREFILLS)]
    tokens = out.sequences[:, ids.shape[1] :].tolist()
    return {
        "batch_size": len(ids), **times.summary(), "hash": digest(tokens), "tokens": tokens,
        "mean_acceptance_length": round(out.speculation.mean_acceptance_length, 3),
    }  # fmt: skip


def work(options: dict[str, Any]) -> list[dict[str, Any]]:
    folder, device = Path(options["folder"]), options["device"]
    if device == "cpu":
        torch.set_num_threads(1)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(folder / role, dtype="auto").to(device).eval()
        for role in ("target", "draft")
    )
    ids = torch.tensor(json.loads((folder / "prompts.json").read_text()), device=device)
    results, plain = [], {}
    for batch_size in options["batch_sizes"]:
        for name, k, chosen in methods_of(draft, options["ks"]):
            entry = measure(target, ids[:batch_size], options["new_tokens"], options["rounds"], **chosen)
            tokens = entry.pop("tokens")
            expected = plain.setdefault(batch_size, tokens)
            equal = f"{equal_rows(tokens, expected)}/{batch_size}"
            results.append({"method": name, "K": k, "equal_to_plain": equal, **entry})
            print("ours", name, k, batch_size, entry["tokens_per_second"], file=sys.stderr, flush=True)
    # Compared with what vLLM writes, in another process.
    (folder / "ours.json").write_text(json.dumps({"new_tokens": options["new_tokens"], "plain": plain}))
    return results


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(work(json.loads(sys.argv[1]))))
