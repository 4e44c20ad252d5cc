"""Training look-ahead embeddings: losses against the plain forward, nothing else learns, killed runs go on exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import save_checkpoint
from tiny import VOCAB, tiny_llama
from transformers import MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from specdec.cli.app import app
from specdec.drafters.look_ahead import LookAhead, LookAheadEmbeddings
from specdec.drafters.training.data import TokenStream, TrainBatch
from specdec.drafters.training.look_ahead import recipe as training_recipe
from specdec.drafters.training.look_ahead.recipe import (
    LookAheadLoss,
    LookAheadRecipe,
    draw_splits,
    initialise,
    label_places,
    loss_weights,
)
from specdec.drafters.training.look_ahead.run import Measure, train_look_ahead
from specdec.drafters.training.own_text import Prompts
from specdec.drafters.training.trainer import TrainConfig, make_accelerator, read_losses
from specdec.errors import ConfigError, InputError

CPU = torch.device("cpu")


def random_embeddings(num_tokens=3, hidden_size=32, num_helpers=2):
    made = LookAheadEmbeddings(num_tokens, hidden_size, num_helpers)
    torch.nn.init.normal_(made.weight, std=0.3)
    return made


def expected_losses(model, embeddings, token_ids, split):
    """By the definition: the text up to the split, the embeddings behind it, one plain forward."""
    inputs = torch.cat([model.get_input_embeddings()(token_ids[: split + 1]), embeddings.weight])[None]
    places = torch.tensor([*range(split + 1), split + 1, split + 1, split + 1, split + 2, split + 3])[None]
    mask = torch.ones(1, 1, places.shape[1], places.shape[1], dtype=torch.bool).tril()
    logits = model(inputs_embeds=inputs, position_ids=places, attention_mask=mask).logits[0, -embeddings.num_tokens :]
    labels = token_ids[split + 2 : split + 2 + embeddings.num_tokens]  # the split's own prediction is split + 1
    return F.cross_entropy(logits[: len(labels)], labels, reduction="none")


@torch.no_grad()
def test_losses_are_those_of_the_embeddings_behind_the_text():
    model, embeddings = tiny_llama(0), random_embeddings()
    token_ids, splits = torch.randint(3, 60, (2, 15)), torch.tensor([[0, 6, 6, 9], [11, 2, 12, 1]])
    found = LookAheadLoss(model, embeddings)(token_ids, splits)
    for row in range(2):
        for place, split in enumerate(splits[row].tolist()):
            expected = expected_losses(model, embeddings, token_ids[row], split)
            torch.testing.assert_close(found[row, place, : len(expected)], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_target_that_is_one_off_is_found(monkeypatch):
    """The check above, with embedding 1 told to predict what the target predicts by itself."""
    monkeypatch.setattr(training_recipe, "label_places", lambda splits, count: label_places(splits, count) - 1)
    with pytest.raises(AssertionError):
        test_losses_are_those_of_the_embeddings_behind_the_text()


def test_splits_and_weights():
    """Embedding 1 always has a counted token to predict; others count where theirs is."""
    counted = torch.zeros(3, 9, dtype=torch.bool)
    counted[0, 4:7], counted[1, 8] = True, True  # row 2 has none
    batch = TrainBatch(torch.zeros(3, 9, dtype=torch.long), counted)
    splits = draw_splits(batch, 50, torch.Generator().manual_seed(0))
    assert set(splits[0].tolist()) == {2, 3, 4} and set(splits[1].tolist()) == {6}
    weights = loss_weights(batch, splits, 3, 0.5)
    of_split = {split: weights[0, i].tolist() for i, split in enumerate(splits[0].tolist())}
    assert of_split == {2: [1, 0.5, 0.25], 3: [1, 0.5, 0], 4: [1, 0, 0]}
    assert (weights[1] == torch.tensor([1.0, 0, 0])).all() and not weights[2].any()


def test_only_the_embeddings_get_gradients():
    model, embeddings = tiny_llama(0), random_embeddings()
    loss = LookAheadLoss(model, embeddings)
    loss(torch.randint(3, 60, (2, 12)), torch.randint(0, 6, (2, 4))).sum().backward()
    assert [name for name, p in loss.named_parameters() if p.requires_grad] == ["embeddings.weight"]
    assert (embeddings.weight.grad.norm(dim=1) > 0).all()
    assert all(p.grad is None for p in model.parameters())


def test_where_training_starts():
    model, embeddings = tiny_llama(0), LookAheadEmbeddings(2, 32)
    own = model.get_input_embeddings().weight.detach()
    initialise(embeddings, model, None)
    torch.testing.assert_close(embeddings.weight.detach(), own.mean(0).expand(2, -1))
    initialise(embeddings, model, torch.tensor([5] * 3))  # with fewer kinds than are averaged, others fill up
    assert embeddings.weight.isfinite().all()


RECIPE = LookAheadRecipe(
    num_tokens=2,
    num_helpers=1,
    num_splits=6,
    shares={"target": 0.5, "fixed": 0.5},
    num_texts=8,
    batch_rows=4,
    row_tokens=16,
)
CONFIG = TrainConfig(num_steps=12, learning_rate=0.2, weight_decay=0.0, checkpoint_every=4)


def run(folder, kill_at=None, monkeypatch=None):
    model = tiny_llama(0)
    tokens = np.random.default_rng(0).integers(3, VOCAB, 600).astype(np.int32)
    if kill_at is not None:
        call = training_recipe.LookAheadStep.__call__

        def killed(self, wrapped, step):
            if step.index == kill_at:
                raise KeyboardInterrupt
            return call(self, wrapped, step)

        monkeypatch.setattr(training_recipe.LookAheadStep, "__call__", killed)
    before = {name: p.clone() for name, p in model.named_parameters()}
    done = train_look_ahead(
        model, RECIPE, CONFIG, folder, make_accelerator(CPU), TokenStream(tokens, 16), Prompts(TokenStream(tokens, 6))
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return done


def test_a_killed_run_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 6, patch)
    again = run(tmp_path / "killed")
    assert again.record.resumed_at == 4
    assert torch.equal(whole.embeddings.weight, again.embeddings.weight)
    assert read_losses(tmp_path / "whole" / "losses.jsonl") == read_losses(tmp_path / "killed" / "losses.jsonl")


def test_training_pays(tmp_path):
    """A target whose text repeats one piece: what comes next but one is known from the text, and gets learned."""
    model = tiny_llama(0)
    text = np.tile(np.arange(3, 9, dtype=np.int32), 100)
    recipe = LookAheadRecipe(num_tokens=2, num_splits=8, shares={"fixed": 1.0}, batch_rows=8, row_tokens=16)
    config = TrainConfig(num_steps=60, learning_rate=0.1, weight_decay=0.0)
    done = train_look_ahead(model, recipe, config, tmp_path, make_accelerator(CPU), TokenStream(text, 16))
    assert done.record.last_loss < 0.75 * done.record.first_loss


def test_measured_in_the_decoder():
    model = tiny_llama(0, vocab_size=7)
    measure = Measure(model, [torch.tensor([3, 4, 5]), torch.tensor([6, 3])], 30)
    found = measure(random_embeddings(3))
    shares = found["greedy_acceptance_by_position"]
    assert found["greedy_acceptance_length"] == pytest.approx(1 + sum(shares), abs=1e-3)
    assert 0 < found["sampled_acceptance_by_position"][0] < 1


def test_the_command(tmp_path):
    target = save_checkpoint(tmp_path / "target")
    lines = [json.dumps({"text": " ".join(f"w{3 + (i * n) % 50}" for n in range(40))}) for i in range(1, 20)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "held_out.json").write_text(json.dumps(["w5 w6 w7", "w9 w10"]))
    command = (
        f"train look-ahead --target {target} --out {tmp_path / 'out'} --text {tmp_path / 'text.jsonl'} "
        "--num-tokens 2 --helpers 1 --splits 4 --texts 8 --steps 3 --batch-rows 2 --row-tokens 24 --prompt-tokens 8 "
        f"--validate {tmp_path / 'held_out.json'} --validation-tokens 8"
    ).split()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "greedy_acceptance_length" in done.output and (tmp_path / "out" / "look_ahead.md").exists()
    drafter = LookAhead.load(tmp_path / "out")
    assert set(drafter.embeddings.recipe["held_out"]) == {"before", "after"}
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "already holds look-ahead embeddings" in again.output
    generated = CliRunner().invoke(
        app,
        f"generate --target {target} --look-ahead {tmp_path / 'out'} --num-speculative-tokens 2 --max-new-tokens 8 "
        "--prompt w5".split(),
    )
    assert generated.exit_code == 0, generated.output
    checked = CliRunner().invoke(
        app,
        f"check --target {target} --draft {tmp_path / 'out'} --num-speculative-tokens 1,2 --max-new-tokens 8 "
        f"--prompts {tmp_path / 'held_out.json'} --batch-size 2".split(),
    )
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--drafter look_ahead", "needs the embeddings; pass --look-ahead FOLDER"),
        ("--drafter prompt_lookup --look-ahead F", "is for --drafter look_ahead"),
        ("--draft D --look-ahead F", "both choose a drafter"),
        ("--look-ahead F", "holds no look_ahead.json"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path):
    target = save_checkpoint(tmp_path / "target")
    done = CliRunner().invoke(app, f"generate --target {target} --prompt w5 {options}".split())
    assert done.exit_code == 2 and message in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens=0 must be at least 1"),
        ({"num_helpers": -1}, "num_helpers=-1 must be at least 0"),
        ({"decay": 0.0}, "decay=0.0 must be above 0"),
        ({"init": "zero"}, "init='zero'; choose 'mean' or 'frequent'"),
        ({"row_tokens": 8}, "leaves no split for 8"),
        ({"shares": {"on-policy": 1.0}}, "use target or fixed"),
    ],
)
def test_bad_recipes(options, message):
    with pytest.raises(ConfigError, match=message):
        LookAheadRecipe(**options)


def test_what_is_missing_is_said_before_work(tmp_path):
    config, accelerator = TrainConfig(1, 1e-3), make_accelerator(CPU)
    for share, message in (("fixed", "needs a training text"), ("target", "needs prompts")):
        with pytest.raises(InputError, match=message):
            train_look_ahead(tiny_llama(), LookAheadRecipe(shares={share: 1.0}), config, tmp_path, accelerator)
    small = dict(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    windowed = MistralForCausalLM(MistralConfig(**small, num_key_value_heads=2, sliding_window=64))
    with pytest.raises(ConfigError, match="sliding_window=64; lower row_tokens"):
        train_look_ahead(windowed, LookAheadRecipe(), config, tmp_path, accelerator)
