"""The file of a run that may be killed at any moment: every row once, and only rows of this run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import specdec
from specdec.cli.app import app
from specdec.files.output_file import OutputFile

ROOT = Path(__file__).parents[2]
PAIR = ROOT / "specdec" / "assets" / "demo_pair"
PROMPTS = ["one", "two", "three"]
SETTINGS = {"target": "abc", "max_new_tokens": 4}


def row(index):
    return {"index": index, "prompt": PROMPTS[index], "completion": "é\n"}


def begin(path, settings=SETTINGS, prompts=PROMPTS):
    return OutputFile(path, settings, prompts)


def test_rows_are_found_again(tmp_path):
    path = tmp_path / "out.jsonl"
    file = begin(path)
    file.append(row(2))
    file.append(row(0))
    file.close()
    file = begin(path)
    assert file.done == {0, 2}
    file.append(row(1))
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row(2), row(0), row(1)]


def test_a_line_that_was_cut_off_anywhere_is_made_again(tmp_path):
    path = tmp_path / "out.jsonl"
    file = begin(path)
    file.append(row(1))
    whole = path.read_bytes()
    file.append(row(0))
    file.close()
    both = path.read_bytes()
    for end in range(len(whole), len(both)):
        path.write_bytes(both[:end])
        file = begin(path)
        assert file.done == {1}
        file.append(row(0))
        file.close()
        assert path.read_bytes() == both
    path.write_bytes(whole + b"\0\0\0\n")
    begin(path).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"index": 0, "prom\n{"index": 1, "prompt": "two"}\n', "line 1 is damaged"),
        ('{"index": 1, "prompt": "two"}\n{"index": 1, "prompt": "two"}\n', "line 2 is a second row for prompt 1"),
        ('{"index": 1, "prompt": "three"}\n', "line 1 is not a row of these prompts"),
        ('{"index": 7, "prompt": "three"}\n', "line 1 is not a row of these prompts"),
    ],
)
def test_foreign_rows_are_refused_by_line(tmp_path, content, words):
    path = tmp_path / "out.jsonl"
    begin(path).close()
    path.write_text(content)
    with pytest.raises(specdec.InputError, match=words):
        begin(path)
    assert path.read_text() == content


def test_other_settings_and_other_files_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    begin(path).close()
    with pytest.raises(specdec.ConfigError, match="begun with max_new_tokens=4, now it is 5"):
        begin(path, {**SETTINGS, "max_new_tokens": 5})
    with pytest.raises(specdec.ConfigError, match="begun with prompts="):
        begin(path, prompts=[*PROMPTS, "four"])
    other = tmp_path / "other.jsonl"
    other.write_text("{}\n")
    with pytest.raises(specdec.InputError, match=r"but not 'other.jsonl.settings.json'"):
        begin(other)
    with pytest.raises(specdec.InputError, match="cannot be written"):
        begin(tmp_path / "nowhere" / "out.jsonl")


def test_two_writers_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    file = begin(path)
    with pytest.raises(specdec.InputError, match="is being written by another process"):
        begin(path)
    file.close()
    begin(path).close()


def arguments(prompts, out, *more):
    run = ["generate", "--target", PAIR / "target", "--draft", PAIR / "draft", "--prompts", prompts, "--out", out]
    return [*map(str, run), "--max-new-tokens", "24", *more]


@pytest.mark.parametrize("num_kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_resumed_runs_have_every_row_once(tmp_path, demo_pair, num_kills):
    """SIGKILL at random moments after a row was written; then to the end, with another batch and layout."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = [text[: 20 + 7 * (i % 9)] for i, text in enumerate((demo_pair.prompts * 40)[: 10 + 20 * num_kills])]
    prompts.write_text("".join(json.dumps({"question_id": 100 + i, "prompt": t}) + "\n" for i, t in enumerate(texts)))
    moments, environment = random.Random(0), {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for _ in range(num_kills):
        before = out.stat().st_size if out.exists() else 0
        command = [sys.executable, "-m", "specdec", *arguments(prompts, out, "--batch-size", "4")]
        run = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while run.poll() is None and (not out.exists() or out.stat().st_size == before):
            time.sleep(0.001)
        time.sleep(0.05 * moments.random())
        run.kill()
        run.wait()
    interrupted = len(out.read_text().splitlines())
    assert 0 < interrupted < len(texts), "the kills must come before the end"
    last = arguments(prompts, out, "--batch-size", "7", "--layout", "repad", "--kv-tokens", "700")
    done = CliRunner().invoke(app, last)
    assert done.exit_code == 0, done.stderr
    assert "rows are done, resuming" in done.stderr and "tokens/s" in done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(len(texts)))
    encoded = [demo_pair.tokenizer(text).input_ids for text in texts]
    expected = specdec.generate_many(demo_pair.target, encoded, max_new_tokens=24, in_order=True)
    for found, alone in zip(sorted(rows, key=lambda row: row["index"]), expected, strict=True):
        assert found["id"] == 100 + found["index"] and found["prompt"] == texts[found["index"]]
        assert found["prompt_ids"] == alone.prompt_ids and found["completion_ids"] == alone.token_ids
    other = CliRunner().invoke(app, [*arguments(prompts, out)[:-1], "25"])
    assert other.exit_code != 0 and "begun with max_new_tokens=24" in other.stderr.replace("\n", " ")
