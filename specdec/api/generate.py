"""The Hugging Face face: `generate()` like transformers' own, and `speculative()` for its `custom_generate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import (
    BaseStreamer,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
)

from specdec.batch.layout import Layout
from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.drafter import Drafter
from specdec.engine.decode import OnCommit, decode
from specdec.engine.emitted import Emitted
from specdec.engine.metrics import Speculation
from specdec.engine.stopping import Stopping, users_criteria
from specdec.engine.streaming import Streamers
from specdec.engine.target import Target
from specdec.errors import ConfigError, DrafterError
from specdec.network.base import vocab_size_of
from specdec.network.memory import check_memory
from specdec.network.refusals import check_architecture, check_lengths, check_model
from specdec.options.generation import GenerationOptions, check_served, merge_config, resolve_options, whole_number
from specdec.options.inputs import check_input_ids, refuse_model_inputs, split_prompts
from specdec.options.speculation import POLICY_ALIASES, Randomness, SpeculativeConfig, speculative_config
from specdec.policy import LengthPolicy
from specdec.verify.lossy import Lossy
from specdec.verify.processors import processors_of, users_own
from specdec.verify.sampler import Sampler
from specdec.verify.verification import verification_of


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """transformers' output with the statistics of the speculation."""

    speculation: Speculation | None = None


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    drafter: Drafter | PreTrainedModel | str | None = None,
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
    length_policy: LengthPolicy | str = "fixed",
    **options: Any,
) -> Tensor | SpeculativeOutput:
    """Decode a batch of prompts: greedily, token for token what `model.generate` writes for each of them alone, or with
    `do_sample=True` by samples that follow the target's distribution.

    input_ids: [rows, columns] integers, padded on the left. attention_mask: the same shape, 0 for padding; without it
        every token is part of its prompt.
    drafter: a Drafter, a draft model with the target's tokenizer, or a name ("prompt_lookup"); None is plain decoding.
        transformers' `assistant_model=` and `prompt_lookup_num_tokens=` mean the same.
    num_speculative_tokens: tokens drafted per row and step, 1 to 32, by default 5; where `length_policy` decides, the
        most of them, by default 20. `num_assistant_tokens=` is the same.
    streamer: as in transformers, or one for each row (prompts times num_return_sequences): each gets its row's prompt,
        its tokens as they are committed, and `end()` when the row ends.
    stopping_criteria, and stop_strings with `tokenizer=`: asked after every token of every row.
    logits_processor, prefix_allowed_tokens_fn, and the options that transformers makes processors of: applied at every
        verified position to that row's own tokens, as if the row were alone.
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
        "disco", "cost_model", or a LengthPolicy; see docs/length-policies.md. transformers'
        `num_assistant_tokens_schedule=` and `assistant_confidence_threshold=` choose one too.
    options: the fields of GenerationConfig, over `generation_config` over the model's own; those that would need
        beams are refused.

    Returns [rows, columns + new tokens] int64, each row padded behind its end; with `return_dict_in_generate=True` a
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
        drafter, num_speculative_tokens, config, explicit, assistant_model, layout, length_policy
    )
    randomness = Randomness(seed, generator, verification).checked(bool(config.do_sample), speculation.drafter)
    callbacks = Callbacks(streamer, logits_processor, prefix_allowed_tokens_fn, stopping_criteria, tokenizer, on_commit)
    if (copies := whole_number("num_return_sequences", config.num_return_sequences or 1)) > 1:
        check_input_ids(input_ids, model.get_input_embeddings().weight.shape[0])
        input_ids = input_ids.repeat_interleave(copies, 0)
        attention_mask = None if attention_mask is None else attention_mask.repeat_interleave(copies, 0)
    return _generate(model, input_ids, attention_mask, speculation, config, callbacks, randomness)


def speculative(
    drafter: Drafter | PreTrainedModel | str,
    num_speculative_tokens: int | None = None,
    *,
    streamer: BaseStreamer | Sequence[BaseStreamer] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | Sequence[str] | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    verification: str | Lossy = "token",
    layout: Layout | str = "ragged",
    length_policy: LengthPolicy | str = "fixed",
) -> Callable[..., Tensor | SpeculativeOutput]:
    """A decoding loop for transformers: `model.generate(**inputs, custom_generate=speculative(draft_model))`.

    Everything else is configured on `model.generate` as usual. streamer, tokenizer, stop_strings: transformers keeps
    these from a custom loop (and a streamer given to it prints the prompt alone), so they are given here, as are our
    own seed, generator, verification, layout and length policy. An `assistant_model` given to transformers never
    arrives either.
    """
    if drafter is None:
        raise DrafterError("speculative() needs a drafter; for plain decoding call model.generate without it")
    choice: dict[str, Any] = {"layout": layout, "length_policy": length_policy}
    k = speculative_config(drafter, num_speculative_tokens, **choice).num_speculative_tokens
    randomness = Randomness(seed, generator, verification)
    randomness.checked(None)

    def custom_generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        **model_kwargs: Any,
    ):
        check_model(model)
        config = model.generation_config if generation_config is None else generation_config
        defaults = model.generation_config._get_default_generation_params()
        check_served(config, None, defaults)
        for name in ("num_assistant_tokens", "prompt_lookup_num_tokens"):
            if getattr(config, name, None) not in (None, k, defaults.get(name)):
                raise ConfigError(
                    f"{name}={getattr(config, name)} contradicts speculative(..., num_speculative_tokens={k}); the "
                    "drafter and its number of tokens are chosen there"
                )
        if (ngram := getattr(config, "max_matching_ngram_size", None)) not in (
            None,
            defaults.get("max_matching_ngram_size"),
        ):
            raise ConfigError(
                f"max_matching_ngram_size={ngram!r} is chosen in speculative(PromptLookup(max_ngram_size=...)), of "
                "specdec.drafters.prompt_lookup; leave it out here"
            )
        for name in POLICY_ALIASES:
            if getattr(config, name, None) not in (None, 0, "constant", defaults.get(name)):
                raise ConfigError(
                    f"{name}={getattr(config, name)!r} is chosen by speculative(..., length_policy=); leave it out here"
                )
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
        speculation = speculative_config(drafter, k, **choice)
        checked = randomness.checked(bool(config.do_sample), speculation.drafter)
        return _generate(model, input_ids, mask, speculation, config, callbacks, checked)

    return custom_generate


@dataclass(frozen=True)
class Callbacks:
    """What the caller wants to be asked or told while the rows are decoded."""

    streamer: BaseStreamer | Sequence[BaseStreamer] | None = None
    logits_processor: LogitsProcessorList | None = None
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None
    stopping_criteria: StoppingCriteriaList | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    on_commit: OnCommit | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot be called."""
        for name in ("logits_processor", "stopping_criteria"):
            given = getattr(self, name)
            if given is not None and not (isinstance(given, Sequence) and all(map(callable, given))):
                raise ConfigError(f"{name}={given!r}; pass a list of callables, as transformers takes it")
        for name in ("prefix_allowed_tokens_fn", "on_commit"):
            if not (getattr(self, name) is None or callable(getattr(self, name))):
                raise ConfigError(f"{name}={getattr(self, name)!r} cannot be called; pass a function")


def _generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    speculation: SpeculativeConfig,
    config: GenerationConfig,
    callbacks: Callbacks,
    randomness: Randomness,
) -> Tensor | SpeculativeOutput:
    check_input_ids(input_ids, model.get_input_embeddings().weight.shape[0])
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    options = resolve_options(config, input_ids.shape[1], positions, vocab_size_of(model))
    prompts = split_prompts(input_ids, attention_mask, config.pad_token_id)
    drafter, num_speculative_tokens = speculation.drafter, speculation.num_speculative_tokens
    streamers = Streamers(callbacks.streamer, len(prompts))
    stopping = Stopping(callbacks.stopping_criteria, options, callbacks.tokenizer)
    lengths = [len(prompt) for prompt in prompts]
    check_architecture(model, speculation.layout)
    check_lengths(model, max(lengths) + options.max_new_tokens, "target")
    speculation.check(model, max(lengths) + options.max_new_tokens)
    processors = processors_of(
        model, config, set(lengths), options, callbacks.logits_processor, callbacks.prefix_allowed_tokens_fn
    )
    rows = Rows([prompt.cpu() for prompt in prompts], options.max_new_tokens, speculation.spare_slots, model.device)
    sampler, streams = None, None
    if options.do_sample:
        streams = randomness.streams(len(rows), rows.device)
        sampler = Sampler(processors, streams, vocab_size_of(model))
    verification = verification_of(randomness.verification, options.do_sample, streams, processors)
    scores, logits = (
        Emitted(len(rows), options.pad_token_id) if wanted else None
        for wanted in (options.output_scores, options.output_logits)
    )
    target = Target(
        model,
        processors,
        verification,
        options.eos_token_ids,
        len(rows),
        rows.capacity,
        rows.max_limit,
        drafter.target_layers,
        speculation.layout,
        scores,
        logits,
    )
    check_memory(target.network, target.layout, len(rows), rows.capacity, drafter.kv_model)

    def on_commit(report: StepReport) -> None:
        streamers.after_step(report)
        if callbacks.on_commit is not None:
            callbacks.on_commit(report)

    streamers.begin(prompts)
    policy = speculation.length_policy
    statistics = decode(target, drafter, policy, rows, num_speculative_tokens, stopping, on_commit, sampler)
    sequences: Any = assemble(rows, input_ids, lengths, options)
    if not options.return_dict:
        return sequences
    num_new_tokens = rows.output_lengths - np.array(lengths)
    emitted: list[Any] = [None if one is None else one.finish(num_new_tokens) for one in (scores, logits)]
    return SpeculativeOutput(sequences=sequences, scores=emitted[0], logits=emitted[1], speculation=statistics)


def assemble(rows: Rows, input_ids: Tensor, prompt_lengths: list[int], options: GenerationOptions) -> Tensor:
    """The prompts as they came in, each followed by its new tokens, padded on the right: [rows, columns + longest]."""
    starts = torch.tensor(prompt_lengths)
    lengths = torch.from_numpy(rows.output_lengths) - starts
    place = torch.arange(int(lengths.max()))
    index = (starts[:, None] + place).clamp(max=rows.output_ids.shape[1] - 1).to(rows.device)
    behind = (place >= lengths[:, None]).to(rows.device)
    new_ids = rows.output_ids.gather(1, index).masked_fill(behind, options.pad_token_id)
    return torch.cat([input_ids.long(), new_ids.to(input_ids.device)], 1)
