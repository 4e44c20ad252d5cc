"""Which model something was trained for, or which tokenizer ids belong to: enough of them to tell them from others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 8  # weights read per parameter
HALF_PRECISION = 2.0**-7  # relative: twice the rounding of a bfloat16


@dataclass(frozen=True)
class Fingerprint:
    """A model as recorded in a head.

    dtype: of the weights when they were read. weights: parameter name -> a few of its values, evenly spaced.
    In the same dtype these must be equal; a copy in another dtype is the same model within rounding.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_parameters: int
    dtype: str
    weights: Mapping[str, list[float]]

    @staticmethod
    def of(model: PreTrainedModel) -> Fingerprint:
        """Reads a few values of each parameter, not the whole model."""
        config = model.config.get_text_config(decoder=True)
        return Fingerprint(
            config.model_type,
            config.vocab_size,
            config.hidden_size,
            config.num_hidden_layers,
            sum(parameter.numel() for parameter in model.parameters()),
            str(model.dtype).removeprefix("torch."),
            {name: sample(parameter.detach()) for name, parameter in model.named_parameters()},
        )

    def difference(self, other: Fingerprint) -> str | None:
        """The difference between `other` and this model, in words; None if it is the same."""
        for name in ("model_type", "vocab_size", "hidden_size", "num_layers", "num_parameters"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} {theirs} instead of {ours}"
        if self.weights.keys() != other.weights.keys():
            return f"parameters of other names ({min(self.weights.keys() ^ other.weights.keys())})"
        relative = 0.0 if self.dtype == other.dtype else HALF_PRECISION
        for name, values in self.weights.items():
            ours, theirs = torch.tensor(values), torch.tensor(other.weights[name])
            if ours.shape != theirs.shape:
                return f"another shape of {name}"
            if not torch.allclose(theirs, ours, rtol=relative, atol=relative * ours.abs().max().item(), equal_nan=True):
                return f"other weights in {name}"
        return None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Fingerprint:
        """Raises TypeError where a field is missing or unknown."""
        return Fingerprint(**values)


def sample(weight: torch.Tensor) -> list[float]:
    flat = weight.flatten()
    place = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), device=flat.device).long()
    place = place.clamp(max=len(flat) - 1)  # for a large weight float32 rounds it up
    return flat[place].double().tolist()


@dataclass(frozen=True)
class TokenizerPrint:
    """Which tokenizer ids belong to. name: for messages. size: its number of tokens. sha256: of all tokens with ids."""

    name: str
    size: int
    sha256: str

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> TokenizerPrint:
        vocab = sorted(tokenizer.get_vocab().items())
        name = str(tokenizer.name_or_path).rstrip("/").rpartition("/")[2]
        return TokenizerPrint(name, len(vocab), sha256(json.dumps(vocab).encode()).hexdigest())

    def __str__(self) -> str:
        return f"{self.name or 'unnamed'} ({self.size} tokens, {self.sha256[:8]})"
