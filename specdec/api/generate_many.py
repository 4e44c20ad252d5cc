"""More prompts than rows: `generate_many()` keeps the batch full and yields continuations as they are done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import LogitsProcessorList

from specdec.api.generate import Callbacks
from specdec.batch.layout import Layout
from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.drafter import Drafter
from specdec.engine.decode import OnCommit, check_shared_slots, decode_steps
from specdec.engine.metrics import Speculation
from specdec.engine.schedule import Continuous, Request
from specdec.engine.stopping import Stopping
from specdec.engine.target import Target
from specdec.errors import ConfigError, InputError
from specdec.network.base import vocab_size_of
from specdec.network.memory import check_memory
from specdec.network.refusals import check_architecture, check_lengths, check_model
from specdec.options.generation import GenerationOptions, check_served, merge_config, resolve_options
from specdec.options.inputs import check_input_ids
from specdec.options.speculation import Randomness, SpeculativeConfig, speculative_config
from specdec.policy import LengthPolicy
from specdec.verify.lossy import Lossy
from specdec.verify.processors import processors_of
from specdec.verify.sampler import Sampler
from specdec.verify.verification import verification_of

ORDERS = ("arrival", "longest_first")


@dataclass(frozen=True)
class Completion:
    """One prompt's result.

    index: of the prompt, counted from 0 as they came. prompt_ids, token_ids: without padding; token_ids are new.
    finish_reason: "eos", "length", or "stop" (a stopping criterion). num_steps, num_draft_tokens,
    num_accepted_draft_tokens: verify forwards that the row took part in, what was drafted in them and accepted.
    num_preemptions: how often it had to give up its place.
    """

    index: int
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    num_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    num_preemptions: int


class Completions(Iterator[Completion]):
    """Yields completions; decoding goes on while the next one is asked for.

    speculation: statistics so far. peak_kv_tokens: the most tokens that the target's cache had room for.
    num_preemptions: of all rows. `close()` ends it early; until it has ended, the model runs with our attention.
    """

    def __init__(self, source: Iterator[Completion], schedule: Continuous, speculation: Speculation):
        self._source, self._schedule, self.speculation = source, schedule, speculation

    def __next__(self) -> Completion:
        return next(self._source)

    def close(self) -> None:
        self._source.close()  # type: ignore[attr-defined]

    @property
    def peak_kv_tokens(self) -> int:
        return self._schedule.peak_kv_tokens

    @property
    def num_preemptions(self) -> int:
        return self._schedule.num_preemptions


def generate_many(
    model: PreTrainedModel,
    prompts: Iterable[Tensor | Sequence[int]],
    *,
    drafter: Drafter | PreTrainedModel | str | None = None,
    num_speculative_tokens: int | None = None,
    max_rows: int = 16,
    kv_tokens: int | None = None,
    prefill_tokens: int | None = None,
    order: str = "arrival",
    in_order: bool = False,
    max_new_tokens: int | list[int] | tuple[int, ...] | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_commit: OnCommit | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    verification: str | Lossy = "token",
    layout: Layout | str = "ragged",
    length_policy: LengthPolicy | str = "fixed",
    **options: Any,
) -> Completions:
    """Decode any number of prompts in a batch of `max_rows`: whoever finishes is replaced at once.

    prompts: [length] token ids each, without padding; an iterator is read as far as places become free.
    kv_tokens: the most tokens for which the target's cache has room (a draft model's has as many); the newest row
        gives up its place when the rows outgrow them, and is continued later without loss. None: as many as
        `max_rows` of the longest rows need.
    prefill_tokens: tokens of newcomers per forward between two steps, by default 128 on a CPU and 2048 elsewhere.
    order: "arrival", or "longest_first", which reads all prompts first and leaves short ones for the end, so that
        the batch stays full. in_order: yield results in the order of the prompts, not as they finish.
    max_new_tokens: for all, or one per prompt.
    The others are those of `generate`. Row i of a sampled run uses the random stream (seed, i), as it would there:
    its output depends neither on the schedule nor on the other rows.

    Raises SpecDecError when it is called, before any token is generated; for prompts of an iterator when they are read.
    """
    check_model(model)
    explicit = set(options)
    limits = max_new_tokens if isinstance(max_new_tokens, list | tuple) else None
    if max_new_tokens is not None and limits is None:
        options["max_new_tokens"] = max_new_tokens
    config = merge_config(model, generation_config, options)
    check_served(config, explicit)
    speculation = speculative_config(drafter, num_speculative_tokens, config, explicit, None, layout, length_policy)
    check_shared_slots(speculation.drafter, True)
    check_many(config, max_rows, kv_tokens, prefill_tokens, order)
    randomness = Randomness(seed, generator, verification).checked(bool(config.do_sample), speculation.drafter)
    check_architecture(model, speculation.layout)
    speculation.check(model, 1)
    intake = Intake(model, speculation, config, randomness, kv_tokens, limits)
    if not isinstance(prompts, Iterable) or (isinstance(prompts, Tensor) and not prompts.dim()):
        raise InputError(f"prompts is {prompts!r}; pass an iterable of prompts, [length] token ids each")
    if isinstance(prompts, Sequence | Tensor):
        for _ in intake.requests(prompts):
            pass
    requests = intake.requests(prompts)
    if order == "longest_first":
        requests = iter(sorted(requests, key=lambda request: -request.limit))
    schedule = Continuous(requests, max_rows, intake.spare, model.device, kv_tokens, prefill_tokens)
    callbacks = Callbacks(None, logits_processor, prefix_allowed_tokens_fn, stopping_criteria, tokenizer, on_commit)
    statistics = Speculation()
    finished = run(intake, schedule, callbacks, statistics) if schedule.waiting else iter(())
    return Completions(sorted_by_index(finished) if in_order else finished, schedule, statistics)


def run(intake: Intake, schedule: Continuous, callbacks: Callbacks, statistics: Speculation) -> Iterator[Completion]:
    """Everything is built and checked here; the rows are decoded as completions are asked for."""
    model, config, speculation = intake.model, intake.config, intake.speculation
    first = schedule.waiting[0]
    options = intake.options(first)
    stopping = Stopping(callbacks.stopping_criteria, options, callbacks.tokenizer)
    processors = processors_of(
        model, config, {len(first.prompt)}, options, callbacks.logits_processor, callbacks.prefix_allowed_tokens_fn
    )
    schedule.on_enter = lambda request: processors.add(len(request.prompt))
    drafter = speculation.drafter
    sampler, streams = None, None
    if config.do_sample:
        streams = intake.randomness.streams(None, model.device)
        sampler = Sampler(processors, streams, vocab_size_of(model))
    method = intake.randomness.verification
    verification = verification_of(method, bool(config.do_sample), streams, processors)
    slots, eos = schedule.slots, options.eos_token_ids
    target = Target(
        model,
        processors,
        verification,
        eos,
        len(slots),
        slots.capacity,
        None,
        drafter.target_layers,
        speculation.layout,
    )
    check_memory(target.network, target.layout, len(slots), slots.capacity, drafter.kv_model)
    k = speculation.num_speculative_tokens
    policy = speculation.length_policy
    steps = decode_steps(target, drafter, policy, Rows.of(slots), k, schedule, statistics, stopping, sampler)
    return collect(steps, schedule, set(eos), callbacks.on_commit)


@dataclass
class Intake:
    """Makes requests of prompts, or says what is wrong with them. limits: max_new_tokens of each prompt."""

    model: PreTrainedModel
    speculation: SpeculativeConfig
    config: GenerationConfig
    randomness: Randomness
    kv_tokens: int | None
    limits: Sequence[int] | None

    @property
    def spare(self) -> int:
        return self.speculation.spare_slots

    def options(self, request: Request) -> GenerationOptions:
        return self._resolve(request.index, len(request.prompt))

    def requests(self, prompts: Iterable[Tensor | Sequence[int]]) -> Iterator[Request]:
        """One for each prompt. Raises ConfigError at their end for entries that belong to none of them."""
        num_prompts = 0
        for index, prompt in enumerate(prompts):
            yield self.request(index, prompt)
            num_prompts = index + 1
        for name, entries in (("max_new_tokens", self.limits), ("seed", self.randomness.seed)):
            if isinstance(entries, Sequence) and len(entries) > num_prompts:
                raise ConfigError(
                    f"{name} has {len(entries)} entries for {num_prompts} prompts; give one each, or one number"
                )

    def request(self, index: int, prompt: Tensor | Sequence[int]) -> Request:
        try:
            # Python's numbers keep their kind, so that what is no integer is refused below rather than cut off.
            ids = prompt if isinstance(prompt, Tensor) else torch.tensor(list(prompt))
        except (TypeError, ValueError) as error:
            raise InputError(f"prompt {index} is no sequence of token ids ({error}); encode text first") from None
        if ids.dim() != 1 or not len(ids):
            raise InputError(f"prompt {index} has shape {list(ids.shape)}; pass [length] token ids, at least one")
        try:
            check_input_ids(ids[None], self.model.get_input_embeddings().weight.shape[0])
        except InputError as error:
            raise InputError(f"prompt {index}: {error}") from None
        seed = self.randomness.seed
        if isinstance(seed, Sequence) and index >= len(seed):
            raise ConfigError(
                f"seed has {len(seed)} entries, too few for prompt {index}; give one int, or more of them"
            )
        request = Request(index, ids.long().cpu(), self._resolve(index, len(ids)).max_new_tokens)
        check_lengths(self.model, request.limit, "target")
        self.speculation.drafter.check(self.model, request.limit)
        if self.kv_tokens is not None and request.limit + self.spare > self.kv_tokens:
            raise ConfigError(
                f"prompt {index} with its new tokens and drafts may need {request.limit + self.spare} tokens, but "
                f"kv_tokens={self.kv_tokens}; raise it, shorten the prompt or lower max_new_tokens"
            )
        return request

    def _resolve(self, index: int, length: int) -> GenerationOptions:
        if self.limits is not None:
            if index >= len(self.limits):
                raise ConfigError(f"max_new_tokens has {len(self.limits)} entries, too few for prompt {index}")
            self.config.max_new_tokens = self.limits[index]
        positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return resolve_options(self.config, length, positions, vocab_size_of(self.model))


def check_many(
    config: GenerationConfig, max_rows: int, kv_tokens: int | None, prefill_tokens: int | None, order: str
) -> None:
    """Raise ConfigError for what `generate` serves and this does not, and for numbers out of range."""
    for name, value in (("max_rows", max_rows), ("kv_tokens", kv_tokens), ("prefill_tokens", prefill_tokens)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
    if order not in ORDERS:
        raise ConfigError(f"order={order!r}; choose {' or '.join(map(repr, ORDERS))}")
    # These depend on how long the one prompt or batch is that transformers makes its processors for.
    refused = {"min_length": (None, 0), "forced_eos_token_id": (None,), "num_return_sequences": (None, 1)}
    for name in ("output_scores", "output_logits"):
        refused[name] = (None, False)
    for name, neutral in refused.items():
        if getattr(config, name, None) not in neutral:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} is not served by generate_many; leave it at {neutral[-1]!r}, or "
                "call generate() on batches"
            )


def collect(
    steps: Iterator[StepReport], schedule: Continuous, eos_token_ids: set[int], on_commit: OnCommit | None
) -> Iterator[Completion]:
    """Gather each row's tokens from the reports; what a preempted row has written is kept here."""
    counts: dict[int, np.ndarray] = {}
    for report in steps:
        if on_commit is not None:
            on_commit(report)
        numbers = np.stack([np.ones_like(report.row_ids), report.num_drafted, report.num_accepted], 1)
        done = []
        for slot, index in enumerate(report.row_ids.tolist()):
            request = schedule.running[index]
            request.new_ids += report.token_ids[slot, : report.num_committed[slot]].tolist()
            if not report.is_prefill:
                counts[index] = counts.get(index, 0) + numbers[slot]
            if report.finished[slot]:
                done.append(schedule.running.pop(index))
        for request in done:
            num_steps, drafted, accepted = counts.pop(request.index, np.zeros(3, dtype=np.int64)).tolist()
            reason = "length" if len(request.new_ids) >= request.max_new_tokens else "stop"
            reason = "eos" if request.new_ids[-1] in eos_token_ids else reason
            prompt_ids, new_ids = request.prompt.tolist(), request.new_ids
            yield Completion(
                request.index, prompt_ids, new_ids, reason, num_steps, drafted, accepted, request.num_preemptions
            )


def sorted_by_index(completions: Iterator[Completion]) -> Iterator[Completion]:
    """Hold back what is early."""
    early: dict[int, Completion] = {}
    following = 0
    for completion in completions:
        early[completion.index] = completion
        while following in early:
            yield early.pop(following)
            following += 1
