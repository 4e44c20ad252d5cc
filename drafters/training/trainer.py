"""The loop that every recipe trains with: a step function gives the loss, the loop does the rest.

It runs on accelerate: on a CPU, on one GPU, or on several with `accelerate launch -m specdec train ...`. A run that is
killed and started again continues from its last checkpoint and ends with the weights of an uninterrupted one: bit for
bit on a CPU, and on a GPU if its kernels are deterministic.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from specdec.drafters.training.checkpoint import (
    LossLog,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from specdec.drafters.training.loss_guard import LossGuard
from specdec.errors import ConfigError

CHECKPOINT, LOSSES = "checkpoint.pt", "losses.jsonl"
LOG_EVERY = 10  # steps; reading a loss waits for the device


@dataclass(frozen=True)
class TrainConfig:
    """How a run optimises.

    learning_rate: the peak of a linear warm-up over the first `warmup_share` of the steps and a cosine down to
        `final_share` of it. weight_decay: on matrices only. checkpoint_every: in steps.
    bfloat16: autocast forwards; weights, gradients and losses stay float32.
    """

    num_steps: int
    learning_rate: float
    warmup_share: float = 0.03
    final_share: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    checkpoint_every: int = 500
    bfloat16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_steps", self.num_steps, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{name}={value} is below {least}; raise it")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate} is not positive; 3e-4 to 3e-3 suit small drafters")

    def learning_rate_at(self, step: int) -> float:
        """step: from 0. A function of the step alone, so that a resumed run needs no scheduler state."""
        warmup = max(round(self.warmup_share * self.num_steps), 1)
        progress = min(step / self.num_steps, 1.0)
        cosine = self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * min((step + 1) / warmup, 1.0) * cosine


@dataclass(frozen=True)
class TrainStep:
    """The step function's place in the run: which step (from 0), which process of how many, on which device.

    Data and random numbers should be functions of these (`index` and `shard`), so that a resumed run sees the same.
    """

    index: int
    rank: int
    num_processes: int
    device: torch.device

    @property
    def shard(self) -> int:
        """The number of this process's batch in the run's order of batches."""
        return self.index * self.num_processes + self.rank


class Stateful(Protocol):
    """State besides the weights that a step depends on, such as a buffer of generated text; one state per process."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainRecord:
    """Results of a run: settings for the model card, the loss of the first and of the last steps (mean of up to 20)."""

    num_steps: int
    resumed_at: int
    first_loss: float
    last_loss: float
    num_processes: int
    settings: dict[str, Any] = field(default_factory=dict)


LossOf = Callable[[nn.Module, TrainStep], Tensor]


def make_accelerator(device: torch.device) -> Accelerator:
    """One process or several, as set by `accelerate launch`. Precision is set by `TrainConfig.bfloat16`."""
    if device.type == "cuda" and device.index is not None and "LOCAL_RANK" not in os.environ:
        torch.cuda.set_device(device)  # accelerate takes the current one, whatever number was requested
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def train(
    module: nn.Module,
    loss_of: LossOf,
    config: TrainConfig,
    folder: Path,
    accelerator: Accelerator,
    settings: dict[str, Any] | None = None,
    state: Stateful | None = None,
) -> TrainRecord:
    """Minimise `loss_of(module, step)` over the parameters of `module` that require gradients.

    loss_of: returns a scalar; it must call the module that it is given, which may be a wrapper of yours.
    folder: gets `losses.jsonl` (step, loss, learning_rate) and, until `finish` removes it, `checkpoint.pt`. If that
    already exists, the run resumes from it.
    settings: everything else that the result depends on, in JSON types; a checkpoint of other settings is refused.

    Raises ConfigError or InputError for a checkpoint that does not fit, NumericalError when the loss is not finite or
    has diverged (`LossGuard`); the last checkpoint stays.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(f"no parameter of {type(module).__name__} requires gradients; nothing would be trained")
    settings = {**as_json(asdict(config)), **(settings or {}), "num_processes": accelerator.num_processes}
    seed_everything(config.seed + accelerator.process_index)
    module.to(accelerator.device)
    optimizer = build_optimizer(trained, config)
    first = resume(folder / CHECKPOINT, settings, trained, optimizer, state, accelerator)
    wrapped = accelerator.prepare_model(module)
    log = LossLog(folder / LOSSES, first) if accelerator.is_main_process else None
    guard = LossGuard(config.learning_rate)
    guard.add(read_losses(folder / LOSSES)[:first] if first else ())
    pending: list[tuple[int, Tensor]] = []
    with progress_bar(config.num_steps, first, accelerator.is_main_process) as show:
        for index in range(first, config.num_steps):
            step = TrainStep(index, accelerator.process_index, accelerator.num_processes, accelerator.device)
            loss = optimise_once(wrapped, loss_of, step, optimizer, list(trained.values()), config, accelerator)
            pending.append((index, loss))
            at_checkpoint = (index + 1) % config.checkpoint_every == 0 or index + 1 == config.num_steps
            if at_checkpoint or len(pending) == LOG_EVERY:
                losses = write_losses(pending, log, config, accelerator)
                show(index + 1, losses[-1])
                guard.add(losses)
                pending = []
            if at_checkpoint:
                checkpoint(folder / CHECKPOINT, index + 1, settings, trained, optimizer, state, accelerator)
    accelerator.wait_for_everyone()
    return record_of(folder / LOSSES, config, first, settings, accelerator)


def optimise_once(
    wrapped: nn.Module,
    loss_of: LossOf,
    step: TrainStep,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    config: TrainConfig,
    accelerator: Accelerator,
) -> Tensor:
    """Take one step; returns the loss before it, detached."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step.index)
    with torch.autocast(step.device.type, torch.bfloat16, enabled=config.bfloat16):
        loss = loss_of(wrapped, step)
    accelerator.backward(loss)
    nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach().float()


def finish(folder: Path, accelerator: Accelerator) -> None:
    """Call once the result is saved: keeps only the losses of the run's files."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in folder.iterdir():
            if path.name != LOSSES:
                path.unlink()


def build_optimizer(trained: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in trained.values() if p.ndim > 1]
    vectors = [p for p in trained.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    on_gpu = next(iter(trained.values())).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=on_gpu)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resume(
    path: Path,
    settings: dict[str, Any],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Stateful | None,
    accelerator: Accelerator,
) -> int:
    """Restore everything from the last checkpoint; returns the number of steps done."""
    if not path.exists():
        return 0
    saved = load_checkpoint(path, settings)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved["weights"][name])
    optimizer.load_state_dict(saved["optimizer"])
    mine = saved["processes"][accelerator.process_index]
    if state is not None:
        state.load_state_dict(mine["state"])
    restore_random_state(mine["random"], accelerator.device)
    return saved["num_steps_done"]


def checkpoint(
    path: Path,
    num_steps_done: int,
    settings: dict[str, Any],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Stateful | None,
    accelerator: Accelerator,
) -> None:
    mine = {"random": random_state(accelerator.device), "state": None if state is None else state.state_dict()}
    processes = gather_object([mine])
    if accelerator.is_main_process:
        saved = {
            "num_steps_done": num_steps_done,
            "settings": settings,
            "weights": {name: p.detach() for name, p in trained.items()},
            "optimizer": optimizer.state_dict(),
            "processes": processes,
        }
        save_checkpoint(path, saved)
    accelerator.wait_for_everyone()


def write_losses(
    pending: list[tuple[int, Tensor]], log: LossLog | None, config: TrainConfig, accelerator: Accelerator
) -> list[float]:
    """Log, and return, the mean over the processes of each step."""
    losses: Any = accelerator.reduce(torch.stack([loss for _, loss in pending]), reduction="mean")
    values: list[float] = losses.tolist()
    entries = [
        {"step": index, "loss": value, "learning_rate": config.learning_rate_at(index)}
        for (index, _), value in zip(pending, values, strict=True)
    ]
    if log is not None:
        log.append(entries)
    return values


def record_of(
    path: Path, config: TrainConfig, first: int, settings: dict[str, Any], accelerator: Accelerator
) -> TrainRecord:
    losses = read_losses(path)
    window = min(20, len(losses))
    return TrainRecord(
        num_steps=config.num_steps,
        resumed_at=first,
        first_loss=sum(losses[:window]) / window,
        last_loss=sum(losses[-window:]) / window,
        num_processes=accelerator.num_processes,
        settings=settings,
    )


def read_losses(path: Path) -> list[float]:
    """The loss of every step so far."""
    return [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def progress_bar(num_steps: int, first: int, is_shown: bool) -> Iterator[Callable[[int, float], None]]:
    """Yields show(num_steps_done, loss); the bar goes to stderr."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not is_shown) as progress:
        task = progress.add_task("training", total=num_steps, completed=first, loss="")
        yield lambda done, loss: progress.update(task, completed=done, loss=f"loss {loss:.4f}")


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Turn tuples into lists, as a file does."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
