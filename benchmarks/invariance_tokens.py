"""Token equality: `specdec.generate` in many settings against transformers' `generate`, one prompt at a time.

Decoding small models is bound by the host, so the settings are shared among processes on one device.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pairs import load_pair

from specdec import make_batch_invariant
from specdec.bench.methods import Pair, batch_of, new_tokens, our_method, transformers_method
from specdec.check.ways import Way

PROMPTS_PER_TASK = 8  # for the batch-1 settings, so that processes finish together


@dataclass(frozen=True)
class Setting:
    """drafter: "draft_model", "prompt_lookup", or None for transformers' own generate."""

    drafter: str | None
    batch_size: int
    num_speculative_tokens: int | None

    @property
    def label(self) -> str:
        if self.drafter is None:
            return f"transformers, batch {self.batch_size}"
        return f"{self.drafter} K={self.num_speculative_tokens}, batch {self.batch_size}"


@dataclass(frozen=True)
class Job:
    """The settings of every process. dtype: a name in torch."""

    folder: str
    num_prompts: int
    max_new_tokens: int
    dtype: str
    device: str
    is_invariant: bool


_pair: Pair | None = None
_job: Job | None = None


def start(job: Job) -> None:
    """Run in each process: load the pair, and make the target invariant."""
    global _pair, _job
    torch.set_num_threads(1)
    _pair = load_pair(Path(job.folder), job.num_prompts, getattr(torch, job.dtype), torch.device(job.device))
    _job = job
    if job.is_invariant:
        make_batch_invariant(_pair.target)


@torch.no_grad()
def decode(task: tuple[Setting, range]) -> list[list[int]]:
    """New tokens of each prompt in the range, decoded batch by batch."""
    assert _pair is not None and _job is not None
    setting, prompts = task
    size, k = setting.batch_size, setting.num_speculative_tokens
    if setting.drafter is None:
        method = transformers_method(_pair, setting.label, size, None, _job.max_new_tokens)
    else:
        drafter = _pair.draft if setting.drafter == "draft_model" else setting.drafter
        method = our_method(_pair, Way(setting.drafter, k, size), drafter, _job.max_new_tokens)
    found: list[list[int]] = []
    for begin in range(prompts.start, prompts.stop, size):
        batch = batch_of(_pair, range(begin, min(begin + size, prompts.stop)))
        found += new_tokens(method.decode(batch), batch, _pair.eos_ids)
    return found


def compare(job: Job, settings: Sequence[Setting], num_processes: int) -> Iterator[dict]:
    """Yields one record per finished setting: the prompts whose tokens equal those of transformers at batch 1."""
    tasks = [(Setting(None, 1, None), prompts) for prompts in pieces(job.num_prompts, PROMPTS_PER_TASK)]
    for setting in sorted(settings, key=lambda setting: -setting.batch_size):
        per_task = max(setting.batch_size, PROMPTS_PER_TASK // setting.batch_size * setting.batch_size)
        tasks += [(setting, prompts) for prompts in pieces(job.num_prompts, per_task)]
    reference: list[list[int]] = []
    outputs: dict[Setting, list[list[int]]] = {setting: [] for setting in settings}
    with multiprocessing.get_context("spawn").Pool(num_processes, start, (job,)) as pool:
        for (setting, _), tokens in zip(tasks, pool.imap(decode, tasks, chunksize=1), strict=True):
            if setting.drafter is None:
                reference += tokens
                continue
            outputs[setting] += tokens
            if len(outputs[setting]) == job.num_prompts:
                yield describe(setting, outputs[setting], reference)


def describe(setting: Setting, tokens: Sequence[list[int]], reference: Sequence[list[int]]) -> dict:
    equal = [ours == theirs for ours, theirs in zip(tokens, reference, strict=True)]
    return {
        "setting": setting.label,
        "drafter": setting.drafter,
        "batch_size": setting.batch_size,
        "num_speculative_tokens": setting.num_speculative_tokens,
        "num_equal": sum(equal),
        "num_prompts": len(equal),
        "num_tokens": sum(map(len, reference)),
        "different_prompts": [i for i, same in enumerate(equal) if not same],
    }


def pieces(num_prompts: int, size: int) -> list[range]:
    return [range(begin, min(begin + size, num_prompts)) for begin in range(0, num_prompts, size)]
