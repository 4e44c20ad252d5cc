"""`specdec.infill`: greedy fillings equal one token a call, calls never exceed tokens, rows do not depend on their
batch, and what cannot be served is refused with a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_refused
from tiny import tiny_llama
from tiny_xlnet import tiny_xlnet
from transformers import AutoTokenizer, XLNetLMHeadModel
from typer.testing import CliRunner

import specdec
from specdec.cli.app import app
from specdec.drafters.any_subset import AnySubsetDrafter
from specdec.errors import ConfigError, DrafterError, InputError, NumericalError, UnsupportedModelError
from specdec.network.any_subset.model import XLNet

VOCAB, MASK = 11, 10
MODEL = tiny_xlnet(1, spread=0.7)
DRAFTERS = ["self", "ahead", "ngram", None]


@st.composite
def batches(draw, max_rows=3, max_length=12):
    """input_ids, mask, attention_mask of rows with different lengths, padding on either side, any places to fill."""
    rows = draw(st.integers(1, max_rows))
    columns = draw(st.integers(2, max_length))
    ids = torch.tensor([[draw(st.integers(0, MASK - 1)) for _ in range(columns)] for _ in range(rows)])
    present, mask = torch.zeros(rows, columns, dtype=torch.bool), torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        length = draw(st.integers(2, columns))
        start = draw(st.integers(0, columns - length))
        present[row, start : start + length] = True
        hidden = draw(st.sets(st.integers(start, start + length - 1), min_size=1, max_size=length - 1))
        mask[row, list(hidden)] = True
    return ids, mask, present.long()


def sequential(ids, mask, present):
    """One place after the other by transformers' forward, one row at a time."""
    filled = ids.clone()
    for row in range(len(ids)):
        there = present[row].bool().nonzero()[:, 0]
        hidden = mask[row][there]
        length = len(there)
        for place in hidden.nonzero()[:, 0].tolist():
            unknown = hidden & (torch.arange(length) >= place)
            # Content that was filled in sees what was there before it, as in the one-pass density.
            rank = torch.where(hidden, torch.arange(length), -1)
            bans = (rank[:, None] <= rank[None]) & (rank[None] >= 0) | unknown[None]
            mapping = torch.zeros(1, 1, length)
            mapping[0, 0, place] = 1
            with torch.no_grad():
                logits = MODEL(filled[row, there][None], perm_mask=bans[None].float(), target_mapping=mapping).logits
            filled[row, there[place]] = logits[0, 0, :MASK].argmax()
    return filled


@given(batches(), st.sampled_from(DRAFTERS), st.integers(1, 6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_greedy_filling_is_sequential_and_calls_never_exceed_tokens(batch, drafter, k, bonus_token):
    ids, mask, present = batch
    out = specdec.infill(
        MODEL, ids, mask, present, drafter=drafter, num_speculative_tokens=k, bonus_token=bonus_token,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(out.sequences, sequential(ids, mask, present))
    spent = out.speculation.num_target_calls + out.speculation.num_draft_calls
    assert spent <= int(mask.sum(1).max())
    assert out.speculation.num_new_tokens == int(mask.sum())


@given(batches(), st.sampled_from(DRAFTERS[:3]), st.integers(1, 6), st.booleans(), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_sampled_filling_keeps_the_bound_and_the_rows_apart(batch, drafter, k, bonus_token, seed):
    ids, mask, present = batch
    options = {
        "drafter": drafter, "num_speculative_tokens": k, "bonus_token": bonus_token, "do_sample": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    seeds = [seed + row for row in range(len(ids))]
    out = specdec.infill(MODEL, ids, mask, present, seed=seeds, **options)
    assert out.speculation.num_target_calls + out.speculation.num_draft_calls <= int(mask.sum(1).max())
    assert torch.equal(out.sequences.masked_fill(mask, 0), ids.masked_fill(mask, 0))
    for row in range(len(ids)):
        one = slice(row, row + 1)
        alone = specdec.infill(MODEL, ids[one], mask[one], present[one], seed=seeds[one], **options)
        assert torch.equal(alone.sequences[0], out.sequences[row])


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("drafter", ["self", "ngram"])
def test_one_token_a_draft(drafter, do_sample):
    """The paper's loop needs up to 2 N - 1 calls for N tokens at k = 1. Here such drafts, which gain nothing without
    the bonus token, are not made: N calls; with the bonus token there are at most N, by both drafters."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, MASK, (1, 20), generator=generator)
    mask = torch.rand(1, 20, generator=generator) < 0.8
    for bonus_token in (False, True):
        out = specdec.infill(
            MODEL, ids, mask, drafter=drafter, num_speculative_tokens=1, do_sample=do_sample,
            seed=1 if do_sample else None, return_dict_in_generate=True, bonus_token=bonus_token,
        )  # fmt: skip
        spent = out.speculation.num_target_calls + out.speculation.num_draft_calls
        assert spent <= int(mask.sum()) if bonus_token else spent == int(mask.sum())


def test_self_drafts_are_verified_in_pairs_of_calls():
    """Two calls yield two tokens at least, since the first token of a draft is certain."""
    ids, mask = torch.arange(9)[None] % 7, torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    for seed in range(20):
        speculation = specdec.infill(
            MODEL, ids, mask, num_speculative_tokens=3, do_sample=True, seed=seed, return_dict_in_generate=True
        ).speculation
        assert speculation.acceptance_by_position[0] in (1.0, pytest.approx(1 - 1 / speculation.num_spec_steps))
        assert 0 <= speculation.num_target_calls - speculation.num_draft_calls <= 1


def test_any_model_with_conditional_logits_is_served():
    """The protocol alone, through transformers' forward in every call, gives what the kept keys give."""
    ids, mask = torch.arange(24).view(2, 12) % 9, torch.rand(2, 12) < 0.7
    mask[:, 5], mask[:, 6] = False, True
    for options in (
        {},
        {"drafter": "ngram"},
        {"do_sample": True, "seed": 3},
        {"bonus_token": False},
        {"drafter": None},
    ):
        assert torch.equal(
            specdec.infill(XLNet(MODEL), ids, mask, **options), specdec.infill(MODEL, ids, mask, **options)
        )
    with pytest.raises(UnsupportedModelError, match="draft by 'self' or 'ngram'"):
        specdec.infill(XLNet(MODEL), ids, mask, drafter="ahead")


def test_masked_ids_are_not_read_and_the_mask_token_is_not_written():
    ids, mask = torch.arange(9)[None] % 7, torch.tensor([[0, 1, 0, 1, 1, 0, 0, 1, 0]]).bool()
    expected = specdec.infill(MODEL, ids, mask)
    for other in (MASK, -100, 3):
        assert torch.equal(specdec.infill(MODEL, ids.masked_fill(mask, other), mask), expected)
    assert not (expected == MASK).any()
    favourite = int(expected[0, 1])
    assert not (specdec.infill(MODEL, ids, mask, mask_token_id=favourite)[mask] == favourite).any()


def test_the_model_is_left_alone():
    before = torch.get_rng_state()
    ids, mask = torch.arange(9)[None] % 7, torch.tensor([[0, 1, 0, 1, 1, 0, 0, 1, 0]]).bool()
    specdec.infill(MODEL, ids, mask, do_sample=True, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(1)
    one = specdec.infill(MODEL, ids, mask, do_sample=True, generator=generator)
    assert torch.equal(one, specdec.infill(MODEL, ids, mask, do_sample=True, generator=generator.manual_seed(1)))


IDS, HIDE = torch.arange(8)[None] % 7, torch.tensor([[0, 1, 0, 1, 1, 0, 0, 1]]).bool()
LIMITED = tiny_xlnet(max_positions=6)
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
NAMELESS = tiny_xlnet(mask_token_id=None)


def test_refusals_name_the_remedy():
    for error, match, arguments in [
        (InputError, r"8 tokens, but the model has 6 positions; cut the text", {"model": LIMITED}),
        (InputError, r"row 0 has no mask.*set mask=True", {"mask": HIDE & False}),
        (InputError, r"masked all over.*at least one visible token", {"mask": HIDE | True}),
        (InputError, r"overlap in row 0: column 1 .*correct one", {"attention_mask": PADDED}),
        (InputError, r"attention_mask has a gap", {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])}),
        (InputError, r"mask is \[1, 3\]; it must be", {"mask": HIDE[:, :3]}),
        (InputError, r"mask is a list; it must be", {"mask": [1, 2]}),
        (InputError, r"mask holds values other than 0 and 1; pass True", {"mask": HIDE.long() * 7}),
        (InputError, r"the mask token at column 0.*input_ids == mask_token_id", {"input_ids": IDS * 0 + MASK}),
        (InputError, r"outside the target's vocabulary", {"input_ids": IDS + 20}),
        (InputError, r"must be two-dimensional", {"input_ids": IDS[0], "mask": HIDE[0]}),
        (UnsupportedModelError, r"no second stream.*XLNetLMHeadModel", {"model": tiny_llama()}),
        (ConfigError, r"pass mask_token_id=tokenizer.mask_token_id", {"model": NAMELESS}),
        (ConfigError, r"training mode.*model.eval", {"model": tiny_xlnet().train()}),
        (ConfigError, r"mask_token_id=11 is not a token of the vocabulary 0..10", {"mask_token_id": 11}),
        (DrafterError, r"drafter='prompt_lookup' cannot.*'self', 'ahead', 'ngram'", {"drafter": "prompt_lookup"}),
        (ConfigError, r"num_speculative_tokens=0 .* 1 to 32", {"num_speculative_tokens": 0}),
        (ConfigError, r"temperature.*do_sample=True", {"temperature": 0.5}),
        (ConfigError, r"temperature=0 is not positive", {"temperature": 0, "do_sample": True}),
        (ConfigError, r"top_p=1.5 is outside", {"top_p": 1.5, "do_sample": True}),
        (ConfigError, r"top_p='x' is not a finite number", {"top_p": "x", "do_sample": True}),
        (ConfigError, r"temperature='1' is not a finite number", {"temperature": "1", "do_sample": True}),
        (ConfigError, r"temperature=inf is not a finite number", {"temperature": float("inf"), "do_sample": True}),
        (DrafterError, r"drafter=a XLNetLMHeadModel cannot draft", {"drafter": NAMELESS}),
        (ConfigError, r"top_k=-1", {"top_k": -1, "do_sample": True}),
        (ConfigError, r"seed= has no effect", {"seed": 1}),
        (ConfigError, r"seed has 2 entries for 1 rows", {"seed": [1, 2], "do_sample": True}),
    ]:
        assert_refused(
            error, f"(?s){match}", specdec.infill, **{"model": MODEL, "input_ids": IDS, "mask": HIDE, **arguments}
        )


def test_nan_is_reported():
    broken = tiny_xlnet(1)
    with torch.no_grad():
        broken.lm_loss.bias[3] = float("nan")
    for options in ({}, {"do_sample": True, "seed": 1}):
        with pytest.raises(NumericalError, match="NaN in row 0"):
            specdec.infill(broken, IDS, HIDE, **options)


def test_an_any_subset_model_drafts_for_a_causal_target():
    """Greedy output is the target's own, sampled output does not depend on the batch; one call drafts all tokens."""
    target, drafter = tiny_llama(vocab_size=VOCAB - 1), AnySubsetDrafter(MODEL)
    ids = torch.tensor([[0, 0, 3, 4, 5], [3, 5, 6, 4, 7]])
    present = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    expected = specdec.generate(target, ids, present, **options)
    out = specdec.generate(
        target, ids, present, drafter=drafter, num_speculative_tokens=4, return_dict_in_generate=True, **options
    )
    assert torch.equal(out.sequences, expected)
    assert out.speculation.num_draft_calls <= out.speculation.num_target_calls
    by_model = specdec.generate(target, ids, present, drafter=MODEL, num_speculative_tokens=4, **options)
    assert torch.equal(by_model, expected)
    sampling = {"do_sample": True, "drafter": drafter, "num_speculative_tokens": 3, **options}
    together = specdec.generate(target, ids, present, seed=[4, 5], **sampling)
    alone = specdec.generate(target, ids[1:], seed=[5], **sampling)
    assert torch.equal(together[1:], alone)
    with pytest.raises(DrafterError, match=r"vocabulary has 11 tokens, the target's 61"):
        specdec.generate(tiny_llama(), ids, present, drafter=drafter, **options)
    with pytest.raises(DrafterError, match=r"exceed the any-subset model's 6 positions"):
        specdec.generate(target, ids, present, drafter=AnySubsetDrafter(LIMITED), **options)


def test_the_shipped_model_fills_code_in_fewer_calls_than_tokens():
    """Held-out code with 95 % hidden, against one token a call."""
    folder = Path(specdec.__file__).parent / "assets" / "infill_model"
    model, tokenizer = (
        XLNetLMHeadModel.from_pretrained(folder, dtype="float32").eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    prompts = json.loads((folder.parent / "demo_pair" / "prompts.json").read_text(encoding="utf-8"))[:2]
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"][:80]])
        mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.95
        plain, drafted = (
            specdec.infill(model, ids, mask, drafter=drafter, return_dict_in_generate=True)
            for drafter in (None, "self")
        )
        assert torch.equal(drafted.sequences, plain.sequences)
        calls = drafted.speculation.num_target_calls + drafted.speculation.num_draft_calls
        assert calls < plain.speculation.num_target_calls == int(mask.sum())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_line_serves_the_shipped_model(dtype):
    done = CliRunner().invoke(app, ["infill", "--text", "def f(<mask:3>):", "--dtype", dtype])
    assert done.exit_code == 0 and done.output.startswith("def f("), done.output


def test_parameters_of_two_dtypes_are_refused_with_the_remedy():
    """As transformers loads an XLNet in half precision."""
    model = tiny_xlnet(2)
    model.lm_loss.to(torch.bfloat16)
    ids, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]])
    with pytest.raises(ConfigError, match=r"bfloat16 and float32.*model\.to\(dtype\)"):
        specdec.infill(model, ids, mask)
    assert specdec.infill(model.to(torch.bfloat16), ids, mask).shape == ids.shape
