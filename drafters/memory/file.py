"""A memory as one file: numpy's .npz, a header and the arrays of each segment, each with a checksum.

The file is data from elsewhere. What it says of places is checked, because compiled code follows it without looking.
Texts of another origin than they pretend to be cost time, and change no token.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specdec.drafters.memory.segment import Segment
from specdec.errors import InputError
from specdec.files.fingerprint import TokenizerPrint
from specdec.version import __version__

KIND, VERSION = "specdec suffix memory", 1
HEADER = "header"
# What numpy and zipfile raise for files that are cut off, damaged, or something else.
READING_ERRORS = (zipfile.BadZipFile, ValueError, EOFError, KeyError, TypeError, NotImplementedError, OSError)


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    max_tokens: int
    tokenizer: TokenizerPrint
    segments: Sequence[Segment]


def write_memory(path: Path, content: Content) -> None:
    """Write a new file beside the old one, and then put it into its place. Raises InputError where that fails."""
    header = {
        "kind": KIND,
        "version": VERSION,
        "specdec": __version__,
        "max_tokens": content.max_tokens,
        "tokenizer": asdict(content.tokenizer),
        "segments": [{"num_texts": part.num_texts, "last_used": part.last_used} for part in content.segments],
    }
    arrays: dict[str, Any] = {HEADER: np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
    for index, segment in enumerate(content.segments):
        arrays[f"codes_{index}"], arrays[f"suffixes_{index}"] = segment.codes, segment.suffixes

    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"memory {str(path)!r} cannot be written: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def read_memory(path: Path) -> Content:
    """Raises InputError, which names the file, for one that is missing, damaged, of another kind or too new."""
    with _opened(path) as (archive, header):
        segments = [_segment(archive, index, notes) for index, notes in enumerate(header["segments"])]
        return Content(int(header["max_tokens"]), TokenizerPrint(**header["tokenizer"]), segments)


def read_tokenizer(path: Path) -> TokenizerPrint:
    """Whose token ids a file holds, without its texts. Raises InputError as `read_memory` does."""
    with _opened(path) as (_, header):
        return TokenizerPrint(**header["tokenizer"])


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Mapping[str, np.ndarray], dict[str, Any]]]:
    """The arrays and the header. What reading them raises becomes an InputError."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; what it raises says why there is none to read
    except OSError as error:
        raise InputError(
            f"memory {str(path)!r} cannot be read: {error.strerror or error}; make one with `specdec memory build`"
        ) from None
    with file:
        try:
            archive = np.load(file, allow_pickle=False)
            header = json.loads(archive[HEADER].tobytes())
            _check_kind(path, header)
            yield archive, header
        except InputError:
            raise
        except READING_ERRORS as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"memory {str(path)!r} is damaged, or no memory at all ({first}); build it again, or restore a copy"
            ) from None


def _check_kind(path: Path, header: Mapping[str, Any]) -> None:
    if header["kind"] != KIND:
        raise InputError(f"{str(path)!r} is not a memory of `specdec memory build`, but {header['kind']!r}")
    if header["version"] != VERSION:
        raise InputError(
            f"memory {str(path)!r} has format {header['version']}, and this specdec {__version__} reads {VERSION}; "
            "build it again, or install the specdec that wrote it"
        )


def _segment(archive: Mapping[str, np.ndarray], index: int, notes: Mapping[str, int]) -> Segment:
    """Raises ValueError for arrays that compiled code could not follow."""
    codes, suffixes = archive[f"codes_{index}"], archive[f"suffixes_{index}"]
    if not (codes.ndim == 1 and codes.dtype == suffixes.dtype == np.int32 and codes.shape == suffixes.shape):
        raise ValueError(f"segment {index} holds other arrays")
    if not len(codes) or codes.min() < 0 or codes[-1] != 0 or suffixes.min() < 0 or suffixes.max() >= len(codes):
        raise ValueError(f"segment {index} leads out of its texts")
    return Segment(codes, suffixes, int(notes["num_texts"]), int(notes["last_used"]))
