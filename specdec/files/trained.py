"""Common base of small trained parts: their files, and the models that they belong to.

A part is stored in a folder as `<kind>.safetensors` with `<kind>.json`. The latter holds its shape, the fingerprints of
the models that it was trained for, and notes of its trainer.
"""

from __future__ import annotations

import json
from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from specdec.errors import ConfigError, InputError
from specdec.files.fingerprint import Fingerprint

if TYPE_CHECKING:
    from typing_extensions import Self


class Trained(nn.Module, ABC):
    """A subclass stores its constructor's arguments in `shape`, so that `load` can build it again."""

    kind: ClassVar[str]  # the name of its files
    format: ClassVar[int] = 1  # of its files; increased when the meaning of the weights' inputs changes
    roles: ClassVar[tuple[str, ...]]  # the models it belongs to, by their part in decoding; each an attribute
    alternative: ClassVar[str]  # what to do without it, for messages
    shape: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        for role in self.roles:
            setattr(self, role, None)
        self.recipe: dict[str, Any] = {}

    def mark(self, models: Mapping[str, PreTrainedModel], recipe: Mapping[str, Any]) -> Self:
        """Mark this part as trained for these models, by role. recipe: how it was trained and its results; any JSON."""
        for role in self.roles:
            setattr(self, role, Fingerprint.of(models[role]))
        self.recipe = dict(recipe)
        return self

    def check_models(self, models: Mapping[str, PreTrainedModel]) -> None:
        """Raise ConfigError unless this part was trained for exactly these models, whatever their dtype now."""
        for role in self.roles:
            known: Fingerprint | None = getattr(self, role)
            if known is None:
                raise ConfigError(
                    f"this {self.kind} does not record which {role} it is for; train it, or load a saved one"
                )
            difference = known.difference(Fingerprint.of(models[role]))
            if difference is not None:
                raise ConfigError(
                    f"this {self.kind} was trained for another {role} ({difference}); train one for "
                    f"{'this pair' if len(self.roles) > 1 else 'this model'} with `{self.command()}`, or "
                    f"{self.alternative}"
                )

    @classmethod
    def command(cls) -> str:
        """The command that trains one."""
        return f"specdec train {cls.kind.replace('_', '-')}"

    def save(self, folder: str | Path) -> None:
        """Write both files, each atomically: a reader finds the old ones or the new ones."""
        fingerprints = {role: getattr(self, role) for role in self.roles}
        if None in fingerprints.values():
            raise ConfigError(
                f"a {self.kind} is saved with the {'pair' if len(self.roles) > 1 else 'model'} it belongs to; "
                "call trained_for() first"
            )

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)

        config = {
            "format": self.format,
            "kind": self.kind,
            "shape": self.shape,
            **{role: fingerprint.to_dict() for role, fingerprint in fingerprints.items()},
            "recipe": self.recipe,
        }

        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        unfinished = folder / f"{self.kind}.safetensors.part"
        save_file(weights, unfinished)
        unfinished.replace(folder / f"{self.kind}.safetensors")

        unfinished = folder / f"{self.kind}.json.part"
        unfinished.write_text(json.dumps(config, indent=1) + "\n")
        unfinished.replace(folder / f"{self.kind}.json")

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Self:
        """The part in `folder`, in float32 and evaluation mode.

        Raises InputError if there is none, or if its files are damaged or of a different kind.
        """
        place = Path(folder) / cls.kind
        files = place.with_suffix(".json"), place.with_suffix(".safetensors")
        for path in files:
            if not path.is_file():
                raise InputError(
                    f"{str(folder)!r} holds no {path.name}; train one with `{cls.command()}`, or {cls.alternative}"
                )

        try:
            config = json.loads(files[0].read_text())
            if config["kind"] == cls.kind and config["format"] in range(cls.format):
                raise InputError(f"{files[0]} was trained by an older version; train it again with `{cls.command()}`")
            if config["format"] != cls.format or config["kind"] != cls.kind:
                raise InputError(
                    f"{files[0]} is a {config['kind']} of format {config['format']}; needed is {cls.kind}, {cls.format}"
                )

            part = cls(**config["shape"])
            for role in cls.roles:
                setattr(part, role, Fingerprint.from_dict(config[role]))
            part.recipe = config["recipe"]
            part.load_state_dict(load_file(files[1]))
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"the {cls.kind} in {str(folder)!r} does not load: {error}; train or copy it again"
            ) from error

        return part.to(device, torch.float32).eval()
