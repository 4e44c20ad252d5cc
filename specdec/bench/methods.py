"""The methods compared: transformers' decoding loops and ours, each a function from a batch of prompts to token ids."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from specdec.api.generate import generate as speculative_generate
from specdec.bench.latency import StepClock
from specdec.check.padding import left_pad
from specdec.check.settings import ends_of
from specdec.check.ways import PLAIN as NO_DRAFTER
from specdec.check.ways import Way, generate_options
from specdec.drafter import Drafter
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.registry import resolve
from specdec.engine.metrics import Speculation

PLAIN = "transformers plain"
ASSISTED = "transformers assisted"
ASSISTED_K = 5
LOOKUP_KS = (5, 10)


@dataclass(frozen=True)
class Pair:
    """A target, optionally a draft with the same tokenizer, and prompts of [length] int64 token ids each."""

    name: str
    target: PreTrainedModel
    draft: PreTrainedModel | None
    prompts: list[Tensor]

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset(ends_of(self.target))


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts. prompt_indices: their indices in the pair. input_ids, attention_mask: [rows, columns]."""

    prompt_indices: range
    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class Decoded:
    """sequences: [rows, columns + new tokens] int64, prompts included. speculation: None for the peers."""

    sequences: Tensor
    speculation: Speculation | None = None


class Decode(Protocol):
    def __call__(self, batch: Batch, clock: StepClock | None = None) -> Decoded:
        """clock: is told of every step."""


@dataclass(frozen=True)
class Method:
    """One way to decode greedily. num_speculative_tokens: None if nothing is drafted or the method decides.
    options: for our methods, the values of `ways.AXES` that differ from their defaults."""

    name: str
    batch_size: int
    is_ours: bool
    num_speculative_tokens: int | None
    decode: Decode
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        k = self.num_speculative_tokens
        return f"{self.name}{'' if k is None else f' K={k}'}, batch {self.batch_size}"


def batches(pair: Pair, batch_size: int) -> list[Batch]:
    """The prompts in order, `batch_size` at a time; the last batch may be smaller."""
    count = len(pair.prompts)
    return [batch_of(pair, range(begin, min(begin + batch_size, count))) for begin in range(0, count, batch_size)]


def batch_of(pair: Pair, prompt_indices: range) -> Batch:
    pad = pair.target.generation_config.pad_token_id or 0
    ids, mask = left_pad([pair.prompts[index] for index in prompt_indices], pad, pair.target.device)
    return Batch(prompt_indices, ids, mask)


def peers(pair: Pair, max_new_tokens: int, batch_sizes: Sequence[int], lookup: bool = True) -> list[Method]:
    """transformers' methods; it speculates only for one prompt at a time. lookup: include prompt lookup."""
    found = []
    for batch_size in batch_sizes:
        found.append(transformers_method(pair, PLAIN, batch_size, None, max_new_tokens))
        if batch_size == 1:
            found += assisted_peers(pair, max_new_tokens) if assists(pair.draft) else []
            found += lookup_peers(pair, max_new_tokens) if lookup else []
    return found


def assists(draft: PreTrainedModel | None) -> bool:
    """Whether transformers can draft with it: a causal model, not an any-subset one."""
    return draft is not None and resolve(draft).name == DraftModel.name


def assisted_peers(pair: Pair, max_new_tokens: int) -> list[Method]:
    """Assisted generation with a constant K, with the heuristic schedule, and with its defaults."""
    draft = pair.draft
    assert draft is not None

    def assisted(name: str, k: int | None, **settings: object) -> Method:
        method = transformers_method(pair, name, 1, k, max_new_tokens, assistant_model=draft)

        def decode(batch: Batch, clock: StepClock | None = None) -> Decoded:
            with assistant_settings(draft, **settings):
                return method.decode(batch, clock)

        return replace(method, decode=decode)

    constant = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    heuristic = {"num_assistant_tokens_schedule": "heuristic_transient", "assistant_confidence_threshold": 0.0}
    return [
        assisted(ASSISTED, ASSISTED_K, num_assistant_tokens=ASSISTED_K, **constant),
        assisted(f"{ASSISTED}, heuristic", None, num_assistant_tokens=ASSISTED_K, **heuristic),
        assisted(f"{ASSISTED}, defaults", None),
    ]


def lookup_peers(pair: Pair, max_new_tokens: int) -> list[Method]:
    return [
        transformers_method(pair, "transformers prompt lookup", 1, k, max_new_tokens, prompt_lookup_num_tokens=k)
        for k in LOOKUP_KS
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
    def decode(batch: Batch, clock: StepClock | None = None) -> Decoded:
        watched = {} if clock is None else {"stopping_criteria": clock.criteria(batch.input_ids)}
        return Decoded(
            pair.target.generate(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                **watched,
                **options,
            )
        )

    return Method(name, batch_size, False, k, decode)


def our_method(
    pair: Pair, way: Way, drafter: Drafter | PreTrainedModel | str | None, max_new_tokens: int, exact: bool = True
) -> Method:
    """drafter: the object for `way.drafter` that `specdec.generate` takes; None for plain decoding."""

    def decode(batch: Batch, clock: StepClock | None = None) -> Decoded:
        k = way.num_speculative_tokens
        return generate(pair, batch, drafter, k, max_new_tokens, clock, {**generate_options(way), "exact": exact})

    name = f"specdec {way.name}"
    return Method(name, way.batch_size, True, way.num_speculative_tokens, decode, dict(way.options))


def our_methods(
    pair: Pair,
    ways: Sequence[Way],
    drafters: Mapping[str, Drafter | PreTrainedModel | str],
    max_new_tokens: int,
    exact: bool = True,
) -> list[Method]:
    """drafters: by the names used in the ways."""
    named = {NO_DRAFTER: None, **drafters}
    return [our_method(pair, way, named[way.drafter], max_new_tokens, exact) for way in ways]


def generate(
    pair: Pair,
    batch: Batch,
    drafter: Drafter | PreTrainedModel | str | None,
    num_speculative_tokens: int | None,
    max_new_tokens: int,
    clock: StepClock | None = None,
    options: Mapping[str, Any] | None = None,
) -> Decoded:
    """Our greedy decoding of a batch. options: more keywords of `specdec.generate`."""
    output = speculative_generate(
        pair.target,
        batch.input_ids,
        batch.attention_mask,
        drafter=drafter,
        num_speculative_tokens=num_speculative_tokens,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        on_commit=None if clock is None else clock.on_commit,
        **(options or {}),
    )
    assert not isinstance(output, Tensor)
    return Decoded(output.sequences, output.speculation)


def new_tokens(decoded: Decoded, batch: Batch, eos_ids: frozenset[int]) -> list[list[int]]:
    """Each row's continuation up to and including its first end-of-sequence token; never padding."""
    rows = decoded.sequences[:, batch.input_ids.shape[1] :].tolist()
    ends = (next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row)) for row in rows)
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def total(parts: Sequence[Speculation]) -> Speculation:
    """The summed counts of several generations."""
    summed = Speculation()
    for part in parts:
        summed.verification, summed.is_lossless = part.verification, part.is_lossless
        for name, value in vars(part).items():
            if isinstance(value, str | bool):
                continue
            known = getattr(summed, name)
            both = (
                [a + b for a, b in zip_longest(known, value, fillvalue=0)] if isinstance(value, list) else known + value
            )
            setattr(summed, name, both)
    return summed
