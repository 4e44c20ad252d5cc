"""The wheel as a user installs it: whole, and independent of the checkout. `make integration` installs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".integration"
# In the checkout specdec/kernels and specdec/drafters are symbolic links to the folders next to specdec.
FOLDERS = {"specdec": "specdec", "kernels": "specdec/kernels", "drafters": "specdec/drafters"}

pytestmark = pytest.mark.integration


def run_installed(folder, *arguments):
    """Runs Python in another folder, where only the environment's packages and the wheel are importable."""
    environment = {**os.environ, "PYTHONPATH": str(INSTALLED)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def files_of(folder):
    """Modules, native sources and assets below a folder of the checkout, links not followed."""
    for directory, _, names in os.walk(ROOT / folder):
        for name in names:
            path = Path(directory, name).relative_to(ROOT / folder)
            if path.suffix in (".py", ".cpp", ".h") or "assets" in path.parts:
                yield path


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_in_the_wheel(folder):
    """A package that pyproject.toml does not name is missing from the wheel, and from no editable install."""
    files = list(files_of(folder))
    assert files
    assert [str(path) for path in files if not (INSTALLED / FOLDERS[folder] / path).exists()] == []


def test_every_module_of_the_wheel_can_be_imported(tmp_path):
    code = (
        "import importlib, pathlib, specdec\n"
        "root = pathlib.Path(specdec.__file__).parent\n"
        "paths = [p.relative_to(root.parent) for p in root.rglob('*.py') if p.stem not in ('__init__', '__main__')]\n"
        "for path in paths:\n"
        "    importlib.import_module('.'.join(path.with_suffix('').parts))\n"
        "print(root, len(paths))\n"
    )
    root, count = run_installed(tmp_path, "-c", code).split()
    assert root == str(INSTALLED / "specdec")
    assert int(count) > 100


def test_the_command_of_the_wheel_answers(tmp_path):
    assert "generate" in run_installed(tmp_path, "-m", "specdec", "--help")


def test_the_wheel_decodes_with_the_models_that_come_with_it(tmp_path):
    code = (
        "import pathlib, torch, specdec\n"
        "from transformers import AutoModelForCausalLM\n"
        "pair = pathlib.Path(specdec.__file__).parent / 'assets' / 'demo_pair'\n"
        "target, draft = (AutoModelForCausalLM.from_pretrained(pair / role) for role in ('target', 'draft'))\n"
        "ids = torch.tensor([[5, 6, 7]])\n"
        "plain = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)\n"
        "print(torch.equal(specdec.generate(target, ids, drafter=draft, max_new_tokens=8), plain))\n"
    )
    assert run_installed(tmp_path, "-c", code).strip() == "True"
