"""specdec: batched speculative decoding for Hugging Face causal LMs that does not change a token."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from specdec.version import __version__

if TYPE_CHECKING:
    from specdec.api.generate import generate, speculative
    from specdec.api.generate_many import Completion, Completions, generate_many
    from specdec.batch.layout import Grouped
    from specdec.batch.report import StepReport
    from specdec.batch.rows import Rows
    from specdec.check.equivalence import EquivalenceReport, check_equivalence
    from specdec.draft import NO_TOKEN, Draft, Verified
    from specdec.drafter import Context, Drafter
    from specdec.drafters.memory.memory import SuffixMemory
    from specdec.drafters.suffix import Suffix
    from specdec.engine.engine import Engine
    from specdec.engine.metrics import Speculation
    from specdec.engine.output import SpeculativeOutput
    from specdec.engine.request import Event, Request
    from specdec.errors import (
        BusyError,
        ConfigError,
        DrafterError,
        InputError,
        NumericalError,
        SpecDecError,
        UnsupportedModelError,
    )
    from specdec.infill.infill import infill
    from specdec.network.any_subset.model import AnySubsetModel
    from specdec.network.invariant.swap import batch_invariant, make_batch_invariant
    from specdec.network.kept_forwards import release
    from specdec.policy import LengthPolicy
    from specdec.verify.lossy import Lenient, TopBeta, Typical

__all__ = [
    "NO_TOKEN",
    "AnySubsetModel",
    "BusyError",
    "Completion",
    "Completions",
    "ConfigError",
    "Context",
    "Draft",
    "Drafter",
    "DrafterError",
    "Engine",
    "EquivalenceReport",
    "Event",
    "Grouped",
    "InputError",
    "LengthPolicy",
    "Lenient",
    "NumericalError",
    "Request",
    "Rows",
    "SpecDecError",
    "Speculation",
    "SpeculativeOutput",
    "StepReport",
    "Suffix",
    "SuffixMemory",
    "TopBeta",
    "Typical",
    "UnsupportedModelError",
    "Verified",
    "__version__",
    "batch_invariant",
    "check_equivalence",
    "generate",
    "generate_many",
    "infill",
    "make_batch_invariant",
    "release",
    "speculative",
]

# Public names are imported when they are first used, so that `specdec --help` does not wait for torch.
_HOMES = {
    "network.any_subset.model": "AnySubsetModel",
    "draft": "NO_TOKEN Draft Verified",
    "drafter": "Context Drafter",
    "drafters.memory.memory": "SuffixMemory",
    "drafters.suffix": "Suffix",
    "check.equivalence": "EquivalenceReport check_equivalence",
    "errors": "BusyError ConfigError DrafterError InputError NumericalError SpecDecError UnsupportedModelError",
    "api.generate": "generate speculative",
    "engine.engine": "Engine",
    "engine.output": "SpeculativeOutput",
    "engine.request": "Event Request",
    "infill.infill": "infill",
    "api.generate_many": "Completion Completions generate_many",
    "network.invariant.swap": "batch_invariant make_batch_invariant",
    "network.kept_forwards": "release",
    "policy": "LengthPolicy",
    "verify.lossy": "Lenient TopBeta Typical",
    "engine.metrics": "Speculation",
    "batch.layout": "Grouped",
    "batch.report": "StepReport",
    "batch.rows": "Rows",
}


class _Package(ModuleType):
    """Importing the submodule `generate` must not hide the function of that name, so its binding is left out."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names.split():
                return getattr(import_module(f"specdec.{home}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *__all__]


sys.modules[__name__].__class__ = _Package
