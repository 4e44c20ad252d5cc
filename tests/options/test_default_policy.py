"""Which policy a caller gets who names none."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama
from transformers import GenerationConfig

import specdec
from specdec import ConfigError, DrafterError
from specdec.options.speculation import default_policy, speculative_config
from specdec.policies.fixed import DEFAULT_FIXED, Fixed
from specdec.policies.heuristic import Heuristic

TARGET = tiny_llama(0)


@pytest.mark.parametrize("number", [None, 3])
def test_without_a_policy_the_length_is_fixed(number):
    config = speculative_config("prompt_lookup", number, target=TARGET)
    assert type(config.length_policy) is Fixed is type(default_policy(number, TARGET))
    assert config.num_speculative_tokens == (number or DEFAULT_FIXED)


def test_transformers_names_still_choose_one():
    schedule = GenerationConfig(num_assistant_tokens_schedule="heuristic")
    for policy in (None, "fixed"):
        config = speculative_config("prompt_lookup", None, schedule, length_policy=policy)
        assert isinstance(config.length_policy, Heuristic)
    with pytest.raises(ConfigError, match="each decide how far to draft"):
        speculative_config("prompt_lookup", None, schedule, length_policy="cost_model")


def test_plain_decoding_takes_no_policy():
    assert speculative_config(None, None).drafter.name == "none"
    with pytest.raises(DrafterError, match="'cost_model' without a drafter"):
        speculative_config(None, None, length_policy="cost_model")


def test_every_face_takes_none():
    prompt, options = torch.arange(3, 9), {"max_new_tokens": 6, "pad_token_id": 0}
    plain = specdec.generate(TARGET, prompt[None], **options)
    out = specdec.generate(TARGET, prompt[None], drafter="prompt_lookup", length_policy=None, **options)
    assert torch.equal(out, plain)
    loop = specdec.speculative("prompt_lookup", length_policy=None)
    assert torch.equal(TARGET.generate(prompt[None], do_sample=False, custom_generate=loop, **options), plain)
    (done,) = specdec.generate_many(TARGET, [prompt], drafter="prompt_lookup", length_policy=None, **options)
    assert done.token_ids == plain[0, len(prompt) :].tolist()


def test_another_default_is_a_change_in_one_place(monkeypatch):
    """All faces ask `default_policy`, with the caller's own number and the target."""
    from specdec.options import speculation
    from specdec.policies.cost_model import CostModel

    asked = []

    def other(num_tokens, target):
        asked.append((num_tokens, target))
        return CostModel() if num_tokens is None and target is not None else Fixed()

    monkeypatch.setattr(speculation, "default_policy", other)
    prompt, options = torch.arange(3, 9), {"max_new_tokens": 6, "pad_token_id": 0}
    specdec.generate(TARGET, prompt[None], drafter="prompt_lookup", **options)
    loop = specdec.speculative("prompt_lookup")
    TARGET.generate(prompt[None], do_sample=False, custom_generate=loop, **options)
    list(specdec.generate_many(TARGET, [prompt], drafter="prompt_lookup", **options))
    specdec.Engine(TARGET, "prompt_lookup").close()
    assert asked.count((None, TARGET)) == 4
    assert speculation.speculative_config("prompt_lookup", None, target=TARGET).num_speculative_tokens == 20
    assert type(speculation.speculative_config("prompt_lookup", 3, target=TARGET).length_policy) is Fixed
