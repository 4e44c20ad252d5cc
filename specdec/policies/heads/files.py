"""The pair that a small trained network belongs to, and the check that it is used with no other.

A head is stored in its drafter's folder or in a folder of its own; see `specdec/files/trained.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedModel

from specdec.files.fingerprint import Fingerprint
from specdec.files.trained import Trained

if TYPE_CHECKING:
    from typing_extensions import Self


class PairHead(Trained):
    """A trained network that belongs to a target and a drafter."""

    roles: ClassVar[tuple[str, ...]] = ("target", "drafter")
    alternative: ClassVar[str] = "choose another length_policy"
    target: Fingerprint | None
    drafter: Fingerprint | None

    def trained_for(self, target: PreTrainedModel, drafter: PreTrainedModel, recipe: Mapping[str, Any]) -> Self:
        """Mark this head as trained for a pair. recipe: how it was trained and what it reached; any JSON."""
        return self.mark({"target": target, "drafter": drafter}, recipe)

    def check(self, target: PreTrainedModel, drafter: PreTrainedModel) -> None:
        """Raise ConfigError unless this head was trained for exactly these two models, whatever their dtype now."""
        self.check_models({"target": target, "drafter": drafter})

    def fits(self, target: PreTrainedModel, drafter: PreTrainedModel) -> bool:
        """Whether `check` would pass."""
        pairs = (self.target, target), (self.drafter, drafter)
        return all(known is not None and known.difference(Fingerprint.of(model)) is None for known, model in pairs)
