"""Training of any-subset models: what is hidden, what is seen, that the loss is the joint density, and whole runs."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_xlnet import tiny_xlnet
from transformers import AutoTokenizer
from typer.testing import CliRunner

import specdec
from specdec.cli.app import app
from specdec.cli.demo import shipped_pair
from specdec.drafters.training.any_subset.recipe import (
    AnySubsetLoss,
    AnySubsetStep,
    MaskRecipe,
    draft_acceptance,
    draw_gaps,
    validate,
    visibility,
)
from specdec.drafters.training.any_subset.run import load_xlnet
from specdec.drafters.training.data import TokenStream
from specdec.drafters.training.trainer import TrainStep
from specdec.errors import ConfigError
from specdec.network.any_subset.model import Order, XLNet

VOCAB = 11


@given(
    st.integers(1, 8), st.integers(2, 40), st.floats(0.01, 0.5), st.floats(0.5, 0.99), st.floats(0, 1),
    st.integers(0, 20),
)  # fmt: skip
def test_masks_hide_what_the_rates_say(rows, length, low, high, span_share, seed):
    hidden = MaskRecipe((low, high), 0, span_share).draw((rows, length), 0, torch.Generator().manual_seed(seed))
    counts = hidden.sum(1)
    assert (counts >= 1).all() and (counts < length).all()
    assert (counts >= low * length - 1).all() and (counts <= high * length + 1).all()


def test_masks_cover_the_rates_evenly():
    hidden = MaskRecipe((0.1, 0.9), 0, 0.0).draw((80, 1000), 0, torch.Generator().manual_seed(0))
    rates = (hidden.sum(1) / 1000).sort().values
    assert ((rates - (0.1 + 0.8 * (torch.arange(80) + 0.5) / 80)).abs() < 0.02).all()


def test_blocks_are_whole():
    hidden = MaskRecipe((0.3, 0.6), 0, 1.0).draw((50, 30), 0, torch.Generator().manual_seed(0))
    edges = (hidden[:, 1:] != hidden[:, :-1]).sum(1) + hidden[:, 0] + hidden[:, -1]
    assert (edges == 2).all()


def test_both_rates_ramp():
    recipe = MaskRecipe((0.85, 0.99), 100)
    assert recipe.rates_at(0) == (0.15, 0.15)
    assert recipe.rates_at(50) == pytest.approx((0.5, 0.57))
    assert recipe.rates_at(100) == recipe.rates_at(9999) == pytest.approx((0.85, 0.99))


def test_who_sees_whom():
    hidden = torch.tensor([[0, 1, 1, 0, 1]]).bool()
    content, queries = visibility(hidden, torch.tensor([[[0] * 5, [0, 1, 1, 0, 2]]]))
    assert content[0].int().tolist() == [
        [1, 0, 0, 1, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 0], [1, 0, 0, 1, 0], [1, 1, 1, 1, 1],
    ]  # fmt: skip
    assert queries[0, 0, [1, 2, 4]].int().tolist() == [[1, 0, 0, 1, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 0]]
    assert queries[0, 1, [1, 2, 4]].int().tolist() == [[1, 0, 0, 1, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 0]]
    assert queries.any(-1).all(), "whoever sees nothing attends to everything"


def test_the_loss_is_the_joint_density():
    model = tiny_xlnet()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (3, 12), generator=generator)
    hidden = MaskRecipe((0.3, 0.8), 0).draw((3, 12), 0, generator)
    nll = AnySubsetLoss(model)(ids, hidden, torch.zeros(3, 1, 12, dtype=torch.long))[:, 0]
    order = Order.lattice(hidden, torch.ones_like(hidden))
    ranks = torch.arange(12).expand(3, -1)
    with torch.no_grad():
        tokens = ids.gather(1, order.positions)
        logits = XLNet(model).conditional_logits(tokens, order, order.lengths, ranks)
        expected = -logits.log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
        expected = expected.masked_fill(ranks < order.num_visible[:, None], 0)
    torch.testing.assert_close(nll.gather(1, order.positions), expected, atol=1e-4, rtol=1e-4)


def test_gaps():
    gaps = draw_gaps((50, 200), torch.Generator().manual_seed(0))
    assert gaps.min() == 1 and gaps.max() == 8
    assert ((gaps == 1).float().mean() - 0.5).abs() < 0.02


def test_steps_are_functions_of_their_number():
    module = AnySubsetLoss(tiny_xlnet())
    step_of = AnySubsetStep(TokenStream(torch.arange(2000) % VOCAB, 16), 4, MaskRecipe(ramp_steps=3))
    losses = [float(step_of(module, TrainStep(i, 0, 1, torch.device("cpu"))).detach()) for i in (5, 6, 5)]
    assert losses[0] == losses[2] != losses[1]


def test_validation_leaves_the_mode_and_repeats():
    module = AnySubsetLoss(tiny_xlnet().train())
    rows = torch.arange(320).view(20, 16) % VOCAB
    first = validate(module, rows, (0.5,))
    assert module.training and first == validate(module, rows, (0.5,)) and set(first) == {"anywhere", "block"}
    shares = draft_acceptance(module, rows, 0.9, 2)
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"mask_rates": (0.5, 1.0)}, "0 < low <= high < 1"),
        ({"mask_rates": (0.6, 0.5)}, "0 < low <= high < 1"),
        ({"span_share": 2}, "use 0 to 1"),
        ({"draft_weight": -1}, "must not be negative"),
    ],
)
def test_recipes_that_cannot_be_served(bad, match):
    with pytest.raises(ConfigError, match=match):
        MaskRecipe(**bad)


def test_a_whole_run_and_going_on_from_it(tmp_path):
    """The text repeats itself, so a small model learns it; what is written fills it in and can be trained further."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    out, more = tmp_path / "out", tmp_path / "more"
    shared = ["--text", text, "--held-out", text, "--row-tokens", 24, "--batch-rows", 8, "--ramp-steps", 5]
    arguments = [
        "--out", out, "--tokenizer", shipped_pair() / "target", "--d-model", 32, "--layers", 2, "--heads", 2,
        "--d-inner", 64, "--steps", 60, "--learning-rate", 5e-3, *shared,
    ]  # fmt: skip
    done = CliRunner().invoke(app, ["train", "any-subset", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "README.md", "tokenizer.json"}
    card = (out / "README.md").read_text()
    record = json.loads(card.split("```json\n")[1].split("```")[0])
    assert record["last loss"] < 0.6 * record["first loss"]
    assert record["held-out loss"]["block"]["0.5"] < 4
    tokenizer, model = AutoTokenizer.from_pretrained(out), load_xlnet(out).eval()
    assert model.config.mask_token_id == tokenizer.mask_token_id and model.config.max_positions == 24
    ids = torch.tensor([tokenizer("the quick brown fox jumps over")["input_ids"]])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 3] = True
    assert specdec.infill(model, ids, mask).shape == ids.shape
    arguments = ["--out", more, "--model", out, "--steps", 3, *shared]
    done = CliRunner().invoke(app, ["train", "any-subset", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    again = json.loads((more / "README.md").read_text().split("```json\n")[1].split("```")[0])
    assert again["first loss"] < record["first loss"] / 1.5


def test_training_options_that_contradict(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 300)
    both = ["--tokenizer", shipped_pair() / "target", "--model", shipped_pair() / "target"]
    cases = (
        ([], "pass either --tokenizer"),
        (both, "pass either --tokenizer"),
        (["--model", shipped_pair() / "target"], "cannot be loaded as an XLNet"),
        (["--tokenizer", shipped_pair() / "target", "--d-model", 30, "--heads", 4], "multiple of num_heads=4"),
    )
    for extra, message in cases:
        arguments = ["train", "any-subset", "--text", text, "--out", tmp_path / "out", *extra]
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 2 and message in done.stderr, done.output
