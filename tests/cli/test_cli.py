"""The command line as a user meets it: what it prints, writes and exits with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from checkpoints import PROMPTS, save_checkpoint, word_tokenizer
from tiny import VOCAB, plain_greedy, tiny_llama
from transformers import GenerationConfig
from typer.testing import CliRunner

from specdec.check import oracle
from specdec.cli.app import app
from specdec.version import __version__

NEW = 8
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The layout of the demo pair: target/, draft/, prompts.json."""
    folder = tmp_path_factory.mktemp("pair")
    save_checkpoint(folder / "target", tiny_llama().bfloat16())
    save_checkpoint(folder / "draft", tiny_llama(1))
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    return folder


@pytest.fixture(scope="module")
def expected(pair):
    """transformers' plain greedy output of each prompt, end of sequence included."""
    model = tiny_llama().bfloat16().float()
    ids = [torch.tensor([int(word[1:]) for word in prompt.split()]) for prompt in PROMPTS]
    return [plain_greedy(model, prompt, max_new_tokens=NEW) for prompt in ids]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check(pair, *more):
    options = ["--target", pair / "target", "--prompts", pair / "prompts.json", "--max-new-tokens", NEW]
    return run("check", *options, *more)


def generate(pair, *more):
    return run("generate", "--target", pair / "target", "--max-new-tokens", NEW, *more)


def words(token_ids):
    """The text without special tokens."""
    return "".join(f"w{token}" for token in token_ids if token > 2)


def plant(monkeypatch, change):
    stock = oracle.generate
    monkeypatch.setattr(oracle, "generate", lambda model, ids, *a, **k: change(stock(model, ids, *a, **k), ids))


def test_check_succeeds(pair, tmp_path):
    out = tmp_path / "report.json"
    options = ["--batch-size", 4, "--num-speculative-tokens", 3, "--json", out]
    result = check(pair, "--draft", pair / "draft", *options)
    assert result.exit_code == 0, result.output
    assert "9/9 prompts equal, token for token" in result.stdout
    assert "9/9" in result.stderr and "9/9 0" not in result.stdout  # bars go to stderr
    report = json.loads(out.read_text())
    assert report["equivalent"] is True and report["num_prompts"] == report["num_equal"] == 9
    assert report["divergences"] == [] and report["dtype"] == "float32" and report["limit"] is None
    assert report["mean_acceptance_length"] >= 1 and 0 <= report["draft_acceptance_rate"] <= 1
    assert report["plain_tokens_per_second"] > 0 and report["speculative_tokens_per_second"] > 0
    assert report["target"] == str(pair / "target") and report["draft"] == str(pair / "draft")


def test_check_with_a_named_drafter_and_options(pair, tmp_path):
    out = tmp_path / "report.json"
    options = ["--drafter", "prompt_lookup", "--limit", 2, "--dtype", "float64", "--json", out]
    result = check(pair, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert (report["num_prompts"], report["limit"], report["dtype"]) == (2, 2, "float64")
    assert report["drafter"] == "prompt_lookup" and report["draft"] is None


def test_check_fails_on_a_bug(pair, expected, tmp_path, monkeypatch):
    def change(sequences, ids):
        if len(ids) == 9 and sequences.shape[1] == ids.shape[1] + NEW:
            sequences[5, ids.shape[1] + 1] = (sequences[5, ids.shape[1] + 1] + 5) % VOCAB
        return sequences

    plant(monkeypatch, change)
    for more in ([], ["--allow-ties"]):
        result = check(pair, "--drafter", "prompt_lookup", "--batch-size", 9, "--json", tmp_path / "out.json", *more)
        assert result.exit_code == 1, result.output
        assert "8/9 prompts equal" in result.stdout and "0 ties, 1 bugs" in result.stdout
        (found,) = json.loads((tmp_path / "out.json").read_text())["divergences"]
        assert (found["prompt"], found["position"], found["kind"]) == (5, 1, "bug")
        assert found["expected_token_id"] == expected[5][1] != found["actual_token_id"]
        assert found["margin"] > 0


def test_check_tolerates_ties_only_if_told(tmp_path, pair, expected, monkeypatch):
    """The first token of prompt 0 gets a twin with identical logits; ours then writes the other of the two."""
    model = tiny_llama().bfloat16()
    token, twin = expected[0][0], (expected[0][0] + 1) % VOCAB
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[token]
    first, second = sorted([token, twin])
    folder = save_checkpoint(tmp_path / "target", model)
    plant(monkeypatch, lambda sequences, ids: torch.where(sequences == first, second, sequences))
    command = ["check", "--target", folder, "--drafter", "prompt_lookup", "--prompts", pair / "prompts.json"]
    command += ["--limit", 1, "--max-new-tokens", 4, "--json", tmp_path / "out.json"]
    strict, lenient = run(*command), run(*command, "--allow-ties")
    assert (strict.exit_code, lenient.exit_code) == (1, 0), strict.output
    assert "1 ties, 0 bugs" in strict.stdout and "margins in float64" in strict.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["equivalent"] is False
    assert report["divergences"][0]["margin"] == 0.0 and report["divergences"][0]["kind"] == "tie"


def test_check_says_which_settings_it_ignores(tmp_path, pair):
    model = tiny_llama()
    model.generation_config.repetition_penalty = 1.3
    folder = save_checkpoint(tmp_path / "target", model)
    options = ["--prompts", pair / "prompts.json", "--drafter", "prompt_lookup", "--max-new-tokens", 4]
    result = run("check", "--target", folder, *options)
    assert result.exit_code == 0, result.output
    assert "note: the checkpoint's generation_config sets repetition_penalty=1.3" in result.stderr


def bad_input(pair, tmp_path):
    """name -> arguments of `check` beyond a good target, the prompts, and words that the message must hold."""
    good, drafter = ["--target", pair / "target"], ["--drafter", "prompt_lookup"]
    prompts = ["--prompts", pair / "prompts.json"]
    files = {
        "empty.txt": "",
        "line.jsonl": '{"prompt": "w3"}\n{"prompt"\n',
        "blank.txt": "w3\n\nw5\n",
        "spaces.json": '["w3", " "]',
        "long.txt": "w3 " * 600,
        "list.json": "{}",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    save_checkpoint(tmp_path / "other", tokenizer=word_tokenizer(first=1))
    save_checkpoint(tmp_path / "small", vocab_size=20, tokenizer=False)
    (tmp_path / "empty").mkdir()

    def with_file(name):
        return [*good, *drafter, "--prompts", tmp_path / name]

    return {
        "no prompt file": (with_file("missing.txt"), "cannot be read: No such file"),
        "empty prompt file": (with_file("empty.txt"), "is empty"),
        "malformed line": (with_file("line.jsonl"), "line 2 is not JSON"),
        "empty line": (with_file("blank.txt"), "line 2 is an empty prompt"),
        "no tokens": (with_file("spaces.json"), "item 1 (from 0) has no tokens"),
        "too long": (with_file("long.txt"), "608 tokens, but the target LlamaForCausalLM has 512 positions"),
        "no list": (with_file("list.json"), "must be a list of strings"),
        "no target folder": ([*prompts, *drafter, "--target", tmp_path / "missing"], "is neither a folder"),
        "no checkpoint": ([*prompts, *drafter, "--target", tmp_path / "empty"], "no config.json"),
        "no draft folder": ([*prompts, *good, "--draft", tmp_path / "empty"], "is not a drafter's: it holds nothing"),
        "no drafter in a folder": ([*prompts, *good, "--drafter", tmp_path / "empty"], "it holds nothing"),
        "unknown option": ([*prompts, *good, "--drafter", "prompt_lookup:size=3"], "its keys are max_ngram_size=int"),
        "empty drafter": ([*prompts, *good, "--drafter", "prompt_lookup,"], "has an empty entry"),
        "no draft of a pair": ([*prompts, *good, "--drafter", "prompt_lookup+draft_model"], "pass --draft FOLDER, or"),
        "other tokenizer in a pair": (
            [*prompts, *good, "--drafter", f"prompt_lookup+{tmp_path / 'other'}"],
            "tokenizer is different",
        ),
        "other tokenizer": ([*prompts, *good, "--draft", tmp_path / "other"], "tokenizer is different"),
        "other vocabulary": ([*prompts, *good, "--draft", tmp_path / "small"], "vocabulary has 20 tokens"),
        "unknown drafter": ([*prompts, *good, "--drafter", "magic"], "unknown drafter 'magic'; known are draft_model"),
        "drafter with arguments": ([*prompts, *good, "--drafter", "synthetic"], "needs arguments"),
        "two drafters": ([*prompts, *good, *drafter, "--draft", pair / "draft"], "pass one of them"),
        "no drafter": ([*prompts, *good], "pass --draft FOLDER or --drafter NAME"),
        "dtype": ([*prompts, *good, *drafter, "--dtype", "int4"], "dtype 'int4' is unknown"),
        "device": ([*prompts, *good, *drafter, "--device", "abacus"], "device 'abacus' is not usable"),
        "json folder": ([*prompts, *good, *drafter, "--json", tmp_path / "no" / "out.json"], "cannot be written"),
    }


def test_bad_input_is_one_line_and_exit_status_2(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("specdec.check.equivalence.run_plain", None)  # no token may be generated
    monkeypatch.setattr("specdec.check.equivalence.run_speculative", None)
    for name, (arguments, message) in bad_input(pair, tmp_path).items():
        result = run("check", "--max-new-tokens", NEW, *arguments)
        assert result.exit_code == 2, f"{name}: {result.output} {result.exception!r}"
        assert result.stdout == "", name
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, f"{name}: {result.stderr}"
        assert message in result.stderr, f"{name}: {result.stderr}"


@pytest.mark.parametrize(
    "options",
    [["--batch-size", 0], ["--num-speculative-tokens", 33], ["--max-new-tokens", 0], ["--limit", 0], ["--what"]],
)
def test_bad_options_are_exit_status_2(pair, options):
    result = check(pair, "--drafter", "prompt_lookup", *options)
    assert result.exit_code == 2 and options[0] in result.stderr


def test_an_interrupt_is_exit_status_130(pair, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("specdec.check.equivalence.run_plain", interrupt)
    result = check(pair, "--drafter", "prompt_lookup")
    assert result.exit_code == 130 and result.stderr.endswith("interrupted\n") and "Traceback" not in result.output


@pytest.mark.parametrize(
    "drafter",
    [
        [],
        ["--drafter", "prompt_lookup"],
        ["--drafter", "prompt_lookup:max_ngram_size=4,min_ngram_size=2"],
        ["--draft", "DRAFT"],
        ["--drafter", "DRAFT"],
        ["--drafter", "prompt_lookup+draft_model:folder=DRAFT"],
        ["--drafter", "prompt_lookup+draft_model", "--draft", "DRAFT"],
    ],
    ids=" ".join,
)
def test_generate_streams_one_prompt(pair, expected, drafter):
    drafter = [word.replace("DRAFT", str(pair / "draft")) for word in drafter]
    result = generate(pair, "--prompt", PROMPTS[0], *drafter)
    assert result.exit_code == 0, result.output
    assert result.stdout == words(expected[0]) + "\n"
    assert f"{len(expected[0])} tokens in" in result.stderr
    assert ("mean acceptance length" in result.stderr) == bool(drafter)


def test_candidates_are_for_the_cost_model(pair, expected):
    options = ["--drafter", "prompt_lookup", "--drafter", f"draft_model:folder={pair / 'draft'}"]
    result = generate(pair, "--prompt", PROMPTS[0], *options)
    assert result.exit_code == 2 and "does not choose among drafters" in result.stderr
    lists = (options, ["--drafter", "prompt_lookup,draft_model,none", "--draft", str(pair / "draft")])
    for options in lists:
        result = generate(pair, "--prompt", PROMPTS[0], *options, "--length-policy", "cost_model")
        assert result.exit_code == 0, result.output
        assert result.stdout == words(expected[0]) + "\n"


def test_look_ahead_embeddings_as_the_draft(demo_pair):
    """Their folder says what it is, to every command."""
    folder = demo_pair.folder
    options = ["--draft", folder / "look_ahead"]
    result = run("doctor", folder / "target", *options, "--json")
    assert json.loads(result.stdout)["drafters"]["look_ahead"]["fits"], result.output
    options += ["--target", folder / "target"]
    result = run("generate", "--prompt", "def f(x):", "--max-new-tokens", 4, "--num-speculative-tokens", 2, *options)
    assert result.exit_code == 0, result.output
    assert wanted_of(folder / "look_ahead").drafters() == ("none", "look_ahead", "prompt_lookup")


def wanted_of(draft):
    from specdec.cli.bench_run import Wanted

    return Wanted("t", str(draft), None, None, "3", "1", {}, None, None, 8, None, 3, None, True, True, True, 0)


def test_check_takes_drafters_with_options(pair, tmp_path):
    """Each is a way of its own; a comma before an option does not end a drafter."""
    drafters = "none,prompt_lookup:max_ngram_size=4,min_ngram_size=2,prompt_lookup+draft_model"
    out = tmp_path / "report.json"
    result = check(pair, "--drafter", drafters, "--draft", pair / "draft", "--json", out, "--limit", 2)
    assert result.exit_code == 0, result.output
    for name in ("plain", "prompt_lookup:max_ngram_size=4,min_ngram_size=2", "prompt_lookup+draft_model"):
        assert name in result.stdout, result.stdout


def test_generate_streams_while_it_decodes(pair, monkeypatch):
    """Would catch a streamer that gets everything at the end."""
    pieces = []
    monkeypatch.setattr("transformers.TextStreamer.put", lambda self, value: pieces.append(value.tolist()))
    generate(pair, "--prompt", PROMPTS[0], "--draft", pair / "draft")
    assert len(pieces) == 1 + NEW


def test_generate_prints_several_prompts_as_text(pair, expected):
    result = generate(pair, "--prompts", pair / "prompts.json", "--draft", pair / "draft", "--batch-size", 4)
    assert result.exit_code == 0, result.output
    for index, token_ids in enumerate(expected):
        assert f"--- prompt {index} ---\n{words(token_ids)}\n" in result.stdout


def test_generate_prints_json_lines(pair, expected):
    options = ["--prompts", pair / "prompts.json", "--draft", pair / "draft", "--batch-size", 4, "--limit", 7, "--json"]
    result = generate(pair, *options, "--num-speculative-tokens", 3)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(7))
    for line in lines:
        token_ids = expected[line["index"]]
        assert line["prompt"] == PROMPTS[line["index"]]
        assert line["completion_ids"] == token_ids and line["completion"] == words(token_ids)
        assert line["num_new_tokens"] == len(token_ids)
        assert line["num_spec_steps"] + line["num_accepted_draft_tokens"] >= len(token_ids) - 1
        assert line["mean_acceptance_length"] >= 1


def test_generate_samples(pair):
    options = ["--prompts", pair / "prompts.json", "--draft", pair / "draft", "--temperature", 0.9, "--json"]

    def rows(*more):
        result = generate(pair, *options, *more)
        assert result.exit_code == 0, result.output
        return {row["index"]: row for row in map(json.loads, result.stdout.splitlines())}, result.stderr

    one, summary = rows("--seed", 4)
    assert all(row["verification"] == "token" and row["is_lossless"] for row in one.values()) and "LOSSY" not in summary
    assert one == rows("--seed", 4, "--batch-size", 2)[0], "a row's sample does not depend on its batch"
    assert one != rows("--seed", 5)[0]
    block, _ = rows("--seed", 4, "--verification", "block")
    assert {row["verification"] for row in block.values()} == {"block"}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--verification", "top_beta:3:2.5"], "top_beta(beta=3, tau=2.5)"),
        (["--verification", "typical:0.1:0.3", "--top-p", 0.9], "typical(epsilon=0.1, delta=0.3)"),
    ],
)
def test_generate_names_a_lossy_rule(pair, options, name):
    common = ["--prompts", pair / "prompts.json", "--draft", pair / "draft", "--limit", 3]
    result = generate(pair, *common, *options)
    assert result.exit_code == 0 and f"LOSSY: {name}" in result.stderr, result.output
    for line in generate(pair, *common, *options, "--json").stdout.splitlines():
        assert json.loads(line)["verification"] == name and json.loads(line)["is_lossless"] is False


def test_generate_reads_a_generation_config(pair, tmp_path):
    """Penalised greedy decoding, as transformers writes it with the same file."""
    config = GenerationConfig(repetition_penalty=1.8, no_repeat_ngram_size=2)
    config.save_pretrained(tmp_path)
    result = generate(
        pair,
        "--prompt",
        PROMPTS[0],
        "--draft",
        pair / "draft",
        "--generation-config",
        tmp_path / "generation_config.json",
    )
    ids = torch.tensor([int(word[1:]) for word in PROMPTS[0].split()])
    model = tiny_llama().bfloat16().float()
    wanted = plain_greedy(model, ids, max_new_tokens=NEW, repetition_penalty=1.8, no_repeat_ngram_size=2)
    assert result.exit_code == 0 and result.stdout == words(wanted) + "\n", result.output
    assert wanted != plain_greedy(model, ids, max_new_tokens=NEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", 0), "--temperature 0 is not a finite number above 0; for greedy decoding leave it out"),
        (("--temperature", "nan"), "--temperature nan is not a finite number"),
        (("--seed", 1), "--seed 1 applies only to sampling; add --temperature, --top-k or --top-p"),
        (("--verification", "block"), "--verification block applies only to sampling; add --temperature"),
        (("--verification", "typical:2:9"), "--verification typical:2:9: epsilon=2.0 must be"),
        (("--verification", "top_beta:2:1", "--top-k", 3), "--verification top_beta:2:1 is for greedy decoding"),
        (("--num-speculative-tokens", 33), "--num-speculative-tokens 33 exceeds 32; pass 1 to 32"),
    ],
)
def test_generates_errors_name_the_commands_options(pair, options, message):
    result = generate(pair, "--prompt", "w5", *options)
    assert result.exit_code == 2 and message in result.stderr, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", 0.5), "--temperature 0.5 applies only to sampling; add --do-sample"),
        (("--top-k", 3), "--top-k 3 applies only to sampling; add --do-sample"),
        (("--seed", 1), "--seed 1 applies only to sampling; add --do-sample"),
        (("--do-sample", "--temperature", 0), "--temperature 0 is not a finite number above 0"),
        (("--drafter", "foo"), "--drafter foo cannot draft for infilling; choose self, ahead, ngram or none"),
        (("--num-speculative-tokens", 33), "--num-speculative-tokens 33 exceeds 32"),
    ],
)
def test_infills_errors_name_the_commands_options(options, message):
    result = run("infill", "--text", "a <mask>", *options)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_infill_samples_among_the_likeliest():
    """Among one token there is no choice: what greedy filling writes."""
    greedy = run("infill", "--text", "def f(<mask:3>):")
    sampled = run("infill", "--text", "def f(<mask:3>):", "--do-sample", "--top-k", 1, "--seed", 3)
    assert greedy.exit_code == 0 and greedy.stdout == sampled.stdout, sampled.output


def test_help_is_complete():
    for command in ("check", "bench"):
        text = " ".join(run(command, "--help").stdout.split())
        assert "ragged (the default), repad, grouped" in text
    assert "..." not in run("train", "--help").stdout.partition("Commands:")[2]


@pytest.mark.parametrize(
    ("content", "options", "number"),
    [
        ({"max_new_tokens": 5}, (), 5),
        ({"max_length": 9}, (), 9 - len(PROMPTS[0].split())),
        ({"max_new_tokens": 5}, ("--max-new-tokens", 3), 3),
        ({"prompt_lookup_num_tokens": 2, "max_new_tokens": 4}, (), 4),
    ],
)
def test_the_lengths_of_a_generation_config_count(pair, tmp_path, content, options, number):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**content, "min_new_tokens": number}))
    common = ("generate", "--target", pair / "target", "--prompt", PROMPTS[0], "--json", "--generation-config", path)
    result = run(*common, *options)
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["completion_ids"]) == number
    path.write_text('{"max_length": 1}')
    result = run(*common)
    assert result.exit_code == 2 and "max_length=1 of the generation config leaves no room" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"num_beams": 4}', "num_beams=4"),
        ('{"temperatur": 4}', "'temperatur' is not an option"),
        ("[1]", "JSON list"),
        ("{", "not JSON"),
    ],
)
def test_generate_refuses_a_generation_config(pair, tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    result = generate(pair, "--prompt", "w5", "--generation-config", path)
    assert result.exit_code == 2 and message in result.stderr, result.output


TEMPLATE = (
    "<bos> {% for message in messages %}w9 {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w10{% endif %}"
)


def test_generate_applies_the_chat_template(pair, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    save_checkpoint(tmp_path / "target", tiny_llama().bfloat16(), tokenizer)
    chat = generate(tmp_path, "--prompt", PROMPTS[0], "--chat")
    model = tiny_llama().bfloat16().float()
    ids = torch.tensor([1, 9, 5, 6, 7, 10])
    assert chat.exit_code == 0, chat.output
    assert chat.stdout == words(plain_greedy(model, ids, max_new_tokens=NEW)) + "\n"
    assert chat.stdout != generate(pair, "--prompt", PROMPTS[0]).stdout
    refused = generate(pair, "--prompt", PROMPTS[0], "--chat")
    assert refused.exit_code == 2 and "no chat template; leave --chat out" in refused.stderr


def test_generate_to_a_file_is_greedy(pair, tmp_path):
    result = generate(pair, "--prompt", "w5", "--out", tmp_path / "rows.jsonl", "--temperature", 0.5)
    assert result.exit_code == 2 and "--out writes greedy rows" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "w3", "--verification", "lenient:2", "--drafter", "prompt_lookup"], "lenience=2.0"),
        (["--prompt", "w3", "--verification", "lenient:0.5"], "nothing to accept"),
        ([], "pass either --prompt TEXT or --prompts FILE"),
        (["--prompt", "w3", "--prompts", "a.txt"], "pass either"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "  "], "--prompt has no tokens"),
        (["--prompt", "w3", "--num-speculative-tokens", 3], "num_speculative_tokens=3 without a drafter"),
        (["--prompt", "w3 " * 510], "518 tokens"),
    ],
)
def test_bad_input_of_generate(pair, options, message):
    result = generate(pair, *options)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stdout == ""


def test_length_policies(pair, expected):
    draft = ["--draft", pair / "draft", "--length-policy"]
    plain = generate(pair, "--prompts", pair / "prompts.json", "--json")
    for policy in ("heuristic", "confidence:0.2", "cost_model"):
        result = generate(pair, "--prompts", pair / "prompts.json", "--json", *draft, policy)
        assert result.exit_code == 0, result.output
        ids = [
            [json.loads(line)["completion_ids"] for line in sorted(run.stdout.splitlines())] for run in (result, plain)
        ]
        assert ids[0] == ids[1]
    result = check(pair, *draft, "fixed,confidence")
    assert result.exit_code == 0 and "2/2 ways equal" in result.stdout, result.output
    for arguments, message in ((["acceptance_head"], "holds no acceptance_head.json"), (["spiral"], "is unknown")):
        result = check(pair, *draft, *arguments)
        assert result.exit_code == 2 and message in result.stderr
    result = check(pair, "--drafter", "prompt_lookup", "--length-policy", "confidence")
    assert result.exit_code == 2 and "does not show" in result.stderr


def test_demo_succeeds(pair):
    result = run("demo", "--models", pair, "--max-new-tokens", NEW)
    assert result.exit_code == 0, result.output
    assert "8/8 outputs identical" in result.stdout and "mean acceptance length" in result.stdout
    for way in ("transformers, batch of 8", "specdec, plain", "specdec, speculative"):
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(way))
        assert line.endswith("8/8") and "x" in line
    assert PROMPTS[0] in result.stdout and result.stdout.isascii()


def test_demo_fails_if_an_output_differs(pair, monkeypatch):
    def change(sequences, ids):
        if sequences.shape[1] == ids.shape[1] + NEW:
            sequences[2, ids.shape[1]] += 1
        return sequences

    plant(monkeypatch, change)
    result = run("demo", "--models", pair, "--max-new-tokens", NEW)
    assert result.exit_code == 1 and "7/8 outputs identical" in result.stdout, result.output


def test_demo_names_what_is_missing(tmp_path):
    result = run("demo", "--models", tmp_path)
    assert result.exit_code == 2 and "prompts.json" in result.stderr


def test_version_and_help():
    assert run("--version").stdout == f"specdec {__version__}\n"
    for command in ([], ["check"], ["generate"], ["demo"]):
        assert run(*command, "--help").exit_code == 0
    listed = run("--help").stdout.partition("Commands:")[2]
    assert all(command in listed for command in ("check", "generate", "demo"))
    assert "..." not in listed  # every summary fits its line


def commands(command, name="specdec"):
    yield name, command
    for part, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {part}")


def test_options_are_lower_case_whatever_their_metavar():
    """typer 0.27 takes a metavar that is the parameter's name in capitals for the option, unless that is given."""
    for name, command in commands(typer.main.get_command(app)):
        for parameter in command.params:
            assert all(option == option.lower() for option in parameter.opts), f"{name}: {parameter.opts}"


def test_python_m_specdec(tmp_path):
    """The real entry point: a fresh process, its exit status and its streams."""
    command = [sys.executable, "-m", "specdec", "check", "--target", str(tmp_path), "--drafter", "magic"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    done = subprocess.run([*command, "--prompts", str(prompts)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith("error: unknown drafter 'magic'") and done.stderr.count("\n") == 1


def test_a_repeated_drafter_is_checked_too(pair):
    target = ("--target", pair / "target", "--prompts", pair / "prompts.json", "--max-new-tokens", NEW, "--limit", 2)
    done = run("check", *target, "--drafter", "prompt_lookup", "--drafter", "none", "--batch-size", "1,2")
    assert done.exit_code == 0, done.output
    assert "4/4 ways equal plain greedy" in done.output
