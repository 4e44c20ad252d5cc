"""A part of the memory: some texts, and the order of all their suffixes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from specdec.errors import InputError

MAX_ID = 2**31 - 3  # ids plus 1 are kept as int32
BYTES_PER_TOKEN = 8  # a code and a place in the suffix array; the code after each text counts as a token


@dataclass(eq=False)
class Segment:
    """codes: [length] int32, of each text the ids plus 1 and then a 0. suffixes: [length] int32, the places in order of
    what begins there. num_texts: how many. last_used: the memory's clock when a proposal last found something here."""

    codes: np.ndarray
    suffixes: np.ndarray
    num_texts: int
    last_used: int = 0

    @staticmethod
    def of(codes: np.ndarray, num_texts: int, last_used: int = 0) -> Segment:
        from pydivsufsort import divsufsort

        # As unsigned numbers, whose order the library follows whatever their size (Mori's divsufsort, in O(n log n)).
        suffixes = divsufsort(codes.view(np.uint32)).astype(np.int32, copy=False)
        return Segment(codes, suffixes, num_texts, last_used)

    def __len__(self) -> int:
        return len(self.codes)

    def merged(self, other: Segment) -> Segment:
        codes = np.concatenate([self.codes, other.codes])
        return Segment.of(codes, self.num_texts + other.num_texts, max(self.last_used, other.last_used))

    @property
    def max_id(self) -> int:
        return int(self.codes.max()) - 1


def codes_of(token_ids: Tensor | Sequence[int] | np.ndarray, most: int) -> np.ndarray:
    """One text as codes with its end, [length + 1] int32: the last `most - 1` tokens of a longer one.

    Raises InputError for what is not a text of token ids.
    """
    ids = token_ids.numpy(force=True) if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise InputError(f"a text has shape {list(ids.shape)} and type {ids.dtype}; pass [length] token ids")
    if ids.size and (ids.min() < 0 or ids.max() > MAX_ID):
        raise InputError(f"a text holds ids {ids.min()} to {ids.max()}; token ids are 0 to {MAX_ID}")
    ids = ids[max(len(ids) - most + 1, 0) :]
    return np.append(ids.astype(np.int32) + np.int32(1), np.int32(0))


def joined(texts: Iterable[np.ndarray], size: int) -> Iterable[tuple[np.ndarray, int]]:
    """Texts in groups of at most `size` codes, or of one text: the codes of each, and how many texts they are."""
    group: list[np.ndarray] = []
    length = 0
    for codes in texts:
        if group and length + len(codes) > size:
            yield np.concatenate(group), len(group)
            group, length = [], 0
        group.append(codes)
        length += len(codes)
    if group:
        yield np.concatenate(group), len(group)
