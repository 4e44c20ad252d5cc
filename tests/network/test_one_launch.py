"""Only a draft model's steps are one launch, and the output is plain greedy's all the same.

Off a GPU the step is its reference; what is tested here is who is given it.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from families import tiny
from tiny import continuations, left_pad, plain_greedy, tiny_llama
from transformers import Qwen3Config, Qwen3ForCausalLM

import specdec
from specdec import batch_invariant
from specdec.kernels.persistent import step as persistent_step
from specdec.kernels.persistent.step import MAX_TOKENS, PersistentStep
from specdec.network.choose import build_network
from specdec.network.invariant import one_launch
from specdec.network.invariant.network import InvariantDraftNetwork, InvariantForward, InvariantNetwork, kept_invariant
from specdec.network.kept_forwards import kept_of

ROOT = Path(__file__).parents[2]
PROMPTS = [torch.tensor(ids) for ids in ([5, 9, 7, 5, 9, 7, 5, 9], [11, 4, 8], [6, 13, 21, 34, 6, 13, 3, 8, 6, 13, 40])]


@pytest.fixture
def steps(monkeypatch):
    """Lets this device have the step at every size; the embeddings of the models that took one, in order."""
    taken = []
    call = PersistentStep.__call__

    def spy(self, token_ids, starts):
        taken.append(self.tensors.embedding.data_ptr())
        return call(self, token_ids, starts)

    monkeypatch.setattr(one_launch, "can_persist", lambda device: True)
    monkeypatch.setattr(persistent_step, "FASTER_UP_TO", MAX_TOKENS)
    monkeypatch.setattr(PersistentStep, "__call__", spy)
    return taken


def address(model):
    return model.model.embed_tokens.weight.data_ptr()


def tiny_qwen3():
    torch.manual_seed(4)
    config = Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("drafts_for_itself", [False, True])
@pytest.mark.parametrize("length_policy", ["fixed", "confidence"])
def test_greedy_output_is_exact_and_the_target_takes_no_such_step(steps, drafts_for_itself, length_policy):
    target = tiny_llama()
    draft = target if drafts_for_itself else tiny_qwen3()
    ids, mask = left_pad(PROMPTS)
    with batch_invariant(target), batch_invariant(draft):
        expected = [plain_greedy(target, prompt, max_new_tokens=16) for prompt in PROMPTS]
        out = specdec.generate(
            target, ids, mask, drafter=draft, num_speculative_tokens=3, max_new_tokens=16, pad_token_id=0,
            length_policy=length_policy,
        )  # fmt: skip
        assert continuations(out, ids.shape[1], expected, 0) == expected
        assert set(steps) == {address(draft)}
        num_steps = len(steps)
        specdec.generate(draft, ids, mask, drafter="prompt_lookup", max_new_tokens=8, pad_token_id=0)
        assert len(steps) == num_steps, "the same model as a target is exact"
    assert kept_of(target, InvariantNetwork).one_launch is None
    assert kept_of(draft, InvariantDraftNetwork).one_launch is not None
    assert kept_of(target, InvariantDraftNetwork) is None or drafts_for_itself
    assert kept_of(draft, InvariantNetwork).cache is not kept_of(draft, InvariantDraftNetwork).cache


def test_a_network_is_exact_unless_the_caller_says_otherwise(steps):
    model = tiny_llama()
    with batch_invariant(model):
        exact, fast = build_network(model, 3, 40), build_network(model, 3, 40, must_be_exact=False)
        assert isinstance(exact, InvariantNetwork) and exact.must_be_exact and not fast.must_be_exact
        ids = torch.tensor([[5, 9]])
        for network, num_steps in ((exact, 0), (fast, 1)):
            with network.running():
                network.forward(ids, torch.tensor([0]), 2)
            assert len(steps) == num_steps


def test_a_gemma_has_no_one_launch_step(steps):
    """Its parts have the names of llama's, but other norms, activations and embeddings."""
    model = tiny("gemma", vocab_size=64, intermediate_size=64)
    with batch_invariant(model):
        network = build_network(model, 3, 40, must_be_exact=False)
        assert isinstance(network, InvariantNetwork)
        with network.running():
            assert network.kept.one_launch is None
            network.forward(torch.tensor([[5, 9]]), torch.tensor([0]), 2)
        assert not steps


def test_many_tokens_and_other_layers_take_the_longer_way(steps):
    model = tiny_llama()
    network = build_network(model, 3, 40, must_be_exact=False)
    assert not isinstance(network, InvariantNetwork), "only batch-invariant models"
    with batch_invariant(model):
        network = build_network(model, 3, 40, must_be_exact=False)
        width = MAX_TOKENS // 3 + 1
        with network.running(), torch.no_grad():
            starts = torch.tensor([0, 4, 9])
            for ids, layers, num_steps in (
                (torch.ones(3, width, dtype=torch.long), (), 0),
                (torch.ones(3, 1, dtype=torch.long), (1, -1), 0),
                (torch.ones(3, 1, dtype=torch.long), (-1,), 1),
            ):
                out = network.forward(ids, starts, 9 + width, layers)
                assert len(steps) == num_steps and len(out.hidden_states) == len(layers)
        # Both ways share the cache's layout: a step behind prompts that the other way cached.
        with network.running(), kept_invariant(model, 3, 40) as exact, torch.no_grad():
            rows = specdec.Rows(PROMPTS, 16, 0, model.device)
            network.prefill(rows)
            for ours, theirs in zip(network.cache.layers, exact.cache.layers, strict=True):
                theirs.keys[:3, :40], theirs.values[:3, :40] = ours.keys[:3, :40], ours.values[:3, :40]
            ids = torch.tensor([[5], [6], [7]])
            got = network.forward(ids, rows.lengths, 20).logits
            torch.testing.assert_close(got, exact(ids, rows.lengths, 20, ()).logits, rtol=1e-4, atol=1e-4)
        assert len(steps) == 2


def test_steps_that_do_not_pay_take_the_longer_way(steps, monkeypatch):
    """Those of many tokens, and over long texts those of more than one."""
    monkeypatch.setattr(persistent_step, "FASTER_UP_TO", 2)
    monkeypatch.setattr(persistent_step, "FASTER_SLOTS", 16)
    model = tiny_llama()
    with batch_invariant(model), torch.no_grad():
        network = build_network(model, 3, 40, must_be_exact=False)
        with network.running():
            for rows, used_slots, is_one in (
                (3, 9, False),
                (2, 16, True),
                (2, 17, False),
                (1, 32, True),
                (1, 33, False),
            ):
                tokens = torch.ones(rows, 1, dtype=torch.long)
                network.forward(tokens, torch.full((rows,), used_slots - 1), used_slots)
                assert bool(steps) == is_one
                steps.clear()


def test_resized_networks_keep_what_is_cached(steps):
    model = tiny_llama()
    with batch_invariant(model), torch.no_grad():
        network, rows = build_network(model, 1, 40, must_be_exact=False), specdec.Rows(PROMPTS[:1], 16, 0, model.device)
        with network.running():
            network.prefill(rows)
            expected = network.forward(torch.tensor([[5]]), rows.lengths, 20).logits
            network.resize(3, 900)
            got = network.forward(torch.tensor([[5]]), rows.lengths, 20).logits
            assert len(steps) == 2 and torch.equal(got, expected)


def test_a_stand_in_has_the_step_that_a_real_model_has(steps, monkeypatch, demo_pair):
    """Or the benchmark on stand-ins would time another step."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stand_in = importlib.import_module("stand_in")
    model = stand_in.inflate(demo_pair.draft, stand_in.SHAPES["tiny"], torch.float32, "cpu")
    assert InvariantForward(model, 1, 40, must_be_exact=False).one_launch is not None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_generate_on_a_gpu_with_steps_of_one_launch(dtype, monkeypatch):
    monkeypatch.setattr(persistent_step, "FASTER_UP_TO", MAX_TOKENS)
    target, draft = tiny_llama().to("cuda", dtype), tiny_qwen3().to("cuda", dtype)
    ids, mask = (x.cuda() for x in left_pad(PROMPTS))
    with batch_invariant(target), batch_invariant(draft):
        expected = [plain_greedy(target, prompt.cuda(), max_new_tokens=40) for prompt in PROMPTS]
        for drafter in (draft, target):
            out = specdec.generate(
                target, ids, mask, drafter=drafter, num_speculative_tokens=4, max_new_tokens=40, pad_token_id=0
            )
            assert continuations(out, ids.shape[1], expected, 0) == expected
            assert kept_of(drafter, InvariantDraftNetwork).one_launch is not None
        assert kept_of(target, InvariantNetwork).one_launch is None
