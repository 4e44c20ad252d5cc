"""What the small trained networks that stop a draft have in common: their files, and the pair they belong to.

A head lies beside its drafter, in the drafter's own folder or in one of its own, as `<kind>.safetensors` with
`<kind>.json`. The latter holds the head's shape, the fingerprints of the target and the drafter it was trained for, and
what its trainer wants to remember.
"""

from __future__ import annotations

import json
from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import Self

from specdec.errors import ConfigError, InputError
from specdec.fingerprint import Fingerprint

FORMAT = 1


class Head(nn.Module, ABC):
    """A subclass stores its constructor's arguments in `shape`, so that `load` can build it again."""

    kind: ClassVar[str]  # the name of its files
    shape: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.target: Fingerprint | None = None
        self.drafter: Fingerprint | None = None
        self.recipe: dict[str, Any] = {}

    def trained_for(self, target: PreTrainedModel, drafter: PreTrainedModel, recipe: Mapping[str, Any]) -> Self:
        """Mark this head as trained for a pair. recipe: how, and what it reached; any JSON."""
        self.target, self.drafter = Fingerprint.of(target), Fingerprint.of(drafter)
        self.recipe = dict(recipe)
        return self

    def check(self, target: PreTrainedModel, drafter: PreTrainedModel) -> None:
        """Raise ConfigError unless this head was trained for exactly these two models, whatever their dtype now."""
        for role, known, model in (("target", self.target, target), ("drafter", self.drafter, drafter)):
            if known is None:
                raise ConfigError(
                    f"this {self.kind} does not say which {role} it is for; train it, or load a saved one"
                )
            difference = known.difference(Fingerprint.of(model))
            if difference is not None:
                raise ConfigError(
                    f"this {self.kind} was trained for another {role} ({difference}); train one for this pair with "
                    f"`specdec train {self.kind.replace('_', '-')}`, or choose another length_policy"
                )

    def save(self, folder: str | Path) -> None:
        """Write both files, each in one piece: a reader finds the old ones or the new ones."""
        if self.target is None or self.drafter is None:
            raise ConfigError(f"a {self.kind} is saved with the pair it belongs to; call trained_for() first")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": FORMAT,
            "kind": self.kind,
            "shape": self.shape,
            "target": self.target.to_dict(),
            "drafter": self.drafter.to_dict(),
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
        """The head in `folder`, in float32 and evaluation mode.

        Raises InputError if there is none, or if its files are damaged or of another kind.
        """
        place = Path(folder) / cls.kind
        files = place.with_suffix(".json"), place.with_suffix(".safetensors")
        for path in files:
            if not path.is_file():
                raise InputError(
                    f"{str(folder)!r} holds no {path.name}; train one with `specdec train "
                    f"{cls.kind.replace('_', '-')}`, or choose another length_policy"
                )
        try:
            config = json.loads(files[0].read_text())
            if config["format"] != FORMAT or config["kind"] != cls.kind:
                raise InputError(
                    f"{files[0]} is a {config['kind']} of format {config['format']}; needed is {cls.kind}, {FORMAT}"
                )
            head = cls(**config["shape"])
            head.target, head.drafter = (Fingerprint.from_dict(config[role]) for role in ("target", "drafter"))
            head.recipe = config["recipe"]
            head.load_state_dict(load_file(files[1]))
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"the {cls.kind} in {str(folder)!r} does not load: {error}; train or copy it again"
            ) from error
        return head.to(device, torch.float32).eval()
