"""Checkpoints in GGUF files, which transformers reads and dequantises. The package `gguf` is needed for that alone."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel

from specdec.errors import InputError

SUFFIX = ".gguf"
PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
WEIGHTS = ("*.safetensors", "*.bin")


def is_gguf(path: Path) -> bool:
    """Whether this is a file that is named as GGUF."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def holds_gguf_alone(folder: Path) -> bool:
    """Whether the folder's weights are in GGUF files and in no others, whatever configs lie beside them."""
    return bool(files_in(folder)) and not any(any(folder.glob(pattern)) for pattern in WEIGHTS)


def files_in(folder: Path) -> list[Path]:
    """The GGUF files of language models; those named mmproj are parts that see."""
    return sorted(path for path in folder.iterdir() if is_gguf(path) and not path.name.lower().startswith("mmproj"))


def find_gguf(path: Path, role: str) -> Path:
    """The GGUF file that `path` is, or that the folder `path` holds.

    Raises InputError for several of them, for a part of one, and where the package is missing that reads it.
    """
    files = files_in(path) if path.is_dir() else [path]
    if len(files) > 1:
        raise InputError(
            f"{role} {str(path)!r} holds {len(files)} GGUF files: {', '.join(file.name for file in files)}; pass one, "
            f"for example {str(files[0])!r}"
        )
    (file,) = files
    if part := PART.search(file.name):
        raise InputError(
            f"{role} {str(file)!r} is one of {int(part[1])} parts; join them first (llama-gguf-split --merge)"
        )
    if find_spec("gguf") is None:
        raise InputError(f"{role} {str(file)!r} is read with the package gguf, which is missing; pip install gguf")
    return file


def now_plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same, no longer marked as quantised: transformers has dequantised every weight, and would refuse to save a
    model with this mark."""
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if name in vars(owner):
            delattr(owner, name)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False
    return model
