"""A request with options of its own, and what the engine tells of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import BaseStreamer, LogitsProcessor, StoppingCriteria

from specdec.errors import ConfigError

# Arguments of `generate` that a request takes under another name, or not at all.
ELSEWHERE = {
    "logits_processor": "pass processors=[...]",
    "stopping_criteria": "pass stopping=[...]",
    "tokenizer": "pass Engine(tokenizer=...)",
    "drafter": "pass Engine(drafter=...): all rows have one",
    "assistant_model": "pass Engine(drafter=...): all rows have one",
    "length_policy": "pass Engine(policy=...): all rows have one",
    "layout": "pass Engine(layout=...)",
    "verification": "pass Engine(verification=...)",
    "generator": "pass seed=",
    "attention_mask": "pass prompt_ids without padding",
    "input_ids": "pass prompt_ids, [length] token ids",
}


class Request:
    """One prompt to continue. Requests of different options share a batch, and each equals its own call alone.

    prompt_ids: [length] token ids, without padding.
    options: fields of GenerationConfig (do_sample, temperature, top_k, repetition_penalty, eos_token_id ...), over
        `generation_config`, over the model's own.
    seed, stream: of sampling; the request draws from stream `stream` of `seed`. Without a seed, one is drawn from
        torch's global generator when the request is added.
    processors, prefix_allowed_tokens_fn: asked at every verified position about the request's own tokens. Copies of the
        processors are asked, so one may be passed to any number of requests.
    stopping: criteria asked after every token. stop_strings: need the engine's tokenizer.
    max_new_tokens: as in GenerationConfig.
    num_speculative_tokens: the most draft tokens per step of this row, at most the engine's; 0 = no drafts.
    streamer: gets the prompt, then each committed token, then `end()`.
    logprobs: n > 0 for the log probability of every token, and of the n likeliest, under the target's raw logits.
    keep, continues: a row kept in the cache, and continued from; not served yet.
    """

    def __init__(
        self,
        prompt_ids: Tensor | Sequence[int],
        *,
        seed: int | None = None,
        stream: int = 0,
        processors: Sequence[LogitsProcessor] = (),
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        stopping: Sequence[StoppingCriteria] = (),
        stop_strings: str | Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        num_speculative_tokens: int | None = None,
        streamer: BaseStreamer | None = None,
        logprobs: int = 0,
        keep: bool = False,
        continues: int | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ):
        for name, remedy in ELSEWHERE.items():
            if name in options:
                raise ConfigError(f"{name}= is not an option of a Request; {remedy}")
        for name, given in (("processors", processors), ("stopping", stopping)):
            if not isinstance(given, Sequence) or isinstance(given, str):
                raise ConfigError(f"{name}={given!r}; pass a list of callables")

        self.prompt_ids = prompt_ids
        self.seed, self.stream = seed, stream
        self.processors, self.prefix_allowed_tokens_fn = list(processors), prefix_allowed_tokens_fn
        self.stopping, self.streamer, self.logprobs = list(stopping), streamer, logprobs
        self.num_speculative_tokens = num_speculative_tokens
        self.generation_config, self.options = generation_config, options
        for name, value in (("max_new_tokens", max_new_tokens), ("stop_strings", stop_strings)):
            if value is not None:
                self.options[name] = value

        for name, is_asked in (("keep", keep), ("continues", continues is not None)):
            if is_asked:
                raise ConfigError(
                    f"{name}={keep if name == 'keep' else continues!r}: rows are not kept between requests yet; send "
                    "the whole text as prompt_ids"
                )


@dataclass(frozen=True)
class Event:
    """What one step did for one request.

    id: of the request. token_ids: the tokens committed in this step.
    logprobs: of each of these tokens, {token id: log probability} of the token and of the likeliest ones; empty
        unless the request asked for them.
    finish_reason: "eos", "length", "stop" (a stopping criterion or string), "abort" or "error"; None while it goes on.
    error: the exception that ended the request, raised by one of its own callbacks or for its own NaN logits.
    """

    id: int
    token_ids: list[int]
    logprobs: list[dict[int, float]]
    finish_reason: str | None = None
    error: Exception | None = None
