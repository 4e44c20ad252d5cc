"""Text with places to fill, written as `<mask:12>` (twelve tokens) or given as lines of a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.errors import InputError

TAG = re.compile(r"<mask:([1-9][0-9]*)>")
LOOKS_LIKE_A_TAG = re.compile(r"<\s*mask\b[^>\n]{0,20}>?", re.IGNORECASE)


@dataclass(frozen=True)
class MaskedText:
    """token_ids: [length] int64, anything at masked places. mask: [length] bool, True at the places to fill."""

    token_ids: Tensor
    mask: Tensor

    def around(self, max_tokens: int) -> tuple[MaskedText, int]:
        """As much text around the places to fill as fits, and the index of its first token.

        Raises InputError if the places to fill are too far apart for that.
        """
        length, places = len(self.mask), self.mask.nonzero()[:, 0]
        if length <= max_tokens or not len(places):
            return self, 0
        begin, end = int(places[0]), int(places[-1]) + 1
        if end - begin >= max_tokens:
            raise InputError(
                f"the places to fill span {end - begin} tokens, and the model has {max_tokens} positions for them and "
                "some text around; fill fewer or closer places at a time"
            )
        first = min(max(begin - (max_tokens - (end - begin)) * 2 // 3, 0), length - max_tokens)
        cut = slice(first, first + max_tokens)
        return MaskedText(self.token_ids[cut], self.mask[cut]), first


def parse_masks(text: str, tokenizer: PreTrainedTokenizerBase) -> MaskedText:
    """Raises InputError for text without a mask, and for misspelled masks."""
    for found in LOOKS_LIKE_A_TAG.finditer(text):
        if not TAG.match(text, found.start()):
            raise InputError(
                f"{found[0]!r} is not a mask; write <mask:12> for twelve tokens (a whole number from 1, no spaces)"
            )
    pieces = TAG.split(text)  # text, number, text, number, ... text
    if len(pieces) == 1:
        raise InputError("the text has no <mask:N>, so nothing to fill; write <mask:12> to fill in twelve tokens")
    ids: list[int] = []
    mask: list[bool] = []
    for index, piece in enumerate(pieces):
        tokens = [0] * int(piece) if index % 2 else encode(piece, tokenizer)
        ids += tokens
        mask += [bool(index % 2)] * len(tokens)
    return MaskedText(torch.tensor(ids), torch.tensor(mask))


def mask_lines(text: str, ranges: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> MaskedText:
    """A text whose lines `ranges` ("3" or "3-5", from 1) are to be filled, in as many tokens as they have now.

    Raises InputError for ranges that are misspelled, lie outside the text or overlap.
    """
    lines = text.splitlines(keepends=True)
    chosen: dict[int, str] = {}

    for part in ranges:
        match = re.fullmatch(r"([1-9][0-9]*)(?:-([1-9][0-9]*))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last:
            raise InputError(f"lines {part!r} is not a range; write 3 or 3-5, counted from 1")

        if last > len(lines):
            raise InputError(f"lines {part} end after the text's {len(lines)} lines; name lines that exist")
        for line in range(first, last + 1):
            if line in chosen:
                raise InputError(f"masks overlap: line {line} is in {chosen[line]} and in {part}; name each line once")
            chosen[line] = part

    ids: list[int] = []
    mask: list[bool] = []

    # Runs of lines are encoded as a whole, so that tokens may span line ends inside them.
    begin = 0
    while begin < len(lines):
        hidden, end = begin + 1 in chosen, begin
        while end < len(lines) and (end + 1 in chosen) == hidden:
            end += 1

        tokens = encode("".join(lines[begin:end]), tokenizer)
        ids += tokens
        mask += [hidden] * len(tokens)
        begin = end
    return MaskedText(torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.bool))


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"] if text else []
