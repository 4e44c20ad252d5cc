"""Distillation: divergences against numbers worked by hand, masks, who gets gradients, data, and that it helps."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from checkpoints import PROMPTS, save_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCAB, plain_greedy, tiny_llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from specdec.cli.app import app
from specdec.drafters.training.data import TokenStream, TrainBatch
from specdec.drafters.training.distill.divergences import NAMES, divergence_of, forward_kl, jensen_shannon, reverse_kl
from specdec.drafters.training.distill.recipe import (
    Distillation,
    Reader,
    cross_entropy,
    distill,
    distillation_loss,
    row_mean,
    target_texts,
)
from specdec.drafters.training.distill.validation import Validation
from specdec.drafters.training.own_text import Prompts, Writing, write
from specdec.drafters.training.trainer import TrainConfig, TrainStep, make_accelerator
from specdec.errors import ConfigError, InputError

CPU = torch.device("cpu")
P, Q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
CUT = torch.tensor([0.5, 0.5, 0.0])


def distributions(size=5):
    weights = st.lists(st.floats(0.01, 1.0), min_size=size, max_size=size)
    return weights.map(lambda values: (torch.tensor(values, dtype=torch.float64) / sum(values)).log())


def test_divergences_worked_by_hand():
    """KL(p || cut) is infinite and KL(cut || p) is not: would catch exchanged arguments."""
    p, q, cut = P.log(), Q.log(), CUT.log()
    log2 = math.log(2)
    assert forward_kl(p, q).item() == pytest.approx(0.25 * log2)
    assert forward_kl(cut, p).item() == pytest.approx(0.5 * log2)
    assert forward_kl(p, cut).item() == math.inf
    assert reverse_kl(p, cut).item() == pytest.approx(0.5 * log2)
    assert reverse_kl(cut, p).item() == math.inf
    assert divergence_of("tvd")(p, q).item() == pytest.approx(0.25)
    m = 0.25 * P + 0.75 * CUT
    expected = 0.25 * (P * (P / m).log()).sum() + 0.75 * (CUT[:2] * (CUT[:2] / m[:2]).log()).sum()
    assert jensen_shannon(p, cut, 0.25).item() == pytest.approx(expected.item())


@given(distributions(), distributions(), st.floats(0.1, 0.9))
def test_divergences_vanish_between_equals_only(p, q, beta):
    for name in NAMES:
        divergence = divergence_of(name, beta)
        assert divergence(p, p).item() == pytest.approx(0, abs=1e-9)
        assert divergence(p, q).item() >= -1e-12
    assert torch.allclose(jensen_shannon(p, q), jensen_shannon(q, p))
    assert divergence_of("tvd")(p, q).item() == pytest.approx(1 - torch.minimum(p, q).exp().sum().item())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_stay_finite_where_a_probability_is_zero(name):
    logits = torch.tensor([[3.0, -200.0, 1.0]], requires_grad=True)
    log_p = torch.tensor([[-200.0, 2.0, 1.0]]).log_softmax(-1)
    divergence_of(name)(log_p, logits.log_softmax(-1)).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_prompts_and_padding_count_for_nothing():
    target, draft = tiny_llama(), tiny_llama(1)
    ids = torch.randint(3, VOCAB, (2, 9))
    counted = torch.zeros(2, 9, dtype=torch.bool)
    counted[0, 4:7], counted[1, 3:] = True, True
    loss = distillation_loss(target, draft, TrainBatch(ids, counted), divergence_of("fkl"))
    changed = ids.clone()
    changed[0, 7:] = 5  # behind the last counted token
    assert torch.equal(distillation_loss(target, draft, TrainBatch(changed, counted), divergence_of("fkl")), loss)
    logits = [model(ids).logits.log_softmax(-1) for model in (target, draft)]
    by_hand = forward_kl(*logits)
    assert loss.item() == pytest.approx((by_hand[0, 3:6].mean() + by_hand[1, 2:8].mean()).item() / 2, rel=1e-5)
    labels = logits[1][:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    expected = -(labels[0, 3:6].mean() + labels[1, 2:8].mean()) / 2
    assert cross_entropy(draft, TrainBatch(ids, counted)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_without_a_counted_position_do_not_count():
    values = torch.tensor([[1.0, 3.0], [9.0, 9.0]])
    assert row_mean(values, torch.tensor([[True, True], [False, False]])).item() == 2.0


def test_the_target_gets_no_gradient():
    target, draft = tiny_llama(), tiny_llama(1)
    batch = TrainBatch(torch.randint(3, VOCAB, (2, 6)), torch.ones(2, 6, dtype=torch.bool))
    distillation_loss(target, draft, batch, divergence_of("jsd")).backward()
    assert all(parameter.grad is None for parameter in target.parameters())
    assert all(parameter.grad is not None for parameter in draft.parameters())


def test_a_padded_vocabulary_is_cut_to_the_shared_tokens():
    target, draft = tiny_llama(), tiny_llama(1, vocab_size=64)
    batch = TrainBatch(torch.randint(3, VOCAB, (2, 6)), torch.ones(2, 6, dtype=torch.bool))
    assert distillation_loss(target, draft, batch, divergence_of("fkl")).isfinite()


def prompts():
    return Prompts([torch.tensor([5, 6, 7]), torch.tensor([11]), torch.tensor([8, 50])])


def test_written_text_is_the_models_own():
    model = tiny_llama()
    expected = [plain_greedy(model, prompt, max_new_tokens=6) for prompt in prompts().source]
    rows = write(model, prompts().source, Writing(6, 0.0, batch_size=2), seed=0)
    assert [row[len(p) :].tolist() for row, p in zip(rows, prompts().source, strict=True)] == expected
    sampled = [write(model, prompts().source, Writing(6, 1.0, size), seed=3) for size in (1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(*sampled, strict=True))  # whatever the batch
    assert [row.tolist() for row in sampled[0]] != [row.tolist() for row in rows]


def test_prompts_from_a_stream_are_pieces_of_it():
    source = Prompts(TokenStream(np.arange(400), 20), prefix=[1])
    found = source.get(3, 9)
    assert all(row[0] == 1 and torch.equal(row[1:] - row[1], torch.arange(len(row) - 1)) for row in found)
    assert len({len(row) for row in found}) > 1 and max(map(len, found)) <= 21
    assert torch.equal(source.get(5, 1)[0], found[2])


def test_batches_mix_sources_by_their_shares(tmp_path):
    target, draft = tiny_llama(), tiny_llama(1)
    data = Distillation(
        shares={"on-policy": 0.25, "target": 0.25, "fixed": 0.5},
        temperatures=(0.0,),
        batch_rows=8,
        row_tokens=10,
        num_texts=6,
        renew_every=2,
    )
    text = TokenStream(np.full(100, 4), 10)
    pool = target_texts(target, prompts(), data, 0, tmp_path, make_accelerator(CPU))
    reader = Reader(data, text, prompts(), pool, draft, 0)
    batches = [reader.batch(TrainStep(index, 0, 1, CPU)) for index in range(3)]
    assert all(batch.token_ids.shape == (8, 10) for batch in batches)
    for batch in batches:
        assert (batch.token_ids[4:] == 4).all() and batch.counted[4:].all()
        for rows, model in (((0, 1), draft), ((2, 3), target)):
            for row in rows:
                ids, counted = batch.token_ids[row], batch.counted[row]
                length = int(counted.long().argmax())
                want = plain_greedy(model, ids[:length], max_new_tokens=int(counted.sum()))
                assert ids[counted].tolist() == want
    state = reader.state_dict()
    again = Reader(data, text, prompts(), pool, draft, 0)
    again.load_state_dict(state)
    assert torch.equal(again.batch(TrainStep(3, 0, 1, CPU)).token_ids, reader.batch(TrainStep(3, 0, 1, CPU)).token_ids)


def test_own_text_is_read_so_often_and_then_renewed():
    draft = tiny_llama(1)
    data = Distillation(
        shares={"on-policy": 1.0}, temperatures=(0.0,), batch_rows=2, row_tokens=10, renew_every=4, own_reads=2
    )
    reader, pools, found = Reader(data, None, prompts(), None, draft, 0), [], []
    for index in range(8):
        found.append(reader.batch(TrainStep(index, 0, 1, CPU)).token_ids)
        pools.append(reader.own)
    assert all(pool is pools[0] for pool in pools[:4]) and all(pool is pools[4] for pool in pools[4:])
    assert pools[4] is not pools[0] and len(pools[0]) == 4
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"own_reads": 9}, "own_reads=9 must be from 1 to renew_every=8"),
        ({"loss": "mse"}, "loss 'mse' is unknown; choose one of fkl, rkl, jsd, tvd"),
        ({"loss": "jsd", "beta": 1.0}, "beta=1.0 must be between 0 and 1"),
        ({"shares": {"web": 1.0}}, "data source 'web' is unknown"),
        ({"shares": {"fixed": 0.5}}, "sum to 1"),
        ({"shares": {"fixed": 0.99, "target": 0.01}}, "less than one row of 32"),
        ({"loss": "ce", "shares": {"on-policy": 1.0}}, "teaches it nothing"),
        ({"temperatures": ()}, "temperatures is empty"),
    ],
)
def test_bad_distillation(options, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(**options)


def test_missing_data_is_named(tmp_path):
    target, draft, config = tiny_llama(), tiny_llama(1), TrainConfig(1, 1e-3)
    for shares, message in (({"fixed": 1.0}, "needs a training text"), ({"target": 1.0}, "need prompts")):
        with pytest.raises(InputError, match=message):
            distill(target, draft, Distillation(shares=shares), config, tmp_path, make_accelerator(CPU))
    with pytest.raises(ConfigError, match="leaves no room after prompts of up to 3"):
        data = Distillation(shares={"target": 1.0}, row_tokens=3)
        distill(target, draft, data, config, tmp_path, make_accelerator(CPU), prompts=prompts())


def bigram_model():
    """Its next token depends on the last alone, which is quickly learnt."""
    model = tiny_llama(initializer_range=0.4)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("shares", [{"target": 1.0}, {"on-policy": 0.5, "fixed": 0.5}])
def test_acceptance_rises(tmp_path, shares):
    """By the probabilities and in the decoder, on prompts that were not trained on."""
    target, draft = bigram_model(), tiny_llama(1, initializer_range=0.02)
    random = np.random.default_rng(0)
    some = Prompts([torch.tensor(random.integers(3, VOCAB, 4)) for _ in range(200)])
    held_out = [torch.tensor(random.integers(3, VOCAB, 4)) for _ in range(12)]
    validation = Validation(target, held_out, 12, num_speculative_tokens=3)
    before = validation.measure(draft)
    data = Distillation("fkl", shares=shares, temperatures=(0.0, 1.0), batch_rows=16, row_tokens=16, num_texts=200)
    text = TokenStream(torch.cat(write(target, some.source, Writing(12, 1.0), 7)), 16)
    distill(target, draft, data, TrainConfig(100, 1e-2), tmp_path, make_accelerator(CPU), text, some)
    after = validation.measure(draft)
    assert after["greedy_agreement"] > before["greedy_agreement"] + 0.3, (before, after)
    assert after["sampled_acceptance"] > before["sampled_acceptance"] + 0.3, (before, after)
    assert after["greedy_acceptance_length"] > before["greedy_acceptance_length"] + 0.5
    assert after["sampled_acceptance_length"] > before["sampled_acceptance_length"] + 0.5


def test_validation_agrees_with_itself():
    """A model accepts all of its own drafts: behind the prefill's token 4 + 1, then the 2 that are left."""
    validation = Validation(tiny_llama(), prompts().source, 8, num_speculative_tokens=4)
    measured = validation.measure(tiny_llama())
    assert measured["greedy_agreement"] == 1 and measured["sampled_acceptance"] == pytest.approx(1, abs=1e-5)
    assert measured["greedy_acceptance_length"] == 3.5
    assert measured["sampled_acceptance_length"] > 2.5  # a sample may end early
    assert measured["num_greedy_tokens"] == 24


@pytest.fixture
def pair(tmp_path):
    save_checkpoint(tmp_path / "target")
    save_checkpoint(tmp_path / "draft", tiny_llama(1).bfloat16())
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + i * i % 50}" for i in range(300)))
    return tmp_path


def run(pair, *more):
    options = [
        "--target",
        pair / "target",
        "--draft",
        pair / "draft",
        "--out",
        pair / "out",
        "--text",
        pair / "text.txt",
    ]
    options += ["--batch-rows", 4, "--row-tokens", 12, "--prompt-tokens", 4, "--texts", 8]
    return CliRunner().invoke(app, ["train", "distill", *map(str, options), *map(str, more)])


def test_the_command_trains_measures_and_saves(pair):
    more = ["--steps", 4, "--data", "mixed", "--validate", pair / "prompts.json", "--validation-tokens", 6]
    result = run(pair, *more, "--learning-rate", 0.01)
    assert result.exit_code == 0, result.output
    trained = AutoModelForCausalLM.from_pretrained(pair / "out", dtype="auto")
    assert trained.dtype == torch.bfloat16
    assert not torch.equal(trained.lm_head.weight, tiny_llama(1).bfloat16().lm_head.weight)
    card = (pair / "out" / "README.md").read_text()
    record = json.loads(card.partition("```json")[2].partition("```")[0])
    assert "KL(target || draft)" in card and "50% on-policy, 50% fixed" in card
    assert set(record["held_out"]) == {"before", "after"} and record["settings"]["num_steps"] == 4
    assert sorted(path.name for path in (pair / "out" / "training").iterdir()) == ["losses.jsonl"]
    again = run(pair, *more)
    assert again.exit_code == 2 and "already holds a model" in again.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loss", "mse"], "loss 'mse' is unknown"),
        (["--data", "target=half"], "'half' is not a number"),
        (["--data", "mixed", "--mix-share", 1], "must be between 0 and 1"),
        (["--precision", "int8"], "use float32 or bfloat16"),
        (["--data", "target", "--prompts", "missing.txt"], "cannot be read"),
    ],
)
def test_bad_options_are_refused_before_training(pair, more, message):
    result = run(pair, *more)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (pair / "out").exists()
