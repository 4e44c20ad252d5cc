"""A folder as the drafter: which kind of drafter its files hold, and loading the models among them."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from specdec.errors import DrafterError
from specdec.files.gguf import holds_gguf_alone, is_gguf
from specdec.files.loading import DTYPES, find_checkpoint, load_model, read_json
from specdec.kept import kept_with

CONFIG, LOOK_AHEAD = "config.json", "look_ahead.json"
HEADS = ("acceptance_head", "disco")  # trained parts that decide how far to draft, and draft nothing
NEEDED = (
    f"a drafter's folder holds {CONFIG} or a .gguf file (a draft model, or an XLNet), or {LOOK_AHEAD} (look-ahead "
    "embeddings)"
)
MAX_LISTED = 5


def kind_of(folder: Path) -> str:
    """The name of the drafter that a folder holds. Raises DrafterError for a folder without one, or with two."""
    is_in_gguf = is_gguf(folder) or holds_gguf_alone(folder)
    has_model, has_embeddings = is_in_gguf or (folder / CONFIG).is_file(), (folder / LOOK_AHEAD).is_file()
    if has_model and has_embeddings:
        raise DrafterError(
            f"the folder {str(folder)!r} holds {CONFIG} and {LOOK_AHEAD}, which are two drafters; write "
            "draft_model:folder=PATH or look_ahead:folder=PATH"
        )
    if has_embeddings:
        return "look_ahead"
    if not has_model:
        raise DrafterError(_refusal(folder))
    if is_in_gguf:
        return "draft_model"

    config = read_json(folder / CONFIG, "model config")
    is_any_subset = isinstance(config, dict) and config.get("model_type") == "xlnet"
    return "any_subset" if is_any_subset else "draft_model"


def _refusal(folder: Path) -> str:
    """Why a folder without a drafter is refused: what it holds, and what is needed."""
    for head in HEADS:
        if (folder / f"{head}.json").is_file():
            return (
                f"the folder {str(folder)!r} holds {head}.json, a head that decides how far to draft, not a drafter; "
                f"put it into the draft model's folder, and pass that folder with length_policy={head!r}"
            )
    found = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(found[:MAX_LISTED]) + (", ..." if len(found) > MAX_LISTED else "") if found else "nothing"
    return f"the folder {str(folder)!r} is not a drafter's: it holds {listed}; {NEEDED}"


def model_in(folder: str | Path, target: PreTrainedModel) -> PreTrainedModel:
    """The model in a folder, on the target's device and in its dtype.

    The newest one is kept as long as its target lives, and loaded again only if its files have changed.
    """
    path = find_checkpoint(str(folder), "draft")
    dtype = str(target.dtype).removeprefix("torch.")
    inside = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    files = sorted((file.name, file.stat().st_mtime_ns) for file in inside)
    key = str(path.resolve()), target.device, dtype, tuple(files)

    def load() -> PreTrainedModel:
        return load_model(path, "draft", target.device, dtype if dtype in DTYPES else None)

    return kept_with(target, model_in, load, key)


def load_target_first(name: str, folder: str | Path) -> DrafterError:
    """The error where a model is to be loaded from a folder and no target is known."""
    return DrafterError(
        f"drafter {name!r} of the folder {str(folder)!r} is loaded on its target's device, and no target is known "
        "here; pass the folder to generate(target, drafter=...), or load the model yourself and pass it as drafter="
    )
