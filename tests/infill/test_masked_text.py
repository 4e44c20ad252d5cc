"""Texts with places to fill: tags, lines, windows, and `specdec infill` around them."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_xlnet import tiny_xlnet
from transformers import AutoTokenizer
from typer.testing import CliRunner

from specdec.cli.app import app
from specdec.cli.demo import shipped_pair
from specdec.drafters.training.any_subset.recipe import MASK_TOKEN
from specdec.errors import InputError
from specdec.infill.masked_text import MaskedText, mask_lines, parse_masks

TEXT = "import os\n\n\ndef f(x):\n    y = x + 1\n    return y\n"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_pair() / "target")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A random model with the demo pair's tokenizer."""
    folder = tmp_path_factory.mktemp("infill_model")
    with_mask = AutoTokenizer.from_pretrained(shipped_pair() / "target")
    with_mask.add_special_tokens({"mask_token": MASK_TOKEN})
    tiny_xlnet(vocab_size=len(with_mask), max_positions=64).save_pretrained(folder)
    with_mask.save_pretrained(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["infill", *map(str, arguments)])


def test_tags(tokenizer):
    masked = parse_masks("def f(<mask:3>):\n<mask:2>", tokenizer)
    assert masked.mask.sum() == 5 and masked.mask[-2:].all()
    assert tokenizer.decode(masked.token_ids[~masked.mask]) == "def f():\n"


@pytest.mark.parametrize("tag", ["<mask>", "<mask:0>", "<mask: 3>", "<mask:three>", "<MASK:3>", "<mask:3", "< mask:3>"])
def test_tags_that_are_spelled_wrongly(tokenizer, tag):
    with pytest.raises(InputError, match=r"is not a mask; write <mask:12>"):
        parse_masks(f"def f({tag}): <mask:2>", tokenizer)


def test_text_without_tags(tokenizer):
    with pytest.raises(InputError, match=r"has no <mask:N>.*write <mask:12>"):
        parse_masks("def f(unmasked): pass", tokenizer)


def test_lines(tokenizer):
    masked = mask_lines(TEXT, ["5", "1-2"], tokenizer)
    assert tokenizer.decode(masked.token_ids) == TEXT
    assert tokenizer.decode(masked.token_ids[masked.mask]) == "import os\n\n    y = x + 1\n"


@pytest.mark.parametrize(
    "ranges, match",
    [
        (["2-4", "4-5"], "masks overlap: line 4 is in 2-4 and in 4-5; name each line once"),
        (["3-2"], "not a range; write 3 or 3-5"),
        (["0"], "not a range; write 3 or 3-5"),
        (["a"], "not a range; write 3 or 3-5"),
        (["4-7"], "end after the text's 6 lines"),
    ],
)
def test_lines_that_are_none(tokenizer, ranges, match):
    with pytest.raises(InputError, match=match):
        mask_lines(TEXT, ranges, tokenizer)


def test_window():
    mask = torch.zeros(100, dtype=torch.bool)
    mask[60:64] = True
    masked = MaskedText(torch.arange(100), mask)
    window, first = masked.around(20)
    assert window.token_ids.tolist() == list(range(first, first + 20)) and window.mask.sum() == 4
    assert masked.around(100) == (masked, 0)
    mask[99] = True
    with pytest.raises(InputError, match=r"span 40 tokens, and the model has 20 positions"):
        masked.around(20)


def test_command(checkpoint, tmp_path):
    done = run("--model", checkpoint, "--text", "def f(<mask:4>):\n    return", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["num_tokens"] == 4 and 1 <= record["num_calls"] <= 4
    assert record["text"].startswith("def f(") and record["text"].endswith("):\n    return")
    plain = run("--model", checkpoint, "--text", "def f(<mask:4>):\n    return", "--drafter", "none")
    assert plain.stdout == record["text"] + "\n"
    path = tmp_path / "module.py"
    path.write_text(TEXT * 5)
    filled = run("--model", checkpoint, "--file", path, "--lines", "11", "--do-sample", "--seed", 3)
    assert filled.exit_code == 0, filled.output
    assert filled.stdout.startswith(TEXT) and filled.stdout.endswith(TEXT + "\n")
    assert (
        filled.stdout == run("--model", checkpoint, "--file", path, "--lines", "11", "--do-sample", "--seed", 3).stdout
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text", "def f(<mask>):"], "write <mask:12>"),
        ([], "pass either --text TEXT or --file FILE"),
        (["--text", "<mask:1> x", "--lines", "1"], "pass --file with it"),
        (["--file", "missing.py"], "cannot be read"),
        (["--text", "<mask:9>"], "at least one visible token"),
        (["--text", "x <mask:80>"], "span 80 tokens, and the model has 64 positions"),
        (["--text", "x <mask:2>", "--drafter", "magic"], "choose self, ahead, ngram or none"),
    ],
)
def test_command_refusals(checkpoint, arguments, message):
    done = run("--model", checkpoint, *arguments)
    assert done.exit_code == 2 and message in done.stderr, done.output


def test_tokenizer_without_a_mask_token(tmp_path, tokenizer):
    tiny_xlnet(vocab_size=len(tokenizer), mask_token_id=None).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = run("--model", tmp_path, "--text", "x <mask:2>")
    assert done.exit_code == 2 and "has no mask token; pass --mask-token-id N" in done.stderr
    assert run("--model", tmp_path, "--text", "x <mask:2>", "--mask-token-id", 1).exit_code == 0


def test_a_model_without_two_streams():
    done = run("--model", shipped_pair() / "target", "--text", "x <mask:2>", "--mask-token-id", 1)
    assert done.exit_code == 2 and "has no second stream" in done.stderr
