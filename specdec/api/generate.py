"""The Hugging Face face: `generate()` like transformers' own, and `speculative()` for its `custom_generate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import BaseStreamer, LogitsProcessorList

from specdec.batch.layout import Layout
from specdec.engine.callbacks import Callbacks
from specdec.engine.engine import Engine, OnCommit
from specdec.engine.hooks import streamer_per_row, users_criteria
from specdec.engine.intake import criteria_of
from specdec.engine.job import Job
from specdec.engine.output import SpeculativeOutput, assembled, per_token
from specdec.engine.schedule import TOGETHER
from specdec.errors import DrafterError
from specdec.network.base import num_embeddings_of
from specdec.network.refusals import check_model
from specdec.options.aliases import refuse_aliases
from specdec.options.generation import check_served, merge_config, whole_number
from specdec.options.inputs import check_input_ids, refuse_model_inputs, split_prompts
from specdec.options.processors import users_own
from specdec.options.speculation import (
    DrafterLike,
    Randomness,
    SpeculativeConfig,
    names_folder,
    speculative_config,
)
from specdec.policy import LengthPolicy
from specdec.verify.lossy import Lossy


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    drafter: DrafterLike = None,
    num_speculative_tokens: int | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: BaseStreamer | Sequence[BaseStreamer] | None = None,
    logits_processor: LogitsProcessorList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_commit: OnCommit | None = None,
    assistant_model: PreTrainedModel | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    verification: str | Lossy = "token",
    layout: Layout | str = "ragged",
    length_policy: LengthPolicy | str | None = None,
    exact: bool = True,
    **options: Any,
) -> Tensor | SpeculativeOutput:
    """Decode a batch of prompts: greedily, token for token what `model.generate` writes for each of them alone, or with
    `do_sample=True` by samples that follow the target's distribution.

    input_ids: [rows, columns] integers, padded on the left. attention_mask: the same shape, 0 for padding; without it
        every token is part of its prompt.
    drafter: a Drafter, a draft model with the target's tokenizer, a checkpoint's folder, or text as for `--drafter`
        ("prompt_lookup:max_ngram_size=4", "prompt_lookup+FOLDER"); None is plain decoding. A list of these, or text
        with commas, names candidates, of which length_policy="cost_model" takes the fastest in each step.
        transformers' `assistant_model=` and `prompt_lookup_num_tokens=` mean the same.
    num_speculative_tokens: tokens drafted per row and step, 1 to 32, by default 5; where `length_policy` decides, the
        most of them, by default 20. `num_assistant_tokens=` is the same.
    streamer: as in transformers, or one for each row (prompts times num_return_sequences): each gets its row's prompt,
        its tokens as they are committed, and `end()` when the row ends.
    stopping_criteria, and stop_strings with `tokenizer=`: asked after every token of every row.
    logits_processor, prefix_allowed_tokens_fn, and the options that transformers makes processors of: applied at every
        verified position to that row's own tokens, as if the row were alone. Of processors that may remember what they
        were asked every row has a copy of its own.
    on_commit: called with a `StepReport` after each step.
    seed, generator: of sampling; row i uses a random stream of its own, (seed, i), or that of its own seed if there is
        one per row. Without either, a seed is drawn from torch's global generator. With the same seed, a row's sample
        does not depend on its batch.
    verification: of sampled drafts, "token" (rejection sampling) or "block" (block verification: never fewer tokens
        a step). A `specdec.Lenient`, `Typical` or `TopBeta` keeps more drafts and is lossy: the output is no longer
        the target's, and `.speculation` says so.
    layout: how rows of different lengths lie in the caches, "ragged", "repad" or "grouped" (of 8 rows a step, or as
        `specdec.Grouped` says); the output is the same. The last two also serve models that know one length per
        batch, such as gpt_neo.
    length_policy: how far each row is drafted in each step, "fixed", "heuristic", "confidence", "acceptance_head",
        "disco", "cost_model", or a LengthPolicy; see docs/length-policies.md. None is "fixed". transformers'
        `num_assistant_tokens_schedule=` and `assistant_confidence_threshold=` choose one too.
    exact: on a GPU, run target and draft model with batch-invariant kernels where they have them, so that greedy output
        is plain greedy decoding's in half precision too, and steps are captured (docs/gpu.md). False keeps the models'
        own modules and kernels.
    options: the fields of GenerationConfig, over `generation_config` over the model's own; those that would need
        beams are refused.

    Returns [rows, columns + new tokens] int64, each row padded after its end; with `return_dict_in_generate=True` a
    `SpeculativeOutput` with `.sequences` and `.speculation`, and with output_scores or output_logits `.scores`
    (processed) and `.logits` (raw): one [rows, vocab] float32 tensor per new token. A row that has ended is certain of
    its padding: 0 for that token and -inf for the others.

    Raises SpecDecError (a ValueError) before any token is generated if something cannot be served exactly, and
    NumericalError if the target's logits become NaN.
    """
    check_model(model)
    explicit = set(options)
    config = merge_config(model, generation_config, options)
    check_served(config, explicit)
    speculation = speculative_config(
        drafter, num_speculative_tokens, config, explicit, assistant_model, layout, length_policy, model
    )
    randomness = Randomness(seed, generator, verification).checked(bool(config.do_sample), speculation.drafter)
    callbacks = Callbacks(streamer, logits_processor, prefix_allowed_tokens_fn, stopping_criteria, tokenizer, on_commit)
    copies = whole_number("num_return_sequences", config.num_return_sequences or 1)
    return _generate(model, input_ids, attention_mask, speculation, config, callbacks, randomness, exact, copies)


def speculative(
    drafter: DrafterLike,
    num_speculative_tokens: int | None = None,
    *,
    streamer: BaseStreamer | Sequence[BaseStreamer] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | Sequence[str] | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    verification: str | Lossy = "token",
    layout: Layout | str = "ragged",
    length_policy: LengthPolicy | str | None = None,
    exact: bool = True,
) -> Callable[..., Tensor | SpeculativeOutput]:
    """A decoding loop for transformers: `model.generate(**inputs, custom_generate=speculative(draft_model))`.

    Everything else is configured on `model.generate` as usual. streamer, tokenizer, stop_strings: transformers keeps
    these from a custom loop, so they are given here, as are our own seed, generator, verification, layout, length
    policy and exact. An `assistant_model` given to transformers never arrives either.

    A streamer given to `model.generate` gets the prompt and no end: an iterator over it waits for ever. To stream:

        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        loop = specdec.speculative(draft_model, streamer=streamer)
        Thread(target=model.generate, kwargs={**inputs, "custom_generate": loop}).start()
        for text in streamer:
            print(text, end="")
    """
    if drafter is None:
        raise DrafterError("speculative() needs a drafter; for plain decoding call model.generate without it")
    choice: dict[str, Any] = {"layout": layout, "length_policy": length_policy}
    # A folder's drafter is built when the target is known.
    known = "prompt_lookup" if names_folder(drafter) else drafter
    k = speculative_config(known, num_speculative_tokens, **choice).num_speculative_tokens
    randomness = Randomness(seed, generator, verification)
    randomness.checked(None)

    def custom_generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        check_model(model)
        config = model.generation_config if generation_config is None else generation_config
        defaults = model.generation_config._get_default_generation_params()
        check_served(config, None, defaults)
        refuse_aliases(config, defaults, k)

        mask = model_kwargs.get("attention_mask")
        # transformers has turned max_new_tokens into the max_length it goes with, and knows what is padding.
        mask = torch.ones_like(input_ids) if mask is None else mask
        refuse_model_inputs(model_kwargs, mask)
        own, allowed = users_own(logits_processor, model, config, input_ids.shape[1], mask)
        criteria = users_criteria(stopping_criteria, config)
        if stop_strings is not None:
            config = copy.copy(config)
            config.stop_strings = stop_strings
        callbacks = Callbacks(streamer, own, allowed, criteria, tokenizer)
        # A drafter of its own for each call, unless the caller made one.
        speculation = speculative_config(drafter, num_speculative_tokens, **choice, target=model)
        checked = randomness.checked(bool(config.do_sample), speculation.drafter)
        return _generate(model, input_ids, mask, speculation, config, callbacks, checked, exact)

    return custom_generate


def _generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    speculation: SpeculativeConfig,
    config: GenerationConfig,
    callbacks: Callbacks,
    randomness: Randomness,
    exact: bool,
    copies: int = 1,
) -> Tensor | SpeculativeOutput:
    """Every row is a request of one engine. copies: rows per prompt."""
    check_input_ids(input_ids, num_embeddings_of(model))
    prompts = split_prompts(input_ids, attention_mask, config.pad_token_id, ends_in(config))
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    streamers = streamer_per_row(callbacks.streamer, len(prompts))
    engine = Engine(
        model,
        speculation.drafter,
        policy=speculation.length_policy,
        num_speculative_tokens=speculation.num_speculative_tokens,
        verification=randomness.verification,
        layout=speculation.layout,
        exact=exact,
        order=TOGETHER,
        on_commit=callbacks.on_commit,
    )
    options = engine.intake.resolve(config, input_ids.shape[1])
    stopping = criteria_of(callbacks.stopping_criteria, options, callbacks.tokenizer)
    jobs = [
        engine.intake.job(
            prompt,
            config,
            options,
            processors=callbacks.logits_processor,
            prefix_allowed_tokens_fn=callbacks.prefix_allowed_tokens_fn,
            stopping=stopping,
            streamer=streamer,
        )
        for prompt, streamer in zip(prompts, streamers, strict=True)
    ]
    seeds = randomness.of_rows(len(jobs)) if options.do_sample else [(None, 0)] * len(jobs)
    for job in jobs:
        engine.check_job(job)

    with engine, engine.working():
        for job, seed in zip(jobs, seeds, strict=True):
            engine.schedule.add(job)
            engine.take_up(job, *seed)
        while not engine.is_finished:
            engine.advance()

    if copies > 1:
        input_ids = input_ids.repeat_interleave(copies, 0)
    output = SpeculativeOutput(
        sequences=assembled(jobs, input_ids, options.pad_token_id),
        scores=per_token([job.scores for job in jobs], options.pad_token_id) if options.output_scores else None,
        logits=per_token([job.logits for job in jobs], options.pad_token_id) if options.output_logits else None,
        speculation=engine.statistics,
    )
    raise_failure(jobs, output)
    return output if options.return_dict else output.sequences


def ends_in(config: GenerationConfig) -> list[Any]:
    """The end-of-sequence tokens of a config."""
    ends = config.eos_token_id
    ends = ends.flatten().tolist() if isinstance(ends, Tensor) else ends
    return list(ends) if isinstance(ends, list | tuple) else [ends]


def raise_failure(jobs: Sequence[Job], output: SpeculativeOutput) -> None:
    """Raise what a row's own callback raised, now that all others have ended. Their tokens are in `error.output`."""
    for job in jobs:
        if job.error is not None:
            with suppress(AttributeError):  # an exception class may not take it
                job.error.output = output  # type: ignore[attr-defined]
            raise job.error
