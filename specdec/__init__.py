"""specdec: batched speculative decoding for Hugging Face causal LMs that does not change a token."""

from specdec.drafter import NO_TOKEN, Draft, Drafter, Verified
from specdec.equivalence import EquivalenceReport, check_equivalence
from specdec.errors import (
    ConfigError,
    DrafterError,
    InputError,
    NumericalError,
    SpecDecError,
    UnsupportedModelError,
)
from specdec.generate import SpeculativeOutput, generate, speculative
from specdec.invariant import batch_invariant, make_batch_invariant
from specdec.metrics import Speculation
from specdec.rows import Rows, StepReport
from specdec.version import __version__

__all__ = [
    "NO_TOKEN",
    "ConfigError",
    "Draft",
    "Drafter",
    "DrafterError",
    "EquivalenceReport",
    "InputError",
    "NumericalError",
    "Rows",
    "SpecDecError",
    "Speculation",
    "SpeculativeOutput",
    "StepReport",
    "UnsupportedModelError",
    "Verified",
    "__version__",
    "batch_invariant",
    "check_equivalence",
    "generate",
    "make_batch_invariant",
    "speculative",
]
