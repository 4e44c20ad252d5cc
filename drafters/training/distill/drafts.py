"""A trained draft model as a checkpoint: complete once its folder exists, rounded as it will be loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from specdec.errors import ConfigError


def check_free(out: Path) -> None:
    """Raise ConfigError if `out` already holds a model."""
    if (out / "config.json").exists():
        raise ConfigError(f"{str(out)!r} already holds a model; choose another --out, or delete it")


@contextmanager
def save_draft(draft: PreTrainedModel, origin: str, tokenizer: PreTrainedTokenizerBase, out: Path) -> Iterator[Path]:
    """Round the weights to the dtype of the checkpoint they came from, and save them, with the tokenizer, in `out`.

    Yields a folder for the checkpoint's other files; `out` gets all of them when the block ends without error,
    config.json last. The model keeps its dtype, with rounded values, so that it measures like the stored one.
    """
    stored = AutoConfig.from_pretrained(origin, local_files_only=True).dtype or draft.dtype
    own_dtype = draft.dtype
    unfinished = out / "model.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    for parameter in draft.parameters():  # not `draft.to`: buffers such as rotation frequencies stay unrounded
        parameter.data = parameter.data.to(stored)
    draft.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    for parameter in draft.parameters():
        parameter.data = parameter.data.to(own_dtype)
    yield unfinished
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(out / path.name)
    unfinished.rmdir()
