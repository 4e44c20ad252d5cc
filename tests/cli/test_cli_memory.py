"""`specdec memory`, and drafters that start with its files."""

from __future__ import annotations

import json

import pytest
from checkpoints import PROMPTS, save_checkpoint, word_tokenizer
from tiny import tiny_llama
from typer.testing import CliRunner

from specdec import SuffixMemory
from specdec.cli.app import app


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("target"), tiny_llama())


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def steps_of(path):
    return [json.loads(line)["num_steps"] for line in path.read_text().splitlines()]


def generate(target, out, *more):
    options = ["--prompts", target / "prompts.json", "--batch-size", 1, "--max-new-tokens", 20, "--out", out]
    done = run("generate", "--target", target, *options, *more)
    assert done.exit_code == 0, done.output


def test_what_was_generated_is_remembered(target, tmp_path):
    """The rows of one run are the memory of the next: fewer steps, and the same text."""
    (target / "prompts.json").write_text(json.dumps(PROMPTS))
    first, second, memory = tmp_path / "first.jsonl", tmp_path / "second.jsonl", tmp_path / "memory.npz"
    generate(target, first, "--drafter", "suffix:learn=false")
    done = run("memory", "build", "--tokenizer", target, "--texts", first, "--out", memory)
    assert done.exit_code == 0 and f"{memory}: {len(PROMPTS)} texts, " in done.stdout, done.output
    generate(target, second, "--drafter", f"suffix:memory={memory}")
    texts = [[json.loads(line)["completion_ids"] for line in path.read_text().splitlines()] for path in (first, second)]
    assert texts[0] == texts[1]
    assert sum(steps_of(second)) < 0.5 * sum(steps_of(first))

    about = json.loads(run("memory", "inspect", memory, "--json").stdout)
    assert about["texts"] == len(PROMPTS) and about["bytes"] == 8 * about["tokens"] == 8 * sum(about["segments"])
    told = run("memory", "inspect", memory)
    assert told.exit_code == 0 and f"{len(PROMPTS)} texts, {about['tokens']} of at most 16777216 tokens" in told.stdout


def test_texts_of_each_kind(target, tmp_path):
    (tmp_path / "a.txt").write_text("w5 w6\nw7")
    (tmp_path / "b.py").write_text("w8\nw9\n")
    (tmp_path / "c.jsonl").write_text('{"text": "w3 w4"}\n{"prompt_ids": [9], "completion_ids": [8, 2]}\n')
    out = tmp_path / "memory.npz"
    options = ["--prompts", tmp_path / "a.txt", "--texts", tmp_path / "b.py", "--texts", tmp_path / "c.jsonl"]
    done = run("memory", "build", "--tokenizer", target, *options, "--max-tokens", 100, "--out", out)
    assert done.exit_code == 0, done.output
    codes = [code for segment in SuffixMemory.load(out).segments for code in segment.codes.tolist()]
    # a line of one token is followed by nothing
    assert codes == [6, 7, 0, 9, 10, 0, 4, 5, 0, 10, 9, 3, 0]
    assert SuffixMemory.load(out).max_tokens == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text.jsonl' cannot be read: No such file"),
        ("[1, 2]\n", "text.jsonl', line 1 has neither a `text` nor `prompt_ids` and `completion_ids`"),
        ('{"prompt_ids": [1]}\n', "has neither a `text`"),
        ('{"text": "w5"}\n', "have no two tokens that follow each other"),
        ('{"prompt_ids": [1], "completion_ids": ["w5"]}\n', "pass [length] token ids"),
    ],
)
def test_texts_that_are_none(target, tmp_path, content, message):
    path, out = tmp_path / "text.jsonl", tmp_path / "memory.npz"
    if content is not None:
        path.write_text(content)
    done = run("memory", "build", "--tokenizer", target, "--texts", path, "--out", out)
    assert done.exit_code == 2 and message in done.stderr and not out.exists(), done.output


def test_files_that_are_no_texts(target, tmp_path):
    (tmp_path / "text.bin").write_bytes(b"w5 \xff")
    options = ["--tokenizer", target, "--out", tmp_path / "memory.npz"]
    for more, message in (
        ([], "there is nothing to remember; pass --texts FILE or --prompts FILE"),
        (["--texts", tmp_path / "text.bin"], "is not UTF-8 (invalid start byte at byte 3)"),
        (["--texts", tmp_path / "none.txt"], "none.txt' cannot be read: No such file"),
        (["--texts", tmp_path], "cannot be read: Is a directory"),
    ):
        done = run("memory", "build", *options, *more)
        assert done.exit_code == 2 and message in done.stderr, done.output
    done = run("memory", "inspect", tmp_path / "text.bin")
    assert done.exit_code == 2 and "is damaged, or no memory at all" in done.stderr, done.output


def test_another_tokenizers_memory_is_refused_before_the_weights_are_read(target, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("w5 w6 w7")
    other, out = tmp_path / "other", tmp_path / "memory.npz"
    word_tokenizer(first=1).save_pretrained(other)
    done = run("memory", "build", "--tokenizer", other, "--texts", tmp_path / "text.txt", "--out", out)
    assert done.exit_code == 0, done.output
    monkeypatch.setattr("specdec.files.loading.load_model", None)
    done = run("generate", "--target", target, "--prompt", "w5", "--drafter", f"suffix:memory={out}")
    assert done.exit_code == 2 and "memory.npz' holds token ids of another tokenizer: other (61" in done.stderr
    done = run("generate", "--target", target, "--prompt", "w5", "--drafter", "suffix:memory=nowhere.npz")
    assert done.exit_code == 2 and "memory 'nowhere.npz' cannot be read" in done.stderr


def test_a_benchmark_takes_no_drafter_that_remembers_its_repeats(target):
    options = ["--target", target, "--limit", 1, "--max-new-tokens", 4, "--repeats", 1, "--no-peers", "--no-stages"]
    options += ["--prompts", target / "prompts.json", "--batch-size", 1, "--num-speculative-tokens", 2]
    (target / "prompts.json").write_text(json.dumps(PROMPTS))
    done = run("bench", *options, "--drafter", "none,suffix+prompt_lookup")
    assert done.exit_code == 2 and "'suffix+prompt_lookup' remembers rows that have ended" in done.stderr, done.output
    done = run("bench", *options, "--drafter", "none,suffix:learn=false")
    assert done.exit_code == 0 and "suffix:learn=false" in done.stdout, done.output


def test_the_doctor_names_a_missing_library(target, monkeypatch):
    monkeypatch.setattr("specdec.drafters.memory.native.find_spec", lambda name: None)
    found = json.loads(run("doctor", target, "--json").stdout)["drafters"]["suffix"]
    assert not found["fits"] and "pip install 'specdec-toolkit[memory]'" in json.dumps(found)
    monkeypatch.undo()
    assert json.loads(run("doctor", target, "--json").stdout)["drafters"]["suffix"]["fits"]
