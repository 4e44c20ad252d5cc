"""Models that the tests share. Tiny random ones are built here; trained ones come with the package or from outside.

`SPECDEC_MODELS` names a folder with more trained pairs (`code-qwen3/{target,draft,prompts.json}`); tests that need it
are skipped, and reported as skipped, where it is not set.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Tiny models gain nothing from a second thread, and on a busy machine its waiting costs most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers

if TYPE_CHECKING:  # imported where they are used: they cost seconds, which most runs of a single file need not pay
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


def pytest_configure(config):
    """Choose between Triton's interpreter and its compiler, before the tests import triton: a process has one of them.

    Tests marked gpu need compiled kernels; a run that does not ask for them interprets.
    """
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item):
    if item.get_closest_marker("interpreter") is None:
        return

    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs the triton package")

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")


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
