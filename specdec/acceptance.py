"""How likely the target is to accept a token that was just drafted: by the drafter's own probability, or by a head.

One number per row comes to the host for each drafted token, in one copy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Self

from specdec.acceptance_head import LEAST_LOG_PROB, AcceptanceHead
from specdec.disco import Disco
from specdec.drafter import Drafter
from specdec.errors import ConfigError
from specdec.heads import Head

if TYPE_CHECKING:
    from specdec.length import Shown

Estimate = Callable[["Shown"], np.ndarray]  # [rows] float64 in 0 .. 1
AnyHead = TypeVar("AnyHead", bound=Head)


def log_prob(shown: Shown) -> Tensor:
    """log q of each row's token, [rows] float32; of NO_TOKEN something finite."""
    logits = shown.logits.float()
    chosen = logits.gather(1, shown.token_ids.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return chosen - logits.logsumexp(1)


def on_host(probabilities: Tensor) -> np.ndarray:
    """NaN, of a drafter that has gone wrong, counts as certain rejection."""
    return np.nan_to_num(probabilities.double().cpu().numpy(), nan=0.0)


@torch.inference_mode()
def draft_probability(shown: Shown) -> np.ndarray:
    """q of the token itself."""
    return on_host(log_prob(shown).exp())


class OfHead(Generic[AnyHead]):
    """An estimate by a trained head."""

    kind: type[AnyHead]
    sees: frozenset[str]

    def __init__(self, head: AnyHead):
        self.head = head

    @classmethod
    def of(cls, policy: str, head: object | None, target: PreTrainedModel, drafter: Drafter) -> Self:
        """head: itself, its folder, or None for the draft model's folder.

        Raises ConfigError where there is no draft model, and where the head is of another kind or pair; InputError
        where the folder holds none.
        """
        model = drafter.model
        if model is None:
            raise ConfigError(
                f"length_policy {policy!r} needs a head trained for a draft model, and drafter {drafter.name!r} has "
                "no model; choose another policy"
            )
        if isinstance(head, str | Path) or head is None:
            head = cls.kind.load(model.config._name_or_path if head is None else head)
        if not isinstance(head, cls.kind):
            raise ConfigError(
                f"length_policy {policy!r}: head is a {type(head).__name__}; pass a {cls.kind.__name__} or its folder"
            )
        head.check(target, model)
        return cls(head.to(model.device, torch.float32).eval())


class HeadEstimate(OfHead[AcceptanceHead]):
    """SpecDec++'s head, written out: its layers are small enough that calling modules would take most of the time."""

    kind = AcceptanceHead
    sees = frozenset({"logits", "hidden_states"})

    def __init__(self, head: AcceptanceHead):
        super().__init__(head)
        layers: list[Any] = list(head.blocks)
        self.blocks = [(layer.weight.detach().t().contiguous(), layer.bias.detach()) for layer in layers]
        rejected, accepted = head.out.weight.detach()
        self.out = (accepted - rejected)[:, None].contiguous()
        bias = head.out.bias.detach()
        self.bias = bias[1] - bias[0] + head.log_weight  # type: ignore[operator]

    @torch.inference_mode()
    def __call__(self, shown: Shown) -> np.ndarray:
        assert shown.hidden_states is not None
        log_q = log_prob(shown).clamp_(LEAST_LOG_PROB, -1e-6)[:, None]
        log_rest = torch.log(-torch.expm1(log_q)).clamp_(min=LEAST_LOG_PROB)
        x = torch.cat([shown.hidden_states.float(), log_q, log_rest], 1)
        for weight, bias in self.blocks:
            x = x.add(F.silu(torch.addmm(bias, x, weight)))
        return on_host(torch.addmm(self.bias, x, self.out).sigmoid_()[:, 0])


class DiscoEstimate(OfHead[Disco]):
    """DISCO's classifier."""

    kind = Disco
    sees = frozenset({"logits"})

    @torch.inference_mode()
    def __call__(self, shown: Shown) -> np.ndarray:
        return on_host(self.head.log_acceptance(shown.logits, shown.place).exp())
