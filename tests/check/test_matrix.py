"""`specdec check` over a matrix of settings: one plain run, every combination, a table, JSON and JUnit XML."""

from __future__ import annotations

import inspect
import json
import xml.etree.ElementTree as ElementTree

import pytest
from checkpoints import PROMPTS, save_checkpoint
from tiny import VOCAB, tiny_llama
from typer.testing import CliRunner

import specdec
from specdec.check import oracle
from specdec.check.ways import AXES, DRAFTED, Way, ways, whole_numbers, words
from specdec.cli.app import app
from specdec.errors import ConfigError
from specdec.files.junit import Case, write_junit
from specdec.options.speculation import speculative_config


def test_ways_are_the_combinations_that_mean_something():
    found = ways(["none", "prompt_lookup"], [2, 4], [1, 8], {"layout": ["ragged", "repad"]})
    # without a drafter K means nothing, layouts do
    assert len(found) == 2 * (1 * 2 + 2 * 2) == len(set(found))
    assert Way("none", None, 8) in found and Way("prompt_lookup", 4, 1, (("layout", "repad"),)) in found
    assert Way("prompt_lookup", 4, 1, (("layout", "repad"),)).label == "prompt_lookup repad K=4, batch 1"
    assert Way("none", None, 8).label == "plain, batch 8"


def test_every_axis_is_an_argument_of_generate():
    for face in (specdec.generate, speculative_config):
        assert set(AXES) <= set(inspect.signature(face).parameters)
    assert set(AXES) >= DRAFTED
    for name, value in AXES.items():
        # None: what is meant without a word depends on the device.
        assert inspect.signature(specdec.generate).parameters[name].default in (value, None)


def test_lists_of_numbers_and_names():
    assert whole_numbers("--x", "8, 1,8") == (8, 1) and words("--x", "a, b,a") == ("a", "b")
    for text in ("0", "1,,2", "x", "33", "-1", "1.5"):
        with pytest.raises(ConfigError, match="--x"):
            whole_numbers("--x", text, 32)
    with pytest.raises(ConfigError, match="'c' is unknown; choose from a, b"):
        words("--x", "a,c", ["a", "b"])


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_checkpoint(folder / "target", tiny_llama())
    save_checkpoint(folder / "draft", tiny_llama(1))
    (folder / "prompts.json").write_text(json.dumps(PROMPTS[:4]))
    named = {"target": folder / "target", "draft": folder / "draft", "prompts": folder / "prompts.json"}
    options = [part for name, path in named.items() for part in (f"--{name}", str(path))]
    more = "--drafter draft_model,prompt_lookup,none --batch-size 1,4 --num-speculative-tokens 2,3 --max-new-tokens 8"
    return ["check", *options, *more.split(), "--layout", "ragged,repad"]


def test_a_matrix_that_is_equal(command, tmp_path, monkeypatch):
    runs = []
    stock = oracle.run_plain
    monkeypatch.setattr("specdec.check.equivalence.run_plain", lambda *a, **k: runs.append(a) or stock(*a, **k))
    out, junit = tmp_path / "out.json", tmp_path / "junit.xml"
    done = CliRunner().invoke(app, [*command, "--json", str(out), "--junit", str(junit)])
    assert done.exit_code == 0, done.output
    assert "20/20 ways equal plain greedy for all 4 prompts" in done.stdout
    assert len(runs) == 2  # the warm-up and one run for all ways
    report = json.loads(out.read_text())
    assert report["equivalent"] is True and len(report["cells"]) == 20
    assert {(cell["drafter"], cell["options"].get("layout")) for cell in report["cells"]} == {
        (drafter, layout) for drafter in ("draft_model", "prompt_lookup", "none") for layout in (None, "repad")
    }
    suite = ElementTree.parse(junit).getroot()
    assert suite.attrib["tests"] == "20" and suite.attrib["failures"] == "0"


def test_a_cell_that_is_wrong_is_named(command, tmp_path, monkeypatch):
    stock = oracle.generate

    def wrong(model, ids, mask, drafter, **options):
        out = stock(model, ids, mask, drafter=drafter, **options)
        if drafter.name == "prompt_lookup" and len(ids) == 4 and options.get("layout") == "repad":
            out[1, ids.shape[1]] = (out[1, ids.shape[1]] + 1) % VOCAB
        return out

    monkeypatch.setattr(oracle, "generate", wrong)
    junit = tmp_path / "junit.xml"
    done = CliRunner().invoke(app, [*command, "--junit", str(junit)])
    assert done.exit_code == 1 and "18/20 ways equal" in done.stdout, done.output
    assert "prompt_lookup repad K=2, batch 4:" in done.stdout and "prompt_lookup repad K=3, batch 4:" in done.stdout
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    failed = {case.attrib["name"]: case.find("failure") for case in cases if case.find("failure") is not None}
    assert set(failed) == {f"prompt_lookup repad K={k}, batch 4" for k in (2, 3)}
    assert all("prompt 1, position 0" in failure.text for failure in failed.values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layout", "spiral"], "layout='spiral' is unknown"),
        (["--drafter", "prompt_lookup"], "both choose a drafter"),
        (["--num-speculative-tokens", "2,33"], "--num-speculative-tokens 2,33: '33'"),
        (["--junit", "nowhere/junit.xml"], "--junit 'nowhere/junit.xml' cannot be written"),
    ],
)
def test_wrong_axes_are_refused_at_once(command, monkeypatch, more, message):
    monkeypatch.setattr("specdec.check.equivalence.run_plain", None)
    if "--drafter" in more:  # in place of the command's own
        at = command.index("--drafter")
        command = [*command[:at], *command[at + 2 :]]
    done = CliRunner().invoke(app, [*command, *more])
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.output


def test_tokens_that_xml_cannot_hold(tmp_path):
    path = tmp_path / "junit.xml"
    write_junit(path, "suite", [Case("a\x00b <&>", "failed", "\x1b[0m", "\ud83d x"), Case("c", "tie", "0 < 1")])
    root = ElementTree.parse(path).getroot()
    assert [case.attrib["name"] for case in root.iter("testcase")] == ["a\\x00b <&>", "c"]
    assert root.attrib["skipped"] == "1" and root.find(".//skipped").attrib["message"] == "0 < 1"
