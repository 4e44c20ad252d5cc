"""Which of transformers' generation options are served, and the values at which the others must be left.

Every field of GenerationConfig is in exactly one of the tables below (a test walks them), so that no option is
silently ignored.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specdec.errors import ConfigError
from specdec.options.inputs import CACHES, refuse_filled_caches

DEFAULT_NEW_TOKENS = 20  # transformers' own default

WARPER_OPTIONS = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
)
SERVED = WARPER_OPTIONS | frozenset(
    {
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "max_time",
        "stop_strings",
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "return_dict_in_generate",
        "output_scores",
        "output_logits",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "do_sample",
        "num_return_sequences",
        # logits processors
        "repetition_penalty",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "sequence_bias",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "remove_invalid_values",
        "renormalize_logits",
    }
)
# Without effect in transformers too: beam options without beams, options of encoder-decoder models, of draft models #
# with another tokenizer, of compilation; without its cache transformers writes the same tokens, more slowly.
WITHOUT_EFFECT = frozenset(
    {
        "use_cache",
        "length_penalty",
        "early_stopping",
        "decoder_start_token_id",
        "is_assistant",
        "assistant_lookbehind",
        "target_lookbehind",
        "disable_compile",
        "compile_config",
        "transformers_version",
    }
)
# Refused unless they have one of these values.
NEUTRAL: dict[str, tuple] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "use_mtp": (None, False),
    "cache_implementation": (None, "dynamic"),
    "cache_config": (None,),
    "max_cache_len": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "token_healing": (None, False),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "assistant_early_exit": (None,),
    "assistant_ensemble_weight": (None,),
    "speculation_type": (None,),
    "continuous_batching_config": (None,),
    "low_memory": (None, False),
    "penalty_alpha": (None,),
    "dola_layers": (None,),
    "diversity_penalty": (None, 0.0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "prefill_chunk_size": (None,),
}
REMEDY = {
    "num_beams": "pass num_beams=1",
}


@dataclass(frozen=True)
class GenerationOptions:
    """max_new_tokens: >= 1. min_new_tokens: >= 0. eos_token_ids: may be empty. pad_token_id: fills rows that ended."""

    max_new_tokens: int
    min_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    return_dict: bool
    output_scores: bool
    output_logits: bool
    max_time: float | None
    stop_strings: tuple[str, ...]
    do_sample: bool
    num_return_sequences: int


def merge_config(
    model: PreTrainedModel, generation_config: GenerationConfig | None, overrides: dict[str, Any]
) -> GenerationConfig:
    """`overrides` over `generation_config` over the model's own generation config, as in transformers.

    Raises ConfigError for keywords that are not generation options.
    """
    refuse_filled_caches(overrides)
    overrides = {name: value for name, value in overrides.items() if name not in CACHES}
    unknown = [name for name in overrides if name not in vars(GenerationConfig())]
    if unknown:
        raise ConfigError(
            f"unknown keyword {unknown[0]!r}; specdec.generate takes the arguments in its signature and the fields of "
            "GenerationConfig (other model inputs, token_type_ids for instance, are not served: leave them out)"
        )

    if not isinstance(generation_config, GenerationConfig | None):
        raise ConfigError(f"generation_config is a {type(generation_config).__name__}; pass a GenerationConfig")

    config = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
    for name, value in model.generation_config.to_dict().items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)

    for name, value in overrides.items():
        setattr(config, name, value)
    if config.do_sample:
        # Sampling without further options uses transformers' defaults (top_k=50).
        for name, value in model.generation_config._get_default_generation_params().items():
            if name in WARPER_OPTIONS and getattr(config, name, None) is None:
                setattr(config, name, value)

    return config


def check_served(config: GenerationConfig, explicit: set[str] | None, defaults: dict[str, Any] | None = None) -> None:
    """Raise ConfigError for the first option that is not served and would change the output.

    explicit: the names that the caller set, None if unknown; for other names the message says where they come from.
    defaults: transformers' own defaults if they have been filled in already; the caller did not request these values.
    """
    defaults = defaults or {}
    temperature = config.temperature
    if config.do_sample and temperature is not None and not (isinstance(temperature, int | float) and temperature > 0):
        raise ConfigError(
            f"temperature={temperature!r} with do_sample=True; it must be a number above 0 "
            "(pass do_sample=False for greedy decoding)"
        )

    if not config.do_sample and config.num_return_sequences not in (None, 1):
        raise ConfigError(
            f"num_return_sequences={config.num_return_sequences} without do_sample=True; greedy decoding has one "
            "result per prompt, pass num_return_sequences=1"
        )

    for name in ("output_scores", "output_logits"):
        if getattr(config, name) and not config.return_dict_in_generate:
            raise ConfigError(f"{name}=True has nowhere to go; pass return_dict_in_generate=True with it")

    for name, neutral in NEUTRAL.items():
        value = getattr(config, name, None)
        if value in neutral or (name in defaults and value == defaults[name]):
            continue
        origin = "" if explicit is None or name in explicit else " (from the generation config)"
        remedy = REMEDY.get(name, f"leave it at {neutral[-1]!r}")
        raise ConfigError(f"{name}={value!r}{origin} is not served; {remedy}")


def resolve_options(
    config: GenerationConfig, num_columns: int, max_positions: int | None, vocab_size: int
) -> GenerationOptions:
    """The numbers of a merged config; `num_columns` is the padded prompt length, which max_length includes."""
    if config.max_new_tokens is not None:
        max_new_tokens, said = config.max_new_tokens, f"max_new_tokens={config.max_new_tokens!r}"
    elif config.max_length is not None:
        max_new_tokens = whole_number("max_length", config.max_length) - num_columns
        said = f"max_length={config.max_length} with {num_columns} prompt tokens"
    else:
        room = DEFAULT_NEW_TOKENS if max_positions is None else max_positions - num_columns
        max_new_tokens = min(DEFAULT_NEW_TOKENS, room)
        said = f"{num_columns} prompt tokens of {max_positions} positions"

    if not is_whole(max_new_tokens) or max_new_tokens <= 0:
        raise ConfigError(f"{said} leaves no whole number of tokens to generate; at least 1 is needed")

    if config.min_new_tokens is not None:
        min_new_tokens = whole_number("min_new_tokens", config.min_new_tokens)
    else:
        min_new_tokens = max(whole_number("min_length", config.min_length or 0) - num_columns, 0)
    if min_new_tokens < 0 or min_new_tokens > max_new_tokens:
        raise ConfigError(f"min_new_tokens={min_new_tokens} is not between 0 and max_new_tokens={max_new_tokens}")

    eos = config.eos_token_id
    eos = eos.tolist() if isinstance(eos, Tensor) else eos
    eos = [] if eos is None else eos if isinstance(eos, list | tuple) else [eos]
    # Ids outside the vocabulary (-1 is common) mean that there is no such token.
    eos_token_ids = tuple(token for token in eos if 0 <= whole_number("eos_token_id", token) < vocab_size)

    max_time = config.max_time
    if max_time is not None and (not isinstance(max_time, int | float) or max_time <= 0):
        raise ConfigError(f"max_time={max_time!r} is not a number of seconds above 0")

    pad = config.pad_token_id
    if pad is None:
        pad = eos_token_ids[0] if eos_token_ids else 0

    strings = config.stop_strings or ()
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    if not all(isinstance(string, str) and string for string in strings):
        raise ConfigError(f"stop_strings={config.stop_strings!r}; pass one or more strings that are not empty")

    copies = whole_number(
        "num_return_sequences", 1 if config.num_return_sequences is None else config.num_return_sequences
    )
    if copies < 1:
        raise ConfigError(f"num_return_sequences={copies} must be at least 1")

    return GenerationOptions(
        max_new_tokens,
        min_new_tokens,
        eos_token_ids,
        whole_number("pad_token_id", int(pad) if isinstance(pad, Tensor) else pad),
        bool(config.return_dict_in_generate),
        bool(config.output_scores),
        bool(config.output_logits),
        max_time,
        strings,
        bool(config.do_sample),
        copies,
    )


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(name: str, value: Any) -> int:
    """`value`, or a ConfigError that names the option."""
    if not is_whole(value):
        raise ConfigError(f"{name}={value!r} is not a whole number")
    return value
