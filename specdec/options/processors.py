"""The logits processors that a request's options stand for, made as transformers makes them for one prompt alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from specdec.errors import ConfigError
from specdec.kernels.commit.truncation import GREEDY, Truncation
from specdec.network.base import vocab_size_of
from specdec.options.generation import GenerationOptions
from specdec.verify.plan import BLIND, Plan

# In transformers' order; each has one number, an attribute of the same name as in Truncation.
TRUNCATIONS = {
    hf.TemperatureLogitsWarper: "temperature",
    hf.TopKLogitsWarper: "top_k",
    hf.TopPLogitsWarper: "top_p",
    hf.MinPLogitsWarper: "min_p",
}
WARPERS = (*BLIND[:7], hf.TopHLogitsWarper, hf.WatermarkLogitsProcessor, hf.LogitNormalization)


def plan_of(
    model: PreTrainedModel,
    config: GenerationConfig,
    prompt_length: int,
    options: GenerationOptions,
    custom: LogitsProcessorList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
) -> Plan:
    """The processors that transformers would use for a prompt of this length alone, and then the `custom` ones.

    config: merged. The minimum lengths are left to `Plan.min_new_tokens`.

    Raises ConfigError for options that no processor can be made of, or that leave no token, and for processors of
    which no row can have its own.
    """
    check_forced_tokens(config)
    if config.exponential_decay_length_penalty is not None and config.eos_token_id is None:
        raise ConfigError(
            f"exponential_decay_length_penalty={config.exponential_decay_length_penalty!r} makes an end of sequence "
            "likelier, and there is none; pass eos_token_id="
        )

    made = built_in(model, config, prompt_length, options, prefix_allowed_tokens_fn)
    # As in transformers, one of the user's stands in for the built-in one of its type. Others come before the warpers,
    # which only sampling has.
    own_by_type = {type(processor): processor for processor in custom or ()}
    merged = [own_by_type.pop(type(processor), processor) for processor in made]
    added = [processor for processor in custom or () if type(processor) in own_by_type]
    for processor in [*merged, *added]:
        check_named_tokens(processor, vocab_size_of(model))

    warpers = [processor for processor in merged if isinstance(processor, WARPERS)]
    others = [processor for processor in merged if not isinstance(processor, WARPERS)]
    truncation, last = truncation_of(LogitsProcessorList(warpers))
    kept = warpers[: len(warpers) - len(last)]
    plan = Plan(
        LogitsProcessorList([*others, *added, *kept]),
        truncation if options.do_sample else GREEDY,
        last,
        options.min_new_tokens,
        options.eos_token_ids,
    )
    plan.check_stateful()
    return plan


def built_in(
    model: PreTrainedModel,
    config: GenerationConfig,
    prompt_length: int,
    options: GenerationOptions,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None,
) -> LogitsProcessorList:
    """transformers' own processors for these options, without the minimum lengths."""
    own = copy.copy(config)
    own.min_length = own.min_new_tokens = None
    own.num_beams = own.num_return_sequences = 1  # newer transformers compares them, and they may be None
    own.max_length = prompt_length + options.max_new_tokens
    model._prepare_special_tokens(own, True, device=model.device)
    try:
        return model._get_logits_processor(
            generation_config=own,
            input_ids_seq_length=prompt_length,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            device=model.device,
            model_kwargs={},
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"transformers cannot make a logits processor of these options: {error}") from error


def truncation_of(processors: LogitsProcessorList) -> tuple[Truncation, LogitsProcessorList]:
    """What the last processors amount to if they are temperature, top-k, top-p, min-p, in this order; and which."""
    values: dict[str, float] = {}
    first = len(processors)
    for kind, name in reversed(TRUNCATIONS.items()):
        if first and type(processors[first - 1]) is kind and is_plain(processors[first - 1]):
            first -= 1
            values[name] = getattr(processors[first], name)
    return Truncation(**values), LogitsProcessorList(processors[first:])  # type: ignore[arg-type]


def is_plain(warper: LogitsProcessor) -> bool:
    """Whether nothing but its one number decides what a warper does."""
    return getattr(warper, "filter_value", -math.inf) == -math.inf and getattr(warper, "min_tokens_to_keep", 1) == 1


def check_forced_tokens(config: GenerationConfig) -> None:
    """Raise ConfigError, as transformers does, if a token would be both forced and forbidden."""
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = set(token_ids_of(getattr(config, name)))
        if forced and forced <= set(token_ids_of(config.suppress_tokens)):
            raise ConfigError(
                f"{name}={getattr(config, name)!r} is forced and suppress_tokens={config.suppress_tokens!r} "
                "forbids it, which leaves no token; take it out of one of them"
            )


def token_ids_of(value: Any) -> list[int]:
    """Of an option that takes None, one token or several."""
    value = value.tolist() if isinstance(value, Tensor) else value
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def check_named_tokens(processor: LogitsProcessor, vocab_size: int) -> None:
    """Raise ConfigError for tokens outside the vocabulary, over which transformers' processors stumble on their way."""
    name, ids = "", []
    if isinstance(processor, hf.SequenceBiasLogitsProcessor):
        name = "bad_words_ids" if isinstance(processor, hf.NoBadWordsLogitsProcessor) else "sequence_bias"
        ids = [token for tokens in processor.sequence_bias for token in tokens]
    elif isinstance(processor, hf.ForcedBOSTokenLogitsProcessor):
        name, ids = "forced_bos_token_id", [processor.bos_token_id]
    elif isinstance(processor, hf.ForcedEOSTokenLogitsProcessor):
        name, ids = "forced_eos_token_id", processor.eos_token_id.flatten().tolist()
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise ConfigError(
            f"{name} names token {outside[0]}, outside the target's vocabulary 0..{vocab_size - 1}; leave it out"
        )


def users_own(
    arrived: LogitsProcessorList | None,
    model: PreTrainedModel,
    config: GenerationConfig,
    num_columns: int,
    attention_mask: Tensor,
) -> tuple[LogitsProcessorList, Callable[[int, Tensor], list[int]] | None]:
    """Inside `custom_generate` transformers has already made processors for the padded batch and merged the user's in.

    Its own are left out, because they are made anew for each prompt; what remains is the user's processors and their
    prefix_allowed_tokens_fn.
    """
    config = copy.copy(config)
    model._prepare_special_tokens(config, True, device=model.device)
    made = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=num_columns,
        device=model.device,
        model_kwargs={"attention_mask": attention_mask},
    )
    own, allowed = LogitsProcessorList(), None
    for processor in arrived or ():
        if type(processor) is hf.PrefixConstrainedLogitsProcessor:
            allowed = processor._prefix_allowed_tokens_fn
        elif not any(same_processor(processor, other) for other in made):
            own.append(processor)
    return own, allowed


def same_processor(one: LogitsProcessor, other: LogitsProcessor) -> bool:
    """Whether two processors are of one type with the same settings."""
    if type(one) is not type(other) or vars(one).keys() != vars(other).keys():
        return False
    for name, value in vars(one).items():
        theirs = vars(other)[name]
        equal = (
            torch.equal(value, theirs) if isinstance(value, Tensor) and isinstance(theirs, Tensor) else value == theirs
        )
        if not equal and not callable(value):
            return False
    return True
