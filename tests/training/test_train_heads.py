"""Training what stops a draft: labels against brute force, only the head learns, and stopping by it pays."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import save_checkpoint
from tiny import VOCAB, tiny_llama
from typer.testing import CliRunner

from specdec.api.generate import generate
from specdec.cli.app import app
from specdec.drafters.training.data import TrainBatch
from specdec.drafters.training.heads.labels import draft_places, propose_everywhere
from specdec.drafters.training.heads.recipe import (
    AcceptanceHeadRecipe,
    DiscoRecipe,
    HeadData,
    calibration,
    log_loss,
    proposals_at,
    train_head,
)
from specdec.drafters.training.heads.simulate import Trace, below, compare_rules, fixed, oracle, product, speed
from specdec.drafters.training.own_text import Prompts
from specdec.drafters.training.trainer import TrainConfig, make_accelerator
from specdec.errors import ConfigError
from specdec.policies.heads.acceptance_head import AcceptanceHead
from specdec.policies.heads.disco import Disco

CPU = torch.device("cpu")
SMALL = 7  # tokens of a vocabulary that brute force can walk


def batch(rows=3, columns=9, vocab_size=SMALL):
    counted = torch.ones(rows, columns, dtype=torch.bool)
    counted[:, :3] = False
    return TrainBatch(torch.randint(3, vocab_size, (rows, columns)), counted)


def generator():
    return torch.Generator().manual_seed(0)


def statistics(q, token):
    other = max(share for index, share in enumerate(q.tolist()) if index != token)
    return [q[token].log().item(), np.log(other), torch.distributions.Categorical(q).entropy().item()]


@pytest.mark.parametrize("vocab_size", [SMALL, SMALL + 1])
def test_labels_by_brute_force(vocab_size):
    """Each prefix is given to both models alone, and acceptance of the proposal is computed from its definition."""
    target, draft = tiny_llama(vocab_size=SMALL), tiny_llama(1, vocab_size=vocab_size)
    text, is_sampled = batch(), torch.tensor([True, False, True])
    found = propose_everywhere(target, draft, text, is_sampled, generator())
    for row in range(3):
        for column in range(8):
            prefix = text.token_ids[row : row + 1, : column + 1]
            p = target(prefix).logits[0, -1].softmax(-1)
            output = draft(prefix, output_hidden_states=True)
            q = output.logits[0, -1, :SMALL].softmax(-1)
            token = int(found.token_ids[row, column])
            if is_sampled[row]:
                want = min(1.0, (p[token] / q[token]).item())
            else:
                assert token == int(q.argmax())
                want = float(token == int(p.argmax()))
            assert found.acceptance[row, column].item() == pytest.approx(want, abs=1e-4)
            assert found.statistics[row, column].tolist() == pytest.approx(statistics(q, token), abs=1e-4)
            assert torch.allclose(found.hidden[row, column], output.hidden_states[-1][0, -1], atol=1e-4)
    assert torch.equal(found.counted, text.predicts)


def test_sampled_proposals_follow_the_drafter():
    target, draft = tiny_llama(vocab_size=SMALL), tiny_llama(1, vocab_size=SMALL)
    text = TrainBatch(torch.tensor([[3, 4]]).repeat(20_000, 1), torch.ones(20_000, 2, dtype=torch.bool))
    found = propose_everywhere(target, draft, text, torch.ones(20_000, dtype=torch.bool), generator())
    q = draft(text.token_ids[:1, :1]).logits[0, 0].softmax(-1)
    shares = torch.bincount(found.token_ids[:, 0], minlength=SMALL) / 20_000
    assert torch.allclose(shares, q, atol=4 * 0.5 / 20_000**0.5)
    p = target(text.token_ids[:1, :1]).logits[0, 0].softmax(-1)
    assert found.acceptance.mean().item() == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.01)


def test_mixed_text_changes_what_the_drafter_reads_not_what_the_target_is_asked():
    target, draft = tiny_llama(vocab_size=SMALL), tiny_llama(1, vocab_size=SMALL)
    text, greedy = batch(), torch.zeros(3, dtype=torch.bool)
    plain = propose_everywhere(target, draft, text, greedy, generator())
    mixed = propose_everywhere(target, draft, text, greedy, generator(), mix_share=0.9)
    assert torch.equal(plain.acceptance, mixed.acceptance) and torch.equal(plain.token_ids, mixed.token_ids)
    assert torch.equal(plain.hidden[:, :3], mixed.hidden[:, :3])  # a prompt is never replaced
    assert not torch.equal(plain.hidden[:, 3:], mixed.hidden[:, 3:])


@pytest.mark.parametrize("weight", [1.0, 6.0])
def test_an_acceptance_head_starts_from_the_drafters_own_probability(weight):
    head = AcceptanceHead(32, rejection_weight=weight)
    AcceptanceHeadRecipe(head, 20).initialise()
    log_probs = torch.tensor([0.1, 0.5, 0.9]).log()
    statistics = torch.stack([log_probs, -torch.rand(3), torch.rand(3)], 1)
    assert torch.allclose(head.log_acceptance(torch.randn(3, 32), statistics), log_probs, atol=1e-5)


def test_places_are_those_of_decoding():
    """K = 3, prefill's token first: two accepted and a rejection, then a full draft and its bonus token."""
    accepted = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1, 1, 0]]).bool()
    counted = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    places, drafted = draft_places(accepted, counted, 3)
    assert drafted[0].tolist() == [False, False, True, True, True, True, True, True, False, True]
    assert places[0][drafted[0]].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_the_loss_of_specdecpp_by_hand():
    head = AcceptanceHead(32, 1, rejection_weight=3.0)
    proposals, accepted = proposals_at(
        tiny_llama(vocab_size=SMALL), tiny_llama(1, vocab_size=SMALL), batch(), HeadData(1, labels="sampled"), [0]
    )
    loss = AcceptanceHeadRecipe(head, 20).loss(head, proposals, accepted)
    above, below_line = 0.0, 0.0
    for row in range(3):
        for column in range(8):
            if proposals.counted[row, column]:
                logits = head(proposals.hidden[row, column], proposals.statistics[row, column])
                log_0, log_1 = logits.log_softmax(-1).tolist()
                a = proposals.acceptance[row, column].item()
                above += 3 * (1 - a) * -log_0 + a * -log_1
                below_line += 3 * (1 - a) + a
    assert loss.item() == pytest.approx(above / below_line, rel=1e-4)


@pytest.mark.parametrize("kind", [AcceptanceHead, Disco])
def test_only_the_head_learns(kind):
    target, draft = tiny_llama(), tiny_llama(1)
    head = AcceptanceHead(32) if kind is AcceptanceHead else Disco(5)
    recipe = (AcceptanceHeadRecipe if kind is AcceptanceHead else DiscoRecipe)(head, 20)
    proposals, accepted = proposals_at(target, draft, batch(vocab_size=VOCAB), HeadData(1), [0])
    recipe.loss(head, proposals, accepted).backward()
    assert all(parameter.grad is None for model in (target, draft) for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("kind", [AcceptanceHead, Disco])
def test_a_head_learns_and_is_saved_for_its_pair(tmp_path, kind, demo_pair):
    """It predicts held-out acceptance better than a constant; neither model changes."""
    target, draft = demo_pair.target, demo_pair.draft
    before = [parameter.clone() for model in (target, draft) for parameter in model.parameters()]
    prompts = Prompts(
        [demo_pair.tokenizer(text, return_tensors="pt")["input_ids"][0][-16:] for text in demo_pair.prompts]
    )
    data = HeadData(num_texts=80, num_held_out=32, num_new_tokens=24, batch_rows=8, labels="greedy")

    config = TrainConfig(num_steps=60, learning_rate=2e-3 if kind is AcceptanceHead else 1e-2)

    def run():
        torch.manual_seed(0)
        head = AcceptanceHead(128, 1) if kind is AcceptanceHead else Disco()
        return train_head(head, target, draft, prompts, data, config, tmp_path, make_accelerator(CPU))

    head = run()
    after = [parameter for model in (target, draft) for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    found = head.recipe["held_out"]["greedy"]
    assert found["log_loss"] < min(found["log_loss_of_constant"], found["log_loss_of_draft_probability"])
    loaded = kind.load(tmp_path)
    loaded.check(target, draft)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ConfigError, match="trained for another"):
        loaded.check(target, tiny_llama())
    with pytest.raises(ConfigError, match="already holds a trained"):
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "soft"}, "labels='soft'; choose one of greedy, sampled, both"),
        ({"mix_share": 1.0}, "mix_share=1.0"),
        ({"num_held_out": 1}, "too few"),
        ({"draft_cost": 0.0}, "must be above 0"),
    ],
)
def test_bad_head_data(options, message):
    with pytest.raises(ConfigError, match=message):
        HeadData(8, **options)


def traces(seed=0, count=30, tokens=60):
    """Acceptance that is known: predicted probabilities are the true ones, the drafter's own only half so."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        acceptance = random.choice([0.3, 0.99], size=tokens, p=[0.25, 0.75])
        top_prob = np.clip(acceptance + random.normal(0, 0.3, tokens), 0.01, 0.99)
        found.append(Trace(random.random(tokens) < acceptance, acceptance, top_prob))
    return found


def test_simulated_speed_counts_as_the_decoder_does(demo_pair):
    """Tokens per step of a fixed K, simulated on the target's text and counted by the decoder itself."""
    target, draft = demo_pair.target, demo_pair.draft
    ids = demo_pair.tokenizer(demo_pair.prompts[3], return_tensors="pt")["input_ids"]
    out = generate(
        target, ids, drafter=draft, num_speculative_tokens=4, max_new_tokens=65, return_dict_in_generate=True
    )
    text = out.sequences
    counted = torch.zeros_like(text, dtype=torch.bool)
    counted[:, ids.shape[1] + 1 :] = True  # the first new token comes from the prefill
    found = propose_everywhere(target, draft, TrainBatch(text, counted), torch.tensor([False]), generator())
    accepted = found.acceptance[0][found.counted[0]].bool().numpy()
    trace = Trace(accepted, np.ones(len(accepted)), np.ones(len(accepted)))
    assert speed([trace], fixed(4), 1e-9) == pytest.approx(64 / out.speculation.num_spec_steps, rel=1e-6)


def test_rules_stop_where_they_should():
    trace = Trace(np.array([1, 1, 0, 1], bool), np.array([0.9, 0.8, 0.5, 0.9]), np.array([0.9, 0.3, 0.9, 0.9]))
    assert product("acceptance", 0.05)(trace, 0) == 1  # 1 - 0.9 > 0.05: stops behind the token, which is kept
    assert product("acceptance", 0.2)(trace, 0) == 2 and product("acceptance", 0.5)(trace, 0) == 3
    assert below(0.4)(trace, 0) == 2 and below(0.4)(trace, 2) == 20
    assert oracle(trace, 0) == 2 and oracle(trace, 2) == 0
    assert [product("acceptance", h)(trace, 0) for h in (0.1, 0.3, 0.6, 0.99)] == sorted(
        product("acceptance", h)(trace, 0) for h in (0.1, 0.3, 0.6, 0.99)
    )


def test_a_good_prediction_beats_fixed_lengths_and_the_oracle_beats_it():
    rules = compare_rules(traces(), draft_cost=0.12)
    assert 0 < rules["head"]["gain"] < rules["oracle"]["gain"]
    assert rules["head"]["speed"] > rules["confidence"]["speed"]
    assert rules["oracle"]["share_of_oracle"] == 1 and rules["fixed"]["gain"] == 0


def test_calibration_and_log_loss():
    acceptance, predicted = np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.55, 0.55, 0.95, 0.95])
    assert log_loss(acceptance, predicted) == pytest.approx(-(np.log(0.55) + np.log(0.45) + 2 * np.log(0.95)) / 4)
    assert calibration(acceptance, predicted) == [
        {"predicted": pytest.approx(0.55), "actual": 0.5, "tokens": 2},
        {"predicted": pytest.approx(0.95), "actual": 1.0, "tokens": 2},
    ]


@pytest.mark.parametrize(("command", "kind"), [("acceptance-head", AcceptanceHead), ("disco", Disco)])
def test_the_commands_train_and_save(tmp_path, command, kind):
    save_checkpoint(tmp_path / "target")
    save_checkpoint(tmp_path / "draft", tiny_llama(1))
    (tmp_path / "prompts.json").write_text(json.dumps(["w5 w6 w7", "w11", "w8 w50 w4"]))
    options = ["--target", tmp_path / "target", "--draft", tmp_path / "draft", "--out", tmp_path / "out"]
    options += ["--prompts", tmp_path / "prompts.json", "--texts", 8, "--held-out", 4, "--new-tokens", 8]
    options += ["--steps", 3, "--batch-rows", 4]
    result = CliRunner().invoke(app, ["train", command, *map(str, options)])
    assert result.exit_code == 0, result.output
    assert "held-out greedy text" in result.stdout and "oracle" in result.stdout
    kind.load(tmp_path / "out").check(tiny_llama(), tiny_llama(1))
    card = (tmp_path / "out" / f"{kind.kind}.md").read_text()
    assert json.loads(card.partition("```json")[2].partition("```")[0])["settings"]["data"]["num_texts"] == 8
    again = CliRunner().invoke(app, ["train", command, *map(str, options)])
    assert again.exit_code == 2 and "already holds a trained" in again.stderr


def test_something_to_continue_is_needed(tmp_path):
    save_checkpoint(tmp_path / "target")
    options = ["--target", tmp_path / "target", "--draft", tmp_path / "target", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, ["train", "acceptance-head", *map(str, options)])
    assert result.exit_code == 2 and "pass --text PATH or --prompts FILE" in result.stderr
