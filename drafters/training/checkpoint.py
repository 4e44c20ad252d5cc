"""The state of a training run on disk: everything an exact resume needs, written completely or not at all."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specdec.errors import ConfigError, InputError

VERSION = 1


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends without error; a kill leaves the old or new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """state: tensors, numbers and strings in dicts and lists, readable without running code."""
    with written_whole(path) as temporary:
        torch.save({"version": VERSION, **state}, temporary)


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state of an unfinished run with the same settings, its tensors on the CPU.

    Raises InputError if the file cannot be read, and ConfigError naming the settings that differ.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"checkpoint {str(path)!r} cannot be read: {error}; delete it to start again") from None
    if state.get("version") != VERSION:
        raise InputError(f"checkpoint {str(path)!r} has format {state.get('version')}, not {VERSION}; delete it")
    before = state["settings"]
    differing = [
        f"{name} was {before.get(name)!r}, is {settings.get(name)!r}"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if differing:
        raise ConfigError(
            f"checkpoint {str(path)!r} is from a run with other settings: {'; '.join(differing)}; "
            "repeat the run's own options to resume it, or choose another folder"
        )
    return state


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators of python, numpy and torch, in types that a checkpoint may hold."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)


class LossLog:
    """`losses.jsonl`: one line per step, each step once, however often the run was resumed."""

    def __init__(self, path: Path, num_steps_done: int):
        """Keep the lines of the first `num_steps_done` steps; later ones will be computed again."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines()[:num_steps_done] if path.exists() else []
        with written_whole(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def append(self, entries: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(entry)}\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
