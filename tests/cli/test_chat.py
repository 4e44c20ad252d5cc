"""Conversations on the command line: the chat template, system messages, files of messages, and what names a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint, word_tokenizer
from tiny import plain_greedy, tiny_llama
from typer.testing import CliRunner

from specdec.bench.suite import encode, read_questions
from specdec.cli.app import app
from specdec.errors import ConfigError, InputError
from specdec.files.loading import encode_prompts, read_prompts

NEW = 6
ROLES = {"system": 20, "user": 21, "assistant": 22, "tool": 23}
TEMPLATE = (
    "<bos> {% for m in messages %}"
    "{% if m.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "{{ {'system': 'w20', 'user': 'w21', 'assistant': 'w22', 'tool': 'w23'}[m.role] }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w24{% endif %}"
)
LINES = [
    {"id": "a", "messages": [{"role": "user", "content": "w5 w6"}]},
    {
        "question_id": 7,
        "messages": [
            {"role": "user", "content": "w5"},
            {"role": "assistant", "content": "w8 w9"},
            {"role": "user", "content": "w7"},
        ],
    },
    {"id": "c", "prompt": "w30 w31"},
]


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return save_checkpoint(tmp_path_factory.mktemp("instruct"), tiny_llama(), tokenizer)


@pytest.fixture
def prompts(tmp_path):
    return lines_in(tmp_path, LINES)


def lines_in(folder: Path, lines) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def continued(*ids):
    return plain_greedy(tiny_llama(), torch.tensor(ids), max_new_tokens=NEW)


def test_messages_are_answered_and_prompts_keep_their_ids(instruct, prompts):
    result = run("generate", "--target", instruct, "--prompts", prompts, "--max-new-tokens", NEW, "--json")
    assert result.exit_code == 0, result.output
    lines = sorted(map(json.loads, result.stdout.splitlines()), key=lambda line: line["index"])
    assert [(line["id"], line["prompt"]) for line in lines] == [("a", "w5 w6"), (7, "w7"), ("c", "w30 w31")]
    assert [line["completion_ids"] for line in lines] == [
        continued(1, 21, 5, 6, 24), continued(1, 21, 5, 22, 8, 9, 21, 7, 24), continued(30, 31),
    ]  # fmt: skip


def test_a_prompt_without_an_id_has_none(instruct):
    result = run("generate", "--target", instruct, "--prompt", "w5", "--max-new-tokens", NEW, "--json")
    assert "id" not in json.loads(result.stdout)


def test_the_system_message_comes_first(instruct, prompts):
    options = ["--target", instruct, "--prompts", prompts, "--max-new-tokens", NEW, "--json", "--chat"]
    result = run("generate", *options, "--system", "w40 w41")
    assert result.exit_code == 0, result.output
    lines = sorted(map(json.loads, result.stdout.splitlines()), key=lambda line: line["index"])
    assert [line["completion_ids"] for line in lines] == [
        continued(1, 20, 40, 41, 21, 5, 6, 24), continued(1, 20, 40, 41, 21, 5, 22, 8, 9, 21, 7, 24),
        continued(1, 20, 40, 41, 21, 30, 31, 24),
    ]  # fmt: skip


def test_a_run_into_a_file_is_resumed_under_the_same_messages(instruct, prompts, tmp_path):
    options = ["--target", instruct, "--prompts", prompts, "--max-new-tokens", NEW, "--out", tmp_path / "rows.jsonl"]
    assert run("generate", *options, "--chat", "--system", "w40").exit_code == 0
    assert run("generate", *options, "--chat", "--system", "w40").exit_code == 0
    for other in (["--chat", "--system", "w41"], ["--chat"], []):
        result = run("generate", *options, *other)
        assert result.exit_code == 2 and ("system" in result.stderr or "is_chat" in result.stderr), result.output


def test_check_compares_conversations(instruct, prompts, tmp_path):
    report = tmp_path / "report.json"
    options = ["--target", instruct, "--prompts", prompts, "--drafter", "prompt_lookup", "--max-new-tokens", NEW]
    plain = run("check", *options)
    result = run("check", *options, "--chat", "--system", "w40", "--json", report)
    assert plain.exit_code == result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert found["is_chat"] is True and found["system"] == "w40" and found["num_prompts"] == 3
    sampled = run(
        "check", *options, "--chat", "--sampling", "--num-samples", 40, "--limit", 1, "--verification", "token"
    )
    assert "no chat template" not in sampled.output


def test_bench_asks_conversations(prompts):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE

    def asked(**options):
        return [encode(tokenizer, question, []).tolist() for question in read_questions(prompts, **options)]

    assert asked() == [[1, 21, 5, 6, 24], [1, 21, 5, 22, 8, 9, 21, 7, 24], [30, 31]]
    assert asked(is_chat=True)[2] == [1, 21, 30, 31, 24]
    assert asked(is_chat=True, system="w40")[1:] == [
        [1, 20, 40, 21, 5, 22, 8, 9, 21, 7, 24], [1, 20, 40, 21, 30, 31, 24],
    ]  # fmt: skip
    assert [question.id for question in read_questions(prompts)] == ["a", 7, "c"]


def test_bench_measures_an_instruct_model_on_its_template(instruct, prompts, tmp_path):
    record = tmp_path / "record.json"
    result = run(
        "bench", "--target", instruct, "--prompts", prompts, "--drafter", "none,prompt_lookup", "--chat", "--repeats",
        1, "--batch-size", 2, "--num-speculative-tokens", 3, "--max-new-tokens", NEW, "--no-peers",
        "--no-stages", "--json", record,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (suite,) = json.loads(record.read_text())["suites"]
    assert suite["prompt_tokens"] == {"min": 5, "mean": pytest.approx((5 + 9 + 5) / 3), "max": 9}


def test_without_a_template(instruct, prompts, tmp_path):
    plain = save_checkpoint(tmp_path / "plain", tiny_llama())
    texts = tmp_path / "texts.txt"
    texts.write_text("w5 w6\n")
    for command in ("generate", "check", "bench"):
        for options in (["--prompts", prompts], ["--prompts", texts, "--chat"]):
            result = run(command, "--target", plain, *options, "--drafter", "prompt_lookup")
            assert result.exit_code == 2 and "no chat template" in result.stderr, (command, result.output)
        result = run(command, "--target", instruct, "--prompts", texts, "--system", "w40", "--drafter", "prompt_lookup")
        assert result.exit_code == 2 and "--system is a message before a conversation; add --chat" in result.stderr


def test_outputs_that_are_judged_have_no_template(instruct, tmp_path):
    rows = lines_in(tmp_path, [{"prompt_ids": [5], "completion_ids": [6]}])
    result = run("check", "--target", instruct, "--outputs", rows, "--chat")
    assert result.exit_code == 2 and "have no meaning for --outputs" in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": []}, "line 1 has `messages` that are not a list of at least one message"),
        ({"messages": "w5"}, "not a list"),
        ({"messages": [{"role": "user"}]}, "message 1 needs a string `role` and a string `content`"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message 1 needs a string"),
        (
            {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]},
            "ends with the ass",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, "is an empty prompt"),
        ({"messages": [{"role": "user", "content": "w5"}], "prompt": "w5"}, "has both `prompt` and `messages`"),
        ({"text": "w5"}, "neither a string `prompt`, nor lists `turns` .of strings. or `messages`"),
    ],
)
def test_bad_messages(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        read_prompts(lines_in(tmp_path, [line]))


def test_messages_that_a_template_does_not_take(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompts = read_prompts(lines_in(tmp_path, [{"messages": [{"role": "developer", "content": "w5"}]}]))
    with pytest.raises(ConfigError, match=r"line 1: the chat template does not take these messages: no developers"):
        encode_prompts(tokenizer, prompts)
    own = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w5"}]
    prompts = read_prompts(lines_in(tmp_path, [{"messages": own}]))
    assert encode_prompts(tokenizer, prompts)[0].tolist() == [1, 20, 9, 21, 5, 24]
    with pytest.raises(ConfigError, match=r"line 1 has a system message of its own; leave --system out"):
        encode_prompts(tokenizer, prompts, system="w40")
    prompts = lines_in(tmp_path, [{"messages": [*own, {"role": "tool", "content": "w6"}]}])
    with pytest.raises(InputError, match="ends with a message of 'tool'; end with the user's"):
        read_questions(prompts)
