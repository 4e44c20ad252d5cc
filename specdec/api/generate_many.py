"""More prompts than rows: `generate_many()` keeps the batch full and yields continuations as they are done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import LogitsProcessorList

from specdec.batch.layout import Layout
from specdec.engine.callbacks import Callbacks
from specdec.engine.engine import Engine, OnCommit
from specdec.engine.intake import criteria_of, prompt_of
from specdec.engine.job import Job
from specdec.engine.metrics import Speculation
from specdec.engine.schedule import Continuous
from specdec.errors import ConfigError, InputError
from specdec.network.refusals import check_model
from specdec.options.generation import check_served, merge_config, whole_number
from specdec.options.speculation import DrafterLike, Randomness, speculative_config
from specdec.policy import LengthPolicy
from specdec.verify.lossy import Lossy


@dataclass(frozen=True)
class Completion:
    """One prompt's result.

    index: of the prompt, counted from 0 as they came. prompt_ids, token_ids: without padding; token_ids are new.
    finish_reason: "eos", "length", or "stop" (a stopping criterion). num_steps, num_draft_tokens,
    num_accepted_draft_tokens: verify forwards that the row took part in, what was drafted in them and accepted.
    num_preemptions: how often it had to give up its place.
    scores, logits: [new tokens, vocab] float32, where output_scores and output_logits ask for them.
    """

    index: int
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    num_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    num_preemptions: int
    scores: Tensor | None = None
    logits: Tensor | None = None


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
    drafter: DrafterLike = None,
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
    length_policy: LengthPolicy | str | None = None,
    exact: bool = True,
    **options: Any,
) -> Completions:
    """Decode any number of prompts in a batch of `max_rows`: a row that finishes is replaced at once.

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
    config.return_dict_in_generate = True  # scores and logits go into each completion
    check_served(config, explicit)
    speculation = speculative_config(
        drafter, num_speculative_tokens, config, explicit, None, layout, length_policy, model
    )
    randomness = Randomness(seed, generator, verification).checked(bool(config.do_sample), speculation.drafter)
    if not isinstance(prompts, Iterable) or (isinstance(prompts, Tensor) and not prompts.dim()):
        raise InputError(f"prompts is {prompts!r}; pass an iterable of prompts, [length] token ids each")

    callbacks = Callbacks(None, logits_processor, prefix_allowed_tokens_fn, stopping_criteria, tokenizer, on_commit)
    engine = Engine(
        model,
        speculation.drafter,
        policy=speculation.length_policy,
        num_speculative_tokens=speculation.num_speculative_tokens,
        verification=verification,
        layout=speculation.layout,
        exact=exact,
        max_rows=max_rows,
        kv_tokens=kv_tokens,
        prefill_tokens=prefill_tokens,
        order=order,
        on_commit=on_commit,
    )
    jobs = Jobs(engine, config, callbacks, randomness, limits)
    schedule = engine.schedule
    assert isinstance(schedule, Continuous)
    made = jobs.of(prompts)
    if isinstance(prompts, Sequence | Tensor) or order == "longest_first":
        for job in made:  # all are checked before the first token
            schedule.add(job)
    else:
        schedule.source = made
        schedule.peek()
    if schedule.waiting:
        engine.prepare()
    return Completions(completions(engine, in_order), schedule, engine.statistics)


class Jobs:
    """Makes jobs of prompts, or says what is wrong with them."""

    def __init__(
        self,
        engine: Engine,
        config: GenerationConfig,
        callbacks: Callbacks,
        randomness: Randomness,
        limits: Sequence[int] | None,
    ):
        """config: merged. limits: max_new_tokens of each prompt."""
        self.engine, self.config, self.callbacks, self.limits = engine, config, callbacks, limits
        self.copies = whole_number("num_return_sequences", config.num_return_sequences or 1)
        self.randomness = randomness
        self.seed = randomness.seed
        if config.do_sample and self.seed is None:
            self.seed = randomness.drawn_seed()
        self._stopping: StoppingCriteriaList | None = None

    def of(self, prompts: Iterable[Tensor | Sequence[int]]) -> Iterator[Job]:
        """`num_return_sequences` jobs for each prompt. Raises ConfigError at their end for entries that belong to none
        of them."""
        num_prompts = 0
        for index, prompt in enumerate(prompts):
            ids = prompt_of(prompt, self.engine.model, f"prompt {index}")
            for _ in range(self.copies):
                yield self.job(index, ids)
            num_prompts = index + 1

        entries = (("max_new_tokens", self.limits, num_prompts), ("seed", self.seed, num_prompts * self.copies))
        for name, given, wanted in entries:
            if isinstance(given, Sequence) and len(given) > wanted:
                raise ConfigError(f"{name} has {len(given)} entries for {wanted} prompts; give one each, or one number")

    def job(self, index: int, prompt: Tensor) -> Job:
        """The next row of prompt `index`."""
        intake, config = self.engine.intake, self.config
        if self.limits is not None:
            if index >= len(self.limits):
                raise ConfigError(f"max_new_tokens has {len(self.limits)} entries, too few for prompt {index}")
            config = limited(config, self.limits[index])
        options = intake.resolve(config, len(prompt))
        if self._stopping is None:
            self._stopping = criteria_of(self.callbacks.stopping_criteria, options, self.callbacks.tokenizer)
        job = intake.job(
            prompt,
            self.config,
            options,
            processors=self.callbacks.logits_processor,
            prefix_allowed_tokens_fn=self.callbacks.prefix_allowed_tokens_fn,
            stopping=self._stopping,
        )
        self.engine.check_job(job)
        self.engine.take_up(job, *self._stream_of(job.index))
        return job

    def _stream_of(self, row: int) -> tuple[int | None, int]:
        if not isinstance(self.seed, Sequence):
            return self.seed, row
        if row >= len(self.seed):
            raise ConfigError(
                f"seed has {len(self.seed)} entries, too few for prompt {row}; give one int, or more of them"
            )
        return int(self.seed[row]), 0


def limited(config: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
    """The config with another number of new tokens."""
    own = copy.copy(config)
    own.max_new_tokens = max_new_tokens
    return own


def completions(engine: Engine, in_order: bool) -> Iterator[Completion]:
    """Decode, and yield each row when it ends. Raises what a row's own callback raised after all others have ended."""
    failures: list[Exception] = []
    early: dict[int, Job] = {}  # ended, and not yielded yet
    following = 0
    with engine:
        while not engine.is_finished:
            with engine.working():
                early |= {job.index: job for job, _ in engine.advance() if job.finish_reason is not None}
            while early and (following in early or not in_order):
                job = early.pop(following if in_order else next(iter(early)))
                following += 1
                if job.error is None:
                    yield completion(job)
                else:
                    failures.append(job.error)
    if failures:
        # A generator may not raise StopIteration itself.
        error = failures[0]
        if isinstance(error, StopIteration):
            raise RuntimeError("a row's callback raised StopIteration") from error
        raise error


def completion(job: Job) -> Completion:
    assert job.finish_reason is not None
    return Completion(
        job.index,
        job.prompt.tolist(),
        job.new_ids,
        job.finish_reason,
        job.num_steps,
        job.num_draft_tokens,
        job.num_accepted_draft_tokens,
        job.num_preemptions,
        torch.stack(job.scores) if job.options.output_scores else None,
        torch.stack(job.logits) if job.options.output_logits else None,
    )
