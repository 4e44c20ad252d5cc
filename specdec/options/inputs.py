"""Turns the inputs of `generate` into prompts without padding, or raises an error that says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.errors import ConfigError, InputError

CACHES = ("past_key_values", "cache")  # older and newer name of the cache among transformers' model inputs
# What a caller writes for a modality of `mm_encoder_outputs`.
MODALITY_INPUTS = {"image": "'pixel_values'", "video": "'pixel_values_videos'", "audio": "'input_features'"}
WITHOUT_CACHE = "each row has its own cache here, which is filled from its prompt: leave it out"


def check_input_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise InputError unless `input_ids` is a [rows, columns] integer tensor within the vocabulary."""
    if not isinstance(input_ids, Tensor):
        raise InputError(
            f"input_ids is a {type(input_ids).__name__}; pass a [rows, columns] integer tensor, as a tokenizer "
            "returns with return_tensors='pt'"
        )

    if input_ids.dim() != 2:
        raise InputError(
            f"input_ids has shape {list(input_ids.shape)}; it must be two-dimensional, [rows, columns] "
            "(for one prompt: input_ids[None])"
        )

    if input_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise InputError(f"input_ids has dtype {input_ids.dtype}; token ids are integers (torch.long)")
    if input_ids.numel() == 0:
        raise InputError(
            f"input_ids has shape {list(input_ids.shape)}: an empty prompt; pass at least one token per row"
        )

    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"input_ids contains {low if low < 0 else high}, outside the target's vocabulary "
            f"0..{vocab_size - 1}; was the prompt made by another tokenizer?"
        )


def split_prompts(
    input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None, eos_token_ids: Sequence[int] = ()
) -> list[Tensor]:
    """The rows of a left-padded batch without their padding, [length] int64 each, on the host.

    Only the mask decides what is padding: a prompt may itself contain the pad or the end-of-sequence token. Without a
    mask every token is part of the prompt.
    """
    if attention_mask is None:
        # Of one row too, transformers takes leading pads for padding, unless the token also ends sequences.
        is_ambiguous = len(input_ids) > 1 or pad_token_id not in eos_token_ids
        if pad_token_id is not None and is_ambiguous and (input_ids[:, 0] == pad_token_id).any():
            row = int((input_ids[:, 0] == pad_token_id).long().argmax())
            raise InputError(
                f"row {row} begins with pad_token_id={pad_token_id} and there is no attention_mask to tell "
                "padding from prompt; pass the tokenizer's attention_mask (all ones if it is prompt)"
            )
        return list(input_ids.long().cpu())
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        shape = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise InputError(f"attention_mask is {shape}; it must have the shape of input_ids, {list(input_ids.shape)}")
    if attention_mask.device != input_ids.device:
        raise InputError(
            f"attention_mask is on {attention_mask.device}, input_ids on {input_ids.device}; move them to one device"
        )
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise InputError("attention_mask holds values other than 0 and 1; pass 1 for prompt tokens and 0 for padding")
    input_ids, visible = input_ids.cpu(), attention_mask.bool().cpu()
    if not visible.any(1).all():
        row = int((~visible.any(1)).long().argmax())
        raise InputError(f"row {row} is all padding; remove it or give it at least one prompt token")

    if not visible[:, -1].all():
        row = int((~visible[:, -1]).long().argmax())
        raise InputError(
            f"row {row} is padded on the right; decoder-only models continue the last column, so pad on the "
            "left (tokenizer.padding_side = 'left')"
        )
    if (visible[:, 1:] < visible[:, :-1]).any():
        row = int((visible[:, 1:] < visible[:, :-1]).any(1).long().argmax())
        raise InputError(f"row {row}'s attention_mask has a gap; only padding on the left can be masked")

    return [ids[mask].long() for ids, mask in zip(input_ids, visible, strict=True)]


def refuse_model_inputs(model_kwargs: dict[str, Any], attention_mask: Tensor) -> None:
    """Raise InputError for model inputs other than text, for a filled cache, and for custom positions."""
    refuse_filled_caches(model_kwargs)
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.shape[-2:] == attention_mask.shape:
        expected = attention_mask.long().cumsum(-1) - 1
        if ((positions != expected) & attention_mask.bool()).any():
            raise InputError("position_ids other than 0, 1, 2 ... are not served; leave them out")
    served = {"attention_mask", *CACHES, "use_cache", "logits_to_keep", "position_ids", "cache_position"}
    for name, value in model_kwargs.items():
        is_absent = (
            value is None or value is False or (isinstance(value, dict) and all(one is None for one in value.values()))
        )
        if name not in served and not is_absent:
            raise InputError(f"{_as_written(name, value)} is not served; pass input_ids and attention_mask only")


def refuse_filled_caches(model_kwargs: Mapping[str, Any]) -> None:
    """Raise InputError for a cache that holds tokens. An empty one, or None, is what a caller has who has none."""
    for name in CACHES:
        cache = model_kwargs.get(name)
        num_cached = 0 if cache is None else cached_tokens(cache)
        if num_cached is None:
            raise ConfigError(f"{name} is a {type(cache).__name__}; {WITHOUT_CACHE}")
        if num_cached:
            raise InputError(
                f"{name} already holds {num_cached} tokens; {WITHOUT_CACHE} "
                "(with the whole text in input_ids the output is the same)"
            )


def cached_tokens(cache: Any) -> int | None:
    """Tokens in a transformers cache, or in the tuples of keys and values that it once was; None for anything else."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, Sequence) and not isinstance(cache, str):
        return int(cache[0][0].shape[-2]) if len(cache) else 0
    return None


def _as_written(name: str, value: Any) -> str:
    """A model input by the name that the caller wrote: transformers encodes images and the like before it calls us."""
    if name != "mm_encoder_outputs" or not isinstance(value, dict):
        return f"model input {name!r}"
    kinds = [str(kind) for kind, outputs in value.items() if outputs is not None]
    written = " and ".join(MODALITY_INPUTS.get(kind, kind) for kind in kinds)
    return f"model input {written} (which transformers has encoded as {name!r})"
