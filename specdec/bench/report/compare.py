"""Two records of the same work: what became slower, beyond chance and differences between machines.

Two runs may be on different machines, or on one machine at different times, so tokens per second are compared as
multiples of transformers' plain decoding in the same repeat of the same run. The ratio of these multiples, after over
before, has a bootstrap interval: repeats are resampled separately in each record, calls (batches of prompts) together
in both. Its confidence is shared among all methods compared, so the chance of any false alarm is that of one
comparison. A method is slower if the ratio is 1 - min_effect or less and the whole interval lies below 1: the first
shows that it matters (and exceeds the difference between two processes of the same program), the second that it is not
chance. Other processes slow methods down unevenly, so repeats in which they kept cores busy do not count; if too few
others remain, there is no verdict.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from specdec.bench.methods import PLAIN
from specdec.bench.report.record import FORMAT, label_of
from specdec.bench.report.statistics import (
    CONFIDENCE,
    Timing,
    interval,
    resampled_calls,
    resampled_rates,
    resampled_repeats,
)
from specdec.bench.report.tables import Table
from specdec.errors import ConfigError, InputError

MIN_EFFECT = 0.05
MIN_REPEATS = 3
SLOWER, FASTER, SAME, UNCLEAR, NOT_EQUAL = "slower", "faster", "same", "unclear", "not equal any more"
BUSY = "busy machine"
MAX_FOREIGN_CORES = 0.2  # cores that other processes may keep busy in a repeat that counts


@dataclass(frozen=True)
class Change:
    """One method. before, after: its speedup over plain decoding, median over repeats; None if not timed. ratio, low,
    high: after over before, with the bootstrap interval. verdict: one of `SLOWER` and the others above. "same": the
    interval lies within 1 +- min_effect; "unclear": it reaches further without being significant; "busy machine": too
    few repeats were undisturbed, and the ratio is over all of them."""

    suite: str
    label: str
    before: float | None
    after: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str

    @property
    def is_regression(self) -> bool:
        return self.verdict in (SLOWER, NOT_EQUAL)


@dataclass(frozen=True)
class Comparison:
    """min_effect: the smallest change that counts. only_before, only_after: methods that the other record lacks.
    notes: other differences between the runs. plain: tokens/s of plain decoding, after over before, by batch size."""

    changes: list[Change]
    min_effect: float
    confidence: float
    only_before: list[str]
    only_after: list[str]
    plain: dict[str, float]
    notes: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.is_regression]

    @property
    def unjudged(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == BUSY]

    def to_dict(self) -> dict[str, Any]:
        return {"num_regressions": len(self.regressions), **asdict(self)}


def read_record(path: Path) -> dict:
    """Raises InputError for a file that is not a record of `specdec bench`."""
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"record {str(path)!r} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"record {str(path)!r} is not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise InputError(
            f"{str(path)!r} is not a record of this specdec bench (format {found!r}, not {FORMAT}); run it"
        )
    return record


def compare(
    before: dict,
    after: dict,
    min_effect: float = MIN_EFFECT,
    max_foreign_cores: float = MAX_FOREIGN_CORES,
    seed: int = 0,
) -> Comparison:
    """Raises ConfigError if the records are not of the same work, or have too few repeats to compare."""
    if not 0 <= min_effect < 1:
        raise ConfigError(f"min_effect={min_effect} is not a share; pass 0 to below 1, such as {MIN_EFFECT}")
    check_same_work(before, after)

    olds, news = ({(e["suite"], label_of(e)): e for e in record["results"]} for record in (before, after))
    ours = [key for key in olds if key in news and olds[key]["is_ours"]]
    if not ours:
        raise ConfigError("the records share no method of specdec; run both with the same drafters and batches")

    confidence = 1 - (1 - CONFIDENCE) / len(ours)
    changes = [
        change_of(
            key,
            (olds[key], baselines(olds, key)),
            (news[key], baselines(news, key)),
            confidence,
            min_effect,
            max_foreign_cores,
            seed,
        )
        for key in ours
    ]

    plain = {
        f"{suite}, {label}": rate_of(news[suite, label]) / rate_of(old)
        for (suite, label), old in olds.items()
        if old["method"] == PLAIN and (suite, label) in news
    }

    only_before, only_after = (
        [", ".join(key) for key in ones if key not in others] for ones, others in ((olds, news), (news, olds))
    )
    return Comparison(changes, min_effect, confidence, only_before, only_after, plain, differences(before, after))


def check_same_work(before: dict, after: dict) -> None:
    wanted: dict[str, Callable[[dict], Any]] = {
        "models": itemgetter("models"),
        "prompts": lambda record: {suite["name"]: suite["digest"] for suite in record["suites"]},
        **{name: itemgetter(name) for name in ("max_new_tokens", "dtype", "device", "batch_invariant")},
        "exact": lambda record: record.get("exact", record["batch_invariant"]),  # until version 2 these were one
    }
    for name, read in wanted.items():
        if read(before) != read(after):
            raise ConfigError(
                f"the records differ in {name} ({read(before)} and {read(after)}), so their speeds cannot be compared; "
                "run both with the same options"
            )
    for name, record in (("first", before), ("second", after)):
        if record["repeats"] < MIN_REPEATS:
            raise ConfigError(
                f"the {name} record has {record['repeats']} repeats, too few to tell chance from change; "
                f"run it with --repeats {MIN_REPEATS} or more"
            )


def differences(before: dict, after: dict) -> list[str]:
    """Differences that still allow a comparison, and may explain a change."""
    names = ("cpu_count", "num_threads", "processor", "gpu")
    pairs = [(name, before["machine"].get(name), after["machine"].get(name)) for name in names]
    pairs += [(name, before["versions"].get(name), after["versions"].get(name)) for name in before["versions"]]
    pairs.append(("seed", before["seed"], after["seed"]))
    return [f"{name}: {old}, then {new}" for name, old, new in pairs if old != new]


def baselines(entries: dict[tuple[str, str], dict], key: tuple[str, str]) -> dict:
    """Entries of plain decoding for the same suite and batch size. Every run measures it."""
    size = entries[key]["batch_size"]
    return next(
        entry
        for (suite, _), entry in entries.items()
        if suite == key[0] and entry["method"] == PLAIN and entry["batch_size"] == size
    )


def change_of(
    key: tuple[str, str],
    olds: tuple[dict, dict],
    news: tuple[dict, dict],
    confidence: float,
    min_effect: float,
    max_foreign_cores: float,
    seed: int,
) -> Change:
    """olds, news: the method's entry and plain decoding's, of each record."""
    old, new = olds[0], news[0]
    if not (old["timed"] and new["timed"]):
        verdict = NOT_EQUAL if old["timed"] else UNCLEAR
        before, after = (e["speedup_over_plain"]["median"] if e["timed"] else None for e in (old, new))
        return Change(*key, before, after, None, None, None, verdict)
    chosen = [quiet_repeats(*entries, max_foreign_cores) for entries in (olds, news)]
    judged = min(map(len, chosen)) >= MIN_REPEATS
    first, second = (
        (timing_of(entries[0], repeats if judged else None), timing_of(entries[1], repeats if judged else None))
        for entries, repeats in zip((olds, news), chosen, strict=True)
    )
    before, after = (float(np.median(ours.rates() / plain.rates())) for ours, plain in (first, second))
    low, high = interval(resampled_ratios(first, second, seed), confidence)
    ratio = after / before
    verdict = verdict_of(ratio, low, high, min_effect) if judged else BUSY
    return Change(*key, before, after, ratio, low, high, verdict)


def resampled_ratios(before: tuple[Timing, Timing], after: tuple[Timing, Timing], seed: int) -> np.ndarray:
    """olds, news: each (ours, plain). Calls have the same prompts in both, so they are resampled together; repeats are
    not.
    """
    generator = np.random.default_rng(seed)
    calls = resampled_calls(len(before[0].tokens), generator)
    medians = []
    for ours, plain in (before, after):
        repeats = resampled_repeats(len(ours.seconds), generator)
        rates = resampled_rates(ours, repeats, calls) / resampled_rates(plain, repeats, calls)
        medians.append(np.median(rates, 1))
    return medians[1] / medians[0]


def verdict_of(ratio: float, low: float, high: float, min_effect: float) -> str:
    if ratio <= 1 - min_effect and high < 1:
        return SLOWER
    if ratio >= 1 + min_effect and low > 1:
        return FASTER
    return SAME if low >= 1 - min_effect and high <= 1 + min_effect else UNCLEAR


def quiet_repeats(ours: dict, plain: dict, max_foreign_cores: float) -> list[int]:
    """Repeats in which no other process disturbed our method or plain decoding."""
    busy = zip(ours["foreign_cores"], plain["foreign_cores"], strict=True)
    return [repeat for repeat, cores in enumerate(busy) if max(cores) <= max_foreign_cores]


def timing_of(entry: dict, repeats: Sequence[int] | None) -> Timing:
    """repeats: which repeats to use; None for all."""
    seconds = entry["calls"]["seconds"]
    chosen = seconds if repeats is None else [seconds[repeat] for repeat in repeats]
    return Timing.of(chosen, entry["calls"]["num_new_tokens"])


def rate_of(entry: dict) -> float:
    return entry["tokens_per_second"]["median"]


def table(changes: Sequence[Change]) -> Table:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = []
    for one in changes:
        spread = "-" if one.low is None else f"{number(one.ratio)} ({number(one.low)}-{number(one.high)})"
        rows.append((one.label, number(one.before), number(one.after), spread, one.verdict))
    return ("method", "x plain, before", "after", "ratio (interval)", "verdict"), rows
