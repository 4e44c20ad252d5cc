"""Training text as tokens: read once, then addressed by number, so that a resumed run continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.errors import ConfigError, InputError
from specdec.files.loading import first_line


@dataclass(frozen=True)
class TrainBatch:
    """Texts of different lengths, padded on the right, where causal attention never sees the padding.

    token_ids: [rows, columns] int64. counted: [rows, columns] bool, the tokens whose prediction the loss counts:
        neither padding nor, in a continued prompt, the prompt.
    """

    token_ids: Tensor
    counted: Tensor

    def to(self, device: torch.device) -> TrainBatch:
        return TrainBatch(self.token_ids.to(device), self.counted.to(device))

    @property
    def predicts(self) -> Tensor:
        """[rows, columns - 1] bool: the positions from which a counted token is predicted."""
        return self.counted[:, 1:]


@dataclass(frozen=True)
class TokenStream:
    """Documents one after the other, and rows cut from them in an order fixed by `seed`.

    Each epoch reads the whole stream once, in rows of `row_tokens`, reshuffled and shifted by a random offset. Row n is
    a function of n and the seed only.

    token_ids: [tokens] integers, on the CPU; may be a memory map.
    """

    token_ids: np.ndarray | Tensor
    row_tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.row_tokens < 2:
            raise ConfigError(f"row_tokens={self.row_tokens} leaves nothing to predict; use at least 2")
        if len(self.token_ids) < 2 * self.row_tokens:
            raise InputError(
                f"the training text has {len(self.token_ids)} tokens, but two rows of {self.row_tokens} are needed; "
                "add text or lower row_tokens"
            )

    @property
    def rows_per_epoch(self) -> int:
        return len(self.token_ids) // self.row_tokens - 1  # the offset takes up to one row

    def rows(self, first: int, count: int) -> Tensor:
        """Rows first .. first + count - 1 of the endless order, [count, row_tokens] int64."""
        numbers = range(first, first + count)
        epochs = {n // self.rows_per_epoch: None for n in numbers}
        orders = {epoch: order_of(self.seed, epoch, self.rows_per_epoch, self.row_tokens) for epoch in epochs}
        starts = [int(orders[n // self.rows_per_epoch][n % self.rows_per_epoch]) for n in numbers]
        return torch.stack([self._row(start) for start in starts])

    def batch(self, first: int, count: int) -> TrainBatch:
        rows = self.rows(first, count)
        return TrainBatch(rows, torch.ones_like(rows, dtype=torch.bool))

    def _row(self, start: int) -> Tensor:
        return torch.as_tensor(np.asarray(self.token_ids[start : start + self.row_tokens]).astype(np.int64))


@lru_cache(maxsize=4)
def order_of(seed: int, epoch: int, num_rows: int, row_tokens: int) -> np.ndarray:
    """Where each row of an epoch starts, [num_rows] int64."""
    random = np.random.default_rng([seed, epoch])
    return random.permutation(num_rows) * row_tokens + int(random.integers(row_tokens + 1))


def pad_right(rows: Sequence[Tensor], counted_from: Sequence[int], pad_token_id: int) -> TrainBatch:
    """One batch of rows of different lengths ([length] int64 each); in row i, tokens from counted_from[i] on count."""
    lengths = torch.tensor([len(row) for row in rows])
    token_ids = torch.full((len(rows), int(lengths.max())), pad_token_id)
    for index, row in enumerate(rows):
        token_ids[index, : len(row)] = row
    column = torch.arange(token_ids.shape[1])
    counted = (column < lengths[:, None]) & (column >= torch.tensor(counted_from)[:, None])
    return TrainBatch(token_ids, counted)


def read_stream(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> np.ndarray:
    """The tokens of all files in turn, each document ended by the tokenizer's EOS; [tokens] int32, or a memory map.

    A `.npy` file holds tokens as written by `save_stream`, and must be the only file. A `.jsonl` file holds one
    document (`text` or `prompt`) per line, a `.json` file a list of them; any other file is one document. A folder
    means all files in it, at any depth, in the order of their names, except those that are not UTF-8.

    Raises InputError that names the unusable file and line.
    """
    files = [file for path in paths for file in files_of(path)]
    packed = [file for file in files if file.suffix == ".npy"]
    if packed and len(files) > 1:
        raise InputError(f"{str(packed[0])!r} holds packed tokens and must be the only training file; drop the others")
    if packed:
        return load_stream(packed[0], vocab_size)
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError("the tokenizer has no end-of-sequence token to put between documents; set its eos_token")
    parts = []
    texts = [text for file in files for text in documents_of(file)]
    for begin in range(0, len(texts), 1000):
        some = texts[begin : begin + 1000]
        encoded = tokenizer(some, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        parts += [np.array([*ids, end], dtype=np.int32) for ids in encoded]
    if not parts:
        raise InputError(f"no training text in {', '.join(map(str, paths))}; name files with text")
    return check_tokens(np.concatenate(parts), vocab_size, "the training text")


def load_stream(path: Path, vocab_size: int) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"token file {str(path)!r} cannot be read: {first_line(error)}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(f"token file {str(path)!r} must hold one dimension of integers")
    return check_tokens(tokens, vocab_size, f"token file {str(path)!r}")


def save_stream(path: Path, token_ids: np.ndarray) -> None:
    """Packed tokens that `read_stream` reads without a tokenizer."""
    from specdec.drafters.training.checkpoint import written_whole

    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.save(file, token_ids)


def check_tokens(tokens: np.ndarray, vocab_size: int, what: str) -> np.ndarray:
    for begin in range(0, len(tokens), 1 << 24):  # in parts, since it may be a memory map
        part = tokens[begin : begin + (1 << 24)]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"{what} holds token {low if low < 0 else high}, but the model has {vocab_size} tokens; "
                "use the model's own tokenizer"
            )
    return tokens


def files_of(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"training text {str(path)!r} does not exist; name a file or a folder")
    return sorted(file for file in path.rglob("*") if file.is_file() and is_text(file)) if path.is_dir() else [path]


def is_text(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return path.suffix == ".npy"
    return True


def documents_of(path: Path) -> Iterable[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"training text {str(path)!r} cannot be read: {first_line(error)}") from None
    if path.suffix == ".jsonl":
        lines = [line for line in content.split("\n") if line.strip()]
        items = [parse(line, f"{str(path)!r}, line {number}") for number, line in enumerate(lines, 1)]
    elif path.suffix == ".json":
        found = parse(content, repr(str(path)))
        items = found if isinstance(found, list) else [found]
    else:
        items = [content]
    return [text_of(item, path) for item in items if item != ""]


def parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is not JSON: {error.msg} at column {error.colno}") from None


def text_of(item: Any, path: Path) -> str:
    text = (item.get("text") or item.get("prompt")) if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise InputError(f"training text {str(path)!r} holds an entry that is neither a string nor has a `text`")
    return text
