"""transformers' logits processors at every verified position, each seeing that row's own tokens up to there.

A processor was written for one new position per row and rows of one length. Here it meets [rows, k + 1] positions of
rows of any length. Processors that do not look at the tokens take all positions at once; those that only ask which
tokens occur, or how the text ends, take all positions with suitable padding; every other one, custom ones included, is
asked once per position with the unpadded tokens of the row, as if it were alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from specdec.batch.rows import Rows
from specdec.errors import ConfigError
from specdec.kernels.commit.truncation import Truncation, Truncations
from specdec.network.base import vocab_size_of
from specdec.options.generation import GenerationOptions
from specdec.verify.truncations import SameForAllRows

# Scores of a position depend on that position's scores alone.
BLIND = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
    hf.SuppressTokensLogitsProcessor,
)
OCCURRENCE = (hf.RepetitionPenaltyLogitsProcessor,)  # which tokens occur: padding by repeating one of them is harmless
ENDING = (hf.NoRepeatNGramLogitsProcessor, hf.NoBadWordsLogitsProcessor, hf.SequenceBiasLogitsProcessor)
NO_TOKEN = -1  # pads on the left for processors that compare n-grams: equals no token of the text
# In transformers' order; each has one number, an attribute of the same name as in Truncation.
TRUNCATIONS = {
    hf.TemperatureLogitsWarper: "temperature",
    hf.TopKLogitsWarper: "top_k",
    hf.TopPLogitsWarper: "top_p",
    hf.MinPLogitsWarper: "min_p",
}
WARPERS = (*BLIND[:7], hf.TopHLogitsWarper, hf.WatermarkLogitsProcessor, hf.LogitNormalization)


class Processors:
    """The processors of one `generate` call.

    truncation: temperature, top-k, top-p and min-p where they come last, as they usually do. They are then left to
        the code that makes a distribution of the scores, which is far cheaper; `warpers` holds transformers' own.
    """

    def __init__(
        self,
        build: Callable[[int], LogitsProcessorList],
        prompt_lengths: set[int],
        min_new_tokens: int = 0,
        eos_token_ids: tuple[int, ...] = (),
    ):
        """build: prompt length -> its processors; some count from the end of the prompt.

        min_new_tokens: no end of sequence before a row has that many.
        """
        self.build = build
        lists = {length: build(length) for length in prompt_lengths}
        # The same for every prompt: warpers know nothing of lengths.
        self.truncation, self.warpers = truncation_of(next(iter(lists.values()), LogitsProcessorList()))
        kept = {length: len(processors) - len(self.warpers) for length, processors in lists.items()}
        self.by_prompt_length = {length: LogitsProcessorList(lists[length][: kept[length]]) for length in lists}
        self._rows_truncations = SameForAllRows(self.truncation)
        self.min_new_tokens, self.eos_token_ids = min_new_tokens, list(eos_token_ids)

    def __call__(self, rows: Rows, draft_ids: Tensor, logits: Tensor, first: int = 0) -> Tensor:
        """Processed scores, [rows, width, vocab], of raw logits behind `first` .. `first + width - 1` draft tokens.

        draft_ids: [rows, at least first + width - 1] int64; what a row did not draft has scores without meaning.
        Scores are float32 if there is anything to process, as in transformers, and otherwise the logits themselves.
        """
        # transformers' order: the minimum length before whatever ranks or counts the remaining tokens.
        logits = self._forbid_early_end(rows, logits, first)
        if not any(self.by_prompt_length.values()):
            return logits
        scores = torch.empty_like(logits, dtype=torch.float32)
        width = logits.shape[1]
        texts = torch.cat([rows.token_ids[:, : rows.max_length], torch.zeros_like(draft_ids)], 1)
        place = rows.lengths[:, None] + torch.arange(draft_ids.shape[1], device=rows.device)
        texts.scatter_(1, place, draft_ids.clamp(min=0))
        for prompt_length, processors in self.by_prompt_length.items():
            slots = np.flatnonzero(rows.host_prompt_lengths == prompt_length)
            if len(slots):
                index = torch.from_numpy(slots).to(rows.device)
                positions = Positions(
                    texts[index].repeat_interleave(width, 0),
                    (rows.host_lengths[slots, None] + first + np.arange(width)).flatten(),
                    rows.row_ids[slots].repeat(width),
                    draft_ids[index, first : first + width - 1],
                )
                flat = logits[index].float().flatten(0, 1)
                for processor in processors:
                    flat = apply_processor(processor, positions, flat)
                scores[index] = flat.unflatten(0, (len(slots), width))
        return scores

    def truncations(self, rows: Rows) -> Truncations:
        """The truncation of each row of this step; for now all have the call's."""
        return self._rows_truncations.truncations(rows)

    def add(self, prompt_length: int) -> None:
        """Make the processors of prompts of one more length."""
        if prompt_length not in self.by_prompt_length:
            processors = self.build(prompt_length)
            kept = len(processors) - len(self.warpers)
            self.by_prompt_length[prompt_length] = LogitsProcessorList(processors[:kept])

    @property
    def name_tokens(self) -> bool:
        """Whether scores of particular tokens are read or changed, so that each must have one."""
        return any(self.by_prompt_length.values()) or self.min_new_tokens > 0

    def warped(self, scores: Tensor) -> Tensor:
        """Scores with the truncation applied by transformers' own warpers, float32. scores: [positions, vocab]."""
        scores = scores.float()
        nothing = scores.new_empty(len(scores), 0, dtype=torch.long)
        for warper in self.warpers:
            scores = warper(nothing, scores)
        return scores

    def _forbid_early_end(self, rows: Rows, logits: Tensor, first: int) -> Tensor:
        """-inf for the end-of-sequence tokens wherever a row would end with fewer than min_new_tokens."""
        if not self.eos_token_ids or not (rows.num_new_tokens + first < self.min_new_tokens).any():
            return logits
        column = first + torch.arange(logits.shape[1], device=logits.device)
        too_early = (rows.lengths - rows.prompt_lengths)[:, None] + column < self.min_new_tokens
        is_eos = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_eos[self.eos_token_ids] = True
        return logits.masked_fill(too_early[..., None] & is_eos, float("-inf"))


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


class Positions(NamedTuple):
    """Where scores are asked for. texts: [positions, columns] int64. ends: [positions], position i follows the first
    ends[i] tokens of texts[i]. row_ids: [positions], rows of the caller's batch. draft_ids: [rows, width - 1], the
    tokens between the width positions of a row, which stand together."""

    texts: Tensor
    ends: np.ndarray
    row_ids: np.ndarray
    draft_ids: Tensor

    def padded(self, pad_with: int | None) -> Tensor:
        """The texts at equal length: padded on the left with `pad_with`, or on the right with their own first token."""
        longest = int(self.ends.max())
        ends = torch.from_numpy(self.ends).to(self.texts.device)[:, None]
        place = torch.arange(longest, device=self.texts.device)
        if pad_with is None:
            return torch.where(place < ends, self.texts[:, :longest], self.texts[:, :1])
        source = place - (longest - ends)
        return self.texts.gather(1, source.clamp(min=0)).masked_fill(source < 0, pad_with)


def apply_processor(processor: LogitsProcessor, positions: Positions, scores: Tensor) -> Tensor:
    """scores: [positions, vocab] float32, as the processors before left them."""
    kind = type(processor)
    if kind in BLIND:
        return processor(positions.texts, scores)
    if kind in OCCURRENCE and processor.prompt_ignore_length is None:
        return processor(positions.padded(None), scores)
    if kind in ENDING and getattr(processor, "ngram_size", 2) > 1:
        return processor(positions.padded(NO_TOKEN), scores)
    return one_by_one(processor, positions, scores)


def one_by_one(processor: LogitsProcessor, positions: Positions, scores: Tensor) -> Tensor:
    """Ask about each position of each row in turn, as far as the row's draft can be accepted.

    Behind a token that was not drafted, or that the processor itself forbids, nothing is asked: the text there is none
    that the processor could ever see in plain decoding, and it may not know what to say.
    """
    drafts = positions.draft_ids.tolist()
    width = positions.draft_ids.shape[1] + 1
    out = scores.clone()
    for slot, draft in enumerate(drafts):
        for column in range(width):
            place = slot * width + column
            if column and (draft[column - 1] < 0 or out[place - 1, draft[column - 1]] == float("-inf")):
                break
            is_prefix = type(processor) is hf.PrefixConstrainedLogitsProcessor
            own = for_row(processor, int(positions.row_ids[place])) if is_prefix else processor
            text = positions.texts[place : place + 1, : positions.ends[place]]
            out[place] = own(text, scores[place : place + 1])[0]
    return out


def for_row(processor: hf.PrefixConstrainedLogitsProcessor, row: int) -> LogitsProcessor:
    """The one processor that is told which row it sees; alone, every row would be number 0."""
    allowed = processor._prefix_allowed_tokens_fn
    return hf.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)


def processors_of(
    model: PreTrainedModel,
    config: GenerationConfig,
    prompt_lengths: set[int],
    options: GenerationOptions,
    custom: LogitsProcessorList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
) -> Processors:
    """The processors that transformers would use for each prompt alone, and then the `custom` ones.

    The minimum lengths are left to `Processors`, which counts new tokens row by row.
    """

    check_forced_tokens(config)
    if config.exponential_decay_length_penalty is not None and config.eos_token_id is None:
        raise ConfigError(
            f"exponential_decay_length_penalty={config.exponential_decay_length_penalty!r} makes an end of sequence "
            "likelier, and there is none; pass eos_token_id="
        )
    vocab_size = vocab_size_of(model)

    def build(prompt_length: int) -> LogitsProcessorList:
        own = copy.copy(config)
        own.min_length = own.min_new_tokens = None
        own.num_beams = own.num_return_sequences = 1  # newer transformers compares them, and they may be None
        own.max_length = prompt_length + options.max_new_tokens
        model._prepare_special_tokens(own, True, device=model.device)
        try:
            built_in = model._get_logits_processor(
                generation_config=own,
                input_ids_seq_length=prompt_length,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                device=model.device,
                model_kwargs={},
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"transformers cannot make a logits processor of these options: {error}") from error
        # As in transformers, one of the user's stands in for the built-in one of its type; others come before the
        # warpers, which only sampling has.
        own_by_type = {type(processor): processor for processor in custom or ()}
        merged = [own_by_type.pop(type(processor), processor) for processor in built_in]
        added = [processor for processor in custom or () if type(processor) in own_by_type]
        warpers = [processor for processor in merged if isinstance(processor, WARPERS)]
        for processor in [*merged, *added]:
            check_named_tokens(processor, vocab_size)
        return LogitsProcessorList([p for p in merged if not isinstance(p, WARPERS)] + added + warpers)

    return Processors(build, prompt_lengths, options.min_new_tokens, options.eos_token_ids)


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
