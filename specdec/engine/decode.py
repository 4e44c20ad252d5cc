"""The loop: a drafter proposes, the target verifies the whole ragged batch in one forward, and what the target itself
would have written is committed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from specdec.batch.layout.grouped import order_with_first
from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.engine.ahead import Early, launch_early
from specdec.engine.decoding import Decoding
from specdec.engine.proposal import propose


@torch.no_grad()
def decode_steps(decoding: Decoding) -> Iterator[StepReport]:
    """Decode until no rows are left and none will join; yields each report when its finished rows have left."""
    target, drafter, policy = decoding.target, decoding.drafter, decoding.policy
    rows, schedule, k = decoding.rows, decoding.schedule, decoding.num_speculative_tokens
    early: Early | None = None

    while True:
        joined = schedule.admit(target, drafter, rows)  # with the first token after their prompts
        if joined is not None:
            report, _ = settle(decoding, *joined)
            yield report

        rows.take(rows.slots.num_residents)
        if not len(rows):
            if schedule.is_done:
                return
            continue

        take_turns(decoding)
        max_tokens = min(k, rows.max_remaining - 1)
        widths = decoding.widths(max_tokens)
        if early is not None and early.fits(widths, max_tokens):
            forward = early.forward
        else:
            forward = target.forward(rows, propose(drafter, rows, widths, max_tokens, target.vocab_size))
        policy.drafted(forward.draft)

        read = target.commit(rows, forward)
        early = launch_early(decoding, step_tokens=1 + forward.draft.token_ids.shape[1])
        report, verified = read()

        drafter.observe(verified)
        report, kept = settle(decoding, rows, policy.learn(report))
        if early is not None and kept is not None:
            early = early.of_rows(kept)

        num_changes = rows.slots.num_changes
        yield report
        if rows.slots.num_changes != num_changes:  # a request was withdrawn meanwhile
            early = None


def settle(decoding: Decoding, rows: Rows, report: StepReport) -> tuple[StepReport, Tensor | None]:
    """Stop rows that are to stop, count, and let finished rows leave.

    Returns the report of what remains committed, and the index of the rows that are left if any left, [rows] int64.
    """
    report = decoding.hooks.after_step(rows, report)
    statistics = decoding.statistics
    statistics.add(report)
    statistics.num_draft_calls = decoding.drafter.num_calls
    statistics.num_realignments = decoding.target.network.cache.num_realignments
    if not report.finished.any():
        return report, None

    kept = rows.retire(report.finished)
    move(decoding, kept)
    return report, kept


def take_turns(decoding: Decoding) -> None:
    """Of all residents, let those take part whose turn the layout says it is."""
    target, rows = decoding.target, decoding.rows
    if target.layout.takes_turns:
        chosen = target.layout.next_turn(target.network.cache, rows.slots)
        order = order_with_first(chosen, len(rows))
        if (order != np.arange(len(rows))).any():
            move(decoding, rows.slots.arrange(order))
        rows.take(len(chosen))


def move(decoding: Decoding, index: Tensor) -> None:
    decoding.target.keep_rows(index)
    decoding.drafter.keep_rows(index)
