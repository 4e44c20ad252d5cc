"""Failures of the engine: each ends its own row, is refused by name, or closes the engine and says why."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from tiny import VOCAB, plain_greedy, tiny_llama

import specdec
from specdec import Engine, Request
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.prompt_lookup import PromptLookup
from tests.engine.test_engine import DRAFTERS, OTHER, TARGET


class Failing:
    """A callback of a row that raises at its n-th call, in every form that a row has one."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, ids, scores, **_):
        self._count()
        return scores if scores is not None else torch.zeros(len(ids), dtype=torch.bool)

    def put(self, value):
        self._count()

    def end(self):
        pass

    def _count(self):
        self.calls -= 1
        if self.calls < 0:
            raise KeyError("mine")


FAILURES = {
    "processor": lambda calls: {"processors": [Failing(calls)]},
    "stopping": lambda calls: {"stopping": [Failing(calls)]},
    "streamer": lambda calls: {"streamer": Failing(calls)},
}


@pytest.mark.parametrize("kind", sorted(FAILURES))
@pytest.mark.parametrize("calls", [0, 1, 5])
@pytest.mark.parametrize("drafter", ["none", "close"])
def test_an_exception_ends_its_own_row_alone(kind, calls, drafter):
    settings = {"max_new_tokens": 10, "eos_token_id": None}
    prompts = [[5, 6, 7], [8, 9], [3, 4, 5]]
    expected = [plain_greedy(TARGET, torch.tensor(prompt), **settings) for prompt in prompts]
    tokens, last = {index: [] for index in range(3)}, {}
    with Engine(TARGET, DRAFTERS[drafter]()) as engine:
        for row, prompt in enumerate(prompts):
            engine.add_request(Request(prompt, **settings, **(FAILURES[kind](calls) if row == 1 else {})))
        while not engine.is_finished:
            for event in engine.step():
                tokens[event.id] += event.token_ids
                last[event.id] = event
    assert last[1].finish_reason == "error" and isinstance(last[1].error, KeyError)
    assert [tokens[0], tokens[2]] == [expected[0], expected[2]]
    assert tokens[1] == expected[1][: len(tokens[1])] and len(tokens[1]) < 10


def test_generate_raises_after_the_other_rows_have_ended():
    seen = []

    class Streamer(Failing):
        def put(self, value):
            super().put(value)
            seen.append(value.tolist())

    ids = torch.tensor([[5, 6], [8, 9]])
    good = Streamer(10**6)
    with pytest.raises(KeyError, match="mine") as caught:
        specdec.generate(TARGET, ids, max_new_tokens=8, eos_token_id=None, streamer=[Streamer(2), good])
    expected = plain_greedy(TARGET, ids[1], max_new_tokens=8, eos_token_id=None)
    assert caught.value.output.sequences[1, 2:].tolist() == expected
    assert [token for value in seen for token in value if isinstance(token, int)][-1] == expected[-1]


def test_generate_many_raises_after_the_other_rows_are_yielded():
    def picky(row, ids):
        if row == 1 and len(ids) > 4:
            raise KeyError("mine")
        return list(range(VOCAB))

    prompts = [[5, 6], [8, 9], [3, 4, 5]]
    completions = specdec.generate_many(
        TARGET, prompts, max_new_tokens=6, eos_token_id=None, prefix_allowed_tokens_fn=picky
    )
    found = []
    with pytest.raises(KeyError, match="mine"):
        found.extend(completions)
    assert sorted(one.index for one in found) == [0, 2]


BAD = {
    "num_beams=4 is not served": {"num_beams": 4},
    "unknown keyword": {"nonsense": 1},
    "num_assistant_tokens=3 is chosen by the engine": {"num_assistant_tokens": 3},
    "num_return_sequences=2": {"num_return_sequences": 2, "do_sample": True},
    "output_scores=True: events carry no tensors": {"output_scores": True, "return_dict_in_generate": True},
    "logprobs=-1 is not a whole number": {"logprobs": -1},
    "stream=0.5 is not a whole number": {"stream": 0.5},
    "num_speculative_tokens=9: a row drafts 0 to 5": {"num_speculative_tokens": 9},
    "seed= has no effect on greedy": {"seed": 3},
    "needs the tokenizer": {"stop_strings": "x"},
    "streamer is a int": {"streamer": 3},
    "processors holds a str": {"processors": ["x"]},
    "leaves no whole number of tokens": {"max_new_tokens": 0},
    "generation_config is a dict": {"generation_config": {}},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_request_is_refused_and_disturbs_no_row(message):
    expected = plain_greedy(TARGET, torch.tensor([5, 6]), max_new_tokens=6, eos_token_id=None)
    with Engine(TARGET, "prompt_lookup") as engine:
        engine.add_request(Request([5, 6], max_new_tokens=6, eos_token_id=None))
        tokens = [token for event in engine.step() for token in event.token_ids]
        with pytest.raises(specdec.SpecDecError, match=message):
            engine.add_request(Request([7, 8], **{"max_new_tokens": 4, **BAD[message]}))
        while not engine.is_finished:
            tokens += [token for event in engine.step() for token in event.token_ids]
    assert tokens == expected


@pytest.mark.parametrize(
    "ids, message", [([], "at least one"), ([[1, 2]], "shape"), ([VOCAB], "vocabulary"), (["a"], "not a")]
)
def test_a_bad_prompt_is_refused(ids, message):
    with Engine(TARGET) as engine, pytest.raises(specdec.InputError, match=message):
        engine.add_request(Request(ids))


def test_rows_are_not_kept_yet():
    for own in ({"keep": True}, {"continues": 0}):
        with pytest.raises(specdec.ConfigError, match="rows are not kept between requests yet"):
            Request([5], **own)


def test_a_request_that_can_never_fit_is_refused():
    with Engine(TARGET, kv_tokens=32) as engine, pytest.raises(specdec.ConfigError, match="kv_tokens=32"):
        engine.add_request(Request([5], max_new_tokens=60))


def test_one_caller_at_a_time():
    """From a callback, from another thread, by another engine of the same target or draft model."""
    engine = Engine(TARGET, DraftModel(OTHER))
    refused = []

    def attempt(function):
        try:
            function()
        except specdec.BusyError as error:
            refused.append(str(error))

    def interfere(report):
        attempt(engine.step)
        attempt(lambda: engine.add_request(Request([5])))
        attempt(lambda: engine.abort(0))
        attempt(engine.close)
        attempt(lambda: specdec.generate(TARGET, torch.tensor([[5]]), max_new_tokens=1))
        attempt(lambda: specdec.generate(OTHER, torch.tensor([[5]]), max_new_tokens=1))
        thread = threading.Thread(target=attempt, args=(engine.step,))
        thread.start()
        thread.join()

    engine.on_commit = interfere
    with engine:
        engine.add_request(Request([5, 6], max_new_tokens=1))
        engine.step()
        assert len(refused) == 7 and all("within a step" in message for message in refused)
        engine.on_commit = None
    with pytest.raises(specdec.BusyError, match="closed"):
        engine.step()
    # Between steps others may use the models.
    with Engine(TARGET) as one, Engine(TARGET) as two:
        for each in (one, two):
            each.add_request(Request([5, 6], max_new_tokens=4, eos_token_id=None))
        while not (one.is_finished and two.is_finished):
            one.step()
            two.step()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Request([5], logits_processor=[]), r"logits_processor= is not an option .* pass processors="),
        (lambda: Request([5], tokenizer=3), r"pass Engine\(tokenizer="),
        (lambda: Request([5], drafter="prompt_lookup"), r"pass Engine\(drafter="),
        (lambda: Request([5], processors=print), "pass a list of callables"),
        (lambda: Engine(TARGET).add_request([5]), r"pass a Request\(prompt_ids"),
        (lambda: Engine(TARGET).add_request(Request([5], stop_strings="a")), r"pass Engine\(tokenizer="),
        (lambda: Engine(TARGET).add_request(Request([5], output_scores=True)), "events carry no tensors"),
    ],
)
def test_what_belongs_elsewhere_is_named(make, message):
    with pytest.raises(specdec.ConfigError, match=message):
        make()


def test_an_exception_of_the_drafter_closes_the_engine_and_is_named():
    class Broken(PromptLookup):
        def propose(self, rows, max_tokens):
            raise KeyError("lost")

    engine = Engine(TARGET, Broken())
    engine.add_request(Request([5, 6], max_new_tokens=4))
    with pytest.raises(KeyError, match="lost"):
        while not engine.is_finished:
            engine.step()
    with pytest.raises(specdec.BusyError, match="closed by KeyError: 'lost'"):
        engine.step()
    assert not engine.drafter.is_busy
    specdec.generate(TARGET, torch.tensor([[5, 6]]), max_new_tokens=2)


def test_a_drafter_at_work_is_refused_before_any_request():
    drafter = PromptLookup()
    with Engine(TARGET, drafter) as engine:
        engine.add_request(Request([5, 6], max_new_tokens=4, eos_token_id=None))
        engine.step()
        with pytest.raises(specdec.DrafterError, match="already at work"):
            Engine(OTHER, drafter)


def run_many(*prompts, **options):
    """What generate_many yields, by index, and what it raises."""
    found, error = {}, None
    try:
        for one in specdec.generate_many(TARGET, list(prompts), max_new_tokens=4, eos_token_id=None, **options):
            found[one.index] = one.token_ids
    except KeyError as raised:
        error = raised
    return found, error


@pytest.mark.parametrize("in_order", [True, False])
def test_results_after_a_failed_row_are_not_lost(in_order):
    def picky(row, ids):
        if row == 0:
            raise KeyError("mine")
        return list(range(VOCAB))

    found, error = run_many([5, 6], [8, 9], [3, 4, 5], prefix_allowed_tokens_fn=picky, in_order=in_order)
    assert sorted(found) == [1, 2] and isinstance(error, KeyError)


class Boom:
    """Raises about texts for which `is_bad` says so."""

    def __init__(self, is_bad):
        self.is_bad = is_bad

    def __call__(self, ids, scores):
        if self.is_bad(ids[0].tolist()):
            raise KeyError("mine")
        return scores


@pytest.mark.parametrize("drafter", ["none", "lookup", "other", "close"])
@pytest.mark.parametrize("neighbour", ["none", "greedy", "sampled"])
@pytest.mark.parametrize("samples", [{}, {"do_sample": True, "seed": 1}])
def test_a_processor_counts_where_the_row_gets_alone(drafter, neighbour, samples):
    """It may raise about drafted texts that the row never reaches: past its length, its end, a rejected token."""
    settings = {"max_new_tokens": 6, "eos_token_id": None, **samples}
    k = {} if drafter == "none" else {"num_speculative_tokens": 4}

    def tokens(own, is_bad=lambda ids: False):
        with Engine(TARGET, DRAFTERS[drafter](), **k) as engine:
            engine.add_request(Request([5, 6, 7], **{**settings, **own}, processors=[Boom(is_bad)]))
            if neighbour != "none":
                other = {"do_sample": True, "seed": 9} if neighbour == "sampled" else {}
                engine.add_request(Request([9, 8], max_new_tokens=30, eos_token_id=None, **other))
            found, last = [], None
            while last is None:
                for event in engine.step():
                    if event.id == 0:
                        found += event.token_ids
                        last = event.finish_reason
        return found, last

    text, _ = tokens({})
    true = [5, 6, 7, *text]
    # Only the row's own text is known to the processor: nothing else may end it.
    assert tokens({}, lambda ids: ids != true[: len(ids)] or len(ids) == 9) == (text, "length")
    ended = tokens({"eos_token_id": text[2]}, lambda ids: text[2] in ids[3:])
    assert ended == (text[: text.index(text[2]) + 1], "eos")
    stopped = tokens(
        {"stopping": [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 5])]}, lambda ids: len(ids) >= 5
    )
    assert stopped == (text[:2], "stop")
    # It raises about the row's own text: what came before stays, however far a step went.
    assert tokens({}, lambda ids: len(ids) >= 6) == (text[:3], "error")


def test_an_engine_that_is_never_closed_gives_the_models_back():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        target = tiny_llama(0)
        own = target.config._attn_implementation
        engine = Engine(target, "prompt_lookup", exact=True)
        engine.add_request(Request([5, 6], max_new_tokens=6, eos_token_id=None))
        engine.step()
        del engine
        gc.collect()
        assert target.config._attn_implementation == own
        Engine(target, exact=True).close()
    finally:
        torch.set_num_threads(before)
