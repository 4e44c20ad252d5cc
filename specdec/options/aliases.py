"""transformers' names for what we call drafter, num_speculative_tokens and length_policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import GenerationConfig

from specdec.errors import ConfigError


class Alias(NamedTuple):
    """A field of GenerationConfig that chooses a drafter, its number of tokens, or a length policy.

    chosen_in: what to say where `speculative()` has chosen already. neutral: values that choose nothing.
    is_number: a number of draft tokens; the number that was chosen does not contradict.
    """

    name: str
    chosen_in: str
    neutral: tuple[Any, ...] = ()
    is_number: bool = False


_NUMBER = (
    "contradicts speculative(..., num_speculative_tokens={k}); the drafter and its number of tokens are chosen there"
)
_NGRAM = (
    "is chosen in speculative(PromptLookup(max_ngram_size=...)), of specdec.drafters.prompt_lookup; leave it out here"
)
_POLICY = "is chosen by speculative(..., length_policy=); leave it out here"

ALIASES = (
    Alias("num_assistant_tokens", _NUMBER, is_number=True),
    Alias("prompt_lookup_num_tokens", _NUMBER, is_number=True),
    Alias("max_matching_ngram_size", _NGRAM),
    Alias("num_assistant_tokens_schedule", _POLICY, (0, "constant")),
    Alias("assistant_confidence_threshold", _POLICY, (0, "constant")),
)
POLICY_ALIASES = ("num_assistant_tokens_schedule", "assistant_confidence_threshold")


def refuse_aliases(config: GenerationConfig, defaults: Mapping[str, Any], k: int) -> None:
    """Inside `custom_generate`, where `speculative()` has chosen k draft tokens.

    defaults: transformers' own, which it has filled in already. Raises ConfigError for a field that says otherwise.
    """
    for alias in ALIASES:
        value = getattr(config, alias.name, None)
        chosen = (k,) if alias.is_number else ()
        if value not in (None, *alias.neutral, *chosen, defaults.get(alias.name)):
            shown = value if alias.is_number else repr(value)
            raise ConfigError(f"{alias.name}={shown} {alias.chosen_in.format(k=k)}")


def refuse_engine_options(names: Mapping[str, Any]) -> None:
    """Raise ConfigError for a request's option that chooses a drafter or a policy: an engine has one, for all rows."""
    for alias in ALIASES:
        if alias.name in names:
            raise ConfigError(f"{alias.name}={names[alias.name]!r} is chosen by the engine for all rows; leave it out")
