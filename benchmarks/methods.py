"""What is compared: transformers' decoding loops and ours, each as a function from a batch of prompts to token ids."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import specdec
from specdec import Speculation

PLAIN = "transformers plain"
ASSISTED = "transformers assisted"
ASSISTED_K = 5
LOOKUP_KS = (5, 10)


@dataclass(frozen=True)
class Pair:
    """A target, a draft with the same tokenizer, and prompts as [length] int64 token ids each."""

    name: str
    target: PreTrainedModel
    draft: PreTrainedModel
    prompts: list[Tensor]

    @property
    def eos_ids(self) -> frozenset[int]:
        eos = self.target.generation_config.eos_token_id
        return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left. prompt_indices: which of the pair's. input_ids, attention_mask: [rows, columns]."""

    prompt_indices: range
    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class Decoded:
    """sequences: [rows, columns + new tokens] int64, prompts included. speculation: None for the peers."""

    sequences: Tensor
    speculation: Speculation | None = None


@dataclass(frozen=True)
class Method:
    """One way to decode greedily. num_speculative_tokens: None where nothing is drafted or the method decides."""

    name: str
    batch_size: int
    is_ours: bool
    num_speculative_tokens: int | None
    decode: Callable[[Batch], Decoded]

    @property
    def label(self) -> str:
        k = self.num_speculative_tokens
        return f"{self.name}{'' if k is None else f' K={k}'}, batch {self.batch_size}"


def load_pair(folder: Path, num_prompts: int, dtype: torch.dtype, device: torch.device) -> Pair:
    """The pair in `folder`: target/ (with the tokenizer), draft/, and prompts.json, of which the first are used."""
    prompts = json.loads((folder / "prompts.json").read_text())
    if len(prompts) < num_prompts:
        raise ValueError(
            f"{folder.name}/prompts.json holds {len(prompts)} prompts, fewer than num_prompts={num_prompts}"
        )
    target, draft = (
        AutoModelForCausalLM.from_pretrained(folder / role, dtype=dtype).eval().to(device)
        for role in ("target", "draft")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    ids = [torch.tensor(tokenizer(prompt).input_ids) for prompt in prompts[:num_prompts]]
    return Pair(folder.resolve().name, target, draft, ids)


def batches(pair: Pair, batch_size: int) -> list[Batch]:
    """The prompts in their order, `batch_size` at a time."""
    return [left_pad(pair, range(begin, begin + batch_size)) for begin in range(0, len(pair.prompts), batch_size)]


def left_pad(pair: Pair, prompt_indices: range) -> Batch:
    prompts = [pair.prompts[i] for i in prompt_indices]
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pair.target.generation_config.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return Batch(prompt_indices, ids.to(pair.target.device), mask.to(pair.target.device))


def all_methods(pair: Pair, max_new_tokens: int, ks: Sequence[int], batch_sizes: Sequence[int]) -> list[Method]:
    """Peers and ours at every batch size; transformers speculates for one prompt at a time only."""
    found = []
    for batch_size in batch_sizes:
        found.append(transformers_method(pair, PLAIN, batch_size, None, max_new_tokens))
        if batch_size == 1:
            found += speculating_peers(pair, max_new_tokens)
        found.append(our_method(pair, "specdec plain", batch_size, None, None, max_new_tokens))
        for name, drafter in (("draft_model", pair.draft), ("prompt_lookup", "prompt_lookup")):
            found += [our_method(pair, f"specdec {name}", batch_size, k, drafter, max_new_tokens) for k in ks]
    return found


def speculating_peers(pair: Pair, max_new_tokens: int) -> list[Method]:
    """Assisted generation with a constant K, with the heuristic schedule, as it comes; and prompt lookup."""

    def assisted(name: str, k: int | None, **settings: object) -> Method:
        method = transformers_method(pair, name, 1, k, max_new_tokens, assistant_model=pair.draft)

        def decode(batch: Batch) -> Decoded:
            with assistant_settings(pair.draft, **settings):
                return method.decode(batch)

        return replace(method, decode=decode)

    constant = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    heuristic = {"num_assistant_tokens_schedule": "heuristic_transient", "assistant_confidence_threshold": 0.0}
    lookups = [
        transformers_method(pair, "transformers prompt lookup", 1, k, max_new_tokens, prompt_lookup_num_tokens=k)
        for k in LOOKUP_KS
    ]
    return [
        assisted(ASSISTED, ASSISTED_K, num_assistant_tokens=ASSISTED_K, **constant),
        assisted(f"{ASSISTED}, heuristic", None, num_assistant_tokens=ASSISTED_K, **heuristic),
        assisted(f"{ASSISTED}, defaults", None),
        *lookups,
    ]


@contextmanager
def assistant_settings(draft: PreTrainedModel, **settings: object) -> Iterator[None]:
    """transformers reads these from the draft's generation config, and some schedules write to it."""
    before = draft.generation_config
    try:
        draft.generation_config = copy.deepcopy(before)
        draft.generation_config.update(**settings)
        yield
    finally:
        draft.generation_config = before


def transformers_method(
    pair: Pair, name: str, batch_size: int, k: int | None, max_new_tokens: int, **options: object
) -> Method:
    def decode(batch: Batch) -> Decoded:
        return Decoded(
            pair.target.generate(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                **options,
            )
        )

    return Method(name, batch_size, False, k, decode)


def our_method(
    pair: Pair,
    name: str,
    batch_size: int,
    k: int | None,
    drafter: PreTrainedModel | str | None,
    max_new_tokens: int,
) -> Method:
    def decode(batch: Batch) -> Decoded:
        output = specdec.generate(
            pair.target,
            batch.input_ids,
            batch.attention_mask,
            drafter=drafter,
            num_speculative_tokens=k,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
        )
        return Decoded(output.sequences, output.speculation)

    return Method(name, batch_size, True, k, decode)


def new_tokens(decoded: Decoded, batch: Batch, eos_ids: frozenset[int]) -> list[list[int]]:
    """Each row's continuation up to and including its first end-of-sequence token; never padding."""
    rows = decoded.sequences[:, batch.input_ids.shape[1] :].tolist()
    ends = (next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row)) for row in rows)
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def total(parts: Sequence[Speculation]) -> Speculation:
    """The counts of several generations together."""
    summed = Speculation()
    for part in parts:
        for name, value in vars(part).items():
            known = getattr(summed, name)
            both = (
                [a + b for a, b in zip_longest(known, value, fillvalue=0)] if isinstance(value, list) else known + value
            )
            setattr(summed, name, both)
    return summed
