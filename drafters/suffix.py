"""Suffix decoding: propose what most often followed the longest known suffix of the text, here or in finished texts.

The rule is that of SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975) for a chain. Let C(N) be the share of token N
among all that followed the same context. A path has the probability D(N) = D(parent of N) C(N), and of a suffix of p
tokens at most MAX_SPEC(p) = alpha p tokens are drafted.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.rows import Rows
from specdec.batch.slots import to_device
from specdec.draft import NO_TOKEN, Draft, Verified
from specdec.drafter import Context, Drafter
from specdec.drafters.memory.memory import SuffixMemory
from specdec.drafters.memory.native import check_native
from specdec.errors import ConfigError, DrafterError
from specdec.files.loading import tokenizer_print_of
from specdec.network.base import vocab_size_of

MAX_MATCH = 1024  # tokens of a suffix; more would tell nothing
LEAST_PROBABILITY = 0.01


class RowText:
    """A row's committed tokens on the host. codes: [capacity] int32, ids plus 1, of which the first `length` count."""

    def __init__(self) -> None:
        self.codes, self.length = np.zeros(256, dtype=np.int32), 0

    def append(self, token_ids: np.ndarray) -> None:
        """token_ids: [tokens] int64"""
        begin, self.length = self.length, self.length + len(token_ids)
        if self.length > len(self.codes):
            self.codes = np.concatenate([self.codes, np.zeros(2 * self.length, dtype=np.int32)])
        self.codes[begin : self.length] = token_ids + 1


class Suffix(Drafter):
    """Costs no network call, and the host a few microseconds a row.

    The draft's next token is the one that most often followed the longest suffix of the text and the draft so far that
    occurs, followed by a token, in the row's own text or in the memory; of equally frequent ones the one that followed
    latest in the row's own text, then the one of the smallest id. As long as something follows, occurrences are looked
    at no further back than the suffix that was found first. The draft ends when the product of the tokens' shares falls
    below `min_probability`, after `max_factor` tokens for each token of the first suffix, and where nothing is known.

    A row enters the memory when it ends, its prompt and what was generated. Greedy output does not depend on the
    memory. Sampled output follows the target's distribution with any memory, and repeats with the same memory.
    """

    name = "suffix"
    shares_slots = True
    learns = True

    def __init__(
        self,
        memory: SuffixMemory | Path | None = None,
        max_tokens: int | None = None,
        max_match: int = 64,
        max_factor: float = 4.0,
        min_probability: float = 0.1,
        learn: bool = True,
    ):
        """memory: what is known from the start, or a file of it; by default an empty one. max_tokens: the most tokens
            that a memory of a file, or an empty one, may hold.
        max_match: the longest suffix that is looked for. learn: whether rows that end enter the memory.

        Raises ConfigError for values that cannot be served, InputError for a file that cannot be read, and DrafterError
        where a library is missing.
        """
        check_native()
        if not 1 <= max_match <= MAX_MATCH:
            raise ConfigError(f"max_match={max_match} is not 1 to {MAX_MATCH} tokens")
        if not 0 < max_factor < math.inf:
            raise ConfigError(f"max_factor={max_factor} is not a finite number above 0")
        if not LEAST_PROBABILITY <= min_probability <= 1:
            raise ConfigError(f"min_probability={min_probability} is not {LEAST_PROBABILITY} to 1")
        if isinstance(memory, SuffixMemory) and max_tokens is not None:
            raise ConfigError(
                f"max_tokens={max_tokens} with a memory of its own bound of {memory.max_tokens}; leave it out, or pass "
                "SuffixMemory(max_tokens=...)"
            )
        self.memory = _memory_of(memory, max_tokens)
        self.max_match, self.max_factor, self.min_probability = max_match, float(max_factor), float(min_probability)
        self.learns = learn
        self._texts: dict[int, RowText] = {}
        self._vocab_size = 0
        self._counts = np.zeros(0, dtype=np.int32)
        self._scratch = np.zeros((3, 0), dtype=np.int32)

    def check(self, target: PreTrainedModel, max_length: int) -> None:
        """Raise DrafterError for a memory of another tokenizer, as far as the target's is known."""
        tokenizer = tokenizer_print_of(target)
        if tokenizer is not None:
            self.memory.belongs_to(tokenizer)
        known = _num_ids(target)
        if self.memory.max_id >= known:
            raise DrafterError(
                f"the memory holds token id {self.memory.max_id}, and the target knows {known} tokens: "
                "it is of another tokenizer; build one with `specdec memory build --tokenizer FOLDER`, or start "
                "with an empty one"
            )

    def start(self, context: Context, rows: Rows) -> None:
        super().start(context, rows)
        self._texts = {}
        self._vocab_size = vocab_size_of(context.target)
        self._counts = np.zeros(_num_ids(context.target) + 1, dtype=np.int32)

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        from specdec.drafters.memory.lookup import draft_after

        self._catch_up(rows)
        longest = max(rows.max_length, self.max_match)
        if self._scratch.shape[1] < longest:
            self._scratch = np.zeros((3, 2 * longest), dtype=np.int32)
        table = self.memory.table
        used = np.zeros(len(table), dtype=np.bool_)
        drafts = [
            draft_after(
                text.codes, text.length, table, max_tokens, self.max_match, self.max_factor, self.min_probability,
                self._vocab_size, self._counts, self._scratch, used,
            )
            for text in (self._texts[row] for row in rows.row_ids.tolist())
        ]  # fmt: skip
        self.memory.mark_used(used)

        width = max(map(len, drafts))
        if not width:
            return Draft.empty(len(rows), rows.device)
        if rows.device.type == "cuda":
            width = max_tokens  # columns are nearly free there, and each new width of a forward costs a capture
        token_ids = np.full((len(rows), width), NO_TOKEN, dtype=np.int64)
        for row, draft in zip(token_ids, drafts, strict=True):
            row[: len(draft)] = draft
        return Draft.trusted(to_device(token_ids, rows.device), is_valid=True)

    def _catch_up(self, rows: Rows) -> None:
        """Read what is not known of these rows: once a prompt with its first token, and on a CPU nothing else."""
        texts = [self._texts.setdefault(row, RowText()) for row in rows.row_ids.tolist()]
        lengths = rows.host_lengths.tolist()
        begins = [text.length for text, length in zip(texts, lengths, strict=True) if text.length < length]
        if begins:
            begin = min(begins)
            missing = rows.token_ids[:, begin : max(lengths)].cpu().numpy()
            for text, length, ids in zip(texts, lengths, missing, strict=True):
                text.append(ids[text.length - begin : length - begin])

    def observe(self, verified: Verified) -> None:
        """Without a word of the device: what a step commits is on the host when the step has been read."""
        assert verified.row_ids is not None and verified.committed_ids is not None
        for row, ids, length in zip(
            verified.row_ids.tolist(), verified.committed_ids, verified.host_lengths.tolist(), strict=True
        ):
            text, new = self._texts.get(row), ids[ids != NO_TOKEN]
            if text is not None and text.length + len(new) == length:
                text.append(new)

    def ended(self, row_id: int, token_ids: Tensor) -> None:
        self._texts.pop(row_id, None)
        if self.learns:
            self.memory.add(token_ids)

    def finish(self) -> None:
        self._texts = {}


def _memory_of(memory: SuffixMemory | Path | None, max_tokens: int | None) -> SuffixMemory:
    if isinstance(memory, SuffixMemory):
        return memory
    if memory is not None:
        return SuffixMemory.load(memory, max_tokens)
    return SuffixMemory() if max_tokens is None else SuffixMemory(max_tokens)


def _num_ids(target: PreTrainedModel) -> int:
    """Ids that a text may hold: prompts all that have an embedding, and the target may write more."""
    return max(target.get_input_embeddings().weight.shape[0], vocab_size_of(target))
