"""From what a user passes as `drafter=` or `--drafter` to a Drafter. Each drafter is imported when it is first named.

The grammar of text:

    text  = FOLDER | part ["+" part ...]      "a+b": a where it has a draft for the row, else b
    part  = FOLDER | name [":" key "=" value ["," key "=" value ...]]

A FOLDER is one that exists; its files say which drafter it holds (`folders.py`). Values are converted as the drafter's
constructor is annotated. A list names candidates, of which a length policy chooses one in each step; so does text with
commas, "a,b,none". None, or "none", is plain decoding.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from transformers import PreTrainedModel

from specdec.drafter import Drafter
from specdec.errors import DrafterError
from specdec.files.gguf import is_gguf

NOTHING, FOLDER, OBJECTS = "nothing", "folder", "objects"
WRITTEN = (int, float, str, bool, Path)  # kinds of values that text can give
PLAIN = "none"  # plain decoding, as one of several candidates


class Entry(NamedTuple):
    """One drafter of the table.

    needs: NOTHING if its name alone is enough; FOLDER if its class has `load(folder, target, **options)`, and text says
        `folder=PATH`; OBJECTS if it cannot be written as text.
    """

    module: str
    owner: str
    needs: str = NOTHING

    @property
    def is_complete(self) -> bool:
        return self.needs == NOTHING

    @property
    def path(self) -> str:
        return f"{self.module}.{self.owner}"


DRAFTERS = {
    "draft_model": Entry("specdec.drafters.draft_model", "DraftModel", FOLDER),
    "prompt_lookup": Entry("specdec.drafters.prompt_lookup", "PromptLookup"),
    "suffix": Entry("specdec.drafters.suffix", "Suffix"),
    "any_subset": Entry("specdec.drafters.any_subset", "AnySubsetDrafter", FOLDER),
    "look_ahead": Entry("specdec.drafters.look_ahead", "LookAhead", FOLDER),
    "synthetic": Entry("specdec.drafters.synthetic", "Synthetic", OBJECTS),
}


class Part(NamedTuple):
    """One drafter as it was written. options: by key, converted; `folder` among them where one is loaded."""

    name: str
    options: Mapping[str, Any]

    @property
    def folder(self) -> Path | None:
        return self.options.get(FOLDER)


def drafter_class(name: str) -> type[Drafter]:
    """The class of a drafter's name.

    Raises DrafterError for an unknown name, listing the known ones.
    """
    if name not in DRAFTERS:
        raise DrafterError(
            f"unknown drafter {name!r}; known are {', '.join(DRAFTERS)}, and folders that exist (here is none of that "
            "name)"
        )
    entry = DRAFTERS[name]
    return getattr(import_module(entry.module), entry.owner)


def resolve(
    drafter: Drafter | PreTrainedModel | str | PathLike | Sequence,
    target: PreTrainedModel | None = None,
    given: Mapping[str, Drafter] | None = None,
    **options,
) -> Drafter:
    """A Drafter from a Drafter, a draft model, text, or a list of these and None, which is plain decoding.

    target: needed to load draft models from folders. given: drafters that stand for their names alone, as those of
    `--draft` do. options: go to the constructor of a drafter that is named.
    """
    drafter = only_one(drafter)
    if isinstance(drafter, list | tuple):
        return _candidates(drafter, target, given)
    if isinstance(drafter, Drafter):
        return drafter
    if isinstance(drafter, PreTrainedModel):
        is_any_subset = getattr(drafter.config, "model_type", None) == "xlnet"
        made: Any = drafter_class("any_subset" if is_any_subset else "draft_model")
        return made(drafter)
    if not isinstance(drafter, str | PathLike):
        what = f"the class {drafter.__name__}" if isinstance(drafter, type) else f"a {type(drafter).__name__}"
        raise DrafterError(
            f"drafter is {what}; pass a Drafter instance, a PreTrainedModel, a folder or one of the names "
            f"{', '.join(DRAFTERS)}"
        )

    given = given or {}
    parts = parse(str(drafter), given)
    if options:
        parts = [Part(part.name, {**part.options, **options}) for part in parts]
    return _joined([_build(part, target, given) for part in parts])


def only_one(drafter: Any) -> Any:
    """What was passed, or the only candidate of a list, else the list of candidates, text split at its commas.

    Raises DrafterError for an empty list, and for a list within a list.
    """
    if isinstance(drafter, str):
        texts = listed("drafter", drafter) if "," in drafter.strip(",") else [drafter]
        drafter = texts if len(texts) > 1 else drafter
    if not isinstance(drafter, list | tuple):
        return drafter
    if not drafter:
        raise DrafterError("drafter=[] names no candidate; pass one, or None for plain decoding")
    if len(drafter) == 1:
        return only_one(drafter[0])

    if any(isinstance(candidate, list | tuple) for candidate in drafter):
        raise DrafterError("drafter= holds a list within a list; write all candidates in one")
    return list(drafter)


def is_plain(candidate: object) -> bool:
    return candidate is None or (isinstance(candidate, str) and candidate == PLAIN)


def _candidates(candidates: Sequence, target: PreTrainedModel | None, given: Mapping[str, Drafter] | None) -> Drafter:
    from specdec.drafters.candidates import Candidates

    drafting = [candidate for candidate in candidates if not is_plain(candidate)]
    if not drafting:
        raise DrafterError(f"drafter={list(candidates)} names no drafter; pass None for plain decoding")
    return Candidates([resolve(one, target, given) for one in drafting], len(drafting) < len(candidates))


def listed(option: str, text: str) -> list[str]:
    """ "a,b:key=1,key=2" as the drafters a and b:key=1,key=2, each once: a comma before `key=` belongs to a drafter.

    option: where the text stands, for messages. Raises DrafterError for an empty entry.
    """
    if _is_folder(text):
        return [text]
    found: list[str] = []
    for piece in text.split(","):
        is_option = found and ":" in found[-1] and re.match(r"\s*\w+=", piece)
        if is_option:
            found[-1] += f",{piece}"
        else:
            found.append(piece.strip())
    if "" in found:
        raise DrafterError(f"{option} {text!r} has an empty entry; write drafters with one comma between two of them")
    return list(dict.fromkeys(found))


def parse(text: str, given: Mapping[str, Drafter] | Sequence[str] = ()) -> list[Part]:
    """The drafters of "a+b", in order. given: names that need no arguments here.

    Loads no weights. Raises DrafterError for everything that the grammar or the drafters' constructors do not know.
    """
    if _is_folder(text):
        return [_folder_part(text)]
    pieces = [piece.strip() for piece in text.split("+")]
    if "" in pieces:
        raise DrafterError(f"drafter {text!r} has an empty part; write a name, or two as 'a+b'")
    return [_folder_part(piece) if _is_folder(piece) else _parse_part(piece, given) for piece in pieces]


def _is_folder(text: str) -> bool:
    path = Path(text).expanduser()
    return text not in DRAFTERS and bool(text) and (path.is_dir() or is_gguf(path))


def _folder_part(text: str) -> Part:
    from specdec.drafters.folders import kind_of

    folder = Path(text).expanduser()
    return Part(kind_of(folder), {FOLDER: folder})


def _parse_part(text: str, given: Mapping[str, Drafter] | Sequence[str]) -> Part:
    name, colon, written = text.partition(":")
    built, entry = drafter_class(name), DRAFTERS[name]
    if entry.needs == OBJECTS:
        raise DrafterError(
            f"drafter {name!r} needs arguments that cannot be written as text; in Python pass {entry.path}(...)"
        )
    if colon and not written:
        raise DrafterError(f"drafter {text!r}: nothing follows the colon; {_keys_that_exist(name)}")

    types = _types_of(name, built)
    options: dict[str, Any] = {}
    for pair in written.split(",") if written else []:
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if key not in types and FOLDER in types and not equals and Path(key).expanduser().exists():
            raise DrafterError(
                f"drafter {text!r}: a folder has a key; write {name}:{FOLDER}={key}, or the folder alone"
            )
        if key not in types:
            raise DrafterError(f"drafter {name!r} has no key {key!r}; {_keys_that_exist(name)}")
        if key in options:
            raise DrafterError(f"drafter {text!r} gives {key} twice; give it once")
        if not equals or not value:
            raise DrafterError(f"drafter {name!r}: {key} has no value; write {name}:{key}=VALUE")
        options[key] = _converted(name, key, value, types[key])

    if not (name in given and not options):
        _check_complete(name, built, types, options)
    return Part(name, options)


def _types_of(name: str, built: type[Drafter]) -> dict[str, type]:
    """The keys that text may give, and what their values are."""
    hints = get_type_hints(built.__init__)
    types: dict[str, type] = {FOLDER: Path} if DRAFTERS[name].needs == FOLDER else {}
    for key in inspect.signature(built).parameters:
        # `int | None` is an int where it is written, and `SuffixMemory | Path` a path.
        kinds = [kind for kind in get_args(hints.get(key)) or (hints.get(key),) if kind in WRITTEN]
        if len(kinds) == 1:
            types[key] = kinds[0]
    return types


def _keys_that_exist(name: str) -> str:
    keys = [f"{key}={kind.__name__}" for key, kind in _types_of(name, drafter_class(name)).items()]
    return f"its keys are {', '.join(keys)}" if keys else "it has no keys"


def _converted(name: str, key: str, value: str, kind: type) -> Any:
    """Raises DrafterError for a value that is not of this kind."""
    if kind is bool:
        if value not in ("true", "false"):
            raise DrafterError(f"drafter {name!r}: {key}={value} is not a bool; write true or false")
        return value == "true"
    if kind is Path:
        return Path(value).expanduser()
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise DrafterError(f"drafter {name!r}: {key}={value} is not {what}; {_keys_that_exist(name)}") from None


def _check_complete(name: str, built: type[Drafter], types: Mapping[str, type], options: Mapping[str, Any]) -> None:
    """Raise DrafterError if a key without a default was not given."""
    entry = DRAFTERS[name]
    parameters = inspect.signature(built).parameters
    needed = [key for key in types if key == FOLDER or parameters[key].default is inspect.Parameter.empty]
    missing = [key for key in needed if key not in options]
    if missing:
        values = ",".join("folder=PATH" if key == FOLDER else f"{key}=VALUE" for key in missing)
        raise DrafterError(
            f"drafter {name!r} needs arguments: {', '.join(missing)}; write {name}:{values}, or in Python pass "
            f"{entry.path}(...)"
        )


def _build(part: Part, target: PreTrainedModel | None, given: Mapping[str, Drafter]) -> Drafter:
    if part.name in given and not part.options:
        return given[part.name]
    built: Any = drafter_class(part.name)
    options = dict(part.options)
    folder = options.pop(FOLDER, None)
    return built(**options) if folder is None else built.load(folder, target, **options)


def _joined(drafters: Sequence[Drafter]) -> Drafter:
    """The first that has a draft, in the order given."""
    from specdec.drafters.either import Either

    first, *others = drafters
    return Either(first, _joined(others)) if others else first
