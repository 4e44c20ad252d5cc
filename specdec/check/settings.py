"""Plain greedy decoding as a model's settings: what every comparison runs under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

# Settings that make decoding something other than N plain greedy tokens, each with the value that changes nothing; None
# changes nothing either. Sampling warpers are not listed, because without do_sample they do nothing.
NO_CHANGE: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "token_healing": False,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_time": None,
    "stop_strings": None,
}


@contextmanager
def greedy_settings(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Give the model a generation config of plain greedy decoding that keeps only its special tokens.

    Yields the settings that are ignored, by name. Afterwards the model gets its own config back.
    """
    own = model.generation_config
    values = own.to_dict()  # for JSON
    ignored = {name: values.get(name) for name, neutral in NO_CHANGE.items() if values.get(name) not in (None, neutral)}

    eos = own.eos_token_id
    pad = next((token for token in (own.pad_token_id, *ends_of(model)) if token is not None), 0)
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, bos_token_id=own.bos_token_id, eos_token_id=eos, pad_token_id=pad
    )

    try:
        yield ignored
    finally:
        model.generation_config = own


def ends_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The end-of-sequence tokens of the model's generation config."""
    eos = model.generation_config.eos_token_id
    return () if eos is None else tuple(torch.as_tensor(eos).flatten().tolist())
