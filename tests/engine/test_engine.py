"""The engine: requests of different options in one batch, each as if it were alone; failures end their own row."""

from __future__ import annotations

from functools import cache
from itertools import cycle
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, plain_greedy, tiny_llama
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GenerationConfig, PreTrainedTokenizerFast

import specdec
from specdec import Engine, Request
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.suffix import Suffix
from specdec.engine import schedule

TARGET, OTHER, CLOSE = map(tiny_llama, (0, 1, 0))
with torch.no_grad():
    for parameter in CLOSE.parameters():  # right now and then
        parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
DRAFTERS = {
    "none": lambda: None,
    "lookup": PromptLookup,
    "other": lambda: DraftModel(OTHER),
    "close": lambda: DraftModel(CLOSE),
    # Samples repeat with the same memory alone, so rows that end do not enter it.
    "suffix": lambda: Suffix(learn=False),
}


LETTERS = [*(chr(0x100 + token) for token in range(VOCAB - 6)), *"abcdef"]


@cache
def letters():
    """A tokenizer of one letter per token."""
    tokenizer = Tokenizer(WordLevel({letter: token for token, letter in enumerate(LETTERS)}, unk_token=LETTERS[0]))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def decode(engine, *requests):
    """Each request's tokens and finish reason, in order."""
    with engine:
        ids = [engine.add_request(request) for request in requests]
        found = {index: [[], None] for index in ids}
        while not engine.is_finished:
            for event in engine.step():
                found[event.id][0] += event.token_ids
                if event.finish_reason is not None:
                    assert found[event.id][1] is None, "one last event"
                    found[event.id][1] = event.finish_reason
    return [tuple(found[index]) for index in ids]


options = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 14)},
    optional={
        "eos_token_id": st.sampled_from([None, 2, [3, 9], [5, 11, 17, 23]]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "no_repeat_ngram_size": st.sampled_from([0, 2]),
        "suppress_tokens": st.sampled_from([None, [4, 5]]),
        "min_new_tokens": st.sampled_from([None, 1]),
        "stop_strings": st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=2).map(
            lambda ids: ["".join(LETTERS[token] for token in ids)]
        ),
        "num_speculative_tokens": st.integers(0, 3),
    },
)
sampling = st.fixed_dictionaries(
    {"do_sample": st.just(True), "seed": st.integers(0, 99), "stream": st.integers(0, 3)},
    optional={
        "temperature": st.sampled_from([0.5, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 7]),
        "top_p": st.sampled_from([0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.01, 0.1]),
    },
)
requests = st.lists(
    st.tuples(
        st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=9),
        options,
        st.one_of(st.just({}), sampling),
    ),
    min_size=1,
    max_size=6,
)


def check_mixed(drafter, rows, max_rows, kv_tokens, verification, order):
    def engine(count, budget):
        return Engine(
            TARGET,
            DRAFTERS[drafter](),
            **({} if drafter == "none" else {"num_speculative_tokens": 3}),
            max_rows=count,
            kv_tokens=budget,
            verification=verification,
            order=order,
            tokenizer=letters(),
        )

    def request(ids, own, samples):
        own = {name: value for name, value in own.items() if drafter != "none" or name != "num_speculative_tokens"}
        if (own.get("min_new_tokens") or 0) > own["max_new_tokens"]:
            own["min_new_tokens"] = None
        return Request(ids, **own, **samples)

    with mock.patch.object(schedule, "ROUNDING", 4):  # so that small rows outgrow their slots
        together = decode(engine(max_rows, kv_tokens), *(request(*row) for row in rows))
    for row, found in zip(rows, together, strict=True):
        [alone] = decode(engine(1, None), request(*row))
        assert found == alone, row
        ids, own, samples = row
        if not samples and "stop_strings" not in own:
            ours = {name: value for name, value in own.items() if name != "num_speculative_tokens"}
            assert found[0] == plain_greedy(TARGET, torch.tensor(ids), **ours), row


cases = dict(
    drafter=st.sampled_from(sorted(DRAFTERS)),
    rows=requests,
    max_rows=st.integers(1, 5),
    kv_tokens=st.sampled_from([None, 64]),
    verification=st.sampled_from(["token", "block"]),
    order=st.sampled_from(["arrival", "longest_first"]),
)


@settings(max_examples=25, deadline=None)
@given(**cases)
def test_mixed_batches_equal_each_row_alone(drafter, rows, max_rows, kv_tokens, verification, order):
    """Greedy and sampled rows, truncations, penalties, stop strings, ends, caps on drafts, both orders, preemption."""
    check_mixed(drafter, rows, max_rows, kv_tokens, verification, order)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(**cases)
def test_500_mixed_batches_equal_each_row_alone(drafter, rows, max_rows, kv_tokens, verification, order):
    check_mixed(drafter, rows, max_rows, kv_tokens, verification, order)


def test_mixed_rows_are_preempted_and_resumed(monkeypatch):
    monkeypatch.setattr(schedule, "ROUNDING", 4)
    rows = [
        ([5, 6, 7], {"eos_token_id": None}, {}),
        ([8, 9], {"eos_token_id": None}, {"do_sample": True, "seed": 1, "temperature": 0.7, "top_k": 5}),
        ([3, 4, 5, 6, 7], {"eos_token_id": None, "repetition_penalty": 1.3}, {}),
        ([11], {"eos_token_id": None}, {"do_sample": True, "seed": 1, "stream": 3, "top_p": 0.8}),
    ]
    rows = [(ids, {"max_new_tokens": 30, **own}, samples) for ids, own, samples in rows]
    for drafter in DRAFTERS:
        k = {} if drafter == "none" else {"num_speculative_tokens": 3}
        engine = Engine(TARGET, DRAFTERS[drafter](), max_rows=4, kv_tokens=72, **k)
        together = decode(engine, *(Request(ids, **own, **samples) for ids, own, samples in rows))
        assert engine.schedule.num_preemptions > 0
        for (ids, own, samples), found in zip(rows, together, strict=True):
            [alone] = decode(Engine(TARGET, DRAFTERS[drafter](), max_rows=1, **k), Request(ids, **own, **samples))
            assert found == alone


@pytest.mark.parametrize("drafter", sorted(DRAFTERS))
def test_requests_join_and_leave_at_any_time(drafter):
    prompts = [[5, 6, 7], [8, 9], [3, 4, 5, 6, 7, 8], [11]]
    settings = {"max_new_tokens": 9, "eos_token_id": None}
    expected = [plain_greedy(TARGET, torch.tensor(prompt), **settings) for prompt in prompts]
    found = {}
    with Engine(TARGET, DRAFTERS[drafter](), max_rows=2) as engine:
        for prompt in prompts[:2]:
            engine.add_request(Request(prompt, **settings))
        engine.step()
        for prompt in prompts[2:]:
            engine.add_request(Request(prompt, **settings))
        assert not engine.is_finished
        tokens = {index: [] for index in range(5)}
        tokens[0], tokens[1] = [expected[0][0]], [expected[1][0]]
        while not engine.is_finished:
            for event in engine.step():
                tokens[event.id] += event.token_ids
        # An idle engine takes more requests.
        assert engine.step() == []
        late = engine.add_request(Request(prompts[0], **settings))
        while not engine.is_finished:
            for event in engine.step():
                tokens[event.id] += event.token_ids
        found = tokens
    assert [found[index] for index in range(4)] == expected and found[late] == expected[0]


@pytest.mark.parametrize("drafter", ["none", "lookup", "close"])
def test_an_aborted_request_ends_and_disturbs_no_other(drafter):
    prompts = [[5, 6, 7], [8, 9], [3, 4, 5, 6, 7, 8], [11]]
    settings = {"max_new_tokens": 12, "eos_token_id": None}
    expected = [plain_greedy(TARGET, torch.tensor(prompt), **settings) for prompt in prompts]
    tokens, reasons = {index: [] for index in range(4)}, {}
    with Engine(TARGET, DRAFTERS[drafter](), max_rows=3) as engine:
        for prompt in prompts:
            engine.add_request(Request(prompt, **settings))
        for step in range(100):
            for event in engine.step():
                tokens[event.id] += event.token_ids
                reasons.setdefault(event.id, event.finish_reason)
                reasons[event.id] = event.finish_reason
            if step == 2:
                engine.abort(1)
            if step == 3:
                engine.abort(3)
                engine.abort(17)
            if engine.is_finished:
                break
    assert reasons == {0: "length", 1: "abort", 2: "length", 3: "abort"}
    assert [tokens[0], tokens[2]] == [expected[0], expected[2]]
    assert tokens[1] == expected[1][: len(tokens[1])] and len(tokens[1]) < 12


def test_logprobs_are_those_of_the_targets_raw_logits():
    prompt = [5, 6, 7]
    with Engine(TARGET) as engine:
        engine.add_request(Request(prompt, max_new_tokens=6, eos_token_id=None, logprobs=3, repetition_penalty=1.5))
        engine.add_request(Request([8, 9], max_new_tokens=6, eos_token_id=None))
        found, tokens = [], []
        while not engine.is_finished:
            for event in engine.step():
                if event.id == 0:
                    found += event.logprobs
                    tokens += event.token_ids
                else:
                    assert event.logprobs == []
    with torch.no_grad():
        logits = TARGET(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    expected = torch.log_softmax(logits, -1)
    assert len(found) == len(tokens) == 6
    for place, (token, one) in enumerate(zip(tokens, found, strict=True)):
        assert set(one) == {token, *expected[place].topk(3).indices.tolist()}
        for key, value in one.items():
            assert value == pytest.approx(expected[place, key].item(), abs=1e-4)


def test_a_requests_own_config_counts_over_the_models():
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, eos_token_id=None, max_new_tokens=7)
    [(ours, _)] = decode(Engine(TARGET), Request([5, 6], generation_config=config, seed=4))
    whole = specdec.generate(TARGET, torch.tensor([[5, 6]]), generation_config=config, seed=[4])
    assert ours == whole[0, 2:].tolist()


class Reading(PromptLookup):
    """Gathers the hidden states of its layers along every row's text: prompts, joins, resumed rows, steps."""

    name = "reading"
    target_layers = (0, 1, -1)

    def start(self, context, rows):
        super().start(context, rows)
        self.states = {}
        self.is_resumed = 0

    def read(self, rows, begin, end, states):
        assert [state.shape[:2] for state in states] == 3 * [(len(rows), end - begin)]
        for slot, row in enumerate(rows.row_ids.tolist()):
            known = self.states.setdefault(row, [])
            self.is_resumed += begin == 0 and len(known) > 0
            del known[begin:]
            assert len(known) == begin or begin >= rows.host_lengths[slot]
            stop = min(end, int(rows.host_lengths[slot]))
            known.extend([state[slot, place - begin] for state in states] for place in range(begin, stop))

    def propose(self, rows, max_tokens):
        self.rows = rows.row_ids.copy()
        return super().propose(rows, max_tokens)

    def observe(self, verified):
        for slot, row in enumerate(self.rows.tolist()):
            begin = int(verified.host_lengths[slot] - verified.num_committed[slot]) - 1
            known = self.states[row]
            del known[begin:]
            known.extend(
                [state[slot, place] for state in verified.hidden_states]
                for place in range(int(verified.num_committed[slot]))
            )


@pytest.mark.parametrize("kv_tokens", [None, 64])
def test_a_drafter_reads_the_states_of_every_row(kv_tokens, monkeypatch):
    prompts = [list(range(3, 3 + length)) for length in (9, 2, 5, 7)]
    drafter, texts = Reading(), {}
    monkeypatch.setattr(schedule, "ROUNDING", 4)
    with Engine(TARGET, drafter, num_speculative_tokens=3, max_rows=3, kv_tokens=kv_tokens, prefill_tokens=4) as engine:
        for prompt in prompts:
            engine.add_request(Request(prompt, max_new_tokens=20, eos_token_id=None))
        for prompt, index in zip(prompts, range(4), strict=True):
            texts[index] = list(prompt)
        while not engine.is_finished:
            for event in engine.step():
                texts[event.id] += event.token_ids
        states = drafter.states
    assert (drafter.is_resumed > 0) == (kv_tokens is not None)
    for row, text in texts.items():
        with torch.no_grad():
            expected = TARGET(torch.tensor([text]), output_hidden_states=True).hidden_states
        assert len(states[row]) >= len(text) - 1 - 3
        for place, found in enumerate(states[row][: len(text) - 1]):
            for layer, state in zip(drafter.target_layers, found, strict=True):
                torch.testing.assert_close(state, expected[layer][0, place], rtol=1e-4, atol=1e-4)


def test_a_greedy_row_is_drafted_alike_next_to_sampled_ones():
    """Under a lossy rule the drafts decide the output."""
    rule = specdec.Lenient(0.2)
    for first in range(3, 12):
        row = Request([first, 6, 7], max_new_tokens=14, eos_token_id=None, repetition_penalty=1.3)
        sampled = Request([9, 8], max_new_tokens=20, eos_token_id=None, do_sample=True, seed=1)
        alone, mixed = (
            decode(Engine(TARGET, DraftModel(CLOSE), verification=rule, num_speculative_tokens=3), *requests)[0]
            for requests in ([row], [row, sampled])
        )
        assert alone == mixed


def test_the_callers_tensor_is_its_own():
    prompt = torch.tensor([5, 6, 7])
    expected = plain_greedy(TARGET, prompt, max_new_tokens=5, eos_token_id=None)
    with Engine(TARGET) as engine:
        engine.add_request(Request(prompt, max_new_tokens=5, eos_token_id=None))
        prompt.fill_(9)
        tokens = []
        while not engine.is_finished:
            tokens += [token for event in engine.step() for token in event.token_ids]
    assert tokens == expected


def test_nothing_is_kept_of_requests_that_have_ended():
    with Engine(TARGET, PromptLookup(), policy="heuristic") as engine:
        for _ in range(20):
            engine.add_request(Request([5, 6], max_new_tokens=3, eos_token_id=None))
        while not engine.is_finished:
            engine.step()
        assert not (engine._jobs or engine.policy._tokens or engine.hooks.failed or engine.schedule.running)
        assert not (engine.processors._plans or engine.streams._of_row)


@pytest.mark.parametrize(
    "order", [(torch.inference_mode, torch.enable_grad), (torch.enable_grad, torch.inference_mode)]
)
@pytest.mark.parametrize("drafter", [None, "prompt_lookup", "draft_model"])
def test_steps_within_the_callers_inference_mode_and_outside(drafter, order):
    draft = tiny_llama(1) if drafter == "draft_model" else drafter
    found, modes = {}, cycle(order)
    requests = [Request([5, 6, 7 + i], max_new_tokens=9 + 3 * i) for i in range(5)]
    with next(modes)():
        engine = Engine(TARGET, draft, max_rows=2)
        for request in requests:
            engine.add_request(request)
    with engine:
        while not engine.is_finished:
            with next(modes)():
                for event in engine.step():
                    found.setdefault(event.id, []).extend(event.token_ids)
    for i, request in enumerate(requests):
        expected = plain_greedy(TARGET, torch.tensor(request.prompt_ids), max_new_tokens=9 + 3 * i)
        assert found[i] == expected


def test_completions_read_outside_of_the_inference_mode_they_were_asked_for_in():
    prompts = [torch.tensor([5, 6, 7 + i]) for i in range(4)]
    with torch.inference_mode():
        done = specdec.generate_many(TARGET, prompts, max_new_tokens=20, max_rows=2, in_order=True)
        first = next(done)
    expected = [plain_greedy(TARGET, prompt, max_new_tokens=20) for prompt in prompts]
    assert [first.token_ids, *(one.token_ids for one in done)] == expected
