"""The errors of specdec: one hierarchy, each naming the value, the limit and the remedy.

All but `NumericalError` are raised before any token is generated.
"""


class SpecDecError(ValueError):
    """Base of every error that specdec raises on purpose."""


class ConfigError(SpecDecError):
    """An option has a value that cannot be served."""


class InputError(SpecDecError):
    """`input_ids`, `attention_mask`, a prompt file or a checkpoint folder is not usable."""


class UnsupportedModelError(SpecDecError):
    """The target or draft model cannot be decoded with per-row cache lengths, or would not be exact."""


class DrafterError(SpecDecError):
    """The drafter is none, is unknown, or does not fit the target."""


class BusyError(SpecDecError):
    """An engine, or one of its models, is asked for a step while it runs one, or after it was closed."""


class NumericalError(SpecDecError):
    """The target produced NaN logits, or a logits processor NaN scores, in the row that is named; or a training's loss
    is not finite or has diverged."""
