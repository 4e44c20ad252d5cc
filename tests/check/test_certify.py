"""The referee of other engines: honest outputs pass, every planted corruption is a bug, and no corruption is a tie."""

from __future__ import annotations

import json
import random
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from checkpoints import save_checkpoint
from tiny import VOCAB, plain_greedy, tiny_llama
from typer.testing import CliRunner

from specdec.check import teacher_forcing
from specdec.check.certify import Certificate, certify
from specdec.check.oracle import run_batched, run_plain
from specdec.check.outputs import OutputRow, read_outputs
from specdec.check.settings import greedy_settings
from specdec.cli.app import app
from specdec.errors import ConfigError, InputError, NumericalError
from tests.check.test_equivalence import PROMPTS, with_twins

NEW = 16


@pytest.fixture
def model():
    return tiny_llama()


def rows_of(prompts, completions):
    pairs = zip(prompts, completions, strict=True)
    return [OutputRow(list(map(int, prompt)), list(ids), f"line {i}") for i, (prompt, ids) in enumerate(pairs, 1)]


def honest(model, new=NEW):
    return [plain_greedy(model, prompt, max_new_tokens=new) for prompt in PROMPTS]


def kinds(found: Certificate):
    return [row.kind for row in found.rows]


def swapped(rng, ids, others, vocab_size):
    """One token exchanged for another."""
    place = rng.randrange(len(ids))
    return [*ids[:place], (ids[place] + 1 + rng.randrange(vocab_size - 1)) % vocab_size, *ids[place + 1 :]]


def exchanged(rng, ids, others, vocab_size):
    """Two neighbours that differ, in the other order."""
    place = rng.choice([i for i in range(len(ids) - 1) if ids[i] != ids[i + 1]] or [0])
    return [*ids[:place], *ids[place : place + 2][::-1], *ids[place + 2 :]]


def shifted(rng, ids, others, vocab_size):
    """As if the first token had been taken for prompt."""
    return [*ids[1:], ids[0]]


def of_another_row(rng, ids, others, vocab_size):
    return rng.choice([other for other in others if other != ids])


def truncated(rng, ids, others, vocab_size):
    return ids[: rng.randrange(1, len(ids))]


CORRUPTIONS = [swapped, exchanged, shifted, of_another_row, truncated]


def test_plain_greedy_is_certified(model):
    found = certify(model, rows_of(PROMPTS, honest(model)))
    assert found.certified and kinds(found) == ["equal"] * 5 and found.max_new_tokens == NEW
    assert found.rounding is None and found.margin_dtype is None  # nothing was in doubt


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_every_corruption_is_a_bug(model, corrupt):
    """One corrupted row among honest ones, ten times each: would catch judging the wrong row, position or length."""
    rng, outputs = random.Random(corrupt.__name__), honest(model)
    for trial in range(10):
        row = trial % len(outputs)
        changed = corrupt(rng, outputs[row], outputs, VOCAB)
        if changed == outputs[row]:
            continue
        planted = [*outputs[:row], changed, *outputs[row + 1 :]]
        found = certify(model, rows_of(PROMPTS, planted), NEW)
        assert kinds(found) == ["bug" if i == row else "equal" for i in range(5)], (trial, changed)
        first = next((i for i, (a, b) in enumerate(zip(changed, outputs[row], strict=False)) if a != b), len(changed))
        assert found.rows[row].finding.position == first


def test_half_precision_of_transformers_is_certified_and_corruptions_are_not(demo_pair):
    """A trained model in bfloat16, in a padded batch: its ties pass, and none of the corruptions hides among them."""
    model, tokenizer = demo_pair.target.to(torch.bfloat16), demo_pair.tokenizer
    try:
        prompts = [torch.tensor(tokenizer(text).input_ids[:24]) for text in demo_pair.prompts[:8]]
        with greedy_settings(model):
            outputs = run_batched(model, prompts, 40).outputs
        assert certify(model, rows_of(prompts, outputs), 40).certified
        rng, planted = random.Random(0), []
        for corrupt in CORRUPTIONS:
            for prompt, ids in zip(prompts, outputs, strict=True):
                changed = corrupt(rng, ids, outputs, model.config.vocab_size)
                if changed != ids:
                    planted.append((prompt, changed))
        found = certify(model, rows_of(*zip(*planted, strict=True)), 40)
        assert len(planted) >= 35 and set(kinds(found)) == {"bug"}, kinds(found)
        assert found.margin_dtype == "float64" and 0 < found.rounding < 0.5
    finally:
        model.to(torch.float32)


def test_an_exact_tie_is_a_tie_and_hides_no_bug_behind_it(model):
    first, second = with_twins(model)
    own = plain_greedy(model, PROMPTS[0], max_new_tokens=6)
    ids = PROMPTS[0].tolist()
    assert own[0] == first
    behind = plain_greedy(model, torch.tensor([*ids, second]), max_new_tokens=5)
    behind = [first if token == second else token for token in behind]
    found = certify(model, [OutputRow(ids, [second, *behind], "line 1")])
    assert kinds(found) == ["tie"] and found.certified
    finding = found.rows[0].finding
    assert (finding.position, finding.expected_token_id, finding.actual_token_id) == (0, first, second)
    assert finding.margin == 0.0 <= finding.limit
    wrong = [second, *behind[:-1], (behind[-1] + 3) % VOCAB]
    (row,) = certify(model, [OutputRow(ids, wrong, "line 1")], 6).rows
    assert row.kind == "bug" and row.finding.position == 5 and row.num_ties >= 1


def test_where_a_row_may_end(model):
    """Prompt 0 ends on its own; whatever else ends early, late or goes on behind the end is a bug."""
    end = plain_greedy(model, PROMPTS[0], max_new_tokens=NEW)[2]
    model.generation_config.eos_token_id = [end, 2]
    outputs = honest(model)
    going_on = max(range(5), key=lambda i: len(outputs[i]))
    short, full, long = outputs[0], outputs[going_on], PROMPTS[going_on]
    assert len(short) <= 3 and len(full) == NEW and full[-1] not in (end, 2)
    rows = rows_of([PROMPTS[0], long], [short, full])
    assert kinds(certify(model, rows)) == ["equal", "equal"]
    cases = {
        "behind_end": ([*short, 9], len(short)),
        "ends_early": (short[:-1], len(short) - 1),
    }
    for reason, (ids, position) in cases.items():
        row = certify(model, rows_of([PROMPTS[0]], [ids]), NEW).rows[0]
        assert (row.kind, row.finding.reason, row.finding.position) == ("bug", reason, position)
    (row,) = certify(model, rows_of([long], [full]), len(full) - 1).rows
    assert (row.kind, row.finding.reason, row.finding.position) == ("bug", "too_long", len(full) - 1)
    (row,) = certify(model, rows_of([long], [[]]), NEW).rows
    assert (row.kind, row.finding.expected_token_id, row.finding.actual_token_id) == ("bug", full[0], None)


@pytest.mark.parametrize(("tokens", "logits_bytes"), [(8, 2**28), (64, 4 * VOCAB * 3), (2048, 4 * VOCAB * 7)])
def test_pieces_of_any_size_are_the_whole(model, monkeypatch, tokens, logits_bytes):
    outputs = honest(model)
    sequences = [prompt.tolist() + ids for prompt, ids in zip(PROMPTS, outputs, strict=True)]
    starts = [len(prompt) for prompt in PROMPTS]
    monkeypatch.setattr(teacher_forcing, "LOGITS_BYTES", logits_bytes)
    monkeypatch.setattr(teacher_forcing, "TOKENS_PER_FORWARD", {"cpu": tokens})
    seen = torch.zeros(len(sequences), max(map(len, sequences)))
    for piece in teacher_forcing.pieces(model, sequences, starts):
        rows, width, vocab_size = piece.logits.shape
        assert 4 * rows * width * vocab_size <= max(logits_bytes, 4 * rows * vocab_size)
        for slot, index in enumerate(piece.indices):
            whole = model(torch.tensor([sequences[index]])).logits[0]
            columns = range(piece.first_column, min(piece.first_column + width, len(whole)))
            torch.testing.assert_close(
                piece.logits[slot, : len(columns)], whole[columns.start : columns.stop], rtol=1e-4, atol=1e-4
            )
            seen[index, columns.start : columns.stop] += 1
    for index, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        assert (seen[index, start - 1 : len(sequence)] == 1).all()
    assert kinds(certify(model, rows_of(PROMPTS, outputs))) == ["equal"] * 5


def test_a_text_may_be_cut_into_other_tokens(demo_pair):
    """The engine's tokens are lost in text; a letter at a time they are not the target's, and yet it is its text."""
    model, tokenizer = demo_pair.target, demo_pair.tokenizer
    prompt = torch.tensor(tokenizer(demo_pair.prompts[0]).input_ids)
    with greedy_settings(model):
        ids = run_plain(model, [prompt], 24).outputs[0]
    text = tokenizer.decode(ids)
    letters = [token for letter in text for token in tokenizer(letter, add_special_tokens=False).input_ids]
    assert letters != ids
    own = OutputRow(prompt.tolist(), letters, "line 1", text)
    assert kinds(certify(model, [own], tokenizer=tokenizer)) == ["equal"]
    assert kinds(certify(model, [OutputRow(prompt.tolist(), letters, "line 1")])) == ["bug"]
    wrong = text[:9] + ("x" if text[9] != "x" else "y") + text[10:]
    ids = tokenizer(wrong, add_special_tokens=False).input_ids
    assert kinds(certify(model, [OutputRow(prompt.tolist(), ids, "", wrong)], 24, tokenizer)) == ["bug"]


def test_what_cannot_be_judged_is_refused(model, monkeypatch):
    with pytest.raises(InputError, match="no rows"):
        certify(model, [])
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        certify(model, rows_of(PROMPTS, honest(model)), 0)
    with pytest.raises(InputError, match="tokenizer="):
        certify(model, [OutputRow([5], [6], "line 1", "w6")])
    with pytest.raises(InputError, match="line 1 holds 61, outside"):
        certify(model, rows_of([[5]], [[6, 61]]))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="line 1"):
        certify(model, rows_of(PROMPTS[:1], [[5, 6]]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def lines(path, *items):
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ([1], "line 2 is not a JSON object"),
        ({"completion_ids": [4]}, "line 2 has neither a list `prompt_ids` nor a string `prompt`"),
        ({"prompt_ids": [4]}, "line 2 has neither a list `completion_ids` nor a string `completion`"),
        ({"prompt_ids": [], "completion_ids": [4]}, "line 2 has an empty prompt"),
        ({"prompt_ids": [4, 61], "completion_ids": [4]}, "`prompt_ids` holds 61, outside the model's vocabulary 0..60"),
        ({"prompt_ids": [4], "completion_ids": [4.0]}, "line 2: `completion_ids` must be a list of integers"),
        ({"prompt_ids": [4] * 500, "completion_ids": [4] * 13}, "line 2 has 513 tokens, but the model has 512"),
    ],
)
def test_malformed_rows_are_named_by_line(checkpoint, tmp_path, monkeypatch, line, message):
    monkeypatch.setattr("specdec.cli.check.outputs.certify", None)  # before any work
    path = lines(tmp_path / "out.jsonl", {"prompt_ids": [4], "completion": "w5"}, line)
    done = CliRunner().invoke(app, ["check", "--model", str(checkpoint), "--outputs", str(path)])
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.output


def test_ids_are_preferred_to_text(checkpoint, tmp_path):
    from specdec.files.loading import load_tokenizer

    path = lines(tmp_path / "out.jsonl", {"prompt": "w5 w6", "completion": "w7", "completion_ids": [8, 9]})
    (row,) = read_outputs(path, load_tokenizer(checkpoint, "target"), VOCAB)
    assert (row.prompt_ids, row.completion_ids, row.text) == ([5, 6], [8, 9], None)


def test_the_command_line(checkpoint, tmp_path, model):
    outputs = honest(model)
    rows = [{"prompt_ids": p.tolist(), "completion_ids": ids} for p, ids in zip(PROMPTS, outputs, strict=True)]
    good = lines(tmp_path / "good.jsonl", *rows)
    rows[3]["completion_ids"] = [*outputs[3][:5], (outputs[3][5] + 1) % VOCAB, *outputs[3][6:]]
    bad = lines(tmp_path / "bad.jsonl", *rows)
    report, junit = tmp_path / "report.json", tmp_path / "junit.xml"
    more = ["--json", str(report), "--junit", str(junit)]
    done = CliRunner().invoke(app, ["check", "--model", str(checkpoint), "--outputs", str(good), *more])
    assert done.exit_code == 0 and "5 rows: 5 equal, 0 tie, 0 bug" in done.stdout, done.output
    assert json.loads(report.read_text())["certified"] is True
    done = CliRunner().invoke(app, ["check", "--model", str(checkpoint), "--outputs", str(bad), *more])
    assert done.exit_code == 1 and "5 rows: 4 equal, 0 tie, 1 bug" in done.stdout, done.output
    assert "line 4" in done.stdout and "another token" in done.stdout
    found = json.loads(report.read_text())
    assert found["num_bug"] == 1 and found["rows"][3]["finding"]["position"] == 5
    suite = ElementTree.parse(junit).getroot()
    assert suite.attrib["tests"] == "5" and suite.attrib["failures"] == "1"
    failed = [case.attrib["name"] for case in suite.iter("testcase") if case.find("failure") is not None]
    assert len(failed) == 1 and failed[0].endswith("line 4")
    done = CliRunner().invoke(app, ["check", "--model", str(checkpoint)])
    assert done.exit_code == 2 and "--prompts FILE" in done.stderr
    done = CliRunner().invoke(
        app, ["check", "--model", str(checkpoint), "--outputs", str(good), "--drafter", "prompt_lookup"]
    )
    assert done.exit_code == 2 and "--drafter prompt_lookup has no meaning" in done.stderr
