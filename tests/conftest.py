"""Models that the tests share. Tiny random ones are built here; trained ones come with the package or from outside.

`SPECDEC_MODELS` names a folder with more trained pairs (`code-qwen3/{target,draft,prompts.json}`); tests that need it
are skipped, and reported as skipped, where it is not set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Tiny models gain nothing from a second thread, and on a busy machine its waiting costs most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers

if TYPE_CHECKING:  # imported where they are used: they cost seconds, which every process for the interpreter would pay
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).parent.parent

transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


@dataclass
class TrainedPair:
    """A target, a draft with the same tokenizer (left padding), and prompts held out from their training."""

    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    folder: Path


def load_pair(folder: Path) -> TrainedPair:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target, draft = (
        AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32).eval() for role in ("target", "draft")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "target", padding_side="left")
    return TrainedPair(target, draft, tokenizer, json.loads((folder / "prompts.json").read_text()), folder)


@pytest.fixture(scope="session")
def code_pair() -> TrainedPair:
    root = os.environ.get("SPECDEC_MODELS")
    if not root or not (Path(root) / "code-qwen3").is_dir():
        pytest.skip("SPECDEC_MODELS does not name a folder with code-qwen3")
    return load_pair(Path(root) / "code-qwen3")


@pytest.fixture(scope="session")
def demo_pair() -> TrainedPair:
    import specdec

    return load_pair(Path(specdec.__file__).parent / "assets" / "demo_pair")


@pytest.fixture(autouse=True)
def _no_leftovers():
    """Every test starts from the same random state and leaves autograd as it was."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled()


@pytest.fixture
def run_in_subprocess():
    """Run a part of the suite in a process with other environment variables; it must pass and must run something."""

    def run(*arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]

    return run
