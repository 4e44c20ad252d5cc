"""Independent copies of logits processors in the middle of their work.

Libraries for grammars keep their state in objects of compiled code within an ordinary Python object, which Python's
`deepcopy` cannot copy, or copies with all its tables. Here such an object is copied by its own method, what never
changes is shared, and the rest is deep-copied.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.errors import ConfigError

METHODS = ("fork", "deep_copy")  # independent copies by their names, wherever they are offered
# Of Python's own classes these are often shallow, and `deepcopy` sees all that there is. Of compiled ones it does not.
METHODS_OF_COMPILED = ("clone", "copy")
CONTAINERS = (list, tuple, set, frozenset, deque)
# What does not change while text is generated, or changes for everybody.
SHARED = (
    type,
    ModuleType,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    torch.nn.Parameter,
    logging.Logger,
    type(threading.Lock()),
    type(threading.RLock()),
)
# The same, of libraries that are not imported here: the first and the last part of a class's full name.
SHARED_BY_NAME = {
    ("xgrammar", "CompiledGrammar"),
    ("xgrammar", "GrammarCompiler"),
    ("xgrammar", "TokenizerInfo"),
    ("outlines_core", "Index"),
    ("outlines_core", "Vocabulary"),
    ("builtins", "LLTokenizer"),
    ("llguidance", "LLTokenizer"),
    ("tokenizers", "Tokenizer"),
}


def fork(processors: Sequence[Any], unchanging: Iterable[Any] = ()) -> list[Any]:
    """Independent copies of processors as they stand. What several of them hold together, their copies do too.

    unchanging: of the processors, those that have no state; they are returned as they are.

    Raises ConfigError, which names the processor, where one cannot be copied.
    """
    unchanging = list(unchanging)
    try:
        return copied(list(processors), unchanging)
    except Exception as error:  # of the processors' own code, or Python's about it: any kind
        for processor in processors:
            try:
                copied([processor], unchanging)
            except Exception as own:
                raise cannot_copy(processor, own) from own
        raise cannot_copy(processors[-1], error) from error  # each can be copied alone


def cannot_copy(processor: Any, error: Exception) -> ConfigError:
    name = getattr(processor, "__qualname__", type(processor).__qualname__)
    return ConfigError(
        f"logits processor {name} cannot be copied ({type(error).__name__}: {error}); every row, and every drafted "
        "token of a sampled row, needs a copy of its own: give it a method fork() that returns an independent copy, or "
        "`self` if calls leave no trace in it"
    )


def copied(values: list[Any], unchanging: list[Any]) -> list[Any]:
    """A deep copy. `deepcopy` takes from its memo what is copied in another way, or not at all."""
    memo: dict[int, Any] = {id(value): value for value in unchanging}
    functions: list[FunctionType] = []
    methods: list[BuiltinFunctionType] = []
    cells: dict[int, CellType] = {}
    seen: set[int] = set()
    pending: list[Any] = list(values)
    while pending:
        value = pending.pop()
        if id(value) in memo or id(value) in seen:
            continue
        seen.add(id(value))
        if is_shared(value):
            memo[id(value)] = value
        elif (name := own_method(value)) is not None:
            memo[id(value)] = made_by(name, value)
        elif isinstance(value, FunctionType):
            if value.__closure__ and not is_importable(value):
                functions.append(value)
                memo[id(value)] = with_new_cells(value, cells)
                pending += [cell.cell_contents for cell in value.__closure__ if is_filled(cell)]
        elif isinstance(value, BuiltinFunctionType):
            if not isinstance(value.__self__, ModuleType | type(None)):
                methods.append(value)
                pending.append(value.__self__)
        else:
            pending += parts_of(value)

    for method in methods:  # a list's `append` belongs to the copy of the list
        memo[id(method)] = getattr(copy.deepcopy(method.__self__, memo), method.__name__)
    for function in functions:
        for cell in function.__closure__ or ():
            if is_filled(cell) and not is_filled(cells[id(cell)]):
                cells[id(cell)].cell_contents = copy.deepcopy(cell.cell_contents, memo)
    return [copy.deepcopy(value, memo) for value in values]


def is_shared(value: Any) -> bool:
    names = type(value).__module__.partition(".")[0], type(value).__name__
    # torch.compile's functions hold locks and caches, and only compute.
    return isinstance(value, SHARED) or names in SHARED_BY_NAME or hasattr(value, "_torchdynamo_orig_callable")


def own_method(value: Any) -> str | None:
    """The name of the method by which an object copies itself, None if it has none."""
    offered = [name for name in METHODS if callable(getattr(type(value), name, None))]
    is_compiled = not (hasattr(value, "__dict__") or isinstance(value, (*CONTAINERS, dict)))
    if not offered and is_compiled and not hasattr(value, "__deepcopy__"):
        offered = [name for name in METHODS_OF_COMPILED if callable(getattr(type(value), name, None))]
    return offered[0] if offered else None


def made_by(name: str, value: Any) -> Any:
    made = getattr(value, name)()
    if not isinstance(made, type(value)):
        raise TypeError(f"{type(value).__qualname__}.{name}() returned a {type(made).__name__}")
    return made


def parts_of(value: Any) -> list[Any]:
    """The objects that an object holds, as far as they can be seen."""
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    parts: list[Any] = []
    if isinstance(value, CONTAINERS):
        parts += value
    elif isinstance(value, dict):
        parts += [*value.keys(), *value.values()]
    if not hasattr(value, "__deepcopy__"):
        parts += getattr(value, "__dict__", {}).values()
        names = [name for kind in type(value).__mro__ for name in slots_of(kind)]
        parts += [getattr(value, name) for name in names if hasattr(value, name)]
    return parts


def slots_of(kind: type) -> Iterable[str]:
    """The attributes that a class keeps outside of `__dict__`."""
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    own = kind.__name__.lstrip("_")
    return [f"_{own}{name}" if name.startswith("__") and not name.endswith("__") else name for name in names]


def is_importable(function: FunctionType) -> bool:
    """Whether a function is the one of its name in its module: then its state, if any, is the module's."""
    found: Any = sys.modules.get(function.__module__ or "")
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def with_new_cells(function: FunctionType, cells: dict[int, CellType]) -> FunctionType:
    """The function with empty cells for the variables that it closes over. cells: new ones by the old ones' ids."""
    closure = tuple(cells.setdefault(id(cell), CellType()) for cell in function.__closure__ or ())
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    made.__dict__.update(function.__dict__)
    return made


def is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
