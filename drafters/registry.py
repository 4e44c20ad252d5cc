"""Turns a user's `drafter=` into a Drafter. Each drafter is imported when it is first named."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from transformers import PreTrainedModel

from specdec.drafter import Drafter
from specdec.errors import DrafterError

# name -> (module, class, whether the name alone is enough to build it)
DRAFTERS = {
    "draft_model": ("specdec.drafters.draft_model", "DraftModel", False),
    "prompt_lookup": ("specdec.drafters.prompt_lookup", "PromptLookup", True),
    "any_subset": ("specdec.drafters.any_subset", "AnySubsetDrafter", False),
    "look_ahead": ("specdec.drafters.look_ahead", "LookAhead", False),
    "synthetic": ("specdec.drafters.synthetic", "Synthetic", False),
}


def drafter_class(name: str) -> Callable[..., Drafter]:
    """The class for a drafter's name.

    Raises DrafterError for an unknown name, listing the known ones.
    """
    if name not in DRAFTERS:
        raise DrafterError(f"unknown drafter {name!r}; known are {', '.join(DRAFTERS)}")
    module, attribute, _ = DRAFTERS[name]
    return getattr(import_module(module), attribute)


def drafter_from(name: str, folder: str) -> Drafter:
    """The drafter of that name stored in a folder; for drafters whose classes can `load`."""
    return drafter_class(name).load(folder)  # type: ignore[attr-defined]


def resolve(drafter: Drafter | PreTrainedModel | str, **options) -> Drafter:
    """A Drafter from a Drafter, a draft model or a name; `options` go to the named drafter's constructor."""
    if isinstance(drafter, Drafter):
        return drafter
    if isinstance(drafter, PreTrainedModel):
        is_any_subset = getattr(drafter.config, "model_type", None) == "xlnet"
        return drafter_class("any_subset" if is_any_subset else "draft_model")(drafter)
    if not isinstance(drafter, str):
        what = f"the class {drafter.__name__}" if isinstance(drafter, type) else f"a {type(drafter).__name__}"
        raise DrafterError(
            f"drafter is {what}; pass a Drafter instance, a PreTrainedModel or one of the names {', '.join(DRAFTERS)}"
        )
    built = drafter_class(drafter)
    if not DRAFTERS[drafter][2] and not options:
        raise DrafterError(
            f"drafter={drafter!r} needs arguments; pass {built.__module__}.{built.__name__}(...) "
            "or, for a draft model, the model itself"
        )
    return built(**options)
