"""How likely the target is to accept a token that was just drafted: by the drafter's own probability, or by a head.

One number per row comes to the host for each drafted token, in one copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar
from weakref import ref

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.drafter import Drafter
from specdec.errors import ConfigError
from specdec.kept import kept_with
from specdec.kernels.commit.token_statistics import log_prob, token_statistics, token_statistics_of_few
from specdec.policies.estimate_graphs import EstimateGraphs
from specdec.policies.heads.acceptance_head import LEAST_LOG_PROB, MOST_ENTROPY, AcceptanceHead, numbers
from specdec.policies.heads.disco import Disco
from specdec.policies.heads.files import PairHead

if TYPE_CHECKING:
    from typing_extensions import Self

    from specdec.draft import Shown

AnyHead = TypeVar("AnyHead", bound=PairHead)
# The range of the statistics that a head sees, as in `numbers`: log q of the token and of the best other, and entropy.
LEAST_STATISTICS = np.array([LEAST_LOG_PROB, LEAST_LOG_PROB, 0.0], np.float32)
MOST_STATISTICS = np.array([-1e-6, 0.0, MOST_ENTROPY], np.float32)
NUMPY_UP_TO = 2**16  # logits; for no more than these numpy's reductions are faster than torch's


class AcceptanceEstimate(ABC):
    """How likely the target accepts each row's newest token, given that it accepts those before.

    sees: what it looks at of the things a drafter shows, as `LengthPolicy.sees`.
    sees_place: whether the token's index in its draft matters.
    """

    sees: ClassVar[frozenset[str]]
    sees_place: ClassVar[bool] = False

    def __init__(self) -> None:
        self._graphs = EstimateGraphs()

    def __call__(self, shown: Shown) -> np.ndarray:
        """[rows] float64 in 0 .. 1. NaN, which a faulty drafter may cause, counts as certain rejection."""
        on_cuda = shown.logits.device.type == "cuda"
        found = self._graphs.replay(self, shown) if on_cuda else self.probabilities(shown)
        return without_nan(found.cpu().numpy().astype(np.float64))

    @abstractmethod
    def probabilities(self, shown: Shown) -> Tensor:
        """[rows] float32 on the device. Rows may not depend on each other, and the host may not wait for the device.
        `shown.place` may be a tensor."""


def without_nan(probabilities: np.ndarray) -> np.ndarray:
    probabilities[np.isnan(probabilities)] = 0.0
    return probabilities


class DraftProbability(AcceptanceEstimate):
    """The probability that the drafter itself gave the token."""

    sees = frozenset({"logits"})

    @classmethod
    def of(cls, drafter: Drafter) -> Self:
        if drafter.model is None:
            return cls()
        return kept_with(drafter.model, cls, cls)

    @torch.inference_mode()
    def probabilities(self, shown: Shown) -> Tensor:
        return log_prob(shown.logits, shown.token_ids).exp()


class EstimateByHead(AcceptanceEstimate, Generic[AnyHead]):
    """The estimate of a trained head."""

    kind: type[AnyHead]

    def __init__(self, head: AnyHead):
        super().__init__()
        self.head = head

    @classmethod
    def of(cls, policy: str, head: object | None, target: PreTrainedModel, drafter: Drafter) -> Self:
        """head: the head itself, its folder, or None for the draft model's folder.

        Raises ConfigError if there is no draft model or the head is of another kind or pair, and InputError if the
        folder holds no head.
        """
        model = drafter.model
        if model is None:
            raise ConfigError(
                f"length_policy {policy!r} needs a head trained for a draft model, and drafter {drafter.name!r} has "
                "no model; choose another policy"
            )
        folder = model.config._name_or_path if head is None else head
        if isinstance(folder, str | Path):
            source = stamp(Path(folder) / cls.kind.kind)
        elif isinstance(folder, cls.kind):
            folder.to(model.device, torch.float32)  # before its state is read, because moving changes it
            source = state(folder)
        else:
            raise ConfigError(
                f"length_policy {policy!r}: head is a {type(head).__name__}; pass a {cls.kind.__name__} or its folder"
            )

        def make() -> Any:
            head = cls.kind.load(folder) if isinstance(folder, str | Path) else folder
            head.check(target, model)
            return cls(head.to(model.device, torch.float32).eval())

        # The last one of a kind is kept: reading a large pair's weights takes longer than drafting many tokens.
        return kept_with(model, cls, make, (source, state(target), state(model)))


def state(module: object) -> tuple:
    """A value that changes when the module is another one, or when its weights are moved or changed (changes through
    `.data` go unnoticed)."""
    if not isinstance(module, nn.Module):
        return (module,)
    weights = ((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in module.parameters())
    return ref(module), *weights


def stamp(path: Path) -> tuple:
    """A value that changes with the files of a trained part. path: of both files, without a suffix."""
    files = [path.with_suffix(suffix) for suffix in (".json", ".safetensors")]
    return path.resolve(), *(file.stat().st_mtime_ns if file.is_file() else None for file in files)


class HeadEstimate(EstimateByHead[AcceptanceHead]):
    """The estimate of SpecDec++'s head.

    The head is computed here without its modules, and on a CPU with numpy: it is so small that calling modules or
    torch's operations would take most of the time.
    """

    kind = AcceptanceHead
    sees = frozenset({"logits", "hidden_states"})

    def __init__(self, head: AcceptanceHead):
        super().__init__(head)
        layers: list[Any] = [*head.blocks, head.out]
        pairs = [(layer.weight.detach().t().contiguous(), layer.bias.detach()) for layer in layers]
        weight, bias = pairs[-1]  # [width, 2], [2]; only the difference of the two logits matters
        difference = weight[:, 1:] - weight[:, :1], bias[1:] - bias[:1] + head.log_weight
        # Halved, so that each gives h where the head's own layer gives 2 h: SiLU(2 h) = h + h tanh(h), and
        # sigmoid(2 h) = (1 + tanh(h)) / 2.
        self.layers: list[Any] = [(0.5 * weight, 0.5 * bias) for weight, bias in (*pairs[:-1], difference)]
        self.is_on_cpu = weight.device.type == "cpu"
        if self.is_on_cpu:
            self.layers = [(weight.numpy(), bias.numpy()) for weight, bias in self.layers]

    def __call__(self, shown: Shown) -> np.ndarray:
        if not self.is_on_cpu:
            return super().__call__(shown)
        assert shown.hidden_states is not None
        with torch.inference_mode():
            logits, token_ids = shown.logits.float(), shown.token_ids
            if logits.numel() <= NUMPY_UP_TO:
                statistics = token_statistics_of_few(logits.numpy(), token_ids.numpy())
            else:
                statistics = token_statistics(logits, token_ids).numpy()
            return self._by_numpy(shown.hidden_states.float().numpy(), statistics)

    @torch.inference_mode()
    def probabilities(self, shown: Shown) -> Tensor:
        assert shown.hidden_states is not None
        statistics = token_statistics(shown.logits, shown.token_ids)
        x = torch.cat([shown.hidden_states.float(), numbers(statistics)], 1)
        *blocks, (weight, bias) = self.layers
        for block_weight, block_bias in blocks:
            x = x + F.silu(torch.addmm(block_bias, x, block_weight, beta=2, alpha=2))
        return torch.addmm(bias, x, weight, beta=2, alpha=2)[:, 0].sigmoid()

    def _by_numpy(self, hidden: np.ndarray, statistics: np.ndarray) -> np.ndarray:
        """The same as `probabilities`, [rows] float64. hidden: [rows, hidden]; statistics: [rows, 3]."""
        statistics = np.minimum(np.maximum(statistics, LEAST_STATISTICS), MOST_STATISTICS)
        log_q = statistics[:, :1]
        log_rest = np.maximum(np.log(-np.expm1(log_q)), LEAST_LOG_PROB)
        x = np.concatenate([hidden, log_q, log_rest, statistics[:, 1:]], 1)
        *blocks, (weight, bias) = self.layers
        for block_weight, block_bias in blocks:
            half = x @ block_weight
            half += block_bias
            x += half
            half *= np.tanh(half)
            x += half
        half = (x @ weight)[:, 0].astype(np.float64) + bias
        return without_nan(0.5 + 0.5 * np.tanh(half))


def estimate_beside(policy: str, target: PreTrainedModel, drafter: Drafter) -> HeadEstimate | None:
    """The estimate of the acceptance head in the draft model's folder; None if there is no head for this pair."""
    folder = None if drafter.model is None else Path(drafter.model.config._name_or_path)
    if folder is None or not (folder / f"{AcceptanceHead.kind}.json").is_file():
        return None
    try:
        return HeadEstimate.of(policy, None, target, drafter)
    except ConfigError:  # the head belongs to another pair
        return None


class DiscoEstimate(EstimateByHead[Disco]):
    """The estimate of DISCO's classifier."""

    kind = Disco
    sees, sees_place = frozenset({"logits"}), True

    @torch.inference_mode()
    def probabilities(self, shown: Shown) -> Tensor:
        return self.head.log_acceptance(shown.logits, shown.place).exp()
