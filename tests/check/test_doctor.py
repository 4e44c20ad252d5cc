"""`specdec doctor`: what it promises is what `generate` does, and it generates nothing."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from checkpoints import save_checkpoint, word_tokenizer
from families import tiny
from tiny import tiny_llama
from typer.testing import CliRunner

from specdec import batch_invariant
from specdec.cli.app import app
from specdec.network.memory import footprint
from specdec.network.native import build

MIB = 2**20
SHORT = "native" if build.is_switched_on() and build.library() else "fused"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_checkpoint(root / "target", tiny_llama())
    save_checkpoint(root / "draft", tiny_llama(1, num_hidden_layers=1))
    save_checkpoint(root / "foreign", tiny_llama(1), word_tokenizer(first=7))
    save_checkpoint(root / "gpt_neo", tiny("gpt_neo"), word_tokenizer(tiny("gpt_neo").config.vocab_size))
    save_checkpoint(root / "mamba", tiny("mamba"), word_tokenizer(tiny("mamba").config.vocab_size))
    return root


def doctor(model, *more):
    with mock.patch("transformers.generation.GenerationMixin.generate", side_effect=AssertionError("generated")):
        return CliRunner().invoke(app, ["doctor", str(model), *map(str, more)])


def diagnosis(model, *more):
    done = doctor(model, *more, "--json")
    return done.exit_code, json.loads(done.stdout)


def test_a_served_pair(folder):
    status, found = diagnosis(folder / "target", "--draft", folder / "draft", "--batch-size", 4, "--length", 100)
    assert status == 0 and found["served"] is True and not found["problems"]
    assert {name: served["network"] for name, served in found["layouts"].items()} == {
        "ragged": SHORT, "repad": SHORT, "grouped": SHORT,
    }  # fmt: skip
    assert found["drafters"]["draft_model"]["fits"] and found["drafters"]["prompt_lookup"]["fits"]
    assert not found["drafters"]["any_subset"]["fits"]
    # two layers: q, k, v, o, gate, up, down each, and the head; two norms each, and the last
    assert found["exactness"]["modules"] == {"Linear": 15, "LlamaRMSNorm": 5} and found["exactness"]["invariant"]
    assert found["exactness"]["network"] == "invariant"
    assert {"specdec", "torch", "transformers", "python"} <= set(found["versions"])
    memory = found["memory"]
    # keys and values, 2 layers, 2 heads of 8 numbers in float32; the draft has one layer
    assert memory["target"]["kv_per_token"] == 2 * 2 * 2 * 8 * 4 == 2 * memory["draft"]["kv_per_token"]
    cache = 4 * (100 + 6) * (memory["target"]["kv_per_token"] + memory["draft"]["kv_per_token"])
    assert memory["still_needed"] == cache + 4 * (6 + 1) * 61 * 4
    assert memory["total"] - memory["still_needed"] == sum(
        memory[role][part] for role in ("target", "draft") for part in ("weights", "packed")
    )


def test_the_text_says_the_same(folder):
    done = doctor(folder / "target", "--draft", folder / "draft")
    assert done.exit_code == 0
    for words in (
        "ragged",
        SHORT,
        "batch_invariant: yes",
        "15 Linear",
        "draft_model    yes",
        "rows fit",
        "NOT SERVED",
    ):
        assert (words in done.stdout) == (words != "NOT SERVED"), words


@pytest.mark.parametrize(("name", "layout", "status"), [("gpt_neo", "repad", 0), ("mamba", None, 2)])
def test_models_that_not_every_layout_serves(folder, name, layout, status):
    code, found = diagnosis(folder / name)
    assert code == status
    assert found["layouts"]["ragged"]["network"] is None and found["layouts"]["ragged"]["reason"]
    if layout is not None:
        assert found["layouts"][layout]["network"] == "stock" and found["memory"]["target"]["kv_per_token"] > 0
    else:
        assert found["memory"] is None and "recurrent" in found["problems"][0]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--draft", "foreign"], "tokenizer is different"),
        (["--length", "600"], "512 positions"),
        (["--batch-size", "1000000000"], "rows fit"),
    ],
)
def test_what_does_not_fit_is_a_no(folder, more, reason):
    more = [folder / word if word == "foreign" else word for word in more]
    status, found = diagnosis(folder / "target", *more)
    assert status == 2 and found["served"] is False
    assert len(found["problems"]) == 1 and reason in found["problems"][0]


def test_obstacles_to_invariance_are_named(folder):
    status, found = diagnosis(folder / "gpt_neo", "--dtype", "float64")
    assert status == 0 and not found["exactness"]["invariant"]
    assert "float64" in found["exactness"]["reason"]


def test_a_missing_checkpoint_is_bad_input(folder):
    assert doctor(folder / "nowhere").exit_code == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_the_cache_of_a_token_is_what_a_long_cache_takes(family):
    """Against the bytes that a generation allocates: rows x slots x bytes a token."""
    from specdec.network.choose import build_network

    model = tiny(family)
    network = build_network(model, 3, 40)
    with torch.no_grad(), network.running():
        network.forward(torch.ones(3, 5, dtype=torch.long), torch.zeros(3, dtype=torch.long), 5)
    assert network.cache.nbytes == 3 * 40 * footprint(model).kv_per_token
    assert footprint(model).weights >= 4 * model.num_parameters()


def test_the_cache_of_a_token_does_not_depend_on_how_an_invariant_cache_is_rounded():
    model = tiny_llama()
    expected = footprint(model).kv_per_token
    with batch_invariant(model):
        assert footprint(model).kv_per_token == expected
