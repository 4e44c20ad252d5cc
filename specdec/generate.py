"""The Hugging Face face: `generate()` like transformers' own, and `speculative()` for its `custom_generate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import (
    BaseStreamer,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
)

from specdec.compatibility import check_architecture, check_lengths
from specdec.decode import OnCommit, decode
from specdec.drafter import Drafter, NoDrafts
from specdec.errors import ConfigError, DrafterError, InputError, UnsupportedModelError
from specdec.inputs import check_input_ids, split_prompts
from specdec.metrics import Speculation
from specdec.options import GenerationOptions, check_served, is_whole, merge_config, resolve_options, whole_number
from specdec.processors import processors_of, users_own
from specdec.random_streams import RowStreams
from specdec.rows import Rows, StepReport
from specdec.sampling import Sampler
from specdec.stopping import Stopping, users_criteria
from specdec.target import Target
from specdec.verify import GreedyVerification, SampledVerification, Verification

DEFAULT_SPECULATIVE_TOKENS = 5
MAX_SPECULATIVE_TOKENS = 32
VERIFICATIONS = ("token", "block")


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
    streamer: BaseStreamer | None = None,
    logits_processor: LogitsProcessorList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_commit: OnCommit | None = None,
    assistant_model: PreTrainedModel | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    verification: str = "token",
    **options: Any,
) -> Tensor | SpeculativeOutput:
    """Decode a batch of prompts: greedily, token for token what `model.generate` writes for each of them alone, or with
    `do_sample=True` by samples that follow the target's distribution.

    input_ids: [rows, columns] integers, padded on the left. attention_mask: the same shape, 0 for padding; without it
        every token is part of its prompt.
    drafter: a Drafter, a draft model with the target's tokenizer, or a name ("prompt_lookup"); None is plain decoding.
        transformers' `assistant_model=` and `prompt_lookup_num_tokens=` mean the same.
    num_speculative_tokens: tokens drafted per row and step, 1 to 32, by default 5. `num_assistant_tokens=` is the same.
    streamer: as in transformers, for one prompt. stopping_criteria, and stop_strings with `tokenizer=`: asked after
        every token of every row.
    logits_processor, prefix_allowed_tokens_fn, and the options that transformers makes processors of: applied at every
        verified position to that row's own tokens, as if the row were alone.
    on_commit: called with a `StepReport` after each step.
    seed, generator: of sampling; row i uses a random stream of its own, (seed, i), or that of its own seed if there is
        one per row. Without either, a seed is drawn from torch's global generator. With the same seed, a row's sample
        does not depend on its batch.
    verification: of sampled drafts, "token" (rejection sampling) or "block" (block verification: never fewer tokens
        a step).
    options: the fields of GenerationConfig, over `generation_config` over the model's own; those that would need
        beams are refused.

    Returns [rows, columns + new tokens] int64, each row padded behind its end; with `return_dict_in_generate=True` a
    `SpeculativeOutput` with `.sequences` and `.speculation`.

    Raises SpecDecError (a ValueError) before any token is generated if something cannot be served exactly, and
    NumericalError if the target's logits become NaN.
    """
    check_model(model)
    explicit = set(options)
    config = merge_config(model, generation_config, options)
    check_served(config, explicit)
    chosen, k = choose_drafter(drafter, assistant_model, num_speculative_tokens, config, explicit)
    randomness = Randomness(seed, generator, verification).checked(bool(config.do_sample))
    callbacks = Callbacks(streamer, logits_processor, prefix_allowed_tokens_fn, stopping_criteria, tokenizer, on_commit)
    if (copies := whole_number("num_return_sequences", config.num_return_sequences or 1)) > 1:
        check_input_ids(input_ids, model.get_input_embeddings().weight.shape[0])
        input_ids = input_ids.repeat_interleave(copies, 0)
        attention_mask = None if attention_mask is None else attention_mask.repeat_interleave(copies, 0)
    return _generate(model, input_ids, attention_mask, chosen, k, config, callbacks, randomness)


def speculative(
    drafter: Drafter | PreTrainedModel | str,
    num_speculative_tokens: int = DEFAULT_SPECULATIVE_TOKENS,
    *,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | Sequence[str] | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    verification: str = "token",
) -> Callable[..., Tensor | SpeculativeOutput]:
    """A decoding loop for transformers: `model.generate(**inputs, custom_generate=speculative(draft_model))`.

    Everything else is configured on `model.generate` as usual. streamer, tokenizer, stop_strings: transformers keeps
    these from a custom loop (and a streamer given to it prints the prompt alone), so they are given here, as are our
    own seed, generator and verification. An `assistant_model` given to transformers never arrives either.
    """
    if drafter is None:
        raise DrafterError("speculative() needs a drafter; for plain decoding call model.generate without it")
    _, k = choose_drafter(drafter, None, num_speculative_tokens, None, set())
    randomness = Randomness(seed, generator, verification)
    randomness.checked(True)

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
        checked = randomness.checked(bool(config.do_sample))
        # A drafter of its own for each call, unless the caller made one.
        chosen, _ = choose_drafter(drafter, None, k, None, set())
        return _generate(model, input_ids, mask, chosen, k, config, callbacks, checked)

    return custom_generate


@dataclass(frozen=True)
class Randomness:
    """Where the numbers of sampling come from, and how sampled drafts are verified."""

    seed: int | Sequence[int] | None = None
    generator: torch.Generator | None = None
    verification: str = "token"

    def checked(self, do_sample: bool) -> Randomness:
        """Raise ConfigError for values that cannot be served, or that greedy decoding would ignore."""
        if self.verification not in VERIFICATIONS:
            raise ConfigError(f"verification={self.verification!r}; choose {' or '.join(map(repr, VERIFICATIONS))}")
        if self.seed is not None and self.generator is not None:
            raise ConfigError("seed and generator both say where random numbers come from; pass one of them")
        one = self.seed is None or is_whole(self.seed)
        if not one and not (isinstance(self.seed, Sequence) and all(map(is_whole, self.seed))):
            raise ConfigError(f"seed={self.seed!r}; pass a whole number, or one per row")
        if not isinstance(self.generator, torch.Generator | None):
            raise ConfigError(f"generator is a {type(self.generator).__name__}; pass a torch.Generator")
        for name in ("seed", "generator"):
            if not do_sample and getattr(self, name) is not None:
                raise ConfigError(f"{name}= has no effect on greedy decoding; pass do_sample=True, or leave it out")
        if not do_sample and self.verification != "token":
            raise ConfigError(f"verification={self.verification!r} is for sampled drafts; pass do_sample=True with it")
        return self

    def streams(self, num_rows: int, device: torch.device) -> RowStreams:
        seed = self.seed
        if seed is None:
            device_of = torch.device("cpu") if self.generator is None else self.generator.device
            seed = int(torch.randint(2**62, (), generator=self.generator, device=device_of))
        return RowStreams(seed, num_rows, device)


@dataclass(frozen=True)
class Callbacks:
    """What the caller wants to be asked or told while the rows are decoded."""

    streamer: BaseStreamer | None = None
    logits_processor: LogitsProcessorList | None = None
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None
    stopping_criteria: StoppingCriteriaList | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    on_commit: OnCommit | None = None

    def after_step(self, report: StepReport) -> None:
        if self.streamer is not None:
            for token in report.token_ids[0, : report.num_committed[0]]:
                self.streamer.put(torch.tensor([token]))
        if self.on_commit is not None:
            self.on_commit(report)


def _generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    drafter: Drafter,
    num_speculative_tokens: int,
    config: GenerationConfig,
    callbacks: Callbacks,
    randomness: Randomness,
) -> Tensor | SpeculativeOutput:
    check_input_ids(input_ids, model.get_input_embeddings().weight.shape[0])
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    options = resolve_options(config, input_ids.shape[1], positions, vocab_size_of(model))
    prompts = split_prompts(input_ids, attention_mask, config.pad_token_id)
    streamer = callbacks.streamer
    if streamer is not None and len(prompts) > 1:
        raise ConfigError(f"a streamer prints one prompt, not {len(prompts)}; pass one row, or on_commit= for batches")
    stopping = Stopping(callbacks.stopping_criteria, options, callbacks.tokenizer)
    lengths = [len(prompt) for prompt in prompts]
    check_architecture(model)
    check_lengths(model, max(lengths) + options.max_new_tokens, "target")
    drafter.check(model, max(lengths) + options.max_new_tokens)
    processors = processors_of(
        model, config, set(lengths), options, callbacks.logits_processor, callbacks.prefix_allowed_tokens_fn
    )
    rows = Rows([prompt.cpu() for prompt in prompts], options.max_new_tokens, num_speculative_tokens + 1, model.device)
    verification: Verification = GreedyVerification()
    drafter.sampler = None
    if options.do_sample:
        streams = randomness.streams(len(rows), rows.device)
        verification = SampledVerification(streams, randomness.verification)
        drafter.sampler = Sampler(processors, streams, vocab_size_of(model))
    target = Target(
        model,
        processors,
        verification,
        options.eos_token_ids,
        len(rows),
        rows.capacity,
        rows.max_limit,
        drafter.target_layers,
    )
    if streamer is not None:
        streamer.put(input_ids.cpu())
    statistics = decode(target, drafter, rows, num_speculative_tokens, stopping, callbacks.after_step)
    if streamer is not None:
        streamer.end()
    sequences: Any = assemble(rows, input_ids, lengths, options)
    return SpeculativeOutput(sequences=sequences, speculation=statistics) if options.return_dict else sequences


def assemble(rows: Rows, input_ids: Tensor, prompt_lengths: list[int], options: GenerationOptions) -> Tensor:
    """The prompts as they came in, each followed by its new tokens, padded on the right: [rows, columns + longest]."""
    starts = torch.tensor(prompt_lengths)
    lengths = torch.from_numpy(rows.output_lengths) - starts
    place = torch.arange(int(lengths.max()))
    index = (starts[:, None] + place).clamp(max=rows.output_ids.shape[1] - 1).to(rows.device)
    behind = (place >= lengths[:, None]).to(rows.device)
    new_ids = rows.output_ids.gather(1, index).masked_fill(behind, options.pad_token_id)
    return torch.cat([input_ids.long(), new_ids.to(input_ids.device)], 1)


def vocab_size_of(model: PreTrainedModel) -> int:
    """Logits per position."""
    return model.get_output_embeddings().weight.shape[0]


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError unless `model` is a transformers model with a generation config."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}; pass a transformers PreTrainedModel "
            "(of a wrapped model, the one inside)"
        )
    if getattr(model, "generation_config", None) is None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot generate; load it with AutoModelForCausalLM")


def choose_drafter(
    drafter: Drafter | PreTrainedModel | str | None,
    assistant_model: PreTrainedModel | None,
    num_speculative_tokens: int | None,
    config: GenerationConfig | None,
    explicit: set[str],
) -> tuple[Drafter, int]:
    """The drafter and the number of tokens it drafts, from our names and transformers'.

    Raises DrafterError or ConfigError for contradictions and for numbers outside 1 .. 32.
    """
    from specdec.drafters.registry import resolve

    lookup = config.prompt_lookup_num_tokens if config is not None else None
    named = [
        name
        for name, value in (
            ("drafter", drafter),
            ("assistant_model", assistant_model),
            ("prompt_lookup_num_tokens", lookup),
        )
        if value is not None
    ]
    if len(named) > 1:
        raise DrafterError(f"{' and '.join(named)} both choose a drafter; pass one of them")
    tokens = {"num_speculative_tokens": num_speculative_tokens, "prompt_lookup_num_tokens": lookup}
    if config is not None and "num_assistant_tokens" in explicit:
        tokens["num_assistant_tokens"] = config.num_assistant_tokens
    given = {name: value for name, value in tokens.items() if value is not None}
    if len(set(given.values())) > 1:
        raise ConfigError(
            f"{' and '.join(f'{name}={value}' for name, value in given.items())} contradict each other; "
            "pass one of them"
        )
    name, k = next(iter(given.items()), ("num_speculative_tokens", DEFAULT_SPECULATIVE_TOKENS))
    if not is_whole(k) or k < 1:
        raise ConfigError(
            f"{name}={k!r} must be a whole number from 1 to {MAX_SPECULATIVE_TOKENS}; for plain decoding pass "
            "drafter=None"
        )
    if k > MAX_SPECULATIVE_TOKENS:
        raise ConfigError(f"{name}={k} exceeds {MAX_SPECULATIVE_TOKENS}; lower it")
    ngram = getattr(config, "max_matching_ngram_size", None) if "max_matching_ngram_size" in explicit else None
    if lookup is not None:
        drafter = "prompt_lookup"
    elif assistant_model is not None:
        drafter = assistant_model
    if ngram is not None and drafter != "prompt_lookup":
        raise ConfigError(
            f"max_matching_ngram_size={ngram} belongs to prompt lookup; pass drafter='prompt_lookup' with it"
        )
    if drafter is None:
        if given:
            raise DrafterError(
                f"{name}={k} without a drafter; pass drafter=, or leave the number out for plain decoding"
            )
        return NoDrafts(), 1
    return resolve(drafter, **({} if ngram is None else {"max_ngram_size": ngram})), k


def refuse_model_inputs(model_kwargs: dict[str, Any], attention_mask: Tensor) -> None:
    """Raise InputError for model inputs that are not text, a cache that is filled, and positions of the user's own."""
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise InputError(
            f"past_key_values already holds {cache.get_seq_length()} tokens; pass the whole prompt instead"
        )
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.shape[-2:] == attention_mask.shape:
        expected = attention_mask.long().cumsum(-1) - 1
        if ((positions != expected) & attention_mask.bool()).any():
            raise InputError("position_ids other than 0, 1, 2 ... are not served; leave them out")
    served = {"attention_mask", "past_key_values", "use_cache", "logits_to_keep", "position_ids", "cache_position"}
    for name, value in model_kwargs.items():
        if name not in served and value is not None and value is not False:
            raise InputError(f"model input {name!r} is not served; pass input_ids and attention_mask only")
