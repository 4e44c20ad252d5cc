"""The libraries that search texts at native speed: an optional extra, asked for when a memory is made."""

from __future__ import annotations

from importlib.util import find_spec

from specdec.errors import DrafterError

NEEDED = ("numba", "pydivsufsort")


def check_native() -> None:
    """Raise DrafterError if a library is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise DrafterError(
            f"drafter 'suffix' needs {' and '.join(missing)}; pip install 'specdec-toolkit[memory]', or take "
            "prompt_lookup, which needs neither"
        )
