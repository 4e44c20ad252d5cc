"""What the small trained networks that stop a draft have in common: the pair they belong to.

A head lies beside its drafter, in the drafter's own folder or in one of its own; see `specdec/files/trained.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedModel

from specdec.files.fingerprint import Fingerprint
from specdec.files.trained import Trained

if TYPE_CHECKING:
    from typing_extensions import Self


class Head(Trained):
    """Belongs to a target and a drafter."""

    roles: ClassVar[tuple[str, ...]] = ("target", "drafter")
    alternative: ClassVar[str] = "choose another length_policy"
    target: Fingerprint | None
    drafter: Fingerprint | None

    def trained_for(self, target: PreTrainedModel, drafter: PreTrainedModel, recipe: Mapping[str, Any]) -> Self:
        """Mark this head as trained for a pair. recipe: how, and what it reached; any JSON."""
        return self.mark({"target": target, "drafter": drafter}, recipe)

    def check(self, target: PreTrainedModel, drafter: PreTrainedModel) -> None:
        """Raise ConfigError unless this head was trained for exactly these two models, whatever their dtype now."""
        self.check_models({"target": target, "drafter": drafter})

    def fits(self, target: PreTrainedModel, drafter: PreTrainedModel) -> bool:
        """Whether `check` would pass."""
        pairs = (self.target, target), (self.drafter, drafter)
        return all(known is not None and known.difference(Fingerprint.of(model)) is None for known, model in pairs)
