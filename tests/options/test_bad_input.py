"""What cannot be served is refused before any token is generated, naming the value, the limit and the remedy."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCAB, tiny_llama
from transformers import GenerationConfig

import specdec
from specdec import ConfigError, DrafterError, InputError, SpecDecError, UnsupportedModelError
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.synthetic import Synthetic
from specdec.options.generation import NEUTRAL, SERVED, WITHOUT_EFFECT

TARGET = tiny_llama(0)
IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])


@pytest.fixture(autouse=True)
def no_forward(monkeypatch):
    """A refusal that comes after the model has run is too late."""

    def run(self, *args, **kwargs):
        raise AssertionError("the model ran before the error")

    monkeypatch.setattr("specdec.network.base.Network.prefill", run)
    monkeypatch.setattr("specdec.network.probe.probe", run)


def refused(kind, *parts, ids=IDS, model=TARGET, **options):
    """The call must fail with an error of this kind that holds all parts; a failure of the test names the options."""
    try:
        specdec.generate(model, ids, **{"max_new_tokens": 4, **options})
    except kind as error:
        caught = error
    else:
        pytest.fail(f"ids={ids}, {options} was not refused")

    assert isinstance(caught, SpecDecError) and isinstance(caught, ValueError)
    for part in parts:
        assert part in str(caught), f"{part!r} not in {caught}"


def test_input_ids():
    for ids, part in [
        (torch.tensor([5, 6]), "two-dimensional"),
        (IDS[None], "two-dimensional"),
        (IDS.float(), "torch.float32"),
        ([[5, 6]], "list"),
        (torch.empty(1, 0, dtype=torch.long), "empty prompt"),
        (torch.empty(0, 4, dtype=torch.long), "empty prompt"),
        (torch.tensor([[5, VOCAB]]), f"{VOCAB}, outside"),
        (torch.tensor([[5, -1]]), "-1, outside"),
    ]:
        refused(InputError, part, ids=ids)


def test_attention_mask():
    for mask, part in [
        (torch.ones(2, 3), "[2, 4]"),
        (torch.ones(4), "[2, 4]"),
        (torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "row 1 is all padding"),
        (torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), "padded on the right"),
        (torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]), "row 1's attention_mask has a gap"),
        (torch.tensor([[1, 1, 1, 2], [1, 1, 1, 1]]), "other than 0 and 1"),
    ]:
        refused(InputError, part, attention_mask=mask)


def test_padding_without_a_mask():
    refused(InputError, "row 1", "attention_mask", ids=torch.tensor([[5, 6], [0, 6]]), pad_token_id=0)


def test_max_new_tokens():
    for value in [0, -3, 2.5, True]:
        refused(ConfigError, f"max_new_tokens={value}", "at least 1", max_new_tokens=value)


def test_max_length_within_the_prompt():
    refused(ConfigError, "max_length=4", max_new_tokens=None, max_length=4)


def test_min_new_tokens():
    refused(ConfigError, "min_new_tokens=9", "max_new_tokens=4", min_new_tokens=9)
    refused(ConfigError, "min_new_tokens=-1", min_new_tokens=-1)


def test_num_speculative_tokens():
    for value in [0, -1, 33, 2.0, "5", True]:
        refused(
            ConfigError,
            f"num_speculative_tokens={value!r}",
            "32",
            drafter="prompt_lookup",
            num_speculative_tokens=value,
        )
        with pytest.raises(ConfigError):
            specdec.speculative("prompt_lookup", num_speculative_tokens=value)


def test_positions():
    refused(ConfigError, "600", "512 positions", "max_new_tokens", max_new_tokens=596)


def test_unknown_keyword():
    refused(ConfigError, "max_tokens", "GenerationConfig", max_tokens=4)
    refused(ConfigError, "pixel_values", pixel_values=torch.zeros(1))


def test_unsupported_modes():
    for options, part in [
        ({"seed": 1}, "do_sample=True"),
        ({"generator": torch.Generator()}, "do_sample=True"),
        ({"verification": "block"}, "do_sample=True"),
        ({"do_sample": True, "verification": "tree"}, "'token' or 'block'"),
        ({"do_sample": True, "seed": 1, "generator": torch.Generator()}, "pass one of them"),
        ({"do_sample": True, "seed": [1, 2, 3]}, "3 entries for 2 rows"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0"),
        ({"do_sample": True, "temperature": -1.0}, "temperature=-1.0"),
        ({"num_beams": 4}, "num_beams=1"),
        ({"num_return_sequences": 2}, "num_return_sequences=1"),
        ({"guidance_scale": 1.2}, "guidance_scale=1.2"),
        ({"token_healing": True}, "token_healing=True"),
        ({"do_sample": True, "num_return_sequences": 0}, "num_return_sequences=0"),
        ({"num_return_sequences": -2}, "num_return_sequences=-2"),
        ({"max_time": "x"}, "max_time='x'"),
        ({"do_sample": True, "temperature": "hot"}, "temperature='hot'"),
        ({"eos_token_id": "x"}, "eos_token_id='x'"),
        ({"pad_token_id": 1.5}, "pad_token_id=1.5"),
        ({"min_new_tokens": 1.5}, "min_new_tokens=1.5"),
        ({"stop_strings": [""]}, "stop_strings=['']"),
        ({"repetition_penalty": -1.0}, "logits processor"),
        ({"do_sample": True, "top_k": -1}, "logits processor"),
        ({"do_sample": True, "seed": "1234"}, "seed='1234'"),
        ({"do_sample": True, "seed": [1.5, 2.5]}, "one per row"),
        ({"do_sample": True, "generator": 5}, "torch.Generator"),
        ({"generation_config": {}}, "GenerationConfig"),
        ({"validate": 1}, "validate"),
        ({"output_scores": True}, "output_scores=True"),
        ({"stop_strings": ["x"]}, "tokenizer="),
        ({"max_time": -1.0}, "max_time=-1.0"),
    ]:
        refused(ConfigError, part, **options)


def test_options_from_the_checkpoint_are_refused_too():
    model = tiny_llama(0)
    model.generation_config.guidance_scale = 1.1
    refused(ConfigError, "guidance_scale=1.1", "from the generation config", model=model)
    refused(ConfigError, "num_beams=3", generation_config=GenerationConfig(num_beams=3))


def test_every_generation_option_has_one_place():
    """A field that transformers adds must be put into a table before it can pass."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    tables = [SERVED, WITHOUT_EFFECT, frozenset(NEUTRAL)]
    assert fields <= frozenset().union(*tables), fields - frozenset().union(*tables)
    assert sum(map(len, tables)) == len(frozenset().union(*tables))


def test_no_option_is_silently_ignored():
    for name in sorted(NEUTRAL):
        value = {"num_assistant_tokens_schedule": "heuristic", "cache_implementation": "static"}.get(name, 7)
        refused(ConfigError, name, **{name: value})


def test_a_drafter_that_is_none():
    refused(DrafterError, "int", "prompt_lookup", drafter=3)
    refused(DrafterError, "Linear", drafter=torch.nn.Linear(2, 2))
    refused(DrafterError, "the class PromptLookup", drafter=PromptLookup)


def test_unknown_drafter_name_lists_the_names():
    refused(
        DrafterError,
        "'medusa'",
        "draft_model, prompt_lookup, suffix, any_subset, look_ahead, synthetic",
        drafter="medusa",
    )


def test_drafter_name_that_needs_arguments():
    refused(DrafterError, "draft_model:folder=PATH", "draft_model.DraftModel(...)", drafter="draft_model")


def test_two_drafters():
    refused(DrafterError, "drafter and assistant_model", drafter="prompt_lookup", assistant_model=TARGET)
    refused(ConfigError, "contradict", prompt_lookup_num_tokens=3, num_speculative_tokens=4)


def test_number_of_drafts_without_a_drafter():
    refused(DrafterError, "num_speculative_tokens=4 without a drafter", num_speculative_tokens=4)


def test_vocabularies_that_differ():
    refused(DrafterError, "122", str(VOCAB), "tokenizer", drafter=tiny_llama(1, vocab_size=2 * VOCAB))
    refused(DrafterError, "vocab_size=99", drafter=DraftModel(TARGET, vocab_size=99))


def test_drafter_on_another_device():
    refused(UnsupportedModelError, "draft model", "not in memory", drafter=tiny_llama(1).to("meta"))
    drafter = DraftModel(tiny_llama(1).to("meta"))
    with pytest.raises(DrafterError, match="the draft model is on meta, the target on cpu; move them to one device"):
        drafter.check(TARGET, 8)


def test_synthetic_drafter():
    refused(DrafterError, "continuations", drafter=Synthetic(0.5, []))
    with pytest.raises(ConfigError, match=r"acceptance_rate=1\.5"):
        Synthetic(1.5, [IDS[0]])


def test_a_model_that_is_none():
    refused(UnsupportedModelError, "str", model="gpt2")
    refused(UnsupportedModelError, "LlamaModel", model=TARGET.model)


def test_n_gram_sizes():
    with pytest.raises(ConfigError, match=r"0\.\.3"):
        PromptLookup(max_ngram_size=3, min_ngram_size=0)
    refused(ConfigError, "max_matching_ngram_size=2", drafter=TARGET, max_matching_ngram_size=2)


def test_tokens_outside_the_vocabulary():
    for options in [
        {"forced_eos_token_id": 999},
        {"forced_eos_token_id": [2, 999]},
        {"forced_bos_token_id": 999},
        {"bad_words_ids": [[5, 999]]},
        {"sequence_bias": {(999,): 1.0}},
    ]:
        refused(ConfigError, f"{next(iter(options))} names token 999", f"0..{VOCAB - 1}", **options)


def test_a_token_that_is_forced_and_suppressed():
    for name in ["forced_bos_token_id", "forced_eos_token_id"]:
        refused(
            ConfigError, f"{name}=7", "suppress_tokens=[7, 8]", ids=IDS[:1, :1], suppress_tokens=[7, 8], **{name: 7}
        )


def test_a_length_penalty_without_an_end():
    model = tiny_llama(0, eos_token_id=None)
    refused(ConfigError, "pass eos_token_id=", model=model, exponential_decay_length_penalty=(2, 1.1))


def test_what_cannot_be_called():
    for options, part in [
        ({"logits_processor": [1]}, "logits_processor=[1]; pass a list of callables"),
        ({"logits_processor": print}, "pass a list of callables"),
        ({"stopping_criteria": [1]}, "stopping_criteria=[1]; pass a list of callables"),
        ({"on_commit": 3}, "on_commit=3 cannot be called"),
        ({"prefix_allowed_tokens_fn": 3}, "prefix_allowed_tokens_fn=3 cannot be called"),
        ({"tokenizer": 3, "stop_strings": "a"}, "tokenizer is a int"),
    ]:
        refused(ConfigError, part, **options)
        with pytest.raises(ConfigError) as caught:
            specdec.generate_many(TARGET, [[5, 6]], max_new_tokens=4, **options)
        assert part in str(caught.value)
