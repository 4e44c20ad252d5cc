"""Models that the tests share. Tiny random ones are built here; trained ones come with the package or from outside.

`SPECDEC_MODELS` names a folder with more trained pairs (`code-qwen3/{target,draft,prompts.json}`); tests that need it
are skipped, and reported as skipped, where it is not set.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
