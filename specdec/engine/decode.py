"""The loop: a drafter proposes, the target verifies the whole ragged batch in one forward, and what the target itself
would have written is committed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from specdec.batch.layout.grouped import order_with_first
from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.drafter import Context, Drafter, check_contract
from specdec.engine.ahead import Early, launch_early
from specdec.engine.metrics import Speculation
from specdec.engine.proposal import propose
from specdec.engine.schedule import FixedBatch, Schedule
from specdec.engine.stopping import Stopping
from specdec.engine.target import Target
from specdec.errors import DrafterError
from specdec.policy import LengthPolicy, widths_of
from specdec.verify.sampler import Sampler

OnCommit = Callable[[StepReport], None]


def decode(
    target: Target,
    drafter: Drafter,
    policy: LengthPolicy,
    rows: Rows,
    num_speculative_tokens: int,
    stopping: Stopping | None = None,
    on_commit: OnCommit | None = None,
    sampler: Sampler | None = None,
) -> Speculation:
    """Decode a batch of rows to their ends; the result is in `rows.output_ids` and `rows.output_lengths`.

    stopping: ends rows early. on_commit: called with each step's report, prefill's included.
    """
    statistics = Speculation()
    schedule = FixedBatch()
    for report in decode_steps(
        target, drafter, policy, rows, num_speculative_tokens, schedule, statistics, stopping, sampler
    ):
        if on_commit is not None:
            on_commit(report)
    return statistics


@torch.no_grad()
def decode_steps(
    target: Target,
    drafter: Drafter,
    policy: LengthPolicy,
    rows: Rows,
    num_speculative_tokens: int,
    schedule: Schedule,
    statistics: Speculation,
    stopping: Stopping | None = None,
    sampler: Sampler | None = None,
) -> Iterator[StepReport]:
    """Decode until the schedule has no rows left; yields each report when its finished rows have left.

    statistics: filled in. rows: those that take part; the schedule says which join.
    """
    changes_rows = target.layout.takes_turns or schedule.takes_newcomers
    check_shared_slots(drafter, changes_rows)
    statistics.verification, statistics.is_lossless = target.verification.name, target.verification.is_lossless
    context = Context(target.network, target.layout, num_speculative_tokens, sampler, policy if policy.sees else None)
    early: Early | None = None

    with target.network.running(), drafting(drafter, policy, context, rows):
        while True:
            joined = schedule.admit(target, drafter, rows)  # with the first token after their prompts
            if joined is not None:
                yield settle(target, drafter, *joined, statistics, stopping)[0]

            rows.take(rows.slots.num_residents)
            if not len(rows):
                if schedule.is_done:
                    return
                continue

            take_turns(target, drafter, rows)
            max_tokens = min(num_speculative_tokens, rows.max_remaining - 1)
            widths = widths_of(policy, rows, max_tokens)
            if early is not None and early.fits(widths, max_tokens):
                forward = early.forward
            else:
                forward = target.forward(rows, propose(drafter, rows, widths, max_tokens, target.vocab_size))
            policy.drafted(forward.draft)

            read = target.commit(rows, forward)
            if not changes_rows:
                step_tokens = 1 + forward.draft.token_ids.shape[1]
                early = launch_early(target, drafter, policy, rows, num_speculative_tokens, step_tokens)
            report, verified = read()

            drafter.observe(verified)
            report, kept = settle(target, drafter, rows, policy.learn(report), statistics, stopping)
            if early is not None and kept is not None:
                early = early.of_rows(kept)
            yield report


def settle(
    target: Target,
    drafter: Drafter,
    rows: Rows,
    report: StepReport,
    statistics: Speculation,
    stopping: Stopping | None,
) -> tuple[StepReport, Tensor | None]:
    """Stop rows that are to stop, count, and let finished rows leave.

    Returns the report of what remains committed, and the index of the rows that are left if any left, [rows] int64.
    """
    if stopping:
        report = stopping.apply(rows, report)
    statistics.add(report)
    statistics.num_draft_calls = drafter.num_calls
    statistics.num_realignments = target.network.cache.num_realignments
    if not report.finished.any():
        return report, None

    kept = rows.retire(report.finished)
    move(target, drafter, kept)
    return report, kept


def take_turns(target: Target, drafter: Drafter, rows: Rows) -> None:
    """Of all residents, let those take part whose turn the layout says it is."""
    if target.layout.takes_turns:
        chosen = target.layout.next_turn(target.network.cache, rows.slots)
        order = order_with_first(chosen, len(rows))
        if (order != np.arange(len(rows))).any():
            move(target, drafter, rows.slots.arrange(order))
        rows.take(len(chosen))


def move(target: Target, drafter: Drafter, index: Tensor) -> None:
    target.keep_rows(index)
    drafter.keep_rows(index)


def check_shared_slots(drafter: Drafter, needed: bool) -> None:
    if needed and not drafter.shares_slots:
        raise DrafterError(
            f"drafter {drafter.name!r} serves fixed batches only, not rows that take turns or join later; call "
            "generate() on batches, with layout='ragged' or 'repad' (a drafter of your own that can follow such rows "
            "says so by shares_slots=True)"
        )


@contextmanager
def drafting(drafter: Drafter, policy: LengthPolicy, context: Context, rows: Rows) -> Iterator[None]:
    check_contract(drafter)
    for kind, one in (("drafter", drafter), ("length_policy", policy)):
        if one.is_busy:
            raise DrafterError(
                f"{kind} {one.name!r} is already at work in another generate call; make one {kind} for each"
            )

    drafter.is_busy = policy.is_busy = True
    try:
        drafter.start(context, rows)
        policy.start(context.target, drafter, context.max_draft_tokens)
        yield
    finally:
        drafter.is_busy = policy.is_busy = False
        drafter.context = None
        drafter.finish()
