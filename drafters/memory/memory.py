"""Finished texts that drafts are taken from: bounded, the least recently used ones leave first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.drafters.memory.file import Content, read_memory, read_tokenizer, write_memory
from specdec.drafters.memory.native import check_native
from specdec.drafters.memory.segment import BYTES_PER_TOKEN, Segment, codes_of, joined
from specdec.errors import ConfigError, DrafterError
from specdec.files.fingerprint import TokenizerPrint

DEFAULT_TOKENS = 2**24  # 128 MiB
LIMIT = 2**32
LARGEST_SEGMENT = 2**27  # places in it, four bytes a token, are sorted as 32-bit numbers
PARTS = 8  # full segments of a full memory: each costs a proposal a search, and each leaves as a whole


class SuffixMemory:
    """The texts that a `Suffix` drafter has seen end, and others that were added.

    A new text is a segment of its own. Segments of about the same size become one, up to an eighth of the memory, so
    that there are few of them and a token is sorted again only a logarithm of times. When there are more than
    `max_tokens` tokens, the segment in which no proposal has found anything for the longest time leaves.

    Serves one thread at a time. Pass the same object to several calls, and `save` it for other processes.

    tokenizer: the fingerprint of the tokenizer whose ids these are; None where none is known yet.
    """

    def __init__(self, max_tokens: int = DEFAULT_TOKENS, tokenizer: PreTrainedTokenizerBase | None = None):
        """max_tokens: the most that are kept, each of 8 bytes. tokenizer: whose ids these will be. Without one it is
        read from the folder of the first target that the memory serves.

        Raises ConfigError for another number, and DrafterError where a library is missing.
        """
        check_native()
        self.max_tokens = checked_tokens(max_tokens)
        self.tokenizer = None if tokenizer is None else TokenizerPrint.of(tokenizer)
        self.segments: list[Segment] = []
        self._clock = 0
        self._table: np.ndarray | None = None

    @classmethod
    def load(
        cls, path: str | Path, max_tokens: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> SuffixMemory:
        """The memory in a file. max_tokens: another bound than the file's.

        Raises InputError for a file that is missing, damaged or no memory, and DrafterError for one of another
        tokenizer than the given one.
        """
        memory = cls(DEFAULT_TOKENS if max_tokens is None else max_tokens)
        content = read_memory(Path(path))
        memory.max_tokens = checked_tokens(content.max_tokens if max_tokens is None else max_tokens)
        memory.tokenizer, memory.segments = content.tokenizer, list(content.segments)
        memory._clock = max((segment.last_used for segment in content.segments), default=0)
        memory._changed()
        if tokenizer is not None:
            memory.belongs_to(TokenizerPrint.of(tokenizer), f"the memory {str(path)!r}")
        return memory

    def save(self, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the memory to a file, which is replaced in one step: another process, or the next one after a crash,
        finds the old file or the new one.

        tokenizer: whose ids these are, if the memory does not know yet. Raises ConfigError where it is not known, and
        InputError for a file that cannot be written.
        """
        if tokenizer is not None:
            self.belongs_to(TokenizerPrint.of(tokenizer))
        if self.tokenizer is None:
            raise ConfigError(
                f"the memory for {str(path)!r} does not know whose token ids it holds; pass save(path, tokenizer=...)"
            )
        write_memory(Path(path), Content(self.max_tokens, self.tokenizer, self.segments))

    def add(self, token_ids: Tensor | Sequence[int]) -> None:
        """Remember one text, [length] token ids: of a longer one than the memory the last tokens.

        Raises InputError for what is no text of token ids.
        """
        codes = codes_of(token_ids, self._longest)
        if len(codes) > 2:  # in a text of one token nothing follows anything
            self._take_in(codes, 1)

    def extend(self, texts: Iterable[Tensor | Sequence[int]]) -> None:
        """Remember many texts, as `add` does for each, but sorted once."""
        coded = (codes_of(text, self._longest) for text in texts)
        for codes, num_texts in joined((codes for codes in coded if len(codes) > 2), self.segment_tokens):
            self._take_in(codes, num_texts)

    def _take_in(self, codes: np.ndarray, num_texts: int) -> None:
        self._clock += 1
        segments = self.segments
        segments.append(Segment.of(codes, num_texts, self._clock))
        while len(segments) > 1 and self._are_to_merge(*segments[-2:]):
            newest = segments.pop()
            segments[-1] = segments[-1].merged(newest)
        self._changed()

    def _are_to_merge(self, older: Segment, newer: Segment) -> bool:
        return len(older) <= 2 * len(newer) and len(older) + len(newer) <= self.segment_tokens

    def _changed(self) -> None:
        while self.num_tokens > self.max_tokens:
            self.segments.remove(min(self.segments, key=lambda segment: segment.last_used))
        self._table = None

    def __len__(self) -> int:
        """How many texts it holds."""
        return sum(segment.num_texts for segment in self.segments)

    @property
    def num_tokens(self) -> int:
        """Tokens in it, with one for the end of each text."""
        return sum(map(len, self.segments))

    @property
    def num_bytes(self) -> int:
        """Bytes that its texts take."""
        return BYTES_PER_TOKEN * self.num_tokens

    @property
    def segment_tokens(self) -> int:
        """The most tokens that segments grow to."""
        return min(max(self.max_tokens // PARTS, 1), LARGEST_SEGMENT)

    @property
    def _longest(self) -> int:
        return min(self.max_tokens, LARGEST_SEGMENT)

    @property
    def max_id(self) -> int:
        """The largest token id in it, -1 if it is empty."""
        return max((segment.max_id for segment in self.segments), default=-1)

    @property
    def table(self) -> np.ndarray:
        """[segments, 3] int64 for `lookup.draft_after`: addresses, which hold as long as nothing is added."""
        if self._table is None:
            found = [(part.codes.ctypes.data, part.suffixes.ctypes.data, len(part)) for part in self.segments]
            self._table = np.array(found, dtype=np.int64).reshape(-1, 3)
        return self._table

    def mark_used(self, used: np.ndarray) -> None:
        """used: [segments] bool, those in which a proposal has found something."""
        if used.any():
            self._clock += 1
            for segment, is_used in zip(self.segments, used.tolist(), strict=True):
                if is_used:
                    segment.last_used = self._clock

    def belongs_to(self, tokenizer: TokenizerPrint, what: str = "the memory") -> None:
        """Raise DrafterError if it holds another tokenizer's ids. If it does not know whose, they are this one's."""
        if self.tokenizer is None:
            self.tokenizer = tokenizer
        check_tokenizer(self.tokenizer, tokenizer, what)


def check_tokenizer(known: TokenizerPrint, tokenizer: TokenizerPrint, what: str) -> None:
    """Raise DrafterError unless both are one. known: of what is in `what`."""
    if known.sha256 != tokenizer.sha256:
        raise DrafterError(
            f"{what} holds token ids of another tokenizer: {known}, and the target's is {tokenizer}; build one with "
            "`specdec memory build --tokenizer FOLDER`, or start with an empty one"
        )


def check_file(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DrafterError for a memory of another tokenizer, InputError for none, without reading its texts."""
    check_tokenizer(read_tokenizer(path), TokenizerPrint.of(tokenizer), f"the memory {str(path)!r}")


def checked_tokens(max_tokens: object) -> int:
    """Raises ConfigError for anything but a whole number of tokens that a memory may hold."""
    is_whole = isinstance(max_tokens, int) and not isinstance(max_tokens, bool)
    if not (is_whole and 3 <= max_tokens <= LIMIT):  # type: ignore[operator]
        raise ConfigError(f"max_tokens={max_tokens!r} of a memory is not a whole number from 3 to {LIMIT}")
    return max_tokens  # type: ignore[return-value]
