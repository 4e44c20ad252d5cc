"""One object that builds target, drafter, policy, caches and schedule once, and decodes requests step by step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.batch.layout import Layout
from specdec.batch.report import StepReport
from specdec.drafter import Context, NoDrafts
from specdec.engine.decode import decode_steps
from specdec.engine.decoding import Decoding
from specdec.engine.guard import at_work, check_idle, check_shared_slots, drafting, in_its_place, unique_models
from specdec.engine.hooks import Hooks
from specdec.engine.intake import Intake
from specdec.engine.job import Job
from specdec.engine.metrics import Speculation
from specdec.engine.request import Event, Request
from specdec.engine.schedule import TOGETHER, Continuous, Schedule, Together, check_sizes
from specdec.engine.target import Target, check_tree
from specdec.errors import BusyError, ConfigError
from specdec.network.base import vocab_size_of
from specdec.network.memory import check_memory
from specdec.network.refusals import check_architecture, check_lengths, check_model
from specdec.options.speculation import DrafterLike, Randomness, speculative_config
from specdec.policy import LengthPolicy
from specdec.verify.lossy import Lossy, TopBeta, Typical
from specdec.verify.processors import Processors
from specdec.verify.random_streams import RequestStreams
from specdec.verify.sampler import Sampler
from specdec.verify.verification import MixedVerification

OnCommit = Callable[[StepReport], None]


class Engine:
    """Decodes requests of different options in one batch, each as if it were alone.

    An engine and its models serve one thread at a time. From its first step until `close` the target runs with our
    attention, so use the engine in a `with` statement, or call `close`.

        with Engine(model, "prompt_lookup") as engine:
            engine.add_request(Request(ids, max_new_tokens=64))
            while not engine.is_finished:
                for event in engine.step():
                    print(event.id, event.token_ids, event.finish_reason)

    statistics: of all requests so far.
    """

    @in_its_place
    def __init__(
        self,
        model: PreTrainedModel,
        drafter: DrafterLike = None,
        *,
        policy: LengthPolicy | str | None = None,
        num_speculative_tokens: int | None = None,
        verification: str | Lossy = "token",
        layout: Layout | str = "ragged",
        exact: bool = True,
        max_rows: int = 16,
        kv_tokens: int | None = None,
        prefill_tokens: int | None = None,
        order: str = "arrival",
        tokenizer: PreTrainedTokenizerBase | None = None,
        on_commit: OnCommit | None = None,
    ):
        """drafter, num_speculative_tokens, verification, layout, exact, and policy (there `length_policy`): as in
            `generate`.
        max_rows: the most rows of a step. kv_tokens, prefill_tokens, order: as in `generate_many`.
        tokenizer: the target's, for stop strings. on_commit: called with a `StepReport` after each step.

        Raises SpecDecError for what cannot be served.
        """
        check_model(model)
        speculation = speculative_config(
            drafter, num_speculative_tokens, layout=layout, length_policy=policy, target=model
        )
        Randomness(verification=verification).checked(None, speculation.drafter)
        check_sizes(max_rows, kv_tokens, prefill_tokens, order)
        check_shared_slots(speculation.drafter, order != TOGETHER or speculation.layout.takes_turns)
        check_idle(speculation.drafter, speculation.length_policy)
        check_architecture(model, speculation.layout)
        speculation.check(model, 1)

        self.model, self.on_commit, self.verification, self.exact = model, on_commit, verification, exact
        self.drafter, self.policy, self.layout = speculation.drafter, speculation.length_policy, speculation.layout
        self.num_speculative_tokens, self.spare = speculation.num_speculative_tokens, speculation.spare_slots
        self.intake = Intake(model, tokenizer)
        self.statistics = Speculation(is_lossless=isinstance(verification, str))
        self.schedule: Schedule = (
            Together(self.spare, model.device)
            if order == TOGETHER
            else Continuous(max_rows, self.spare, model.device, kv_tokens, prefill_tokens, order)
        )
        self.processors = Processors(argmax_decides=isinstance(verification, str))
        self.streams = RequestStreams(model.device)
        self.hooks = Hooks(self.schedule.running, self.processors)

        self._jobs: dict[int, Job] = {}  # that have not ended
        self._aborted: list[Job] = []  # whose events are due
        self._longest = 1  # tokens of the longest sequence that was checked
        self._decoding: Decoding | None = None
        self._reports: Iterator[StepReport] | None = None
        self._is_closed = self._is_running = False
        self._cause: BaseException | None = None  # of the end
        self._any_sampled = False
        self._open = ExitStack()
        # An engine that is never closed gives the models back when it is collected.
        weakref.finalize(self, self._open.close).atexit = False

    def add_request(self, request: Request) -> int:
        """Queue a request; returns its id, counted from 0.

        Raises SpecDecError for options that this engine cannot serve, without disturbing any running row.
        """
        with self.working():
            job = self.intake.job_of(request, self.num_speculative_tokens)
            seed = request.seed
            if seed is None and job.options.do_sample:
                seed = Randomness().drawn_seed()
            self.check_job(job)
            self.schedule.add(job)
            self.take_up(job, seed, request.stream)
            return job.index

    @in_its_place
    def take_up(self, job: Job, seed: int | None, stream: int = 0) -> None:
        """Prepare for a job that the schedule has, or will have. seed: of its samples, None for a greedy one."""
        if not job.plan.truncation.is_greedy:
            assert seed is not None
            self.streams.add(job.index, seed, stream)
            self._any_sampled = True
        verification = self._verification
        self.statistics.verification = (verification.sampled if self._any_sampled else verification.greedy).name

        self._jobs[job.index] = job
        is_drafted = job.max_draft_tokens != 0 and not isinstance(self.drafter, NoDrafts)
        self.processors.add(job.index, job.plan, is_drafted)
        self.hooks.begin(job)

    def check_job(self, job: Job) -> None:
        """Raise SpecDecError if the models have no place for the job, or the verification does not serve it."""
        if job.limit > self._longest:
            check_lengths(self.model, job.limit)
            self.drafter.check(self.model, job.limit)
            self._longest = job.limit
        rule = self.verification
        if isinstance(rule, TopBeta) and not job.plan.truncation.is_greedy:
            raise ConfigError(f"verification={rule} is a rule of greedy decoding; leave do_sample=True out")
        if isinstance(rule, Typical) and job.plan.truncation.is_greedy:
            raise ConfigError(
                f"verification={rule} at temperature 0 is greedy decoding; pass do_sample=True with it, or leave it out"
            )

    @property
    def is_finished(self) -> bool:
        """Whether every request that was added has had its last event."""
        return self._is_closed or (not (self._jobs or self._aborted) and self.schedule.is_done)

    def step(self) -> list[Event]:
        """Decode one step of the batch, or the first tokens of newcomers. Returns what it did for each request."""
        with self.working():
            return [
                Event(job.index, ids, job.logprobs[len(job.new_ids) - len(ids) :], job.finish_reason, job.error)
                for job, ids in self.advance()
            ]

    @in_its_place
    def abort(self, id: int) -> None:
        """End a request between two steps; its last event comes with the next step. Unknown ids are ignored."""
        with self.working():
            job = self._jobs.get(id)
            if job is not None:
                self.schedule.withdraw(job, None if self._decoding is None else self._decoding.target, self.drafter)
                job.finish_reason = "abort"
                self._forget(job)
                self._aborted.append(job)

    def close(self) -> None:
        """End all requests and put the models back as they were. Nothing can be added afterwards."""
        if not self._is_closed:
            with self.working():
                self._close()

    def _close(self) -> None:
        self._is_closed = True
        self._jobs.clear()
        self._aborted.clear()
        self._reports = None
        self._open.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @in_its_place
    def advance(self) -> list[tuple[Job, list[int]]]:
        """One step: each job that took part, with the tokens that it got."""
        done: list[tuple[Job, list[int]]] = [(job, []) for job in self._aborted]
        self._aborted = []
        if not self._jobs and self.schedule.is_done:
            return done

        try:
            self.prepare()
            assert self._decoding is not None
            if not self._is_running:
                self._begin(self._decoding)
            if self._reports is None:
                self._reports = decode_steps(self._decoding)
            report = next(self._reports, None)
            if report is None:  # all rows had left when the newest requests came
                self._reports = decode_steps(self._decoding)
                report = next(self._reports)
            done += self._progress(report)
            if self.on_commit is not None:
                self.on_commit(report)
        except BaseException as error:
            self._cause = error
            self._close()
            raise
        return done

    def _progress(self, report: StepReport) -> list[tuple[Job, list[int]]]:
        """Add the step's tokens to its jobs, and end those that have finished."""
        done = []
        numbers = report.num_committed.tolist(), report.num_drafted.tolist(), report.num_accepted.tolist()
        for slot, (index, committed, drafted, accepted) in enumerate(
            zip(report.row_ids.tolist(), *numbers, strict=True)
        ):
            job, ids = self._jobs[index], report.token_ids[slot, :committed].tolist()
            job.new_ids += ids
            if not report.is_prefill:
                job.num_steps += 1
                job.num_draft_tokens += drafted
                job.num_accepted_draft_tokens += accepted
            if report.finished[slot]:
                failure = self.hooks.failed.pop(index, None)
                job.finish(ids, None if failure is None else failure.error)
                self._forget(job)
            done.append((job, ids))
        return done

    def _forget(self, job: Job) -> None:
        del self._jobs[job.index]
        self.schedule.running.pop(job.index, None)
        self.processors.drop(job.index)
        self.hooks.failed.pop(job.index, None)
        if self._is_running:
            self.policy.row_ended(job.index)
            if job.new_ids:  # else it was withdrawn before it had a first token
                self.drafter.ended(job.index, job.tokens)
        self.streams.drop(job.index)

    @property
    def _verification(self) -> MixedVerification:
        return MixedVerification(self.streams, self.processors, self.verification)

    @in_its_place
    def prepare(self) -> None:
        """Build the caches for the requests that are known, as the first step does by itself.

        Raises ConfigError if they do not fit into the device's memory.
        """
        if self._decoding is None:
            self._decoding = self._build()

    def _build(self) -> Decoding:
        rows = self.schedule.rows()
        is_closed_batch = isinstance(self.schedule, Together)
        target = Target(
            self.model,
            layout=self.layout,
            layers=self.drafter.target_layers,
            max_rows=len(rows.slots),
            num_slots=rows.capacity,
            max_length=rows.max_limit if is_closed_batch else None,
            processors=self.processors,
            verification=self._verification,
            hooks=self.hooks,
            exact=self.exact,
        )
        check_tree(target.network, self.drafter, self.num_speculative_tokens)
        check_memory(target.network, self.layout, len(rows.slots), rows.capacity, self.drafter.kv_model, self.exact)

        return Decoding(
            target,
            self.drafter,
            self.policy,
            self.schedule,
            rows,
            self.hooks,
            self.num_speculative_tokens,
            self.statistics,
        )

    def _begin(self, decoding: Decoding) -> None:
        """Enter what runs until `close`: the target's attention, the drafter and the policy."""
        # A closed batch of greedy rows never asks for samples, so its drafter need not be ready for them.
        is_closed_batch = isinstance(self.schedule, Together)
        is_greedy = is_closed_batch and all(job.plan.truncation.is_greedy for job in self._jobs.values())
        sampler = None if is_greedy else Sampler(self.processors, self.streams, vocab_size_of(self.model))
        watcher = self.policy if self.policy.sees else None
        network = decoding.target.network
        context = Context(network, self.layout, self.num_speculative_tokens, sampler, watcher, self.exact)

        self._open.enter_context(network.running())
        if len(decoding.rows):
            drafts = () if isinstance(self.drafter, NoDrafts) else self.policy.likely(self.num_speculative_tokens)
            widths = sorted({1, *(1 + tokens for tokens in drafts)})
            network.compile_ahead(len(decoding.rows), decoding.rows.max_length, widths)
        self._open.enter_context(drafting(self.drafter, self.policy, context, decoding.rows))
        self._is_running = True

    @contextmanager
    def working(self) -> Iterator[None]:
        """Refuse calls from another thread, another engine or a callback while a step of these models runs."""
        if self._is_closed:
            cause = "" if self._cause is None else f" by {type(self._cause).__name__}: {self._cause}"
            raise BusyError(f"this engine was closed{cause}; make a new one")
        with at_work(self, unique_models(self.model, self.drafter.kv_model, self.drafter.model)):
            yield
