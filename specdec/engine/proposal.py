"""Ask the drafter, and cut its draft to what the target can verify."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from specdec.batch.rows import Rows
from specdec.batch.slots import to_device
from specdec.draft import NO_TOKEN, Draft
from specdec.drafter import Drafter
from specdec.errors import DrafterError


def propose(drafter: Drafter, rows: Rows, widths: np.ndarray, max_tokens: int, vocab_size: int) -> Draft:
    """Ask the drafter for a draft and cut it to what the target can verify.

    widths: [rows] integers, the most tokens of each row, cut at `max_tokens`. Where all are 0 the drafter is not
        asked.
    """
    most = min(max(widths.tolist()), max_tokens)
    if most <= 0:
        return Draft.empty(len(rows), rows.device)
    return usable(rows, drafter.propose(rows, most), widths, most, vocab_size, drafter.name)


def usable(rows: Rows, draft: Draft, widths: np.ndarray, most: int, vocab_size: int, name: str) -> Draft:
    """The part of a draft that can be verified.

    Tokens are cut beyond `widths` ([rows] integers), where a row's length limit leaves no room (the target's own token
    needs one place), where they are not tokens of the target, and after any of these. Raises DrafterError for a draft
    of the wrong kind or shape, or of more than `most` tokens.
    """
    check_draft(rows, draft, most, vocab_size, name)
    ids = draft.token_ids
    if not ids.shape[1]:
        return draft
    is_asked = min(widths.tolist()) >= ids.shape[1]
    is_roomy = min((rows.host_limits - rows.host_lengths).tolist()) > ids.shape[1]
    if is_asked and is_roomy and draft.is_valid:
        return draft
    unusable, place = (ids < 0) | (ids >= vocab_size), torch.arange(ids.shape[1], device=ids.device)
    if not is_asked:
        unusable |= place >= to_device(widths, ids.device)[:, None]
    if not is_roomy:
        unusable |= place >= (rows.limits - rows.lengths - 1)[:, None]
    return replace(draft, token_ids=ids.masked_fill(unusable.cumsum(1).bool(), NO_TOKEN))


def check_draft(rows: Rows, draft: Draft, max_tokens: int, vocab_size: int, name: str) -> None:
    if not isinstance(draft, Draft):
        raise DrafterError(f"drafter {name!r} proposed a {type(draft).__name__}; propose() must return a Draft")
    ids, probs = draft.token_ids, draft.probs
    if not isinstance(ids, torch.Tensor):
        raise DrafterError(f"drafter {name!r} proposed token_ids as a {type(ids).__name__}; needed is a torch.Tensor")
    if ids.dim() != 2 or len(ids) != len(rows) or ids.shape[1] > max_tokens or ids.dtype != torch.long:
        raise DrafterError(
            f"drafter {name!r} proposed token_ids of {list(ids.shape)} {ids.dtype}; needed are [{len(rows)}, at most "
            f"{max_tokens}] torch.int64"
        )
    if probs is not None and probs.shape != (*ids.shape, vocab_size):
        raise DrafterError(
            f"drafter {name!r} gave probs of {list(probs.shape)}; needed are {[*ids.shape, vocab_size]}, the target's "
            "vocabulary last"
        )
    if draft.parents is not None:
        raise DrafterError(f"drafter {name!r} proposed a tree; only chains are verified yet, leave parents=None")
