"""The loop: a drafter proposes, the target verifies the whole ragged batch in one forward, and what the target itself
would have written is committed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from specdec.drafter import Draft, Drafter
from specdec.errors import DrafterError
from specdec.metrics import Speculation
from specdec.rows import Rows, StepReport
from specdec.stopping import Stopping
from specdec.target import Target, usable

OnCommit = Callable[[StepReport], None]


@torch.no_grad()
def decode(
    target: Target,
    drafter: Drafter,
    rows: Rows,
    num_speculative_tokens: int,
    stopping: Stopping | None = None,
    on_commit: OnCommit | None = None,
) -> Speculation:
    """Decode every row to its end; the result is in `rows.output_ids` and `rows.output_lengths`.

    stopping: ends rows early. on_commit: called with each step's report, prefill's included.
    """
    statistics = Speculation()
    with target.network.running(), drafting(drafter, target, rows, num_speculative_tokens):
        report = target.prefill(rows)
        while True:
            if stopping:
                report = stopping.apply(rows, report)
            statistics.add(report)
            if on_commit is not None:
                on_commit(report)
            if report.finished.any():
                kept = rows.retire(report.finished)
                if not len(rows):
                    statistics.num_draft_calls = drafter.num_calls
                    return statistics
                target.keep_rows(kept)
                drafter.keep_rows(kept)
            max_tokens = min(num_speculative_tokens, rows.max_remaining - 1)
            draft = drafter.propose(rows, max_tokens) if max_tokens > 0 else Draft.empty(len(rows), rows.device)
            draft = usable(rows, draft, max_tokens, target.vocab_size, drafter.name)
            report, verified = target.verify(rows, draft)
            drafter.observe(verified)


@contextmanager
def drafting(drafter: Drafter, target: Target, rows: Rows, num_speculative_tokens: int) -> Iterator[None]:
    if drafter.is_busy:
        raise DrafterError(
            f"drafter {drafter.name!r} is already at work in another generate call; make one drafter for each"
        )
    drafter.is_busy = True
    try:
        drafter.start(target.network.model, rows, num_speculative_tokens)
        yield
    finally:
        drafter.is_busy = False
        drafter.finish()
