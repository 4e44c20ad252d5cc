"""The shape of the package: imports go one way, public names are pinned."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import specdec

ROOT = Path(__file__).parent.parent
# What a layer may import of the project; config, infill and the CLI may also name drafters (lazily, below).
MAY_IMPORT = {
    "kernels": ("specdec.kernels",),
    "specdec": ("specdec",),
    "drafters": ("specdec",),
}
MAY_NAME_DRAFTERS = {"specdec/options/speculation.py", "specdec/infill/infill.py"}
# Above the drafters: these may import everything, and nothing below may import them.
FACES = ("specdec/cli/", "specdec/bench/", "specdec/__main__.py")


def sources(layer):
    for path in sorted((ROOT / layer).rglob("*.py")):
        if layer != "specdec" or path.relative_to(ROOT).parts[1] not in ("kernels", "drafters"):
            yield path


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node, node.module


@pytest.mark.parametrize("layer", sorted(MAY_IMPORT))
def test_imports_go_one_way(layer):
    paths = list(sources(layer))
    assert paths
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text())
        top_level = set(tree.body)
        for node, module in imports(tree):
            if not module.startswith(("specdec", "kernels", "drafters", "benchmarks", "tests")):
                continue
            assert module.startswith(MAY_IMPORT[layer]), f"{name} imports {module}"
            if name.startswith(FACES):
                continue
            assert not module.startswith(("specdec.cli", "specdec.bench")), f"{name} imports {module}"
            if layer == "specdec" and module.startswith("specdec.drafters"):
                assert name in MAY_NAME_DRAFTERS and node not in top_level, f"{name} imports {module}"


def test_public_names():
    assert specdec.__all__ == [
        "NO_TOKEN",
        "AnySubsetModel",
        "BusyError",
        "Completion",
        "Completions",
        "ConfigError",
        "Context",
        "Draft",
        "Drafter",
        "DrafterError",
        "Engine",
        "EquivalenceReport",
        "Event",
        "Grouped",
        "InputError",
        "LengthPolicy",
        "Lenient",
        "NumericalError",
        "Request",
        "Rows",
        "SpecDecError",
        "Speculation",
        "SpeculativeOutput",
        "StepReport",
        "TopBeta",
        "Typical",
        "UnsupportedModelError",
        "Verified",
        "__version__",
        "batch_invariant",
        "check_equivalence",
        "generate",
        "generate_many",
        "infill",
        "make_batch_invariant",
        "speculative",
    ]
    for name in specdec.__all__:
        assert hasattr(specdec, name)


def test_the_command_line_answers_without_torch():
    code = (
        "import sys; from specdec.cli.app import app; from typer.testing import CliRunner; "
        "assert CliRunner().invoke(app, ['check', '--help']).exit_code == 0; "
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_submodule_generate_does_not_hide_the_function():
    import specdec.api.generate

    assert callable(specdec.generate) and specdec.generate.__module__ == "specdec.api.generate"


def test_importing_specdec_imports_no_drafter():
    code = "import specdec, sys; specdec.generate; print([m for m in sys.modules if m.startswith('specdec.drafters.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_shipped_files_stay_small():
    assets = ROOT / "specdec" / "assets"
    pair = sum(path.stat().st_size for path in (assets / "demo_pair").rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file())
    assert 0 < pair <= 9_000_000 and total <= 15_000_000


def test_the_attention_kernel_agrees_with_the_limits():
    """The kernel names its own limit, because kernels import nothing of the package."""
    from specdec.kernels.attention.ragged_attention import TREE_SLOTS
    from specdec.limits import MAX_COLUMNS, MAX_STEP_WIDTH

    assert TREE_SLOTS == MAX_COLUMNS >= MAX_STEP_WIDTH


def test_what_is_imported_is_declared():
    """Also what happens to be installed because another dependency needs it."""
    about = (ROOT / "pyproject.toml").read_text()
    declared = about[about.index("\ndependencies = [") : about.index("\ndev = [")]  # and those of benchmarks
    declared = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)>=', declared)}
    assert {"torch", "huggingface_hub", "matplotlib"} <= declared and "pytest" not in declared
    known = declared | sys.stdlib_module_names | {"specdec"}
    for layer in MAY_IMPORT:
        for path in sources(layer):
            tree = ast.parse(path.read_text())
            for_types = {id(node) for block in ast.walk(tree) if is_type_checking(block) for node in ast.walk(block)}
            for node, module in imports(tree):
                if id(node) not in for_types:
                    assert module.split(".")[0] in known, f"{path.relative_to(ROOT)} imports {module}"


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
