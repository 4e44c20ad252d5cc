"""A file of results, one line of JSON per prompt, that survives being interrupted at any moment.

Each line is appended in one write and synced to disk before the next. A second file next to it holds the settings of
the first run; a run that resumes must have the same settings, and the same prompts in the same places.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from specdec.errors import ConfigError, InputError

SUFFIX = ".settings.json"


class OutputFile:
    """done: indices of the prompts whose rows are in the file already."""

    def __init__(self, path: Path, settings: Mapping[str, Any], prompts: Sequence[str]):
        """Open or create the file. settings: everything the results depend on, as JSON values.

        An incomplete last line is removed. Raises InputError if another process is writing the file, or if a row is
        damaged or belongs to another prompt; raises ConfigError that names the setting if settings differ.
        """
        self.path, self.done = path, set[int]()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f"output file {str(path)!r} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise InputError(f"output file {str(path)!r} is being written by another process; wait for it") from None
        try:
            self._check_settings({**settings, "prompts": sha256("\0".join(prompts).encode()).hexdigest()})
            self._read(prompts)
        except BaseException:
            self.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, whose `index` must be new; it is on disk when this returns."""
        assert row["index"] not in self.done
        line = json.dumps(row).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)
        self.done.add(row["index"])

    def close(self) -> None:
        os.close(self._file)  # and with it the lock

    def _check_settings(self, settings: dict[str, Any]) -> None:
        beside = self.path.with_name(self.path.name + SUFFIX)
        if not beside.exists():
            if os.fstat(self._file).st_size:
                raise InputError(
                    f"output file {str(self.path)!r} exists, but not {beside.name!r} with its settings; "
                    "pass another --out, or remove it"
                )
            write_atomically(beside, json.dumps(settings, indent=1))
            return

        try:
            before = json.loads(beside.read_text())
        except ValueError:
            raise InputError(f"settings file {str(beside)!r} is not JSON; restore it, or pass another --out") from None

        settings = json.loads(json.dumps(settings))
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                was, now = (str(values.get(name))[:60] for values in (before, settings))
                raise ConfigError(
                    f"output file {str(self.path)!r} was begun with {name}={was}, now it is {now}; use the "
                    "same settings, or pass another --out"
                )

    def _read(self, prompts: Sequence[str]) -> None:
        content = self.path.read_bytes()
        lines = content.split(b"\n")
        whole = len(content) - len(lines.pop())  # after the last line feed: an incomplete line, or nothing

        for number, line in enumerate(lines, 1):
            place = f"output file {str(self.path)!r}, line {number}"
            try:
                row = json.loads(line)
                index, prompt = row["index"], row["prompt"]
            except (ValueError, KeyError, TypeError):
                if number == len(lines):  # a crash of the machine may leave this
                    whole -= len(line) + 1
                    break
                raise InputError(f"{place} is damaged; remove the line so that it is generated again") from None

            if index in self.done:
                raise InputError(f"{place} is a second row for prompt {index}; remove one of them")
            if not isinstance(index, int) or not 0 <= index < len(prompts) or prompts[index] != prompt:
                raise InputError(f"{place} is not a row of these prompts (index {index!r}); pass another --out")
            self.done.add(index)

        if whole < len(content):
            os.ftruncate(self._file, whole)
            os.fsync(self._file)


def write_atomically(path: Path, text: str) -> None:
    """Write the file completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
