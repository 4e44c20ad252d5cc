"""Length policies: how far rows are drafted changes how fast the text comes, never the text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, continuations, left_pad, plain_greedy, tiny_llama
from transformers import GenerationConfig

import specdec
from specdec import ConfigError, DrafterError, SpecDecError, generate_many
from specdec.batch.layout import LAYOUTS
from specdec.draft import Draft
from specdec.drafter import Drafter
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.kernels.commit.token_statistics import token_statistics
from specdec.policies.by_estimate import ByAcceptanceHead, ByDisco, Confidence
from specdec.policies.cost_model import CostModel, Knowledge
from specdec.policies.fixed import Fixed
from specdec.policies.heads.acceptance_head import AcceptanceHead
from specdec.policies.heads.disco import Disco
from specdec.policies.heuristic import Heuristic
from specdec.policies.registry import LENGTH_POLICIES, resolve_length_policy
from specdec.policy import LengthPolicy
from tests.api.test_generate import OTHER, PAD, TARGET, Hostile, some_prompts
from tests.verify.test_sampling import ALPHA, joint, p_value, sample
from tests.verify.test_sampling import OTHER as SAMPLED_OTHER
from tests.verify.test_sampling import TARGET as SAMPLED_TARGET

HIDDEN = 32
token = st.integers(0, VOCAB - 1)


def random_head(kind, target=TARGET, drafter=OTHER, scale=3.0, **shape):
    """Untrained: its opinion of a token is arbitrary, which is what lossless must survive."""
    torch.manual_seed(3)
    head = kind(**shape).trained_for(target, drafter, {})
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(scale)
    return head.eval()


def heads(target=TARGET, drafter=OTHER, top_k=10):
    return (
        random_head(AcceptanceHead, target, drafter, 1.5, hidden_size=HIDDEN, num_blocks=1),
        random_head(Disco, target, drafter, top_k=top_k),
    )


class AnyWidths(LengthPolicy):
    """A user's own: arbitrary widths, none and too many among them."""

    name = "any_widths"

    def __init__(self, seed=0):
        self.generator = np.random.default_rng(seed)

    def widths(self, rows, max_tokens):
        return self.generator.integers(-1, max_tokens + 3, len(rows)) * self.generator.integers(0, 2)


class AnyStops(AnyWidths):
    """Stops rows anywhere."""

    name = "any_stops"
    sees = frozenset({"logits"})

    def goes_on(self, rows, shown):
        return self.generator.random(len(rows)) < 0.7


class Later(LengthPolicy):
    """Plain decoding for some steps, then full drafts."""

    name = "later"

    def __init__(self, num_plain):
        self.num_plain = num_plain

    def start(self, target, drafter, max_tokens):
        self.num_steps = 0

    def widths(self, rows, max_tokens):
        self.num_steps += 1
        return np.full(len(rows), 0 if self.num_steps <= self.num_plain else max_tokens)


class Ticks:
    """A clock that says anything."""

    def __init__(self, seed=0):
        self.now, self.generator = 0.0, np.random.default_rng(seed)

    def mark(self):
        self.now += self.generator.exponential()
        return self.now

    def seconds(self, begin, end):
        return end - begin


HEAD, DISCO = heads()
POLICIES = {
    "fixed": lambda seed: "fixed",
    "heuristic": lambda seed: "heuristic",
    "confidence": lambda seed: Confidence(0.16),
    "acceptance_head": lambda seed: ByAcceptanceHead(0.8, head=HEAD),
    "disco": lambda seed: ByDisco(0.905, head=DISCO),
    "cost_model": lambda seed: CostModel(None, Ticks(seed), Knowledge()),
    "cost_model with head": lambda seed: CostModel(HEAD, Ticks(seed), Knowledge()),
    "any_widths": AnyWidths,
    "any_stops": AnyStops,
    "later": lambda seed: Later(seed % 20),
}


def run(prompts, policy, drafter=None, k=6, **options):
    ids, mask = left_pad(prompts, PAD)
    return specdec.generate(
        TARGET, ids, mask, drafter=DraftModel(OTHER) if drafter is None else drafter, num_speculative_tokens=k,
        length_policy=policy, return_dict_in_generate=True, **options,
    )  # fmt: skip


@given(
    prompts=st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=6),
    policy=st.sampled_from(sorted(POLICIES)),
    itself=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    k=st.integers(1, 12),
    max_new_tokens=st.integers(1, 30),
    eos=st.lists(token, max_size=4, unique=True),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_every_policy_writes_plain_greedy(prompts, policy, itself, layout, k, max_new_tokens, eos, seed):
    prompts = [torch.tensor(ids) for ids in prompts]
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": eos or None, "pad_token_id": PAD}
    expected = [plain_greedy(TARGET, prompt, **options) for prompt in prompts]
    model = TARGET if itself and "head" not in policy and policy != "disco" else OTHER
    out = run(prompts, POLICIES[policy](seed), DraftModel(model), k, layout=layout, **options)
    assert continuations(out.sequences, max(map(len, prompts)), expected, PAD) == expected


@pytest.mark.parametrize(
    ("policy", "layout"),
    [*((policy, "ragged") for policy in POLICIES), ("any_stops", "repad"), ("any_stops", "grouped"),
     ("cost_model with head", "grouped"), ("any_widths", "repad")],
)  # fmt: skip
def test_continuous_batches_in_every_layout(policy, layout):
    prompts = some_prompts(5, 1, 9, 3, 14, 2, 6)
    limits = [30, 3, 17, 25, 8, 40, 12]
    found = generate_many(
        TARGET, prompts, drafter=DraftModel(OTHER), num_speculative_tokens=6, length_policy=POLICIES[policy](1),
        layout=layout, max_rows=3, kv_tokens=160, prefill_tokens=7, max_new_tokens=limits, in_order=True,
        eos_token_id=None, pad_token_id=PAD,
    )  # fmt: skip
    expected = [
        plain_greedy(TARGET, prompt, max_new_tokens=limit, eos_token_id=None, pad_token_id=PAD)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    assert [done.token_ids for done in found] == expected


@pytest.mark.parametrize("policy", ["confidence", "acceptance_head", "disco", "any_stops", "any_widths"])
def test_rows_stop_at_different_depths(policy):
    reports = []
    run(some_prompts(5, 1, 9, 3), POLICIES[policy](0), max_new_tokens=40, eos_token_id=None, on_commit=reports.append)
    assert any(len(set(report.num_drafted.tolist())) > 1 for report in reports)


# ---- what each policy does


def first_lengths(policy, k=12, prompts=None, max_new_tokens=20):
    """Tokens that each row drafts in its first step."""
    reports = []
    run(prompts or some_prompts(5, 1, 9, 3), policy, k=k, max_new_tokens=max_new_tokens, eos_token_id=None,
        on_commit=reports.append)  # fmt: skip
    order = np.argsort(reports[1].row_ids)
    return reports[1].num_drafted[order], reports


def own_text(prompt, count):
    """The draft model's greedy tokens behind the prompt and the target's first token; of each, what it was drawn
    from."""
    ids = torch.cat([prompt, torch.tensor(plain_greedy(TARGET, prompt, max_new_tokens=1, eos_token_id=None))])
    logits, hidden = [], []
    for _ in range(count):
        output = OTHER(ids[None], output_hidden_states=True, use_cache=False)
        logits.append(output.logits[0, -1])
        hidden.append(output.hidden_states[-1][0, -1])
        ids = torch.cat([ids, output.logits[0, -1].argmax()[None]])
    return ids[-count:], torch.stack(logits), torch.stack(hidden)


def stop_place(over, k):
    """Tokens drafted if `over` ([k] bool) says behind which of them to stop."""
    places = np.flatnonzero(over[: k - 1])
    return int(places[0]) + 1 if len(places) else k


@torch.no_grad()
def test_the_newest_token_is_scored():
    """By hand, from transformers' forwards of each prefix: a row stops behind the very token that is doubted."""
    prompts, k = some_prompts(5, 1, 9, 3), 12
    expected = {"confidence": [], "acceptance_head": [], "disco": []}
    for prompt in prompts:
        tokens, logits, hidden = own_text(prompt, k)
        log_q = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        expected["confidence"].append(stop_place(log_q.exp().numpy() < 0.16, k))
        reached = HEAD.log_acceptance(hidden, token_statistics(logits, tokens)).exp().cumprod(0).numpy()
        expected["acceptance_head"].append(stop_place(1 - reached > 0.8, k))
        disco = torch.stack([DISCO.log_acceptance(row, place) for place, row in enumerate(logits)]).exp().numpy()
        expected["disco"].append(stop_place(disco < 0.905, k))
    for name, lengths in expected.items():
        assert first_lengths(POLICIES[name](0), k)[0].tolist() == lengths, name
        assert len(set(lengths)) > 1, name


@pytest.mark.parametrize("make", [lambda h: ByAcceptanceHead(h, head=HEAD), lambda h: Confidence(1 - h)])
def test_length_is_monotone_in_the_threshold(make):
    thresholds = np.linspace(0, 1, 12)
    lengths = np.stack([first_lengths(make(float(h)))[0] for h in thresholds])
    assert (np.diff(lengths, axis=0) >= 0).all()
    assert (lengths[0] == 1).all() and (lengths[-1] == 12).all() and len(np.unique(lengths)) >= 3


@pytest.mark.parametrize("name", ["confidence", "acceptance_head", "disco"])
def test_bounds_hold(name):
    never, always = {"confidence": (1.0, 0.0), "disco": (1.0, 0.0), "acceptance_head": (0.0, 1.0)}[name]
    head = {"acceptance_head": {"head": HEAD}, "disco": {"head": DISCO}}.get(name, {})
    for threshold, wanted in ((never, 4), (always, 7)):
        _, reports = first_lengths(LENGTH_POLICIES[name](threshold, min_tokens=4, **head), k=7, max_new_tokens=60)
        for report in reports[1:5]:  # no row is near its limit yet
            assert report.num_drafted.tolist() == [wanted] * 4


@pytest.mark.parametrize(
    ("drafter", "expected"), [(DraftModel(TARGET), [5, 7, 9]), (Hostile(TARGET), [5, 4, 3, 2, 1, 1])]
)
def test_the_heuristic_is_transformers_schedule(drafter, expected):
    reports = []
    run(some_prompts(5), "heuristic", drafter, 20, max_new_tokens=60, eos_token_id=None, on_commit=reports.append)
    assert [int(report.num_drafted[0]) for report in reports[1:]][: len(expected)] == expected


def test_transformers_names_choose_a_policy():
    def lengths(**options):
        prompts = some_prompts(5, 1, 9)
        ids, mask = left_pad(prompts, PAD)
        return specdec.generate(
            TARGET, ids, mask, drafter=OTHER, max_new_tokens=30, return_dict_in_generate=True, eos_token_id=None,
            **options,
        ).speculation.drafted_histogram  # fmt: skip

    assert lengths(assistant_confidence_threshold=0.2) == lengths(length_policy="confidence:0.2")
    assert lengths(assistant_confidence_threshold=0) == lengths(num_assistant_tokens_schedule="constant") == lengths()
    for name in ("heuristic", "heuristic_transient"):
        found = lengths(num_assistant_tokens_schedule=name, num_assistant_tokens=3)
        assert found == lengths(length_policy=Heuristic(3), num_speculative_tokens=32)


@pytest.mark.parametrize(
    "asked", [{"num_assistant_tokens": 2}, {"num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 2}]
)
def test_a_config_asks_as_keywords_do(asked):
    """In a GenerationConfig, or in the model's own; without a drafter there is nothing to ask for."""
    model = tiny_llama(0, eos_token_id=None)

    def drafted(drafter=OTHER, **options):
        out = specdec.generate(
            model, torch.tensor([[3, 4, 5, 6, 3, 4]]), drafter=drafter, max_new_tokens=40,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        return out.speculation.drafted_histogram

    by_keyword, unasked = drafted(**asked), drafted()
    assert by_keyword != unasked
    assert drafted(generation_config=GenerationConfig(**asked)) == by_keyword
    vars(model.generation_config).update(asked)
    assert drafted() == by_keyword
    assert drafted(None) == [39]
    model.generation_config.num_assistant_tokens = 40
    assert drafted(num_speculative_tokens=3), "a keyword says the same"
    with pytest.raises(ConfigError, match="num_assistant_tokens=40 exceeds 32"):
        drafted()


def test_a_config_may_choose_the_n_grams(monkeypatch):
    sizes = []
    start = PromptLookup.start
    monkeypatch.setattr(
        PromptLookup, "start", lambda self, *args: sizes.append(self.max_ngram_size) or start(self, *args)
    )
    config, prompt = GenerationConfig(max_matching_ngram_size=7), torch.tensor([[3, 4, 3]])
    for drafter in ("prompt_lookup", OTHER, None):  # without effect on another drafter, as in transformers
        specdec.generate(TARGET, prompt, drafter=drafter, generation_config=config, max_new_tokens=2)
    specdec.generate(TARGET, prompt, prompt_lookup_num_tokens=2, max_matching_ngram_size=5, max_new_tokens=2)
    assert sizes == [7, 5]
    config.max_matching_ngram_size = 0
    with pytest.raises(ConfigError, match="max_matching_ngram_size=0"):
        specdec.generate(TARGET, prompt, drafter="prompt_lookup", generation_config=config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_plain", [1, 7, 8, 9, 25])
def test_a_draft_model_catches_up_with_what_it_did_not_draft(layout, num_plain, monkeypatch):
    """The target as its own draft: if a token were missing from its cache, its drafts would be rejected."""
    monkeypatch.setattr("specdec.drafters.draft_model.prefill_budget", lambda device: 12)
    reports, drafter = [], DraftModel(TARGET)
    run(some_prompts(5, 1, 9, 3), Later(num_plain), drafter, 4, layout=layout, max_new_tokens=60, eos_token_id=None,
        on_commit=reports.append)  # fmt: skip
    assert all(report.num_drafted.sum() == 0 for report in reports[1 : num_plain + 1])
    assert reports[num_plain + 1].num_drafted.tolist() == [4] * 4
    assert all((report.num_accepted == report.num_drafted)[~report.finished].all() for report in reports[1:])


def test_plain_steps_do_not_run_the_draft_model():
    out = run(some_prompts(5, 3), Later(10**6), max_new_tokens=20, eos_token_id=None)
    assert out.speculation.num_draft_calls == 0 and out.speculation.drafted_histogram == [2 * 19]


def test_what_sees_nothing_is_asked_nothing():
    seen = []

    class Watched(DraftModel):
        def propose(self, rows, max_tokens):
            seen.append(self.context.policy)
            return super().propose(rows, max_tokens)

    drafter = Watched(OTHER)
    for policy in ("fixed", "heuristic", "confidence"):
        run(some_prompts(5), policy, drafter, max_new_tokens=8)
        assert {type(one).name if one else None for one in seen} == {policy if policy == "confidence" else None}
        seen.clear()
    assert drafter.context is None


# ---- sampled output


SAMPLED_HEADS = heads(SAMPLED_TARGET, SAMPLED_OTHER, top_k=3)
SAMPLED = {
    "heuristic": lambda: "heuristic",
    "confidence": lambda: Confidence(0.3),
    "acceptance_head": lambda: ByAcceptanceHead(0.5, head=SAMPLED_HEADS[0]),
    "disco": lambda: ByDisco(0.5, head=SAMPLED_HEADS[1]),
    "cost_model": lambda: CostModel(None, Ticks(), Knowledge()),
    "cost_model with head": lambda: CostModel(SAMPLED_HEADS[0], Ticks(), Knowledge()),
    "any_widths": AnyWidths,
    "any_stops": AnyStops,
}


@pytest.mark.parametrize("policy", SAMPLED)
def test_samples_follow_the_target(policy):
    verification = "block" if policy in ("confidence", "any_stops") else "token"
    counts = sample(DraftModel(SAMPLED_OTHER), length_policy=SAMPLED[policy](), verification=verification)
    assert p_value(counts, joint()) > ALPHA


class DropsTheDoubtful(DraftModel):
    """Planted: stops before the token that was doubted, not behind it."""

    def propose(self, rows, max_tokens):
        draft = super().propose(rows, max_tokens)
        doubted = draft.probs.gather(2, draft.token_ids.clamp(min=0)[..., None]).squeeze(2) < 0.3
        return Draft(draft.token_ids.masked_fill(doubted, -1), draft.probs)


def test_a_dropped_token_is_found():
    counts = sample(DropsTheDoubtful(SAMPLED_OTHER), length_policy=Confidence(0.3))
    assert p_value(counts, joint()) < ALPHA


# ---- reports


def test_predictions_are_reported():
    reports = []
    out = run(some_prompts(5, 1, 9, 3), Confidence(0.2), max_new_tokens=40, eos_token_id=None,
              on_commit=reports.append)  # fmt: skip
    found = out.speculation
    tried = sum(
        int(((np.arange(6) <= report.num_accepted[row]) & (np.arange(6) < report.num_drafted[row]))[
            : report.predicted.shape[1]].sum())
        for report in reports[1:] if report.predicted is not None
        for row in range(len(report.row_ids)) if not report.finished[row]
    )  # fmt: skip
    accepted = sum(
        min(int(report.num_accepted[row]), report.predicted.shape[1])
        for report in reports[1:] if report.predicted is not None
        for row in range(len(report.row_ids)) if report.finished[row]
    )  # fmt: skip
    assert sum(found.predicted_histogram) == tried + accepted > 20
    assert sum(found.drafted_histogram) == found.num_spec_steps
    assert sum(i * n for i, n in enumerate(found.drafted_histogram)) == found.num_draft_tokens
    for one in found.calibration:
        assert 0 <= one["predicted"] <= 1 and 0 <= one["actual"] <= 1
    assert found.to_dict()["calibration"] == found.calibration
    assert run(some_prompts(5), "fixed", max_new_tokens=9).speculation.calibration == []


# ---- refusals


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (lambda rows: [3] * len(rows), "a list"),
        (lambda rows: None, "a NoneType"),
        (lambda rows: np.full(len(rows), 2.5), r"float64 of shape \[2\]"),
        (lambda rows: np.array([3]), r"int64 of shape \[1\]"),
    ],
)
def test_widths_of_another_kind_are_named(said, found):
    class Own(LengthPolicy):
        name = "own"

        def widths(self, rows, max_tokens):
            return said(rows)

    with pytest.raises(ConfigError, match=f"'own' gave widths as {found}; widths.. must return a numpy array of 2"):
        run(some_prompts(5, 3), Own())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "prompt_lookup", "length_policy": "confidence"}, "'prompt_lookup' does not show"),
        ({"drafter": "prompt_lookup", "length_policy": "acceptance_head"}, "hidden_states and logits"),
        ({"drafter": OTHER, "length_policy": "spiral"}, "choose 'fixed', 'heuristic'"),
        ({"drafter": OTHER, "length_policy": 3}, "length_policy=3 is unknown"),
        ({"drafter": OTHER, "length_policy": Fixed}, "is the class Fixed; pass an instance"),
        ({"drafter": OTHER, "length_policy": "confidence:2"}, "a number from 0 to 1"),
        ({"drafter": OTHER, "length_policy": "fixed:0.5"}, "may follow acceptance_head, confidence, disco alone"),
        ({"drafter": OTHER, "length_policy": "acceptance_head"}, "holds no acceptance_head.json"),
        ({"drafter": OTHER, "length_policy": "disco"}, "holds no disco.json"),
        ({"drafter": DraftModel(TARGET), "length_policy": ByAcceptanceHead(head=HEAD)}, "another drafter"),
        ({"drafter": OTHER, "length_policy": ByAcceptanceHead(head=DISCO)}, "head is a Disco; pass a AcceptanceHead"),
        ({"length_policy": "confidence"}, "without a drafter"),
        ({"assistant_confidence_threshold": 0.5}, "without a drafter"),
        ({"drafter": OTHER, "length_policy": "heuristic", "assistant_confidence_threshold": 0.4}, "pass one of them"),
        ({"drafter": OTHER, "assistant_confidence_threshold": 1.5}, "not a probability"),
        ({"drafter": OTHER, "num_assistant_tokens_schedule": "sometimes"}, "choose 'constant', 'heuristic'"),
    ],
)  # fmt: skip
def test_refusals_come_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr("specdec.engine.target.Target.prefill", None)
    with pytest.raises(SpecDecError, match=message.replace("(", r"\(")):
        specdec.generate(TARGET, some_prompts(5)[0][None], max_new_tokens=4, **options)


def test_thresholds_are_probabilities():
    for kind in (Confidence, ByAcceptanceHead, ByDisco):
        with pytest.raises(ConfigError, match="not a probability"):
            kind(1.2)
        with pytest.raises(ConfigError, match="min_tokens=0"):
            kind(0.5, min_tokens=0)


def test_a_policy_serves_one_call_at_a_time():
    policy = Fixed()
    first = generate_many(TARGET, some_prompts(5, 4), drafter=OTHER, length_policy=policy, max_new_tokens=9)
    next(first)
    with pytest.raises(DrafterError, match="length_policy 'fixed' is already at work"):
        run(some_prompts(5), policy, max_new_tokens=4)
    first.close()
    run(some_prompts(5), policy, max_new_tokens=4)


def test_inside_transformers():
    ids = some_prompts(6)[0][None]
    plain = TARGET.generate(ids, max_new_tokens=12)
    loop = specdec.speculative(OTHER, length_policy="confidence")
    assert torch.equal(TARGET.generate(ids, max_new_tokens=12, custom_generate=loop), plain)
    with pytest.raises(ConfigError, match="chosen by speculative"):
        TARGET.generate(ids, max_new_tokens=4, custom_generate=loop, num_assistant_tokens_schedule="heuristic")


def test_names_resolve():
    assert [resolve_length_policy(name).name for name in LENGTH_POLICIES] == list(LENGTH_POLICIES)
    assert resolve_length_policy("acceptance_head:0.25").threshold == 0.25


def test_a_head_beside_the_draft_model_is_found(tmp_path):
    HEAD.save(tmp_path)
    OTHER.config._name_or_path, before = str(tmp_path), OTHER.config._name_or_path
    try:
        named = run(some_prompts(5, 1), "acceptance_head:0.5", max_new_tokens=30, eos_token_id=None).speculation
        cost_model = CostModel()
        cost_model.check(TARGET, DraftModel(OTHER))
        assert cost_model.sees == {"logits", "hidden_states"}
        cost_model.check(OTHER, DraftModel(OTHER))  # the head is for another pair
        assert cost_model.sees == {"logits"}
    finally:
        OTHER.config._name_or_path = before
    given = run(some_prompts(5, 1), ByAcceptanceHead(0.5, head=HEAD), max_new_tokens=30, eos_token_id=None).speculation
    assert named.drafted_histogram == given.drafted_histogram


def test_a_drafter_of_propose_alone_is_served_by_what_sees_nothing():
    class Echo(Drafter):
        name = "echo"

        def propose(self, rows, max_tokens):
            return Draft(rows.last_tokens(1).expand(-1, max_tokens))

    prompts = some_prompts(5, 3)
    expected = [plain_greedy(TARGET, prompt, max_new_tokens=20, eos_token_id=None) for prompt in prompts]
    for policy in ("fixed", "heuristic", CostModel("beside", Ticks(), Knowledge()), AnyWidths()):
        out = run(prompts, policy, Echo(), max_new_tokens=20, eos_token_id=None)
        assert out.sequences[:, 5:].tolist() == expected
