"""A filled cache and an encoder-decoder are refused by name, with what to do instead."""

from __future__ import annotations

import pytest
import torch
from tiny import plain_greedy, tiny_llama
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

import specdec
from specdec.errors import ConfigError, InputError, UnsupportedModelError

TARGET = tiny_llama(0, eos_token_id=None)
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def filled():
    with torch.no_grad():
        return TARGET(input_ids=IDS[:, :3], use_cache=True).past_key_values


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_given_to_generate(name):
    with pytest.raises(ConfigError, match=rf"{name}= cannot be continued from; .* leave it out"):
        specdec.generate(TARGET, IDS, max_new_tokens=4, **{name: filled()})


def test_a_filled_cache_inside_transformers():
    loop = specdec.speculative("prompt_lookup")
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "pad_token_id": 0}
    with pytest.raises(InputError, match=r"already holds 3 tokens; .* leave it out .* the output is the same"):
        TARGET.generate(IDS, past_key_values=filled(), custom_generate=loop, **options)
    expected = plain_greedy(TARGET, IDS[0], max_new_tokens=6, pad_token_id=0)
    # The remedy: the whole text without the cache, which transformers continues to the same tokens.
    assert TARGET.generate(IDS, past_key_values=filled(), **options)[0, 5:].tolist() == expected
    assert TARGET.generate(IDS, custom_generate=loop, **options)[0, 5:].tolist() == expected
    empty = DynamicCache(config=TARGET.config)
    assert TARGET.generate(IDS, past_key_values=empty, custom_generate=loop, **options)[0, 5:].tolist() == expected


def test_an_encoder_decoder():
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"encoder-decoder .* decoder-only"):
        specdec.generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        model.generate(
            torch.tensor([[1, 2, 3]]), max_new_tokens=4, custom_generate=specdec.speculative("prompt_lookup")
        )
