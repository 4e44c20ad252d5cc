"""A file of results, one line of JSON a prompt, that survives being interrupted at any moment.

Each line is appended in one write and brought to the disk before the next. Beside the file stand the settings it was
begun with; who goes on with it must have the same, and the same prompts in the same places.
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
        """Open the file, or begin it. settings: whatever the results depend on, fit for JSON.

        A last line that was cut off is removed. Raises InputError if another process is writing the file, if a row is
        damaged or belongs to another prompt; ConfigError, by name, for other settings.
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
        """Write one row, whose `index` is not there yet; it is on the disk when this returns."""
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
                    f"output file {str(self.path)!r} exists, but not {beside.name!r} with the settings it was begun "
                    "with; pass another --out, or remove it"
                )
            write_atomically(beside, json.dumps(settings, indent=1))
            return
        try:
            before = json.loads(beside.read_text())
        except ValueError:
            raise InputError(f"settings file {str(beside)!r} is no JSON; restore it, or begin another --out") from None
        settings = json.loads(json.dumps(settings))
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                was, now = (str(values.get(name))[:60] for values in (before, settings))
                raise ConfigError(
                    f"output file {str(self.path)!r} was begun with {name}={was}, now it is {now}; go on with the "
                    "same settings, or pass another --out"
                )

    def _read(self, prompts: Sequence[str]) -> None:
        content = self.path.read_bytes()
        lines = content.split(b"\n")
        whole = len(content) - len(lines.pop())  # behind the last line feed: a line that was cut off, or nothing
        for number, line in enumerate(lines, 1):
            place = f"output file {str(self.path)!r}, line {number}"
            try:
                row = json.loads(line)
                index, prompt = row["index"], row["prompt"]
            except (ValueError, KeyError, TypeError):
                if number == len(lines):  # what a crash of the machine may leave
                    whole -= len(line) + 1
                    break
                raise InputError(f"{place} is damaged; remove the line to have it made again") from None
            if index in self.done:
                raise InputError(f"{place} is a second row for prompt {index}; remove one of them")
            if not isinstance(index, int) or not 0 <= index < len(prompts) or prompts[index] != prompt:
                raise InputError(f"{place} is no row of these prompts (index {index!r}); pass another --out")
            self.done.add(index)
        if whole < len(content):
            os.ftruncate(self._file, whole)
            os.fsync(self._file)


def write_atomically(path: Path, text: str) -> None:
    """The file is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
