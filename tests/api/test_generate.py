"""The face: tokens equal transformers' own greedy, one prompt at a time, whatever the batch and the drafter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, continuations, left_pad, plain_greedy, tiny_llama
from transformers import TextStreamer

import specdec
from specdec.draft import NO_TOKEN, Draft
from specdec.drafter import Drafter
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.synthetic import Synthetic

EOS, PAD = 2, 0


class Hostile(Drafter):
    """Drafts what the target just refused to say: every token is wrong."""

    name = "hostile"
    shares_slots = True

    def __init__(self, model):
        self.model = model

    def propose(self, rows, max_tokens):
        draft = []
        for slot in range(len(rows)):
            ids = rows.token_ids[slot : slot + 1, : rows.host_lengths[slot]]
            worst = self.model(ids, use_cache=False).logits[0, -1].argmin()
            draft.append(worst.repeat(max_tokens))
        return Draft(torch.stack(draft))


class Ragged(Drafter):
    """Drafts a random number of true tokens per row, then nothing or a wrong one."""

    name = "ragged"
    shares_slots = True

    def __init__(self, truth, seed):
        self.truth, self.generator = truth, torch.Generator().manual_seed(seed)

    def propose(self, rows, max_tokens):
        draft = torch.full((len(rows), max_tokens), NO_TOKEN)
        for slot, row in enumerate(rows.row_ids):
            done = int(rows.num_new_tokens[slot])
            count = int(torch.randint(0, max_tokens + 1, (), generator=self.generator))
            future = torch.tensor(self.truth[row][done : done + count], dtype=torch.long)
            draft[slot, : len(future)] = future
            if len(future) < max_tokens and torch.rand((), generator=self.generator) < 0.5:
                draft[slot, len(future)] = int(torch.randint(0, VOCAB, (), generator=self.generator))
        return Draft(draft)


TARGET = tiny_llama(0)
OTHER = tiny_llama(1, num_hidden_layers=1)


def some_prompts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def drafters(expected):
    truth = [torch.tensor(tokens) for tokens in expected]
    return {
        "none": None,
        "draft_model": OTHER,
        "itself": DraftModel(TARGET),
        "prompt_lookup": PromptLookup(),
        "hostile": Hostile(TARGET),
        "synthetic": Synthetic(0.6, truth),
        "ragged": Ragged(expected, seed=1),
    }


def check_equal(prompts, drafter_name, k, **options):
    ids, mask = left_pad(prompts, PAD)
    expected = [plain_greedy(TARGET, prompt, **options) for prompt in prompts]
    out = specdec.generate(
        TARGET, ids, attention_mask=mask, drafter=drafters(expected)[drafter_name],
        num_speculative_tokens=None if drafter_name == "none" else k, return_dict_in_generate=True, **options,
    )  # fmt: skip
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    assert out.sequences.shape[1] == ids.shape[1] + max(map(len, expected))
    pad = options.get("pad_token_id", PAD)
    assert continuations(out.sequences, ids.shape[1], expected, pad) == expected
    return out


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("name", ["draft_model", "itself", "prompt_lookup", "hostile", "synthetic", "ragged"])
def test_equal_for_every_drafter_and_k(name, k):
    check_equal(some_prompts(5, 1, 9, 3), name, k, max_new_tokens=24)


token = st.integers(0, VOCAB - 1)


@given(
    prompts=st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=6),
    name=st.sampled_from(["none", "draft_model", "itself", "prompt_lookup", "hostile", "synthetic", "ragged"]),
    k=st.integers(1, 8),
    max_new_tokens=st.integers(1, 20),
    eos=st.lists(token, max_size=6, unique=True),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_equal_for_ragged_batches(prompts, name, k, max_new_tokens, eos, data):
    """Prompts of any length with any ids in them (pad and end of sequence included), rows that end anywhere."""
    options = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": data.draw(st.integers(0, max_new_tokens)),
        "eos_token_id": eos or None,
        "pad_token_id": PAD,
    }
    check_equal([torch.tensor(ids) for ids in prompts], name, k, **options)


def test_rows_end_at_different_steps():
    prompts = some_prompts(4, 4, 4, 4, 4, 4, seed=3)
    longest = [plain_greedy(TARGET, prompt, max_new_tokens=20, eos_token_id=None) for prompt in prompts]
    eos = [tokens[3 * row + 2] for row, tokens in enumerate(longest)]
    lengths = {len(plain_greedy(TARGET, prompt, max_new_tokens=20, eos_token_id=eos)) for prompt in prompts}
    assert len(lengths) > 2, "the test needs rows of different lengths"
    out = check_equal(prompts, "draft_model", 4, max_new_tokens=20, eos_token_id=eos, pad_token_id=PAD)
    assert out.speculation.num_new_tokens == sum(
        len(plain_greedy(TARGET, prompt, max_new_tokens=20, eos_token_id=eos)) for prompt in prompts
    )


def test_finished_rows_cost_nothing():
    """Row-steps stop with the row: the forwards see fewer rows."""
    widths = []
    prompts = some_prompts(4, 4, 4, seed=3)
    longest = [plain_greedy(TARGET, prompt, max_new_tokens=16, eos_token_id=None) for prompt in prompts]
    ids, mask = left_pad(prompts)
    specdec.generate(
        TARGET,
        ids,
        mask,
        max_new_tokens=16,
        eos_token_id=longest[0][1],
        on_commit=lambda r: widths.append(len(r.row_ids)),
    )
    assert widths[0] == 3 and widths[-1] < 3 and widths == sorted(widths, reverse=True)


def test_a_perfect_draft_is_accepted_whole_with_the_bonus():
    out = check_equal(some_prompts(6, 3), "itself", 4, max_new_tokens=21, eos_token_id=None)
    statistics = out.speculation
    assert statistics.draft_acceptance_rate == 1.0
    assert statistics.mean_acceptance_length == 5.0
    assert statistics.num_target_calls == 4  # 1 token from prefill, then 4 steps of 5
    assert statistics.acceptance_histogram == [0, 0, 0, 0, 8]


def test_a_hostile_draft_is_rejected_whole():
    out = check_equal(some_prompts(6, 3), "hostile", 4, max_new_tokens=12, eos_token_id=None)
    assert out.speculation.num_accepted_draft_tokens == 0
    assert out.speculation.num_target_calls == 11
    assert out.speculation.mean_acceptance_length == 1.0


def test_statistics_are_those_of_the_committed_tokens():
    reports = []
    prompts = some_prompts(5, 8, 2)
    expected = [plain_greedy(TARGET, prompt, max_new_tokens=15) for prompt in prompts]
    ids, mask = left_pad(prompts)
    out = specdec.generate(
        TARGET, ids, mask, drafter=Ragged(expected, 0), num_speculative_tokens=3, max_new_tokens=15,
        return_dict_in_generate=True, on_commit=reports.append,
    )  # fmt: skip
    steps = reports[1:]
    s = out.speculation
    assert s.num_target_calls == len(steps)
    assert s.num_spec_steps == sum(len(r.row_ids) for r in steps)
    assert s.num_new_tokens == sum(int(r.num_committed.sum()) for r in reports) == sum(map(len, expected))
    assert s.num_draft_tokens == sum(int(r.num_drafted.sum()) for r in steps)
    assert s.num_accepted_draft_tokens == sum(int(r.num_accepted.sum()) for r in steps)
    assert sum(s.acceptance_histogram) == s.num_spec_steps
    assert s.acceptance_by_position[0] >= s.acceptance_by_position[1]
    for position in range(3):
        tried = sum(int(((r.num_drafted > position) & (r.num_accepted >= position)).sum()) for r in steps)
        hits = sum(int((r.num_accepted > position).sum()) for r in steps)
        assert s.conditional_acceptance_by_position[position] == pytest.approx(hits / max(tried, 1))


def test_first_token_can_end_the_row():
    prompts = some_prompts(5, 7)
    first = [plain_greedy(TARGET, prompt, max_new_tokens=1)[0] for prompt in prompts]
    check_equal(prompts, "draft_model", 3, max_new_tokens=8, eos_token_id=first, pad_token_id=PAD)


def test_default_length_is_twenty_new_tokens():
    (prompt,) = some_prompts(6)
    model = tiny_llama(0)
    model.generation_config.eos_token_id = None
    assert specdec.generate(model, prompt[None]).shape[1] == model.generate(prompt[None]).shape[1] == 26


def test_max_length_counts_the_padded_prompt():
    prompts = some_prompts(6, 3)
    ids, mask = left_pad(prompts)
    expected = TARGET.generate(ids, attention_mask=mask, max_length=14, eos_token_id=None, pad_token_id=PAD)
    out = specdec.generate(TARGET, ids, mask, max_length=14, eos_token_id=None, pad_token_id=PAD, drafter=OTHER)
    assert torch.equal(out, expected)


def test_transformers_names_for_drafters():
    (prompt,) = some_prompts(6)
    plain = TARGET.generate(prompt[None], max_new_tokens=10)
    for options in ({"assistant_model": OTHER}, {"prompt_lookup_num_tokens": 4}, {"drafter": "prompt_lookup"}):
        assert torch.equal(specdec.generate(TARGET, prompt[None], max_new_tokens=10, **options), plain)


def test_custom_generate_inside_transformers():
    prompts = some_prompts(6, 3, 8)
    ids, mask = left_pad(prompts)
    options = {"max_new_tokens": 12, "min_new_tokens": 3, "eos_token_id": [2, 7], "pad_token_id": PAD}
    expected = [plain_greedy(TARGET, prompt, **options) for prompt in prompts]
    loop = specdec.speculative(OTHER, num_speculative_tokens=4)
    out = TARGET.generate(ids, attention_mask=mask, custom_generate=loop, return_dict_in_generate=True, **options)
    assert continuations(out.sequences, ids.shape[1], expected, PAD) == expected
    assert out.speculation.num_draft_calls > 0


def test_custom_generate_takes_an_all_ones_mask_and_pads_in_the_prompt():
    prompt = torch.tensor([5, PAD, EOS, 9, PAD, 4])
    expected = plain_greedy(TARGET, prompt, max_new_tokens=9)
    loop = specdec.speculative("prompt_lookup")
    out = TARGET.generate(
        prompt[None], attention_mask=torch.ones(1, 6, dtype=torch.long), custom_generate=loop, max_new_tokens=9
    )
    assert out[0, 6:].tolist() == expected


def test_custom_generate_refuses_what_it_does_not_serve():
    (prompt,) = some_prompts(6)
    loop = specdec.speculative(OTHER)
    for options in ({"prefill_chunk_size": 4}, {"guidance_scale": 1.5}, {"num_beams": 2}, {"output_scores": True}):
        with pytest.raises(specdec.SpecDecError, match=next(iter(options))):
            TARGET.generate(prompt[None], custom_generate=loop, max_new_tokens=4, **options)


class Words:
    """The tokenizer of a streamer: ids as text."""

    def decode(self, ids, **_):
        return "".join(f"{int(i)} " for i in ids)


def test_streamer_gets_prompt_tokens_and_end(capsys):
    (prompt,) = some_prompts(6)
    plain = TARGET.generate(prompt[None], max_new_tokens=9)[0, 6:].tolist()
    specdec.generate(
        TARGET, prompt[None], drafter=OTHER, max_new_tokens=9, streamer=TextStreamer(Words(), skip_prompt=True)
    )
    assert capsys.readouterr().out == "".join(f"{token} " for token in plain) + "\n"
    loop = specdec.speculative(OTHER, streamer=TextStreamer(Words(), skip_prompt=True))
    TARGET.generate(prompt[None], custom_generate=loop, max_new_tokens=9)
    assert capsys.readouterr().out == "".join(f"{token} " for token in plain) + "\n"


def test_stopping_criteria_are_asked_for_every_token():
    prompts = some_prompts(5, 8, 2)
    expected = [plain_greedy(TARGET, prompt, max_new_tokens=18, eos_token_id=None) for prompt in prompts]
    stop = [tokens[4 + row] for row, tokens in enumerate(expected)]

    def ends_with_stop_token(ids, scores, **_):
        return torch.isin(ids[:, -1], torch.tensor(stop))

    options = {
        "max_new_tokens": 18,
        "eos_token_id": None,
        "pad_token_id": PAD,
        "stopping_criteria": [ends_with_stop_token],
    }
    expected = [plain_greedy(TARGET, prompt, **options) for prompt in prompts]
    assert {len(tokens) for tokens in expected} != {18}, "the test needs rows that stop"
    ids, mask = left_pad(prompts)
    for drafter in (None, DraftModel(TARGET), PromptLookup()):
        out = specdec.generate(TARGET, ids, mask, drafter=drafter, **options)
        assert continuations(out, ids.shape[1], expected, PAD) == expected


def test_a_drafter_can_be_used_again():
    drafter = DraftModel(OTHER)
    for lengths in ((5, 3), (7,), (2, 9, 4)):
        prompts = some_prompts(*lengths)
        ids, mask = left_pad(prompts)
        expected = [plain_greedy(TARGET, prompt, max_new_tokens=10, eos_token_id=None) for prompt in prompts]
        out = specdec.generate(TARGET, ids, mask, drafter=drafter, max_new_tokens=10, eos_token_id=None)
        assert out[:, ids.shape[1] :].tolist() == expected


def test_long_prompts_are_prefilled_in_chunks(monkeypatch):
    monkeypatch.setitem(specdec.network.base.PREFILL_TOKENS, "cpu", 8)
    check_equal(some_prompts(11, 4, 5, 1, 8), "draft_model", 3, max_new_tokens=12)


def test_outputs_are_ordinary_tensors():
    """Not inference tensors: users train on generated text."""
    (prompt,) = some_prompts(6)
    out = specdec.generate(TARGET, prompt[None], drafter=OTHER, max_new_tokens=4)
    assert not out.is_inference() and out.dtype == torch.long
    TARGET.get_input_embeddings()(out).sum().backward()
    TARGET.zero_grad()


def test_nan_logits_name_the_row():
    model = tiny_llama(0)
    prompts = some_prompts(6, 3, 8)
    ids, mask = left_pad(prompts)
    token = int(prompts[1][0])
    for prompt in (prompts[0], prompts[2]):
        prompt[prompt == token] = 3 if token != 3 else 4
    ids, mask = left_pad(prompts)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with pytest.raises(specdec.NumericalError, match="row 1"):
        specdec.generate(model, ids, mask, max_new_tokens=4)


def test_vocabularies_padded_differently_are_served():
    draft = tiny_llama(1, vocab_size=VOCAB + 3)
    smaller = tiny_llama(2, vocab_size=VOCAB - 3)
    prompts = [torch.tensor([5, VOCAB - 1, 7]), torch.tensor([VOCAB - 2, 3])]
    ids, mask = left_pad(prompts)
    expected = [plain_greedy(TARGET, prompt, max_new_tokens=12, eos_token_id=None) for prompt in prompts]
    for drafter in (draft, smaller):
        out = specdec.generate(TARGET, ids, mask, drafter=drafter, max_new_tokens=12, eos_token_id=None)
        assert out[:, ids.shape[1] :].tolist() == expected


def test_stock_modules_give_the_same(monkeypatch):
    monkeypatch.setattr("specdec.network.choose.can_fuse", lambda model: False)
    check_equal(some_prompts(6, 3, 8, 1), "draft_model", 4, max_new_tokens=14)
    assert TARGET.config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", ["ragged", "repad"])
def test_a_target_whose_layers_lie_on_two_gpus(layout):
    """Each layer's keys and values lie where the layer does."""
    from accelerate import dispatch_model

    model, prompts = tiny_llama(), [torch.tensor(row) for row in ([1, 5, 7], [1, 9, 4, 3, 8, 6], [1, 3])]
    expected = [plain_greedy(model, prompt, max_new_tokens=12) for prompt in prompts]
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    split = dispatch_model(model, {**places, "model.norm": 1, "lm_head": 1})
    ids, mask = (x.to("cuda:0") for x in left_pad(prompts))
    out = specdec.generate(
        split, ids, mask, drafter="prompt_lookup", num_speculative_tokens=3, max_new_tokens=12, pad_token_id=PAD,
        layout=layout,
    )  # fmt: skip
    assert continuations(out.cpu(), ids.shape[1], expected, PAD) == expected


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("exact", [True, False])
def test_models_on_another_gpu_than_the_current_one(exact):
    model, draft, prompts = tiny_llama().to("cuda:1"), tiny_llama(1).to("cuda:1"), some_prompts(3, 8, 1)
    expected = [plain_greedy(model, prompt.to("cuda:1"), max_new_tokens=24) for prompt in prompts]
    ids, mask = (x.to("cuda:1") for x in left_pad(prompts))
    assert torch.cuda.current_device() == 0
    for drafter in (draft, "prompt_lookup"):
        for _ in range(2):  # captured, then replayed
            out = specdec.generate(
                model, ids, mask, drafter=drafter, num_speculative_tokens=3, max_new_tokens=24, pad_token_id=PAD,
                exact=exact,
            )  # fmt: skip
            assert continuations(out.cpu(), ids.shape[1], expected, PAD) == expected
    assert torch.cuda.current_device() == 0


def test_one_row_that_begins_with_the_pad_token_needs_a_mask():
    """transformers would infer one, so the same call would mean another prompt. A token that also ends is text."""
    ids = torch.tensor([[PAD, PAD, 5, 6]])
    options = {"pad_token_id": PAD, "max_new_tokens": 3}
    with pytest.raises(specdec.InputError, match="no attention_mask to tell padding from prompt"):
        specdec.generate(TARGET, ids, eos_token_id=2, **options)
    assert specdec.generate(TARGET, ids, torch.ones_like(ids), eos_token_id=2, **options).shape[1] > 4
    assert specdec.generate(TARGET, ids, eos_token_id=PAD, **options).shape[1] > 4
