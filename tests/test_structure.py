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
LAYERS = ("kernels", "specdec", "drafters")
# Low to high: a room imports itself and the rooms before it. "contracts" are drafter.py and policy.py.
ROOMS = (
    "kernels", "root", "batch", "files", "network", "verify", "contracts", "policies", "drafters", "options", "engine",
    "api", "check", "bench", "training", "infill", "cli", "package",
)  # fmt: skip
MAX_MODULES = 15  # in a folder
# Drafters are imported when they are named, so that the core starts without them.
NAME_DRAFTERS = {"specdec.options.speculation", "specdec.infill.infill"}


def sources(layer):
    for path in sorted((ROOT / layer).rglob("*.py")):
        if layer != "specdec" or path.relative_to(ROOT).parts[1] not in ("kernels", "drafters"):
            yield path


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "specdec" else ("specdec", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for layer in LAYERS for path in sources(layer)}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node, node.module


def imported(path):
    """The modules of the project that a file imports, run-time and typing, at its top and within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def room_of(module):
    parts = module.split(".")
    if module in ("specdec", "specdec.__main__"):
        return "package"
    if module in ("specdec.drafter", "specdec.policy"):
        return "contracts"
    if parts[1] == "drafters" and parts[2:3] == ["training"]:
        return "training"
    return parts[1] if parts[1] in ROOMS else "root"


def upwards(graph):
    """The imports that climb to a higher room."""
    return [
        (module, other)
        for module, others in graph.items()
        for other in others
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
    ]


def circles(graph):
    """The modules that import themselves by way of others."""
    reached = {module: set(others) for module, others in graph.items()}
    for middle in graph:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    return sorted(module for module, others in reached.items() if module in others)


GRAPH = {module: set(imported(path)) - {module} for module, path in MODULES.items()}
USERS = {"specdec.cli.demo", "specdec.cli.infill"}  # call the package as a user does


def test_imports_go_one_way():
    assert len(GRAPH) > 150
    assert [(module, other) for module, other in upwards(GRAPH) if (other, module in USERS) != ("specdec", True)] == []
    assert circles({module: others - {"specdec"} for module, others in GRAPH.items()}) == []


def test_an_import_that_climbs_and_a_circle_are_found():
    climbing = {**GRAPH, "specdec.batch.rows": {"specdec.engine.decode"}}
    assert ("specdec.batch.rows", "specdec.engine.decode") in upwards(climbing)
    closed = {**GRAPH, "specdec.batch.slots": {"specdec.batch.rows"}}
    assert {"specdec.batch.rows", "specdec.batch.slots"} <= set(circles(closed))


def test_no_folder_is_crowded():
    folders = {path.parent for path in MODULES.values()}
    counts = {folder: len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) for folder in folders}
    assert {folder.name: count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_the_core_names_drafters_within_functions_alone():
    for module, path in MODULES.items():
        if room_of(module) in ("drafters", "training", "bench", "cli", "package", "check"):
            continue
        tree = ast.parse(path.read_text())
        top_level = set(tree.body)
        for node, name in imports(tree):
            if name.startswith("specdec.drafters"):
                assert module in NAME_DRAFTERS and node not in top_level, f"{module} imports {name}"


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
        "Suffix",
        "SuffixMemory",
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
        "release",
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


def test_the_repository_stays_small():
    """20 MiB are tracked at most; more comes out of a recipe."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 20 * 2**20


def test_the_shipped_files_stay_small():
    assets = ROOT / "specdec" / "assets"
    pair = sum(path.stat().st_size for path in (assets / "demo_pair").rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file())
    assert 0 < pair <= 9_000_000 and total <= 16_000_000


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
    for layer in LAYERS:
        for path in sources(layer):
            tree = ast.parse(path.read_text())
            for_types = {id(node) for block in ast.walk(tree) if is_type_checking(block) for node in ast.walk(block)}
            for node, module in imports(tree):
                if id(node) not in for_types:
                    assert module.split(".")[0] in known, f"{path.relative_to(ROOT)} imports {module}"


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
