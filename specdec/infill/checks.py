"""What `infill` is given, checked before any work."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from specdec.errors import ConfigError, DrafterError, InputError
from specdec.kernels.commit.truncation import Truncation
from specdec.limits import MAX_DRAFT_TOKENS
from specdec.network.any_subset.model import AnySubsetModel, Order
from specdec.options.generation import is_whole
from specdec.options.inputs import check_input_ids

DRAFTERS = ("self", "ahead", "ngram")


def checked_truncation(do_sample: bool, temperature: float, top_k: int | None, top_p: float | None) -> Truncation:
    top_k, top_p = top_k or 0, 1.0 if top_p is None else top_p
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{name}={value!r} is not a finite number; pass one, or leave it out")
    if not do_sample and (temperature != 1.0 or top_k or top_p != 1.0):
        raise ConfigError("temperature, top_k and top_p shape samples; pass do_sample=True with them")
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature!r} is not positive; for greedy filling leave do_sample out")
    if not is_whole(top_k) or top_k < 0:
        raise ConfigError(f"top_k={top_k!r} is not a number of tokens; use 1 or more, or leave it out")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p!r} is outside (0, 1]; leave it out to keep all tokens")
    return Truncation(float(temperature), int(top_k), float(top_p))


def check_drafting(drafter: str | None, num_speculative_tokens: int) -> None:
    if drafter is not None and not (isinstance(drafter, str) and drafter in DRAFTERS):
        named = repr(drafter) if isinstance(drafter, str) else f"a {type(drafter).__name__}"
        raise DrafterError(
            f"drafter={named} cannot draft for infilling; choose {', '.join(map(repr, DRAFTERS))}, or None"
        )
    k = num_speculative_tokens
    if not is_whole(k) or not 1 <= k <= MAX_DRAFT_TOKENS:
        raise ConfigError(
            f"num_speculative_tokens={k!r} must be a whole number from 1 to {MAX_DRAFT_TOKENS}; for one token "
            "per call pass drafter=None"
        )


def checked_mask_token(model: AnySubsetModel, mask_token_id: int | None) -> int:
    token = model.mask_token_id if mask_token_id is None else mask_token_id
    if token is None:
        raise ConfigError(
            "neither the model's config nor mask_token_id= says which token is the mask, and it must never be written; "
            "pass mask_token_id=tokenizer.mask_token_id"
        )
    if not is_whole(token) or not 0 <= token < model.vocab_size:
        raise ConfigError(f"mask_token_id={token!r} is not a token of the vocabulary 0..{model.vocab_size - 1}")
    return int(token)


def checked_order(model: AnySubsetModel, input_ids: Tensor, mask: Tensor, attention_mask: Tensor | None) -> Order:
    """The lattice order of the rows.

    Raises InputError for masks of a different shape or kind, masks that overlap padding or leave a row without masked
    or without visible tokens, and texts longer than the model's positions.
    """
    if isinstance(input_ids, Tensor) and isinstance(mask, Tensor) and mask.shape == input_ids.shape:
        input_ids = input_ids.masked_fill(mask.to(input_ids.device).bool(), 0)  # not read, so not checked
    check_input_ids(input_ids, model.vocab_size)

    mask = bool_of(mask, input_ids, "mask", "True at the positions to fill, False elsewhere")
    present = torch.ones_like(mask)
    if attention_mask is not None:
        present = bool_of(attention_mask, input_ids, "attention_mask", "1 for tokens and 0 for padding")

    for row, (fills, there) in enumerate(zip(mask.cpu().numpy(), present.cpu().numpy(), strict=True)):
        places = np.flatnonzero(there)
        if (fills & ~there).any():
            raise InputError(
                f"mask and padding overlap in row {row}: column {int((fills & ~there).argmax())} is to be filled but "
                "has attention_mask 0; correct one of them"
            )
        if not fills.any():
            raise InputError(
                f"row {row} has no mask, so nothing to fill; set mask=True somewhere, or leave the row out"
            )
        if not (there & ~fills).any():
            raise InputError(
                f"row {row} is masked all over; an any-subset model needs at least one visible token, such as the "
                "beginning- or end-of-text token"
            )
        if places[-1] - places[0] + 1 != len(places):
            raise InputError(f"row {row}'s attention_mask has a gap; only padding at its ends can be left out")
        if model.max_positions is not None and len(places) > model.max_positions:
            raise InputError(
                f"row {row} has {len(places)} tokens, but the model has {model.max_positions} positions; cut the text "
                "around the masks"
            )

    return Order.lattice(mask, present)


def bool_of(values: Tensor, input_ids: Tensor, name: str, meaning: str) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != input_ids.shape:
        shape = list(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise InputError(f"{name} is {shape}; it must be a tensor of the shape of input_ids, {list(input_ids.shape)}")
    if values.dtype != torch.bool and not ((values == 0) | (values == 1)).all():
        raise InputError(f"{name} holds values other than 0 and 1; pass {meaning}")
    return values.bool()


def check_visible_tokens(input_ids: Tensor, order: Order, mask_token_id: int) -> None:
    """Raise InputError if a visible token is the mask token: it is not text, and mask= does not cover it."""
    tokens = input_ids.gather(1, order.positions.to(input_ids.device)).cpu()
    visible = torch.arange(tokens.shape[1]) < order.num_visible.cpu()[:, None]
    forgotten = (tokens == mask_token_id) & visible
    if forgotten.any():
        row = int(forgotten.any(1).long().argmax())
        column = int(order.positions[row, int(forgotten[row].long().argmax())])
        raise InputError(
            f"row {row} has the mask token at column {column}, where mask is False; pass "
            "mask=(input_ids == mask_token_id), or put a token there"
        )
