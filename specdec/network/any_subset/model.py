"""Any-subset models: one network for p(token | any set of other tokens of the sequence), asked in a given order.

Shih et al. 2022, arXiv 2205.13554 (any-subset autoregressive models, lattice orders); Yang et al. 2019, arXiv
1906.08237 (XLNet, two streams). An order s lists the places of a row: the visible ones ascending, then those to fill.
All tensors here are laid out by rank: rank i is place s(i).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, XLNetLMHeadModel

from specdec.batch.rows import Rows
from specdec.draft import NO_TOKEN
from specdec.errors import ConfigError, UnsupportedModelError
from specdec.network.any_subset.two_stream import TwoStreamCache


@dataclass(frozen=True)
class Order:
    """The order in which the places of each row become known.

    positions: [rows, columns] int64, the place of each rank; past a row's length, the places that are padding.
    num_visible: [rows] int64, the number of given ranks, at least 1. lengths: [rows] int64, the number of all ranks.
    """

    positions: Tensor
    num_visible: Tensor
    lengths: Tensor

    @staticmethod
    def lattice(mask: Tensor, present: Tensor) -> Order:
        """Visible places ascending, then those to fill ascending: 2^N orders of N places, not N!.

        mask: [rows, columns] bool, the places to fill. present: [rows, columns] bool, False for padding.
        """
        kind = torch.where(present, mask.long(), 2)
        positions = kind.argsort(dim=1, stable=True)
        return Order(positions, (kind == 0).sum(1), present.sum(1))

    def __getitem__(self, index: Tensor) -> Order:
        return Order(self.positions[index], self.num_visible[index], self.lengths[index])


class AnySubsetModel(ABC):
    """An any-subset model needs only one method. Subclass this to fill with your own network."""

    vocab_size: int
    max_positions: int | None = None  # places that a sequence may have
    mask_token_id: int | None = None

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def conditional_logits(self, tokens: Tensor, order: Order, known: Tensor, targets: Tensor) -> Tensor:
        """Logits of the tokens at some ranks, [rows, targets, vocab].

        tokens: [rows, columns] int64 by rank; results must not depend on tokens of ranks >= known.
        known: [rows] int64, at least order.num_visible. The token of rank i is predicted only from the tokens of the
        ranks < min(i, known). So known = order.lengths gives the joint density in one call, and a lower value the
        marginals of unknown tokens; where both predict the same thing they must agree, or samples do not follow the
        joint density.
        targets: [rows, targets] int64, ranks not below order.num_visible; NO_TOKEN where nothing is requested.
        """


class XLNet(AnySubsetModel):
    """XLNet through transformers' own forward: `perm_mask` sets which tokens are seen, `target_mapping` which are
    asked.

    It recomputes everything in each call. `conditionals_of` serves the same model with `TwoStreamCache`.
    """

    def __init__(self, model: XLNetLMHeadModel):
        """Raises UnsupportedModelError for an XLNet that does not see both sides, ConfigError for mixed dtypes."""
        if not isinstance(model, XLNetLMHeadModel):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no second stream, so it gives no density of several tokens in one call; "
                "pass an XLNetLMHeadModel, or an AnySubsetModel of your own"
            )
        if model.config.attn_type != "bi" or model.config.bi_data:
            raise UnsupportedModelError(
                f"this XLNet has attn_type={model.config.attn_type!r}, bi_data={model.config.bi_data}; only "
                "attn_type='bi' without bi_data sees the text on both sides of a place"
            )
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
        if len(dtypes) > 1:  # transformers leaves some of XLNet's parameters in float32, whatever dtype is requested
            raise ConfigError(f"the XLNet's parameters are {' and '.join(dtypes)}; make them one by model.to(dtype)")
        self.model = model
        self.vocab_size = model.lm_loss.weight.shape[0]
        self.max_positions = getattr(model.config, "max_positions", None)
        self.mask_token_id = getattr(model.config, "mask_token_id", None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def conditional_logits(self, tokens: Tensor, order: Order, known: Tensor, targets: Tensor) -> Tensor:
        num_columns = tokens.shape[1]
        column = torch.arange(num_columns, device=tokens.device)
        is_padding = column >= order.lengths[:, None]  # by rank
        # Unknown tokens have the highest rank, visible ones the lowest: equal ranks do not see each other, except in
        # the visible block.
        rank = torch.where(column < known[:, None], column, num_columns)
        rank = torch.where(column < order.num_visible[:, None], -1, rank)
        rank = torch.empty_like(rank).scatter_(1, order.positions, rank)
        bans = (rank[:, :, None] <= rank[:, None, :]) & (rank[:, None, :] >= 0)
        absent = torch.empty_like(is_padding).scatter_(1, order.positions, is_padding)
        at = order.positions.gather(1, targets.clamp(min=0))
        mapping = (at[..., None] == column) & (targets != NO_TOKEN)[..., None]
        dtype = self.model.dtype
        with relative_positions_in(self.model, dtype):
            return self.model(
                torch.empty_like(tokens).scatter_(1, order.positions, tokens),
                input_mask=absent.to(dtype),
                perm_mask=bans.to(dtype),
                target_mapping=mapping.to(dtype),
                use_mems=False,
            ).logits


@contextmanager
def relative_positions_in(model: XLNetLMHeadModel, dtype: torch.dtype) -> Iterator[None]:
    """Cast the sinusoids: transformers makes them in float32 for any model dtype, and its two streams then fail."""

    def cast(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "r": kwargs["r"].to(dtype)}

    handles = [layer.register_forward_pre_hook(cast, with_kwargs=True) for layer in model.transformer.layer]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Conditionals(Protocol):
    """An any-subset model applied to rows whose tokens are in rank order."""

    def logits(self, rows: Rows, draft_ids: Tensor, width: int) -> Tensor:
        """The logits after the committed tokens and each draft token, [rows, k + 1, width, vocab]; one network call.

        draft_ids: [rows, k] int64, NO_TOKEN where nothing is drafted; overwrites the values of `rows` past its lengths.
        [b, i, j]: the token of rank n + i + j given the ranks < n + i, n = rows.lengths[b]. j = 0 is the density, j > 0
        are marginals further ahead. Values past a row's last rank, or past its draft, are meaningless.
        """

    def keep_rows(self, index: Tensor) -> None:
        """Rows left the batch: the new row i is the old row index[i] (int64, [kept rows])."""


def conditionals_of(model: PreTrainedModel | AnySubsetModel, order: Order, rows: Rows) -> Conditionals:
    """The fastest way to serve `model`. order: of the caller's batch; `rows` may hold its rows in another order."""
    index = torch.from_numpy(rows.row_ids).to(rows.device)
    if isinstance(model, AnySubsetModel):
        return Recomputed(model, order[index])
    return Cached(model, order[index], rows.capacity)


class Cached:
    """XLNet with kept keys of committed tokens (see `two_stream.py`)."""

    def __init__(self, model: XLNetLMHeadModel, order: Order, capacity: int):
        """capacity: ranks that the longest row may reach, drafts included."""
        num_columns = order.positions.shape[1]
        positions = order.positions.new_zeros(len(order.positions), max(capacity, num_columns))
        positions[:, :num_columns] = order.positions
        self.cache = TwoStreamCache(model, positions, order.num_visible, num_columns)
        self.lengths = order.lengths
        self.num_calls = 0

    def logits(self, rows: Rows, draft_ids: Tensor, width: int) -> Tensor:
        tokens = with_draft(rows, draft_ids)
        k = draft_ids.shape[1]
        # The last committed token was sampled and has no keys yet; the first call finds none at all.
        starts = rows.lengths - 1 if self.num_calls else torch.zeros_like(rows.lengths)
        num_content = k + 1 if self.num_calls else rows.max_length + k
        self.num_calls += 1
        content = tokens.gather(1, starts[:, None] + torch.arange(num_content, device=starts.device))
        known = rows.lengths[:, None, None] + torch.arange(k + 1, device=starts.device)[:, None].expand(-1, width)
        targets = known + torch.arange(width, device=starts.device)
        targets = torch.minimum(targets, self.lengths[:, None, None] - 1)
        logits = self.cache.forward(content, starts, targets.flatten(1), known.flatten(1), rows.max_length + k)
        return logits.unflatten(1, (k + 1, width))

    def keep_rows(self, index: Tensor) -> None:
        self.cache.keep_rows(index)
        self.lengths = self.lengths[index]


class Recomputed:
    """Any AnySubsetModel, recomputed in each call."""

    def __init__(self, model: AnySubsetModel, order: Order):
        self.model, self.order = model, order
        self.num_calls = 0

    def logits(self, rows: Rows, draft_ids: Tensor, width: int) -> Tensor:
        k = draft_ids.shape[1]
        if k and width > 1:
            raise UnsupportedModelError(
                "conditional_logits gives no marginals after each token of a draft; draft by 'self' or 'ngram'"
            )
        self.num_calls += 1
        tokens = with_draft(rows, draft_ids)[:, : self.order.positions.shape[1]]
        targets = rows.lengths[:, None] + torch.arange(k + width, device=rows.device)
        targets = targets.masked_fill(targets >= self.order.lengths[:, None], NO_TOKEN)
        known = torch.minimum(rows.lengths + k, self.order.lengths)
        logits = self.model.conditional_logits(tokens, self.order, known, targets)
        return logits.unflatten(1, (k + 1, width))

    def keep_rows(self, index: Tensor) -> None:
        self.order = self.order[index]


def with_draft(rows: Rows, draft_ids: Tensor) -> Tensor:
    """The rows' tokens with a draft after the committed ones, written in place; [rows, capacity] int64."""
    place = rows.lengths[:, None] + torch.arange(draft_ids.shape[1], device=rows.device)
    return rows.token_ids.scatter_(1, place, draft_ids.clamp(min=0))
