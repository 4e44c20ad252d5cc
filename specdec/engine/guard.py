"""Who may run: one caller at a time per model, and one generation at a time per drafter and policy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from specdec.batch.rows import Rows
from specdec.drafter import Context, Drafter
from specdec.errors import BusyError, DrafterError
from specdec.network.base import on_device_of
from specdec.policy import LengthPolicy

Method = TypeVar("Method", bound=Callable[..., Any])

_lock = threading.Lock()
_at_work: WeakKeyDictionary[PreTrainedModel, object] = WeakKeyDictionary()  # models within a step -> their engine


def in_its_place(method: Method) -> Method:
    """An engine's method, run on its model's GPU and outside of the caller's inference mode.

    Kernels, streams and events are those of CUDA's current device, which need not be the model's. An engine may be made
    within inference mode and stepped outside of it, and must be able to write to what it made.
    """

    @wraps(method)
    def placed(self: Any, *args: Any, **options: Any) -> Any:
        # The constructor does not have its model yet.
        model = getattr(self, "model", args[0] if args else options.get("model"))
        with torch.inference_mode(False), on_device_of(model):
            return method(self, *args, **options)

    return placed  # type: ignore[return-value]


@contextmanager
def at_work(engine: object, models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Hold these models for one step. Raises BusyError if one of them is within a step already."""
    with _lock:
        for model in models:
            other = _at_work.get(model)
            if other is not None:
                who = "this engine" if other is engine else "another engine"
                raise BusyError(
                    f"{who} is within a step of this {type(model).__name__}, in another thread or below this call; "
                    "an engine and its models serve one caller at a time, and none from inside a callback"
                )
        for model in models:
            _at_work[model] = engine
    try:
        yield
    finally:
        with _lock:
            for model in models:
                del _at_work[model]


def check_idle(drafter: Drafter, policy: LengthPolicy) -> None:
    """Raise DrafterError if one of them is at work in another generation."""
    for kind, one in (("drafter", drafter), ("length_policy", policy)):
        if one.is_busy:
            raise DrafterError(
                f"{kind} {one.name!r} is already at work in another generation; make one {kind} for each"
            )


@contextmanager
def drafting(drafter: Drafter, policy: LengthPolicy, context: Context, rows: Rows) -> Iterator[None]:
    check_idle(drafter, policy)
    drafter.is_busy = policy.is_busy = True
    try:
        drafter.start(context, rows)
        policy.start(context.target, drafter, context.max_draft_tokens)
        yield
    finally:
        drafter.is_busy = policy.is_busy = False
        drafter.finish()
        drafter.context = None


def unique_models(*models: PreTrainedModel | None) -> list[PreTrainedModel]:
    return list({id(model): model for model in models if model is not None}.values())


def check_shared_slots(drafter: Drafter, is_needed: bool) -> None:
    if is_needed and not drafter.shares_slots:
        raise DrafterError(
            f"drafter {drafter.name!r} serves fixed batches only, not rows that take turns or join later. Call "
            "generate() on batches, with layout='ragged' or 'repad'; or set shares_slots = True in your own drafter "
            "if it keeps nothing of a row, or keeps it by slot or by rows.row_ids"
        )
