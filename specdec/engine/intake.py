"""From a request to a job: options resolved, processors planned, everything checked before the row joins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import BaseStreamer, LogitsProcessorList, MaxTimeCriteria

from specdec.engine.hooks import check_streamer, stop_criteria
from specdec.engine.job import Job
from specdec.engine.request import Request
from specdec.errors import ConfigError, InputError
from specdec.network.base import num_embeddings_of, vocab_size_of
from specdec.options.aliases import refuse_engine_options
from specdec.options.generation import GenerationOptions, check_served, is_whole, merge_config, resolve_options
from specdec.options.inputs import check_input_ids
from specdec.options.processors import plan_of
from specdec.options.speculation import Randomness
from specdec.verify.plan import Plan


class Intake:
    """Makes jobs for one model, numbered from 0."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None):
        self.model, self.tokenizer = model, tokenizer
        self.num_jobs = 0
        self._plans: dict[tuple[Any, ...], tuple[Plan, Any]] = {}

    def resolve(self, config: GenerationConfig, num_columns: int) -> GenerationOptions:
        """Numbers out of a merged config for a prompt of `num_columns` columns."""
        positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return resolve_options(config, num_columns, positions, vocab_size_of(self.model))

    def job(
        self,
        prompt: Tensor,
        config: GenerationConfig,
        options: GenerationOptions,
        *,
        processors: LogitsProcessorList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        stopping: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        max_draft_tokens: int | None = None,
        num_logprobs: int = 0,
    ) -> Job:
        """The next job. prompt: [length] int64 on the host. config: merged; options: what it resolves to.

        Jobs of the same config, callbacks and prompt length share a plan, and are processed together.
        """
        forced_end = options.max_new_tokens if config.forced_eos_token_id is not None else None
        key = (id(config), len(prompt), id(processors), id(prefix_allowed_tokens_fn), forced_end)
        if key not in self._plans:
            plan = plan_of(self.model, config, len(prompt), options, processors, prefix_allowed_tokens_fn)
            # What the key names by its id is kept, so that the id stays its own.
            self._plans[key] = plan, (config, processors, prefix_allowed_tokens_fn)
        job = Job(
            self.num_jobs,
            prompt,
            options,
            self._plans[key][0],
            stopping or StoppingCriteriaList(),
            streamer,
            max_draft_tokens,
            num_logprobs,
        )
        self.num_jobs += 1
        return job

    def job_of(self, request: Request, most_draft_tokens: int) -> Job:
        """Raises SpecDecError for a request that the engine cannot serve."""
        if not isinstance(request, Request):
            raise ConfigError(f"add_request got a {type(request).__name__}; pass a Request(prompt_ids, ...)")
        prompt = prompt_of(request.prompt_ids, self.model)
        explicit = set(request.options)
        config = merge_config(self.model, request.generation_config, request.options)
        refuse_outputs(config)
        check_served(config, explicit)
        check_request(request, config, most_draft_tokens)
        options = self.resolve(config, len(prompt))
        if options.stop_strings and self.tokenizer is None:
            raise ConfigError(
                f"stop_strings={list(options.stop_strings)} needs the tokenizer; pass Engine(tokenizer=...)"
            )
        plan = plan_of(
            self.model,
            config,
            len(prompt),
            options,
            LogitsProcessorList(request.processors),
            request.prefix_allowed_tokens_fn,
        )
        job = Job(
            self.num_jobs,
            prompt,
            options,
            plan,
            criteria_of(request.stopping, options, self.tokenizer),
            request.streamer,
            request.num_speculative_tokens,
            request.logprobs,
        )
        self.num_jobs += 1
        return job


def prompt_of(ids: Tensor | Sequence[int], model: PreTrainedModel, name: str = "prompt_ids") -> Tensor:
    """[length] int64 on the host. Raises InputError, which calls the prompt by its name, for anything else."""
    try:
        # Python's numbers keep their kind, so that numbers that are not integers are refused below rather than cut off.
        tensor = ids if isinstance(ids, Tensor) else torch.tensor(list(ids))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not a sequence of token ids ({error}); encode text first") from None
    if tensor.dim() != 1 or not len(tensor):
        raise InputError(f"{name} has shape {list(tensor.shape)}; pass [length] token ids, at least one")
    try:
        check_input_ids(tensor[None], num_embeddings_of(model))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return tensor.to("cpu", torch.long, copy=True)  # the caller may use its tensor again


def criteria_of(
    own: Iterable[Any] | None, options: GenerationOptions, tokenizer: PreTrainedTokenizerBase | None
) -> StoppingCriteriaList:
    """The caller's criteria, the stop strings, and the time limit, which starts now."""
    criteria = StoppingCriteriaList(own or ())
    if options.stop_strings and not any(isinstance(one, StopStringCriteria) for one in criteria):
        criteria.append(stop_criteria(options.stop_strings, tokenizer))
    if options.max_time is not None and not any(isinstance(one, MaxTimeCriteria) for one in criteria):
        criteria.append(MaxTimeCriteria(options.max_time, time.time()))
    return criteria


def refuse_outputs(config: GenerationConfig) -> None:
    """Raise ConfigError for tensors that an event does not carry."""
    for name in ("output_scores", "output_logits"):
        if getattr(config, name):
            raise ConfigError(f"{name}=True: events carry no tensors; ask for logprobs=n, or call generate()")


def check_request(request: Request, config: GenerationConfig, most_draft_tokens: int) -> None:
    """Raise ConfigError for what contradicts the engine, or would be ignored."""
    refuse_engine_options(request.options)
    if config.num_return_sequences not in (None, 1):
        raise ConfigError(
            f"num_return_sequences={config.num_return_sequences}: a request is one row; add as many requests, each "
            "with a stream of its own"
        )
    for name, value, most in (("stream", request.stream, 2**32 - 1), ("logprobs", request.logprobs, 2**31)):
        if not (is_whole(value) and 0 <= value <= most):
            raise ConfigError(f"{name}={value!r} is not a whole number from 0 to {most}")
    cap = request.num_speculative_tokens
    if cap is not None and not (is_whole(cap) and 0 <= cap <= most_draft_tokens):
        raise ConfigError(
            f"num_speculative_tokens={cap!r}: a row drafts 0 to {most_draft_tokens} tokens per step in this engine"
        )
    Randomness(request.seed).checked(bool(config.do_sample))

    for name, given in (("processors", request.processors), ("stopping", request.stopping)):
        for one in given:
            if not callable(one):
                raise ConfigError(f"{name} holds a {type(one).__name__}, which cannot be called; pass functions")
    if request.prefix_allowed_tokens_fn is not None and not callable(request.prefix_allowed_tokens_fn):
        raise ConfigError(f"prefix_allowed_tokens_fn={request.prefix_allowed_tokens_fn!r} cannot be called")
    if request.streamer is not None:
        check_streamer(request.streamer)
