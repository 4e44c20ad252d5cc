"""The cost model within the engine as on a GPU: networks that time their own steps and run ahead, played on a CPU."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running_ahead import running_ahead
from tiny import continuations, left_pad, plain_greedy, tiny_llama

import specdec
from specdec.drafters.candidates import Candidates
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.either import Either
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.limits import MAX_STEP_WIDTH
from specdec.network.choose import service_of
from specdec.network.invariant.network import InvariantNetwork
from specdec.policies.cost_model import CostModel
from tests.engine.test_ahead import CLOSE, OTHER, TARGET, some_prompts

WIDTHS = np.arange(MAX_STEP_WIDTH + 1)
DRAFTERS = {
    "other": lambda: DraftModel(OTHER),
    "close": lambda: DraftModel(CLOSE),
    "itself": lambda: DraftModel(TARGET),
    "lookup": PromptLookup,
    "lookup + close": lambda: Either(PromptLookup(), DraftModel(CLOSE)),
    "list": lambda: Candidates([DraftModel(CLOSE), PromptLookup()], has_plain=True),
}


class Made:
    """Costs of a GPU. Trying a step out overwrites what the network's last forward returned, as a replay does."""

    def __init__(self, network):
        self.network, self.is_draft = network, not network.must_be_exact
        self.known = network.__dict__.setdefault("known", set())

    @property
    def version(self):
        return len(self.known)

    def seconds(self, num_rows, used_slots):
        assert self.known
        return (0.8e-3 if self.is_draft else 4.5e-3) * (1 + 0.005 * num_rows * WIDTHS)

    def ready_seconds(self, num_rows, used_slots):
        widths = {width for rows, width in self.known if rows >= num_rows}
        is_ready = np.array([any(width >= asked for width in widths) for asked in WIDTHS])
        return np.where(is_ready, self.seconds(num_rows, used_slots), np.inf)

    def has(self, num_rows, width, used_slots):
        return (num_rows, width) in self.known

    def measure(self, num_rows, width, used_slots):
        if self.has(num_rows, width, used_slots):
            return
        self.known.add((num_rows, width))
        last = getattr(self.network, "last_output", None)
        if last is not None:
            last.logits.fill_(float("nan"))


@pytest.fixture(autouse=True)
def timed_by_themselves():
    with mock.patch.object(InvariantNetwork, "timings", property(Made)):
        yield


def generate(prompts, drafter, target=TARGET, **options):
    ids, mask = left_pad(prompts)
    service_of(target)  # is tried out while a network's outputs stay what they are
    policy = CostModel(head="beside")
    # On a GPU no estimate is asked for while drafting.
    decides_beforehand = mock.patch.object(CostModel, "_asks_while_drafting", lambda self, target, drafter: False)
    with decides_beforehand, running_ahead() as counts:
        out = specdec.generate(
            target, ids, mask, drafter=DRAFTERS.get(drafter, drafter)(), length_policy=policy, pad_token_id=0,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
    assert policy._chooser is not None
    return out, counts


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    drafter=st.sampled_from(sorted(DRAFTERS)),
    new_tokens=st.integers(1, 40),
    ends=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_tokens_are_plain_greedy_ones(lengths, drafter, new_tokens, ends, seed):
    prompts = some_prompts(*lengths, seed=seed)
    options = {"max_new_tokens": new_tokens, "eos_token_id": None}
    if ends:
        texts = [plain_greedy(TARGET, prompt, pad_token_id=0, **options) for prompt in prompts[:2]]
        options["eos_token_id"] = sorted({text[-1] for text in texts})
    expected = [plain_greedy(TARGET, prompt, pad_token_id=0, **options) for prompt in prompts]
    out, _ = generate(prompts, drafter, **options)
    assert continuations(out.sequences, max(lengths), expected, 0) == expected


@pytest.mark.parametrize("is_list", [False, True])
def test_steps_begin_ahead_with_what_was_learned(is_list):
    """The second call begins with the knowledge of the first, so that most of its steps are promised."""
    prompts, options = some_prompts(5, 3, 9), {"max_new_tokens": 60, "eos_token_id": None}
    target, draft = tiny_llama(0), tiny_llama(0)
    for model in (target, draft):  # of which nothing is known yet
        specdec.make_batch_invariant(model)

    def drafter():
        return Candidates([DraftModel(draft), PromptLookup()]) if is_list else DraftModel(draft)

    found = [generate(prompts, drafter, target, **options) for _ in range(2)]
    out, counts = found[1]
    assert counts["used"] + counts["drafts"] >= 0.6 * out.speculation.num_target_calls
    assert out.speculation.num_target_calls <= found[0][0].speculation.num_target_calls
    assert out.speculation.mean_acceptance_length > 2


def test_a_useless_drafter_is_left_alone_and_plain_steps_begin_ahead():
    prompts, options = some_prompts(5, 3, 9), {"max_new_tokens": 120, "eos_token_id": None}
    for _ in range(2):
        out, counts = generate(prompts, "other", **options)
    assert counts["used"] >= 0.8 * out.speculation.num_target_calls
    assert out.speculation.num_draft_tokens <= 0.05 * out.speculation.num_new_tokens


@pytest.mark.parametrize("drafter", ["close", "list"])
def test_rows_that_join_have_their_own_texts(drafter):
    prompts, options = some_prompts(5, 3, 9, 4, 7), {"max_new_tokens": 24, "eos_token_id": None}
    service_of(TARGET)
    with mock.patch.object(CostModel, "_asks_while_drafting", lambda self, target, drafter: False), running_ahead():
        run = specdec.generate_many(
            TARGET, prompts, drafter=DRAFTERS[drafter](), length_policy="cost_model", max_rows=2, **options
        )
        found = {done.index: done.token_ids for done in run}
    for index, prompt in enumerate(prompts):
        assert found[index] == plain_greedy(TARGET, prompt, pad_token_id=0, **options)


def test_samples_do_not_lose_their_rows():
    """Sampled rows are verified against their own distributions, whoever drafts."""
    prompts = some_prompts(5, 3, 9)
    out, _ = generate(prompts, "list", max_new_tokens=24, do_sample=True, temperature=0.8, seed=3, eos_token_id=None)
    assert out.sequences.shape == (3, 9 + 24) and int(out.sequences.max()) < TARGET.config.vocab_size
    assert torch.equal(out.sequences[:, :9], left_pad(prompts)[0])
