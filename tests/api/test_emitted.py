"""output_scores and output_logits equal transformers' own, prompt by prompt, and hold what tokens came from."""

from __future__ import annotations

import pytest
import torch
from tiny import left_pad, tiny_llama

import specdec
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.prompt_lookup import PromptLookup

PAD = 0
TARGET = tiny_llama(0)
OTHER = tiny_llama(1, num_hidden_layers=1)
PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 5, 6, 7], [9], [11, 12, 13, 11, 12, 13, 11, 12])]
BOTH = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": PAD}
PROCESSED = {"repetition_penalty": 1.7, "min_new_tokens": 5, "suppress_tokens": [8, 9]}
DRAFTERS = {"none": lambda: None, "draft_model": lambda: DraftModel(OTHER), "itself": lambda: DraftModel(TARGET),
            "prompt_lookup": lambda: PromptLookup()}  # fmt: skip


def alone(prompt, **options):
    return TARGET.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)


def check(out, expected, num_columns):
    longest = max(len(one.scores) for one in expected)
    for name in ("scores", "logits"):
        found = getattr(out, name)
        assert len(found) == longest and all(step.shape == (3, TARGET.config.vocab_size) for step in found)
        for row, one in enumerate(expected):
            theirs = getattr(one, name)
            for place, step in enumerate(found):
                assert step.dtype == torch.float32
                if place < len(theirs):
                    # Two ways of computing a float32 logit.
                    assert torch.allclose(step[row], theirs[place][0], rtol=1e-4, atol=1e-4)
                else:
                    assert step[row, PAD] == 0 and step[row, PAD + 1 :].isneginf().all()


@pytest.mark.parametrize("options", [{}, PROCESSED], ids=["plain", "processed"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_equal_to_transformers(drafter, options):
    first = alone(PROMPTS[0], max_new_tokens=14, eos_token_id=None, **options)[0, len(PROMPTS[0]) :].tolist()
    options = {"max_new_tokens": 14, "eos_token_id": [first[7], 2], **BOTH, **options}
    expected = [alone(prompt, **options) for prompt in PROMPTS]
    assert len({len(one.scores) for one in expected}) > 1, "the test needs rows that end at different places"
    ids, mask = left_pad(PROMPTS, PAD)
    out = specdec.generate(TARGET, ids, mask, drafter=DRAFTERS[drafter](), **options)
    check(out, expected, ids.shape[1])


def test_inside_transformers():
    options = {"max_new_tokens": 9, **BOTH, **PROCESSED}
    expected = [alone(prompt, **options) for prompt in PROMPTS]
    ids, mask = left_pad(PROMPTS, PAD)
    out = TARGET.generate(ids, attention_mask=mask, custom_generate=specdec.speculative(OTHER), **options)
    check(out, expected, ids.shape[1])


@pytest.mark.parametrize("verification", ["token", "block"])
def test_sampled_tokens_and_their_scores(verification):
    """Processed scores are -inf outside what the warpers leave, and every token was allowed; logits are raw."""
    ids, mask = left_pad(PROMPTS, PAD)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3, **BOTH}
    out = specdec.generate(TARGET, ids, mask, drafter=OTHER, verification=verification, eos_token_id=None, **options)
    new = out.sequences[:, ids.shape[1] :]
    for place, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        assert scores.isfinite().sum(1).le(5).all() and logits.isfinite().all()
        assert scores.gather(1, new[:, place : place + 1]).isfinite().all()
        kept = scores.isfinite()
        assert torch.allclose(scores[kept], logits[kept] / 0.7)


def test_log_probabilities_of_rows_that_ended():
    """transformers' own sum over whole rows needs no mask, since padding is certain."""
    ids, mask = left_pad(PROMPTS, PAD)
    first = alone(PROMPTS[0], max_new_tokens=14, eos_token_id=None)[0, len(PROMPTS[0]) :].tolist()
    out = specdec.generate(TARGET, ids, mask, drafter=OTHER, max_new_tokens=14, eos_token_id=first[7], **BOTH)
    sums = TARGET.compute_transition_scores(out.sequences, out.scores, normalize_logits=True).sum(1)
    for row, prompt in enumerate(PROMPTS):
        one = alone(prompt, max_new_tokens=14, eos_token_id=first[7], **BOTH)
        theirs = TARGET.compute_transition_scores(one.sequences, one.scores, normalize_logits=True).sum()
        assert sums[row] == pytest.approx(theirs.item(), abs=1e-3)


def test_what_a_stopping_criterion_takes_back():
    def stop(ids, scores, **_):
        return torch.full((len(ids),), ids.shape[1] >= 8)

    ids, mask = left_pad(PROMPTS[:2], PAD)
    out = specdec.generate(
        TARGET, ids, mask, drafter=DraftModel(TARGET), max_new_tokens=12, eos_token_id=None, stopping_criteria=[stop],
        **BOTH,
    )  # fmt: skip
    assert len(out.scores) == len(out.logits) == 7
    for step in out.scores[3:]:
        assert step[0, PAD] == 0 and step[0, PAD + 1 :].isneginf().all() and step[1].isfinite().all()


def test_nothing_is_kept_unless_asked(monkeypatch):
    monkeypatch.setattr("specdec.engine.hooks.Hooks.keep", None)
    out = specdec.generate(TARGET, PROMPTS[0][None], drafter=OTHER, max_new_tokens=4, return_dict_in_generate=True)
    assert out.scores is None and out.logits is None


def test_scores_without_a_dict_are_refused():
    with pytest.raises(specdec.ConfigError, match="output_scores=True has nowhere to go; pass return_dict_in_gen"):
        specdec.generate(TARGET, PROMPTS[0][None], max_new_tokens=4, output_scores=True)
