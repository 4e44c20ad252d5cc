"""The callbacks of a call, for all its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import BaseStreamer, LogitsProcessorList

from specdec.engine.engine import OnCommit
from specdec.errors import ConfigError


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
