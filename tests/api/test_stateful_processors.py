"""Logits processors that remember what they were asked: every row's output is transformers' own for that row
alone, with processors that nobody asked before."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from stateful import MAKERS, FollowsScores, Grammar, Matcher, Parity, closure
from tiny import left_pad, tiny_llama
from tiny_xlnet import tiny_xlnet
from transformers import LogitsProcessor, LogitsProcessorList

import specdec
from specdec import Engine, Request, generate_many
from specdec.drafters.any_subset import AnySubsetDrafter
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.either import Either
from specdec.drafters.look_ahead import LookAhead, LookAheadEmbeddings
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.synthetic import Synthetic
from specdec.verify import row_states
from specdec.verify.row_states import RowStates

TARGET = tiny_llama(0, eos_token_id=None)
OTHER = tiny_llama(1, num_hidden_layers=1, eos_token_id=None)
PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 5, 6, 7], [9], [11, 12, 13, 11, 12, 13, 11, 12], [9], [4, 4])]
NEW = 24


def alone(prompt, *makers, model=TARGET, new=NEW, **options):
    """transformers' continuation of one prompt."""
    ids = prompt[None]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
        logits_processor=LogitsProcessorList([make() for make in makers]), **{"pad_token_id": 0, **options},
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@lru_cache
def expected_of(name):
    return [alone(prompt, MAKERS[name]) for prompt in PROMPTS]


def batch(processors, drafter, k=5, prompts=PROMPTS, **options):
    ids, mask = left_pad(prompts)
    out = specdec.generate(
        TARGET, ids, mask, drafter=drafter, num_speculative_tokens=None if drafter is None else k,
        logits_processor=processors, **{"max_new_tokens": NEW, "pad_token_id": 0, **options},
    )  # fmt: skip
    return out[:, ids.shape[1] :].tolist()


def look_ahead():
    made = LookAheadEmbeddings(3, TARGET.config.hidden_size, num_helpers=1)
    torch.nn.init.normal_(made.weight, std=0.4, generator=torch.Generator().manual_seed(0))
    return LookAhead(made.trained_for(TARGET, {}))


DRAFTERS = {
    "none": lambda expected: None,
    "draft_model": lambda expected: OTHER,
    "itself": lambda expected: DraftModel(TARGET),
    "prompt_lookup": lambda expected: PromptLookup(),
    "either": lambda expected: Either(PromptLookup(), DraftModel(OTHER)),
    "look_ahead": lambda expected: look_ahead(),
    "any_subset": lambda expected: AnySubsetDrafter(tiny_xlnet(vocab_size=TARGET.config.vocab_size)),
    # What the rows are going to write, with mistakes: most steps accept a part of their draft.
    "known": lambda expected: Synthetic(0.7, [torch.tensor(tokens) for tokens in expected]),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_equal_with_every_drafter(drafter, name):
    expected = expected_of(name)
    assert expected != [alone(prompt) for prompt in PROMPTS], "the processor changes nothing"
    k = 3 if drafter == "look_ahead" else 5
    assert batch([MAKERS[name]()], DRAFTERS[drafter](expected), k) == expected


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("layout", ["ragged", "repad", "grouped"])
def test_equal_for_every_k_and_layout(layout, k):
    for name in MAKERS:
        expected = expected_of(name)
        for drafter in ("draft_model", "known"):
            found = batch([MAKERS[name]()], DRAFTERS[drafter](expected), k, layout=layout)
            assert found == expected, (name, drafter)


def test_equal_on_the_trained_pair(demo_pair):
    """Of trained models most drafts are accepted in part; two rows are the same."""
    ids = [demo_pair.tokenizer(demo_pair.prompts[i], return_tensors="pt").input_ids[0, :40] for i in (0, 1, 0, 2)]
    padded, mask = left_pad(ids, demo_pair.tokenizer.pad_token_id)
    options = dict(max_new_tokens=32, pad_token_id=demo_pair.tokenizer.pad_token_id)
    for make in (Parity, Grammar):
        expected = [alone(row, make, model=demo_pair.target, new=32, pad_token_id=0) for row in ids]
        for drafter in (None, demo_pair.draft, "prompt_lookup"):
            out = specdec.generate(
                demo_pair.target, padded, mask, drafter=drafter, logits_processor=[make()], **options
            )[:, padded.shape[1] :].tolist()
            assert [row[: len(want)] for row, want in zip(out, expected, strict=True)] == expected
    parities = [[token % 2 for token in alone(row, Parity, model=demo_pair.target, new=12)] for row in ids]
    assert parities == [[0, 1] * 6] * len(ids)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", MAKERS)
def test_equal_on_a_gpu(demo_pair, name, dtype):
    """Each row is what it is alone and without drafts; with `Parity`, what can be seen from its tokens."""
    target, draft = (
        copy.deepcopy(model).to("cuda", getattr(torch, dtype)) for model in (demo_pair.target, demo_pair.draft)
    )
    rows = [demo_pair.tokenizer(text, return_tensors="pt").input_ids[0, :40] for text in demo_pair.prompts[:6]]
    rows.append(rows[0])
    ids, mask = (tensor.cuda() for tensor in left_pad(rows, demo_pair.tokenizer.pad_token_id))
    options = dict(max_new_tokens=48, eos_token_id=None, pad_token_id=demo_pair.tokenizer.pad_token_id)

    def decoded(ids, mask, **own):
        out = specdec.generate(target, ids, mask, logits_processor=[MAKERS[name]()], **own, **options)
        return out[:, ids.shape[1] :].tolist()

    expected = [decoded(row[None].cuda(), torch.ones_like(row[None]).cuda())[0] for row in rows]
    for drafter in (None, draft, "prompt_lookup"):
        assert decoded(ids, mask, drafter=drafter) == expected
    if name == "parity":
        sampled = decoded(ids, mask, drafter=draft, do_sample=True, seed=1)
        assert all([token % 2 for token in row] == [0, 1] * 24 for row in [*expected, *sampled])


@pytest.mark.parametrize("drafter", ["none", "draft_model", "prompt_lookup"])
@pytest.mark.parametrize("name", MAKERS)
def test_rows_that_join_and_are_preempted_go_on_where_they_stood(name, drafter):
    prompts = [torch.tensor(ids) for ids in ([5, 6, 7], [9], [9], [4, 4, 8, 3], [11, 12, 13], [7, 7])]
    limits = [96, 90, 100, 94, 92, 60]
    expected = [alone(row, MAKERS[name], new=limit) for row, limit in zip(prompts, limits, strict=True)]
    run = generate_many(
        TARGET, prompts, drafter=DRAFTERS[drafter](None), logits_processor=[MAKERS[name]()], max_rows=4, kv_tokens=300,
        max_new_tokens=limits, in_order=True,
    )  # fmt: skip
    assert [one.token_ids for one in run] == expected
    assert run.num_preemptions > 0


def test_requests_have_their_own():
    """The same object in two requests, and another in a third, joining later."""
    shared = Grammar()
    given = [(PROMPTS[0], [shared]), (PROMPTS[1], [shared]), (PROMPTS[2], [Parity()]), (PROMPTS[4], [])]
    found = {}
    with Engine(TARGET, DraftModel(OTHER), max_rows=2) as engine:
        for prompt, processors in given:
            engine.add_request(Request(prompt, processors=processors, max_new_tokens=NEW))
        while not engine.is_finished:
            for event in engine.step():
                assert event.error is None
                found.setdefault(event.id, []).extend(event.token_ids)
        assert not engine.processors._states
    makers = [[Grammar], [Grammar], [Parity], []]
    assert [found[i] for i in range(4)] == [alone(p, *own) for (p, _), own in zip(given, makers, strict=True)]
    assert not shared.matchers, "the caller's own object is never asked"


@pytest.mark.parametrize("name", MAKERS)
def test_inside_transformers(name):
    ids, mask = left_pad(PROMPTS)
    for drafter in ("draft_model", "prompt_lookup"):
        out = TARGET.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0, do_sample=False,
            logits_processor=LogitsProcessorList([MAKERS[name]()]),
            custom_generate=specdec.speculative(DRAFTERS[drafter](None), num_speculative_tokens=3),
        )  # fmt: skip
        assert out[:, ids.shape[1] :].tolist() == expected_of(name)


def test_several_in_a_row_and_among_others():
    """In their order at each place; what two of them hold together, they hold together in every row."""

    def make_two():
        shared = []

        def first(input_ids, scores):
            shared.append(0)
            return scores.masked_fill(torch.arange(scores.shape[1]) % 3 == len(shared) % 3, float("-inf"))

        def second(input_ids, scores):
            shared.append(0)
            return scores.masked_fill(torch.arange(scores.shape[1]) % 4 == len(shared) // 2 % 4, float("-inf"))

        return [first, second]

    options = dict(repetition_penalty=1.4, suppress_tokens=[8, 9, 10], min_new_tokens=4, eos_token_id=[3, 20, 21, 22])

    def want(prompt):
        first, second = make_two()
        return alone(prompt, lambda: first, Parity, lambda: second, **options)

    expected = [want(prompt) for prompt in PROMPTS]
    first, second = make_two()
    for drafter in ("none", "draft_model", "itself"):
        found = batch([first, Parity(), second], DRAFTERS[drafter](None), **options)
        assert [row[: len(own)] for row, own in zip(found, expected, strict=True)] == expected, drafter


def test_a_greedy_row_is_asked_once_about_each_place(monkeypatch):
    """As far as the draft is what the row writes, which needs no copies."""
    calls, copies = [], []

    class Watched(Grammar):
        def __call__(self, input_ids, scores):
            calls.append(tuple(input_ids[0].tolist()))
            return super().__call__(input_ids, scores)

    own_fork = row_states.fork
    monkeypatch.setattr(row_states, "fork", lambda *given: copies.append(0) or own_fork(*given))
    expected = expected_of("grammar")
    prompts = [PROMPTS[i] for i in (0, 2)]
    known = Synthetic(0.7, [torch.tensor(expected[i]) for i in (0, 2)])
    assert batch([Watched()], known, prompts=prompts) == [expected[i] for i in (0, 2)]
    assert len(calls) == len(set(calls)) == 2 * NEW
    assert len(copies) == 2, "one for each row, of the caller's"


@pytest.mark.parametrize("samples", [{}, {"do_sample": True, "seed": 5}])
@pytest.mark.parametrize("drafter", ["draft_model", "itself", "prompt_lookup"])
def test_nothing_is_asked_after_the_end(samples, drafter):
    """Drafts go past it."""
    ends, calls = list(range(45, 61)), []

    class Watched(Parity):
        def __call__(self, input_ids, scores):
            calls.append(input_ids[0].tolist())
            return super().__call__(input_ids, scores)

    out = batch([Watched()], DRAFTERS[drafter](None), 8, eos_token_id=ends, pad_token_id=60, **samples)
    assert any(set(row) & set(ends) for row in out)
    assert not any(set(text) & set(ends) for text in calls)


class Picky(Grammar):
    """Raises about every text that is not the beginning of one of its own."""

    def __init__(self, texts):
        super().__init__()
        self.own = texts

    def __call__(self, input_ids, scores):
        text = input_ids[0].tolist()
        if not any(own[: len(text)] == text for own in self.own):
            raise KeyError("not mine")
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("samples", [{}, {"do_sample": True, "seed": 5}])
def test_a_row_goes_on_where_a_draft_that_it_rejects_raised(samples):
    drafts = tiny_llama(0, eos_token_id=None)
    with torch.no_grad():
        drafts.lm_head.weight += 0.05 * torch.randn(drafts.lm_head.weight.shape)
    options = dict(return_dict_in_generate=True, max_new_tokens=NEW, num_speculative_tokens=5, **samples)
    ids, mask = left_pad(PROMPTS)
    out = specdec.generate(TARGET, ids, mask, drafter=drafts, logits_processor=[Grammar()], **options)
    found = out.sequences[:, ids.shape[1] :].tolist()
    assert 0 < out.speculation.num_accepted_draft_tokens < out.speculation.num_draft_tokens
    picky = Picky([[*prompt.tolist(), *row] for prompt, row in zip(PROMPTS, found, strict=True)])
    again = specdec.generate(TARGET, ids, mask, drafter=drafts, logits_processor=[picky], **options)
    assert again.sequences[:, ids.shape[1] :].tolist() == found


def test_a_row_whose_other_callback_raises_ends_alone():
    """The stateful processors are not asked about the place where it raised."""

    def allowed(row, ids):
        if row == 1 and len(ids) > 6:
            raise KeyError("mine")
        return list(range(TARGET.config.vocab_size))

    with pytest.raises(KeyError, match="mine") as caught:
        batch([Grammar()], OTHER, prefix_allowed_tokens_fn=allowed)
    found = caught.value.output.sequences[:, max(map(len, PROMPTS)) :].tolist()
    expected = expected_of("grammar")
    assert [found[row] for row in (0, 2, 3, 4)] == [expected[row] for row in (0, 2, 3, 4)]
    assert found[1][:6] == expected[1][:6] and not any(found[1][6:])


@pytest.mark.parametrize("drafter", ["none", "draft_model", "itself", "prompt_lookup", "look_ahead", "any_subset"])
@pytest.mark.parametrize("verification", ["token", "block"])
def test_sampled_rows_do_not_depend_on_their_batch(drafter, verification):
    """The grammar raises where it is asked out of order, or about a token that it has not allowed."""
    options = dict(do_sample=True, seed=[3, 4, 5, 6, 7], verification=verification, k=3)
    found = batch([Grammar()], DRAFTERS[drafter](None), **options)
    assert found[1] != found[3]
    for row, prompt in enumerate(PROMPTS):
        own = {**options, "seed": [options["seed"][row]]}
        assert batch([Grammar()], DRAFTERS[drafter](None), prompts=[prompt], **own) == [found[row]]


def test_num_return_sequences():
    ids = PROMPTS[0][None]
    for drafter in (None, OTHER):
        out = specdec.generate(
            TARGET, ids, drafter=drafter, do_sample=True, seed=3, num_return_sequences=4, max_new_tokens=NEW,
            logits_processor=[Parity()],
        )[:, len(PROMPTS[0]) :]  # fmt: skip
        assert len({tuple(row) for row in out.tolist()}) == 4
        assert (out % 2 == torch.arange(NEW) % 2).all()


def test_a_lossy_rule_goes_on_from_the_token_that_it_let_pass():
    out = batch([Grammar()], DraftModel(OTHER), verification=specdec.TopBeta(beta=9, tau=9.0))
    assert out != expected_of("grammar")
    follow(out)


def follow(rows):
    """Replay a grammar over rows: it raises where one of them does not follow it."""
    for row in rows:
        matcher = Matcher()
        for token in row:
            matcher.accept(token)


SMALL = tiny_llama(0, vocab_size=2, eos_token_id=None, pad_token_id=None, bos_token_id=None, initializer_range=0.25)
SMALL_DRAFT = tiny_llama(
    5, vocab_size=2, eos_token_id=None, pad_token_id=None, bos_token_id=None, initializer_range=0.25
)
LENGTH, ROWS, BATCHES = 6, 500, 4


def joint(prompt):
    """{output: probability} under FollowsScores: each prefix asks one of its own about every place up to there."""
    total = {(): 1.0}
    for _ in range(LENGTH):
        grown = {}
        for prefix, probability in total.items():
            ids, processor = torch.cat([prompt, torch.tensor(prefix, dtype=torch.long)])[None], FollowsScores()
            with torch.no_grad():
                logits = SMALL(ids).logits
            for end in range(len(prompt), ids.shape[1] + 1):
                scores = processor(ids[:, :end], logits[:, end - 1].clone())
            for token, p in enumerate(scores[0].double().softmax(-1).tolist()):
                grown[(*prefix, token)] = probability * p
        total = grown
    return total


def p_value(drafter, verification="token"):
    """Chi-square of whole outputs; outcomes that are expected less than 10 times are pooled."""
    prompt, counts = torch.tensor([1, 0, 0, 1, 0]), {}
    for seed in range(BATCHES):
        out = specdec.generate(
            SMALL, prompt.expand(ROWS, -1), drafter=drafter, num_speculative_tokens=None if drafter is None else 2,
            do_sample=True, seed=seed, top_k=0, max_new_tokens=LENGTH, pad_token_id=0, verification=verification,
            logits_processor=[FollowsScores()],
        )[:, len(prompt) :]  # fmt: skip
        for row in map(tuple, out.tolist()):
            counts[row] = counts.get(row, 0) + 1
    cells = [(counts.get(row, 0), ROWS * BATCHES * p) for row, p in joint(prompt).items()]
    large = [cell for cell in cells if cell[1] >= 10]
    small = [cell for cell in cells if cell[1] < 10]
    observed, wanted = np.array([*large, *([tuple(map(sum, zip(*small, strict=True)))] if small else [])]).T
    return chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("drafter", ["none", "draft_model", "itself", "prompt_lookup"])
def test_samples_follow_the_joint_of_a_processor_that_remembers(drafter, verification):
    made = {
        "none": lambda: None, "draft_model": lambda: DraftModel(SMALL_DRAFT), "itself": lambda: DraftModel(SMALL),
        "prompt_lookup": PromptLookup,
    }  # fmt: skip
    assert p_value(made[drafter](), verification) > 1e-3


def never_fork(self, processors):
    """Planted: places and rows share the processors."""
    return list(processors)


def stay(self, node):
    """Planted: the row goes on from the step's first place, whatever was accepted."""
    self._committed = self._nodes[0]


def last(self, node):
    """Planted: the row goes on from the last place that was asked about."""
    self._committed = self._nodes[max(self._nodes)]


@pytest.mark.parametrize("planted", [("_fork", never_fork), ("commit", stay), ("commit", last)])
def test_planted_bugs_are_found(monkeypatch, planted):
    monkeypatch.setattr(RowStates, *planted)
    assert p_value(DraftModel(SMALL_DRAFT)) < 1e-3
    if planted[0] == "_fork":
        assert batch([Parity()], None) != expected_of("parity")


def test_planted_uncertain_places_taken_for_certain(monkeypatch):
    """Without copies a sampled row would go on from a rejected draft: that is noticed, not decoded."""
    own = RowStates.at
    monkeypatch.setattr(RowStates, "at", lambda self, node, parent, is_certain: own(self, node, parent, True))
    with pytest.raises(AssertionError, match="another token than was certain"):
        batch([Grammar()], OTHER, do_sample=True, seed=1)


def holds_a_generator():
    numbers = (number for number in range(1000))

    def processor(input_ids, scores):
        return scores + next(numbers)

    return processor


def test_what_cannot_be_copied_is_refused_before_the_first_token():
    def refuse(call):
        with pytest.raises(
            specdec.ConfigError, match=r"logits processor holds_a_generator.*cannot be copied.*fork\(\)"
        ):
            call()

    ids, own = PROMPTS[0][None], LogitsProcessorList([holds_a_generator()])
    committed = []
    options = dict(logits_processor=own, on_commit=committed.append)
    refuse(lambda: specdec.generate(TARGET, ids, **options))
    refuse(lambda: generate_many(TARGET, [ids[0]], **options))
    refuse(lambda: TARGET.generate(ids, logits_processor=own, custom_generate=specdec.speculative("prompt_lookup")))
    with Engine(TARGET, on_commit=committed.append) as engine:
        refuse(lambda: engine.add_request(Request(ids[0], processors=own)))
        engine.add_request(Request(ids[0], processors=[closure()], max_new_tokens=2))
        while not engine.is_finished:
            assert not any(event.error for event in engine.step())
    assert len(committed) == 2


class BeginsAGenerator(LogitsProcessor):
    """It can be copied until it is asked."""

    numbers = None

    def __call__(self, input_ids, scores):
        if self.numbers is None:
            self.numbers = (number for number in range(1000))
        return scores.masked_fill(torch.arange(scores.shape[1]) % 3 == next(self.numbers) % 3, float("-inf"))


def test_what_can_be_copied_only_before_it_is_asked():
    """Greedy and undrafted rows need no more; a drafted sample is refused without a token."""
    expected = [alone(prompt, BeginsAGenerator) for prompt in PROMPTS]
    for drafter in (None, OTHER, "prompt_lookup"):
        assert batch([BeginsAGenerator()], drafter) == expected
    samples = dict(do_sample=True, seed=3)
    plain = batch([BeginsAGenerator()], None, **samples)
    with pytest.raises(specdec.ConfigError, match=r"logits processor .*BeginsAGenerator cannot be copied") as caught:
        batch([BeginsAGenerator()], OTHER, **samples)
    assert caught.value.output.sequences.shape[1] == max(map(len, PROMPTS))
    with Engine(TARGET, DraftModel(OTHER)) as engine:  # of such rows none is drafted
        for row, prompt in enumerate(PROMPTS):
            own = dict(processors=[BeginsAGenerator()], num_speculative_tokens=0, stream=row)
            engine.add_request(Request(prompt, max_new_tokens=NEW, **own, **samples))
        found = {}
        while not engine.is_finished:
            for event in engine.step():
                found[event.id] = found.get(event.id, []) + event.token_ids
    assert [found[row] for row in range(len(PROMPTS))] == plain
