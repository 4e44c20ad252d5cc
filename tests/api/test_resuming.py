"""Filled caches, images, offloaded and recurrent models and encoder-decoders are refused by name, with what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from families import tiny
from tiny import plain_greedy, tiny_llama
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration
from transformers.generation.candidate_generator import _MapInputEmbedding, _PruneReindexingLMHead

import specdec
from specdec.errors import InputError, UnsupportedModelError
from specdec.options.inputs import refuse_model_inputs

TARGET = tiny_llama(0, eos_token_id=None)
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def filled():
    with torch.no_grad():
        return TARGET(input_ids=IDS[:, :3], use_cache=True).past_key_values


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_given_to_generate(name):
    with pytest.raises(InputError, match=rf"{name} already holds 3 tokens; .* leave it out .* the output is the same"):
        specdec.generate(TARGET, IDS, max_new_tokens=4, **{name: filled()})
    keys_and_values = ((torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8)),)  # as older versions had it
    with pytest.raises(InputError, match=rf"{name} already holds 3 tokens"):
        list(specdec.generate_many(TARGET, [IDS[0]], max_new_tokens=4, **{name: keys_and_values}))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("value", [None, DynamicCache(), ()])
def test_no_cache_and_an_empty_one(name, value):
    expected = plain_greedy(TARGET, IDS[0], max_new_tokens=6, pad_token_id=0)
    out = specdec.generate(TARGET, IDS, max_new_tokens=6, **{name: value})
    assert out[0, 5:].tolist() == expected


def test_an_image_is_refused_by_the_name_that_the_caller_wrote():
    mask, image = torch.ones_like(IDS), SimpleNamespace(pooler_output=torch.zeros(1, 4))
    said = r"model input 'pixel_values' \(which transformers has encoded as 'mm_encoder_outputs'\) is not served"
    with pytest.raises(InputError, match=said):
        refuse_model_inputs({"mm_encoder_outputs": {"image": image}}, mask)
    with pytest.raises(InputError, match="'pixel_values_videos' and 'input_features'"):
        refuse_model_inputs({"mm_encoder_outputs": {"video": image, "audio": image, "image": None}}, mask)
    with pytest.raises(InputError, match="model input 'pixel_values' is not served"):
        refuse_model_inputs({"pixel_values": torch.zeros(1, 3, 4, 4)}, mask)
    for nothing in ({}, {"image": None}):  # a text alone
        refuse_model_inputs({"mm_encoder_outputs": nothing}, mask)


def test_an_offloaded_model_as_target_and_as_draft():
    model = cpu_offload(tiny_llama(0, eos_token_id=None), execution_device=torch.device("cpu"))
    said = r"weights of LlamaForCausalLM are not in memory: they are offloaded .*"
    with pytest.raises(UnsupportedModelError, match=rf"^the {said} use transformers' own generate"):
        specdec.generate(model, IDS, max_new_tokens=4)
    with pytest.raises(UnsupportedModelError, match=rf"^as a draft model: the {said} drafter='prompt_lookup'"):
        specdec.generate(TARGET, IDS, drafter=model, max_new_tokens=4)


def test_a_draft_model_that_keeps_state_is_refused_as_one():
    hybrid = tiny("lfm2", vocab_size=TARGET.config.vocab_size)
    said = r"Lfm2ForCausalLM keeps recurrent state \(layer type 'conv'\), which specdec does not rewind .* yet"
    with pytest.raises(UnsupportedModelError, match=rf"^as a draft model: {said}.*; pass another draft model"):
        specdec.generate(TARGET, IDS, drafter=hybrid, max_new_tokens=4)
    with pytest.raises(UnsupportedModelError, match=rf"^{said}.*; use transformers' own generate for it"):
        specdec.generate(hybrid, IDS, max_new_tokens=4)


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


@pytest.mark.parametrize("part", ["head", "embedding"])
def test_a_draft_model_that_transformers_has_pruned(part):
    """What its assisted decoding leaves behind for a draft of another tokenizer, where it samples."""
    model, kept = tiny_llama(1, eos_token_id=None), torch.arange(40)
    if part == "head":
        model.set_output_embeddings(_PruneReindexingLMHead(model.get_output_embeddings(), kept))
    else:
        model.set_input_embeddings(_MapInputEmbedding(model.get_input_embeddings(), kept))
    said = r"LlamaForCausalLM has a _\w+: transformers pruned it .* another tokenizer, and leaves it so; reload it"
    with pytest.raises(UnsupportedModelError, match=rf"^as a draft model: {said}"):
        specdec.generate(TARGET, IDS, drafter=model, max_new_tokens=4)
    with pytest.raises(UnsupportedModelError, match=rf"^{said}"):
        specdec.generate(model, IDS, max_new_tokens=4)
