"""The documents tell the truth: their commands run, their tables are complete."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from transformers import GenerationMixin
from typer.testing import CliRunner

import specdec
from specdec.options.generation import NEUTRAL, SERVED, WITHOUT_EFFECT

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Of several scripts, in a file of their own.
SHARED_OPTIONS = (ROOT / "benchmarks" / "pairs.py").read_text() + "--help"


def blocks(text, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    return [code for kind, code in found if kind == language]


def test_the_options_page_lists_every_option_in_its_place():
    page = (ROOT / "docs" / "generate-options.md").read_text()
    parts = re.split(r"^## ", page, flags=re.M)[1:]
    for part, table in zip(parts, (SERVED, WITHOUT_EFFECT, NEUTRAL), strict=False):
        assert first_column(part) == set(table)
    assert {"Lenient", "Typical", "TopBeta"} == set(re.findall(r"^\| `(\w+)\(", page, re.M))


def first_column(part):
    """The names in the first column of a table."""
    rows = "".join(line.split("|")[1] for line in part.splitlines() if line.startswith("| `"))
    return set(re.findall(r"`(\w+)`", rows))


def test_the_options_page_lists_every_argument_of_the_installed_generate():
    page = (ROOT / "docs" / "generate-options.md").read_text()
    listed = first_column(page.split("## Arguments of generate()")[1].split("\n## ")[0])
    signature = inspect.signature(GenerationMixin.generate).parameters
    assert set(signature) - {"self", "kwargs"} <= listed
    # The names are not ours alone: each is served by name, or refused by name.
    ours = set(inspect.signature(specdec.generate).parameters)
    only_inside = {"inputs", "custom_generate", "trust_remote_code"}
    model = tiny_llama(0)
    for name in listed - ours - only_inside:
        with pytest.raises(specdec.ConfigError, match=name):
            specdec.generate(model, torch.tensor([[5, 6]]), max_new_tokens=2, **{name: object()})


def test_the_readmes_python_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace: dict = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for code in blocks(README, "python"):
            exec(compile(code, "README.md", "exec"), namespace)
    assert "tokens per target call" in out.getvalue()
    assert "def mean(values):" in out.getvalue()


def specdec_commands(page):
    shell = "\n".join(blocks(page, "")).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in shell.splitlines() if ".venv/bin/specdec" in line]


@pytest.mark.parametrize("command", specdec_commands(README))
def test_the_readmes_commands_run(command, monkeypatch):
    from specdec.cli.app import app

    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "name", ["certifying.md", "reading-the-report.md", "choosing.md", "engine.md", "gpu.md", "memory.md"]
)
def test_a_pages_python_and_commands_run(name, tmp_path, monkeypatch):
    """In a folder of their own, where they find the shipped pair and leave their files."""
    from specdec.cli.app import app

    (tmp_path / "specdec").symlink_to(ROOT / "specdec")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / name).read_text()
    for code in blocks(page, "python"):
        exec(compile(code, name, "exec"), {})
    commands = specdec_commands(page)
    assert commands or blocks(page, "python")
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, (command, done.output)


def test_the_infilling_pages_python_runs(tmp_path):
    from tiny_xlnet import tiny_xlnet
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "specdec/assets/demo_pair/target")
    tokenizer.save_pretrained(tmp_path)
    tiny_xlnet(vocab_size=len(tokenizer) + 1).save_pretrained(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for code in blocks((ROOT / "docs" / "infilling.md").read_text(), "python"):
            exec(compile(code, "infilling.md", "exec"), {"folder": tmp_path})
    assert re.search(r"^[1-7] calls$", out.getvalue(), re.M)


def test_the_readmes_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", README, re.M))
    assert {"demo", "test"} <= {a or b for a, b in targets}
    for name in {a or b for a, b in targets}:
        assert re.search(rf"^{name}:", makefile, re.M), name


def test_the_architecture_names_files_that_exist():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    for line in page.splitlines():
        if line.startswith("| `"):
            folder = ""
            for name in re.findall(r"`([\w./]+)`", line.split("|")[1]):
                folder = str(Path(name).parent) if "/" in name.rstrip("/") else folder
                path = ROOT / name if "/" in name else ROOT / folder / name
                assert path.exists(), name


@pytest.mark.parametrize("name", ["docs/gpu.md", "benchmarks/README.md"])
def test_commands_of_benchmarks_name_options_that_exist(name):
    shell = re.sub(r"\\\n", " ", (ROOT / name).read_text())
    commands = re.findall(r"(benchmarks/\w+\.(?:py|sh))((?: [^`#\n;]*)?)", shell)
    assert len(commands) > 5
    for script, arguments in commands:
        source = (ROOT / script).read_text()
        for option in re.findall(r"(?<= )--[\w-]+", arguments):
            assert option in source or option in SHARED_OPTIONS, (script, option)


def test_no_document_waits_to_be_filled_in():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        text = path.read_text()
        assert not re.search(r"\b(TODO|FIXME|TBD)\b|[A-Z]{4,}_(TABLE|COUNT)", text), path


def test_the_length_policies_page_names_them_all_and_its_policy_runs():
    import torch
    from tiny import tiny_llama

    import specdec
    from specdec.policies.registry import LENGTH_POLICIES

    page = (ROOT / "docs" / "length-policies.md").read_text()
    assert re.findall(r"^\| `(\w+)`", page, re.M) == list(LENGTH_POLICIES)
    namespace: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, "length-policies.md", "exec"), namespace)
    out = specdec.generate(
        tiny_llama(), torch.tensor([[5, 6, 7]]), drafter=tiny_llama(1), length_policy=namespace["Alternating"](),
        max_new_tokens=12, eos_token_id=None, return_dict_in_generate=True,
    )  # fmt: skip
    assert sum(out.speculation.drafted_histogram[1:]) > 0 < out.speculation.drafted_histogram[0]
