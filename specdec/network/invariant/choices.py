"""Which experts a mixture's tokens choose: recorded in one forward, and given to another.

In half precision rounding alone chooses other experts wherever two score nearly the same, which moves a token's logits
as far as an error would. With the same choices the logits of two implementations can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specdec.network.invariant.experts import is_experts


class Choice(NamedTuple):
    """What one call of an experts module gets besides the hidden states: indices and weights."""

    args: tuple
    kwargs: dict[str, Any]

    @classmethod
    def of_call(cls, args: tuple, kwargs: dict[str, Any]) -> Choice:
        return cls(args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"})

    @property
    def indices(self) -> Tensor:
        """[tokens, k]"""
        return next(tensor for tensor in (*self.args, *self.kwargs.values()) if not tensor.is_floating_point())


@contextmanager
def choices_recorded(model: nn.Module) -> Iterator[list[Choice]]:
    """The choices of every call within, in the order of the calls."""
    choices: list[Choice] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        choices.append(Choice.of_call(args, kwargs))

    with _before_experts(model, record):
        yield choices


@contextmanager
def choices_given(model: nn.Module, choices: list[Choice]) -> Iterator[list[Tensor]]:
    """The same calls again, with those choices instead of the model's own. Fills a list with the share of the experts,
    call by call, that the model would have chosen, too."""
    given, shares = iter(choices), list[Tensor]()

    def give(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        choice, own = next(given), Choice.of_call(args, kwargs)
        is_common = choice.indices[:, :, None] == own.indices[:, None, :]
        shares.append(is_common.any(-1).float().mean())
        hidden = {name: kwargs[name] for name in kwargs if name == "hidden_states"}
        return (*args[:1], *choice.args), {**hidden, **choice.kwargs}

    with _before_experts(model, give):
        yield shares


@contextmanager
def _before_experts(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True) for module in model.modules() if is_experts(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mean_share(shares: list[Tensor]) -> float:
    """1 where there was no call."""
    return torch.stack(shares).mean().item() if shares else 1.0
