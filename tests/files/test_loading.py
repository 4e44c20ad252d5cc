"""Checkpoints and prompt files: what is right loads, what is wrong is named."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import save_checkpoint, word_tokenizer
from refusals import assert_refused
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from specdec.errors import ConfigError, DrafterError, InputError
from specdec.files.loading import (
    Prompt,
    check_same_tokenizer,
    encode_prompts,
    find_checkpoint,
    load_model,
    load_tokenizer,
    read_prompts,
    resolve_device,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_llama().to(torch.bfloat16))


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_prompt_files(tmp_path):
    """Would catch splitlines (which cuts at U+2028), a kept byte order mark and a second turn."""
    for name, content, texts in [
        ("a.txt", "one\ntwo words\n", ["one", "two words"]),
        ("a.txt", "one\r\ntwo\r\n\r\n", ["one", "two"]),
        ("a.txt", "\ufeffone\n  two \u2028 still two", ["one", "  two \u2028 still two"]),
        ("a.json", '["one", "two\\nlines"]', ["one", "two\nlines"]),
        ("a.JSON", '\ufeff["one"]', ["one"]),
        ("a.jsonl", '{"prompt": "one"}\n{"turns": ["two", "later"], "question_id": 1}\n', ["one", "two"]),
    ]:
        path = written(tmp_path, name, content)
        assert [prompt.text for prompt in read_prompts(path)] == texts
        assert [prompt.text for prompt in read_prompts(path, limit=1)] == texts[:1]


def test_bad_prompt_files(tmp_path):
    for name, content, message in [
        ("a.txt", "", "is empty"),
        ("a.txt", "\n\n", "is empty"),
        ("a.txt", "one\n\nthree\n", "line 2 is an empty prompt"),
        ("a.txt", b"one\n\xff\xfe\n", "line 2 is not UTF-8"),
        ("a.json", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.json", '["one",\n two]', "is not JSON: Expecting value at line 2, column 2"),
        ("a.json", '{"prompt": "one"}', "holds a JSON object"),
        ("a.json", '["one", 2]', r"item 1 \(from 0\) is a JSON number"),
        ("a.json", '["one", ""]', r"item 1 \(from 0\) is an empty prompt"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "one"}\n\n{"prompt": "three"}\n', "line 2 is not JSON"),
        ("a.jsonl", '["one"]', "line 1 is a JSON list"),
        ("a.jsonl", '{"text": "one"}', "line 1 has neither"),
        ("a.jsonl", '{"turns": []}', "line 1 has neither"),
        ("a.jsonl", '{"prompt": null}', "line 1 has neither"),
        ("a.jsonl", '{"turns": [""]}', "line 1 is an empty prompt"),
        ("a.csv", "one", "not one of .txt, .json, .jsonl"),
    ]:
        path = written(tmp_path, name, content)
        assert_refused(InputError, message, read_prompts, path)


def test_unreadable_prompt_files(tmp_path):
    with pytest.raises(InputError, match=r"missing.txt' cannot be read: No such file"):
        read_prompts(tmp_path / "missing.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match=r"folder.txt' cannot be read: Is a directory"):
        read_prompts(tmp_path / "folder.txt")


def test_an_empty_prompt_beyond_the_limit_is_still_an_error(tmp_path):
    with pytest.raises(InputError, match="line 3"):
        read_prompts(written(tmp_path, "a.txt", "one\ntwo\n\nfour"), limit=1)


def test_encoding_never_truncates():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    ids = encode_prompts(tokenizer, [Prompt("w3 w4 w5", "line 1"), Prompt("w6", "line 2")])
    assert [row.tolist() for row in ids] == [[3, 4, 5], [6]]


def test_a_prompt_without_tokens_is_named():
    with pytest.raises(InputError, match="line 2 has no tokens"):
        encode_prompts(word_tokenizer(), [Prompt("w3", "line 1"), Prompt("  ", "line 2")])


def test_checkpoints_load_in_float32_on_a_cpu(checkpoint):
    model = load_model(checkpoint, "target", CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert load_model(checkpoint, "target", CPU, "bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        load_model(checkpoint, "target", CPU, "int8")


def test_folders_that_are_no_checkpoints(tmp_path, checkpoint):
    assert find_checkpoint(str(checkpoint), "target") == checkpoint
    with pytest.raises(InputError, match="is neither a folder nor a repository in the Hugging Face cache"):
        find_checkpoint(str(tmp_path / "missing"), "target")
    with pytest.raises(InputError, match="draft 'nobody/nothing' is neither a folder"):
        find_checkpoint("nobody/nothing", "draft")
    with pytest.raises(InputError, match="is a file"):
        find_checkpoint(str(checkpoint / "config.json"), "target")
    with pytest.raises(InputError, match=r"no config\.json"):
        find_checkpoint(str(tmp_path), "target")


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_a_weight, r"lacks 1 weights, for example model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda folder: (folder / "model.safetensors").unlink(), "does not load: .*no file named"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "does not load: "),
        (lambda folder: (folder / "config.json").write_text("{"), "does not load: .*not a valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "does not load: Unrecognized"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": "x"}'),
            "vocab_size",
        ),
    ],
)
def test_damaged_checkpoints(tmp_path, damage, message):
    """Missing weights would otherwise be random ones, with a warning at most."""
    folder = save_checkpoint(tmp_path / "damaged")
    damage(folder)
    with pytest.raises(InputError, match=message) as raised:
        load_model(folder, "target", CPU)
    assert "\n" not in str(raised.value)


def test_missing_tokenizers(tmp_path):
    folder = save_checkpoint(tmp_path / "bare", tokenizer=False)
    with pytest.raises(InputError, match=r"target .* has no usable tokenizer"):
        load_tokenizer(folder, "target")
    check_same_tokenizer(word_tokenizer(), folder)  # a draft's folder needs none


def test_another_tokenizer_is_refused(tmp_path):
    word_tokenizer(first=1).save_pretrained(tmp_path / "shifted")
    with pytest.raises(
        DrafterError, match=r"60 tokens differ; for example, '<bos>' is 1 in the target's and 2 in the draft's"
    ):
        check_same_tokenizer(word_tokenizer(), tmp_path / "shifted")
    word_tokenizer(vocab_size=60).save_pretrained(tmp_path / "smaller")
    with pytest.raises(DrafterError, match=r"1 tokens differ; for example, 'w60' is 60 .* and missing in the draft's"):
        check_same_tokenizer(word_tokenizer(), tmp_path / "smaller")


def test_another_padding_is_the_same_tokenizer(tmp_path):
    word_tokenizer(padding_side="left", pad_token="<other>").save_pretrained(tmp_path)
    assert "<other>" in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"][-1]["content"]
    check_same_tokenizer(word_tokenizer(), tmp_path)


def test_devices():
    assert resolve_device("cpu") == CPU
    for name in ["gpu", "cuda:99"]:
        with pytest.raises(ConfigError, match=f"device '{name}' is not usable here"):
            resolve_device(name)


def test_weights_of_other_sizes_and_heads_are_named(tmp_path):
    other = save_checkpoint(tmp_path / "other", tiny_llama())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    said = r"draft '.*other' holds 6 weights of other sizes than its config says, for example .*mlp.down_proj.weight: "
    with pytest.raises(InputError, match=said + r"\[32, 64\] in the file, \[32, 80\] in the model"):
        load_model(other, "draft", CPU)

    head = save_checkpoint(tmp_path / "head", tiny_llama())
    weights = load_file(head / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "lm_head" in name}
    save_file(kept, head / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds a head, or another part, and no whole LlamaForCausalLM: 20 of its 21"):
        load_model(head, "draft", CPU)
