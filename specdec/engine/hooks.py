"""Between the loop and the callers of its rows: stopping criteria, streamers, and what tokens were chosen from.

An exception of a callback ends its own row and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.engine.job import Job
from specdec.errors import ConfigError
from specdec.verify.processors import Processors


class Failure(NamedTuple):
    """num_kept: of the tokens of the step in which the row ends, those that were committed before the error."""

    error: Exception
    num_kept: int


class Hooks:
    """The callbacks of the rows that are in the batch.

    jobs: the running ones by row id. failed: row id -> how the row is to end.
    """

    def __init__(self, jobs: dict[int, Job], processors: Processors):
        self.jobs, self.processors = jobs, processors
        self.failed: dict[int, Failure] = {}

    def fail(self, row: int, error: Exception, num_kept: int = 0) -> None:
        """End a row with an exception. num_kept: tokens of this step that were committed before."""
        self.failed.setdefault(row, Failure(error, num_kept))

    def note_processors(self, report: StepReport) -> None:
        """Let processors follow what was committed. One that raised about a place counts if the row has got there: if
        it has a token of that place."""
        for row, refusal in self.processors.commit(report).items():
            self.fail(row, refusal)
        if not self.processors.raised:
            return
        for slot, row in enumerate(report.row_ids.tolist()):
            if row in self.processors.raised:
                column, error = self.processors.raised[row]
                if report.num_committed[slot] > column:
                    self.fail(row, error, column)

    def keeps_logits(self, rows: Rows) -> bool:
        """Whether any of these rows keeps the logits or scores of its tokens."""
        return any(self.jobs[row].keeps_logits for row in rows.row_ids.tolist())

    def keep(self, rows: Rows, report: StepReport, logits: Tensor, scores: Tensor) -> None:
        """Keep what committed tokens were chosen from, for rows that asked for it.

        logits, scores: [rows, k + 1, vocab].
        """
        wanted = np.array([self.jobs[row].keeps_logits for row in report.row_ids.tolist()])
        slots, columns = np.nonzero(np.arange(report.token_ids.shape[1]) < (report.num_committed * wanted)[:, None])
        if not len(slots):
            return

        places = (rows.num_new_tokens - report.num_committed)[slots] + columns
        index = torch.from_numpy(slots).to(rows.device), torch.from_numpy(columns).to(rows.device)
        raw, row_ids = logits[index].float(), report.row_ids[slots]
        processed = None
        if any(self.jobs[row].options.output_scores for row in row_ids.tolist()):
            processed = self.processors.warped(row_ids, scores[index])

        tokens = report.token_ids[slots, columns].tolist()
        for i, (row, place, token) in enumerate(zip(row_ids.tolist(), places.tolist(), tokens, strict=True)):
            self.jobs[row].keep(place, token, raw[i], None if processed is None else processed[i])

    def after_step(self, rows: Rows, report: StepReport) -> StepReport:
        """End rows that failed or are to stop, and stream. Returns the report of what remains committed."""
        jobs = [self.jobs[row] for row in report.row_ids.tolist()]
        if not self.failed and not any(job.is_watched for job in jobs):
            return report

        num_committed, finished = report.num_committed.copy(), report.finished.copy()
        for slot, job in enumerate(jobs):
            if job.stopping:
                num_committed[slot], finished[slot] = self._stopped(job, rows, slot, report)
            if job.index in self.failed:
                num_committed[slot] = min(self.failed[job.index].num_kept, num_committed[slot])
                finished[slot] = True
        report = rows.cut(report, num_committed, finished)

        if any(job.streamer is not None for job in jobs):
            is_failing = np.array([not self._streamed(job, slot, report) for slot, job in enumerate(jobs)])
            report = rows.cut(report, report.num_committed, report.finished | is_failing)
        return report

    def _stopped(self, job: Job, rows: Rows, slot: int, report: StepReport) -> tuple[int, bool]:
        """How many of this step's tokens stay, and whether the row ends: after the first for which a criterion says so.

        The criteria see the row alone, without padding. Only rows with criteria are walked through like this. A row
        that stops before the place of its failure has not failed.
        """
        count = int(report.num_committed[slot])
        begin = int(rows.host_lengths[slot]) - count
        failure = self.failed.get(job.index)
        try:
            for kept in range(1, (count if failure is None else min(failure.num_kept, count)) + 1):
                if bool(job.stopping(rows.token_ids[slot : slot + 1, : begin + kept], None).all()):
                    self.failed.pop(job.index, None)
                    return kept, True
        except Exception as error:  # of the user's code: it ends this row and no other
            self.fail(job.index, error, kept - 1)
        return count, bool(report.finished[slot])

    def _streamed(self, job: Job, slot: int, report: StepReport) -> bool:
        """Send a row its new tokens one by one, and its end; whether that went well."""
        if job.streamer is None:
            return True
        try:
            for token in report.token_ids[slot, : report.num_committed[slot]]:
                job.streamer.put(torch.tensor([token]))
            if report.finished[slot]:
                job.streamer.end()
        except Exception as error:  # of the user's code: it ends this row and no other
            self.fail(job.index, error)
            job.streamer = None
            return False
        return True

    def begin(self, job: Job) -> None:
        """Send a row's streamer its prompt, as [1, length], the way transformers does."""
        if job.streamer is not None:
            try:
                job.streamer.put(job.prompt[None])
            except Exception as error:  # of the user's code: it ends this row and no other
                self.fail(job.index, error)
                job.streamer = None


def check_streamer(streamer: object) -> None:
    """Raise ConfigError for an object that is not a streamer."""
    if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ConfigError(f"streamer is a {type(streamer).__name__}; it needs transformers' put() and end()")


def streamer_per_row(streamer: object, num_rows: int) -> list[Any]:
    """One streamer per row, or none for all. Raises ConfigError for any other number."""
    if streamer is None:
        return [None] * num_rows
    if not isinstance(streamer, Sequence) and num_rows > 1:
        raise ConfigError(f"one streamer for {num_rows} rows; pass a list with a streamer for each row")
    given = list(streamer) if isinstance(streamer, Sequence) else [streamer]
    if given and len(given) != num_rows:
        raise ConfigError(f"{len(given)} streamers for {num_rows} rows; pass one for each row")
    for one in given:
        check_streamer(one)
    return given or [None] * num_rows


def stop_criteria(strings: tuple[str, ...], tokenizer: PreTrainedTokenizerBase | None) -> StopStringCriteria:
    """What ends a row after any of the strings. Raises ConfigError without a tokenizer."""
    if tokenizer is None:
        raise ConfigError(f"stop_strings={list(strings)} needs the tokenizer; pass tokenizer=")
    if not hasattr(tokenizer, "get_vocab"):
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}; pass the target's transformers tokenizer")
    return StopStringCriteria(tokenizer, list(strings))


def users_criteria(arrived: StoppingCriteriaList | None, config: GenerationConfig) -> StoppingCriteriaList:
    """Inside `custom_generate`: without those that transformers made of the config, which the commit takes care of."""
    eos = config.eos_token_id
    ends = set() if eos is None else set(torch.as_tensor(eos).flatten().tolist())
    own = StoppingCriteriaList()
    for criterion in arrived or ():
        is_length = type(criterion) is MaxLengthCriteria and criterion.max_length == config.max_length
        is_end = type(criterion) is EosTokenCriteria and set(criterion.eos_token_id.flatten().tolist()) == ends
        if not (is_length or is_end):
            own.append(criterion)
    return own
