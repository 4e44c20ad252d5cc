"""Outputs of any engine, as rows of token ids: what `specdec check --outputs` certifies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from specdec.errors import InputError
from specdec.files.loading import read_json_lines


@dataclass(frozen=True)
class OutputRow:
    """One prompt and what an engine continued it with.

    place: where it stands, for messages. text: the completion as text, where its token ids are only this tokenizer's
    reading of it; special tokens, an end of sequence above all, are then missing from both.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    place: str
    text: str | None = None


def read_outputs(
    path: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_positions: int | None = None
) -> list[OutputRow]:
    """The rows of a .jsonl file: `prompt_ids` or `prompt`, and `completion_ids` or `completion`; ids are preferred.

    Raises InputError that names the first line which cannot be judged.
    """
    rows = [output_row(item, place, tokenizer, vocab_size) for item, place in read_json_lines(path, "outputs file")]
    for row in rows:
        length = len(row.prompt_ids) + len(row.completion_ids)
        if max_positions is not None and length > max_positions:
            raise InputError(
                f"{row.place} has {length} tokens, but the model has {max_positions} positions; is it another model's?"
            )
    return rows


def output_row(item: Any, place: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> OutputRow:
    if not isinstance(item, dict):
        raise InputError(
            f"{place} is not a JSON object; it must hold `prompt_ids` or `prompt`, and `completion_ids` or `completion`"
        )
    prompt_ids, _ = ids_or_text(item, "prompt", place, tokenizer, vocab_size)
    if not prompt_ids:
        raise InputError(f"{place} has an empty prompt; greedy decoding continues at least one token")
    completion_ids, text = ids_or_text(item, "completion", place, tokenizer, vocab_size)
    return OutputRow(prompt_ids, completion_ids, place, text)


def ids_or_text(
    item: dict, name: str, place: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[list[int], str | None]:
    """Token ids of `name`_ids, or of the text `name`, which is then returned too."""
    ids, text = item.get(f"{name}_ids"), item.get(name)
    if ids is not None:
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise InputError(f"{place}: `{name}_ids` must be a list of integers")
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise InputError(
                f"{place}: `{name}_ids` holds {wrong}, outside the model's vocabulary 0..{vocab_size - 1}; "
                "was it written with another model?"
            )
        return ids, None
    if not isinstance(text, str):
        raise InputError(f"{place} has neither a list `{name}_ids` nor a string `{name}`")
    # The tokenizer adds its special tokens to a prompt, as it does for generation, and none in the middle of a text.
    return tokenizer(text, add_special_tokens=name == "prompt", truncation=False)["input_ids"], text
