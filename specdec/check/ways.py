"""Ways to decode the same prompts: the cells of `specdec check`'s matrix and the methods of `specdec bench`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from specdec.errors import ConfigError
from specdec.options.generation import is_whole

PLAIN = "none"  # no drafter
# Keywords of `specdec.generate` that can be varied besides drafter, K and batch size, with the value that is meant if
# none is given. A new axis is one line here; those of DRAFTED mean nothing without a drafter.
AXES: dict[str, str] = {
    "layout": "ragged",
    "length_policy": "fixed",
}
DRAFTED = frozenset({"length_policy"})


@dataclass(frozen=True)
class Way:
    """drafter: its name, or "none". num_speculative_tokens: None without a drafter. options: of `AXES`, name and value,
    where they differ from what is meant anyway."""

    drafter: str
    num_speculative_tokens: int | None
    batch_size: int
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Without K and batch size."""
        return " ".join(["plain" if self.drafter == PLAIN else self.drafter, *(value for _, value in self.options)])

    @property
    def label(self) -> str:
        k = self.num_speculative_tokens
        return f"{self.name}{'' if k is None else f' K={k}'}, batch {self.batch_size}"


def ways(
    drafters: Sequence[str],
    ks: Sequence[int],
    batch_sizes: Sequence[int],
    axes: Mapping[str, Sequence[str]] | None = None,
) -> list[Way]:
    """Every combination that means something, once. axes: values for some of `AXES`."""
    return list(dict.fromkeys(_combinations(drafters, ks, batch_sizes, axes or {})))


def _combinations(
    drafters: Sequence[str], ks: Sequence[int], batch_sizes: Sequence[int], axes: Mapping[str, Sequence[str]]
) -> Iterator[Way]:
    for batch_size, drafter, k in product(batch_sizes, drafters, ks):
        for values in product(*axes.values()):
            plain = drafter == PLAIN
            options = tuple(
                (name, value)
                for name, value in zip(axes, values, strict=True)
                if value != AXES[name] and not (plain and name in DRAFTED)
            )
            yield Way(drafter, None if plain else k, batch_size, options)


def axis_values(given: Mapping[str, str | None]) -> dict[str, tuple[str, ...]]:
    """The values of each axis as they were typed, "a,b"; axes of which nothing was said are left out."""
    return {name: words(f"--{name.replace('_', '-')}", text) for name, text in given.items() if text is not None}


def generate_options(way: Way) -> dict[str, Any]:
    """Keywords of `specdec.generate` for a way, drafter and batch apart."""
    return dict(way.options)


def whole_numbers(option: str, text: str, most: int | None = None) -> tuple[int, ...]:
    """ "1,8" as numbers, each once. Raises ConfigError naming the option."""
    found = []
    for part in text.split(","):
        value = int(part) if part.strip().isdecimal() else None
        if not is_whole(value) or value is None or value < 1 or (most is not None and value > most):
            limit = "" if most is None else f" to {most}"
            raise ConfigError(f"{option} {text}: {part.strip()!r} is not a whole number from 1{limit}; pass 4 or 1,4,8")
        found.append(value)
    return tuple(dict.fromkeys(found))


def words(option: str, text: str, known: Sequence[str] | None = None) -> tuple[str, ...]:
    """ "a,b" as names, each once. Raises ConfigError for one that is not among `known`, naming the option."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    wrong = next((name for name in found if not name or (known is not None and name not in known)), None)
    if wrong is not None:
        raise ConfigError(f"{option} {text}: {wrong!r} is unknown; choose from {', '.join(known or ())}")
    return found
