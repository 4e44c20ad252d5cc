"""`specdec bench` as a user meets it: suites, records, pages, answers, refusals."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from checkpoints import PROMPTS, save_checkpoint, word_tokenizer
from tiny import tiny_llama
from typer.testing import CliRunner

import specdec
from specdec.bench import methods
from specdec.bench.latency import RowTimes
from specdec.bench.report.page import page
from specdec.bench.roofline import bytes_read, measured_bandwidth, weight_bytes
from specdec.bench.suite import Question, ask, encode, of_length, read_questions
from specdec.check.settings import greedy_settings
from specdec.check.ways import AXES
from specdec.cli.app import app
from specdec.cli.bench import bench
from specdec.cli.check.command import check
from specdec.errors import InputError

NEW = 6
SPEC_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["w5 w6 w7", "w9 w10"]},
    {"question_id": 7, "category": "math", "turns": ["w40 w3 w9 w22"]},
    {"question_id": 82, "category": "writing", "turns": ["w8 w50 w4", "w12", "w13"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models") / "tiny-pair"
    save_checkpoint(root / "target", tiny_llama())
    save_checkpoint(root / "draft", tiny_llama(1, num_hidden_layers=1))
    (root / "prompts.json").write_text(json.dumps(PROMPTS[:3]))
    (root / "question.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SPEC_BENCH))
    return root


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def options(folder, prompts="prompts.json"):
    named = {"--target": "target", "--draft": "draft", "--prompts": prompts}
    found = [part for name, file in named.items() for part in (name, folder / file)]
    return ["bench", *found, "--max-new-tokens", NEW, "--repeats", 3]


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    """One run over questions of several turns with every sweep: result, record, and the folder of its files."""
    out = tmp_path_factory.mktemp("out")
    done = run(
        *options(folder, "question.jsonl"), "--no-peers", "--drafter", "none,draft_model", "--num-speculative-tokens",
        3, "--batch-size", "1,2", "--layout", "ragged,repad", "--acceptance-rates", "0,1", "--context-lengths", 12,
        "--json", out / "r.json", "--markdown", out / "r.md", "--html", out / "r.html", "--answers", out / "answers",
    )  # fmt: skip
    return done, json.loads((out / "r.json").read_text()), out


def entries(record, suite="prompts"):
    return [entry for entry in record["results"] if entry["suite"] == suite]


def test_every_method_is_checked_and_timed(measured):
    done, record, _ = measured
    assert done.exit_code == 0, done.output
    assert "Every method's outputs equal plain greedy decoding" in done.stdout
    assert "specdec draft_model repad" in done.stdout.split("\nLayouts, prompts\n")[1]
    assert "roofline" not in done.stdout  # of a GPU only
    # transformers plain; none and draft model in two layouts; two rates
    assert sorted(entry["batch_size"] for entry in entries(record)) == [1] * (1 + 4 + 2) + [2] * (1 + 4 + 2)
    for entry in record["results"]:
        assert entry["num_equal"] == entry["num_prompts"] == 6 and entry["timed"]
        assert len(entry["calls"]["seconds"]) == len(entry["tokens_per_second"]["repeats"]) == 3
        assert sum(entry["calls"]["num_new_tokens"]) == entry["num_new_tokens"]
        spread = entry["speedup_over_plain"]
        assert spread["low"] <= spread["median"] <= spread["high"]
        assert entry["time_to_first_token_ms"]["p50"] <= entry["latency_ms"]["p99"]
        assert ("stages" in entry) == entry["is_ours"]
        assert len(entry["calls"]["seconds"][0]) == {1: 6, 2: 3}[entry["batch_size"]]
    keys = {"machine", "versions", "git_sha", "git_dirty", "command", "device", "dtype", "seed", "models", "suites"}
    assert keys <= set(record)


def test_forced_acceptance_is_what_was_asked_for(measured):
    _, record, _ = measured
    rates = {
        entry["method"]: entry["draft_acceptance_rate"] for entry in entries(record) if "synthetic" in entry["method"]
    }
    assert rates == {"specdec synthetic 0": 0.0, "specdec synthetic 1": 1.0}


def test_categories_have_their_own_figures(measured):
    _, record, _ = measured
    assert record["suites"][0]["categories"] == ["writing", "math"]
    entry = next(e for e in entries(record) if e["method"] == "specdec draft_model" and e["batch_size"] == 1)
    writing, math = entry["categories"]["writing"], entry["categories"]["math"]
    assert (writing["num_prompts"], math["num_prompts"]) == (5, 1)
    both = 5 * writing["speedup_over_plain"]["median"] + math["speedup_over_plain"]["median"]
    assert both > 0 and writing["mean_acceptance_length"] >= 1
    steps = entry["num_spec_steps"]
    assert entry["num_step_tokens"] / steps == entry["mean_acceptance_length"]
    batched = next(e for e in entries(record) if e["method"] == "specdec draft_model" and e["batch_size"] == 2)
    assert batched["categories"]["math"]["speedup_over_plain"] is None


def test_context_lengths_are_suites_of_their_own(measured):
    _, record, _ = measured
    assert [suite["name"] for suite in record["suites"]] == ["prompts", "context 12"]
    assert record["suites"][1]["prompt_tokens"] == {"min": 12, "mean": 12, "max": 12}
    assert len(entries(record, "context 12")) == len(entries(record)) - 4  # without the forced acceptance


def test_the_record_names_no_folder_of_the_machine(measured, folder):
    _, record, _ = measured
    assert str(folder.parent) not in json.dumps(record)


def test_spec_benchs_answers_sum_up(measured):
    _, record, out = measured
    timed = [entry for entry in entries(record)]
    files = sorted((out / "answers").iterdir())
    assert len(files) == len(timed)
    by_method = {}
    for path in files:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(line["question_id"], line["category"]) for line in lines] == [
            (81, "writing"),
            (7, "math"),
            (82, "writing"),
        ]
        for line, question in zip(lines, SPEC_BENCH, strict=True):
            (choice,) = line["choices"]
            for name in ("turns", "decoding_steps", "new_tokens", "wall_time"):
                assert len(choice[name]) == len(question["turns"])
            assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"])
            assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
        by_method[lines[0]["model_id"]] = [choice["turns"] for line in lines for choice in line["choices"]]
    assert len({json.dumps(turns) for turns in by_method.values()}) == 1


class Images(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.others = [], []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag == "img":
            self.sources.append(named["src"])
        self.others += [value for name, value in attributes if name in ("href", "src") and tag != "img"]
        assert tag not in ("script", "link", "iframe")


def test_the_page_needs_no_network(measured):
    _, record, out = measured
    text = (out / "r.html").read_text()
    found = Images()
    found.feed(text)
    # By batch, by position, by stage, layouts, forced acceptance, context.
    assert len(found.sources) == 6 and not found.others
    assert all(source.startswith("data:image/svg+xml;base64,") for source in found.sources)
    assert "url(" not in text and "@import" not in text
    for title in ("Speed by batch size", "Acceptance by position", "Time by stage", "Cost of each layout"):
        assert f"<h2>{title}</h2>" in text
    assert record["git_sha"] is None or record["git_sha"] in text


def test_report_says_again_what_the_run_said(measured, tmp_path):
    done, _, out = measured
    again = run("bench", "report", out / "r.json", "--markdown", tmp_path / "r.md")
    assert again.exit_code == 0 and again.stdout == done.stdout
    assert (tmp_path / "r.md").read_text() == (out / "r.md").read_text()
    assert run("bench", "report", out / "r.json", "--plots", tmp_path / "plots").exit_code == 0
    assert "cost-of-each-layout.svg" in {path.name for path in (tmp_path / "plots").iterdir()}


def test_a_wrong_method_is_shown_and_decides_the_exit_status(folder, tmp_path, monkeypatch):
    """One wrong token in one prompt: marked, not timed, in tables and page; the comparison calls it a regression."""
    plain = [
        *options(folder),
        "--num-speculative-tokens",
        2,
        "--batch-size",
        2,
        "--drafter",
        "prompt_lookup",
        "--no-peers",
    ]
    assert run(*plain, "--json", tmp_path / "a.json").exit_code == 0
    right = specdec.generate

    def wrong_once(model, input_ids, *args, **more):
        output = right(model, input_ids, *args, **more)
        if len(input_ids) == 2:
            output.sequences[0, input_ids.shape[1]] += 1
        return output

    monkeypatch.setattr(methods, "speculative_generate", wrong_once)
    done = run(*plain, "--json", tmp_path / "b.json")
    assert done.exit_code == 1
    assert "NOT EQUAL, not timed" in done.stdout
    assert "NOT EQUAL to plain decoding (2 of 3 prompts), not timed: specdec prompt_lookup K=2, batch 2" in done.stdout
    record = json.loads((tmp_path / "b.json").read_text())
    ours = [entry for entry in record["results"] if entry["is_ours"]]
    assert [(entry["timed"], entry["tokens_per_second"]) for entry in ours] == [(False, None)]
    assert "<li class=bad>NOT EQUAL" in page(record) and "<tr class=bad>" in page(record)
    compared = run("bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert compared.exit_code == 1 and "not equal any more" in compared.stdout


def test_compare_flags_a_planted_slowdown_of_a_tenth(measured, tmp_path):
    """The times of a real run, once as they are and once with a tenth more for one method."""
    _, record, out = measured
    slowed = json.loads(json.dumps(record))
    steady = slowed["results"][0]["calls"]["seconds"][0]
    for one in (record, slowed):
        for entry in one["results"]:
            calls = len(entry["calls"]["seconds"][0])
            entry["foreign_cores"] = [0.0] * 3
            entry["calls"]["seconds"] = [[sum(steady) / calls * (1 + 0.01 * r)] * calls for r in range(3)]
    victim = next(e for e in slowed["results"] if e["method"] == "specdec draft_model" and e["batch_size"] == 2)
    victim["calls"]["seconds"] = [[1.1 * call for call in repeat] for repeat in victim["calls"]["seconds"]]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, one in zip(paths, (record, slowed), strict=True):
        path.write_text(json.dumps(one))
    done = run("bench", "compare", *paths, "--json", tmp_path / "c.json")
    assert done.exit_code == 1
    shown = done.stdout.split("context 12")[0].splitlines()
    assert [line.split()[-1] for line in shown if "specdec draft_model K=3, batch 2" in line] == ["slower"]
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["num_regressions"] == 1
    assert run("bench", "compare", paths[0], paths[0]).exit_code == 0
    assert run("bench", "compare", *paths, "--min-effect", 0.2).exit_code == 0
    assert run("bench", "compare", *paths, "--min-effect", 0.2, "--max-foreign-cores", -1).exit_code == 2
    assert run("bench", "compare", paths[0], out / "r.md").exit_code == 2


def test_a_later_turn_sees_the_models_own_answers(folder):
    model, tokenizer = tiny_llama(), word_tokenizer()
    questions = read_questions(folder / "question.jsonl")
    with greedy_settings(model):
        asked = ask(model, tokenizer, questions, NEW)
    assert [(one.question_id, one.turn) for one in asked.asked] == [(81, 0), (7, 0), (82, 0), (81, 1), (82, 1), (82, 2)]
    for index, (question, before) in {3: (0, [0]), 5: (2, [2, 4])}.items():
        said = [tokenizer.decode(asked.reference[i], skip_special_tokens=True) for i in before]
        turns = questions[question].turns
        pieces = [turns[0], *(text for pair in zip(said, turns[1:], strict=True) for text in pair)]
        assert asked.prompts[index].tolist() == tokenizer("\n".join(pieces)).input_ids
    assert asked.categories == ["writing", "math"]


def test_a_chat_template_is_used_for_questions_and_not_for_prompts():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w10 ' if m.role == 'user' else 'w11 ' }}{{ m.content }} {% endfor %}w12"
    )
    question = Question(1, None, ("w5 w6", "w7"), True, "here")
    assert encode(tokenizer, question, ["w20"]).tolist() == [10, 5, 6, 11, 20, 10, 7, 12]
    assert encode(tokenizer, Question(1, None, ("w5 w6",), False, "here"), []).tolist() == [5, 6]


def test_long_prompts_keep_their_end_or_are_refused():
    model, tokenizer = tiny_llama(max_position_embeddings=16), word_tokenizer()
    question = Question(1, None, (" ".join(f"w{3 + i}" for i in range(20)),), True, "line 1")
    with greedy_settings(model):
        shortened = ask(model, tokenizer, [question], NEW, max_prompt_tokens=4)
        with pytest.raises(InputError, match="line 1 has 20 tokens; with 6 new ones the model's 16 positions"):
            ask(model, tokenizer, [question], NEW)
    assert shortened.prompts[0].tolist() == [19, 20, 21, 22] and shortened.num_shortened == 1


def test_a_context_of_some_length_is_made_of_the_suites_prompts():
    model, tokenizer = tiny_llama(), word_tokenizer()
    questions = [Question(i, None, (text,), False, "here") for i, text in enumerate(("w5 w6 w7", "w8 w9"))]
    with greedy_settings(model):
        long = of_length(ask(model, tokenizer, questions, NEW), 4, model, NEW)
    assert [prompt.tolist() for prompt in long.prompts] == [[9, 5, 6, 7], [6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"question_id": 1, "turns": []}, "no list of texts"),
        ({"question_id": 1, "turns": ["w5", ""]}, "no list of texts"),
        ({"turns": ["w5"]}, "question_id None"),
        ({"question_id": 1, "turns": ["w5"], "category": 3}, "category 3"),
        ({"question_id": 5, "turns": ["w5"]}, "repeats question_id 5"),
    ],
)
def test_wrong_questions_are_named_by_their_line(tmp_path, line, reason):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ({"question_id": 5, "turns": ["w5"]}, line)))
    with pytest.raises(InputError, match=f"line 2.*{reason}"):
        read_questions(path)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--batch-size", "0"], "--batch-size 0"),
        (["--acceptance-rates", "0.5,2"], "'2' is not a probability"),
        (["--layout", "sideways"], "sideways"),
        (["--drafter", "nobody"], "nobody"),
        (["--json", "nowhere/x.json"], "cannot be written"),
        (["--context-lengths", "600"], "512"),
        (["--prompts", "none.json"], "cannot be read"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(folder, more, reason, monkeypatch):
    monkeypatch.setattr("specdec.bench.run.measure", lambda *a, **k: pytest.fail("measured"))
    done = run(*options(folder), *more)
    assert done.exit_code == 2 and reason in done.output


def test_options_that_a_subcommand_would_ignore_are_refused(measured):
    _, _, out = measured
    done = run("bench", "--repeats", 3, "report", out / "r.json")
    assert done.exit_code == 2 and "--repeats has no meaning for `specdec bench report`" in done.output


def test_without_matplotlib_the_extra_is_named(measured, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("specdec.cli.bench_run.find_spec", lambda name: None)
    _, _, out = measured
    done = run("bench", "report", out / "r.json", "--html", tmp_path / "r.html")
    assert done.exit_code == 2 and "specdec-toolkit[bench]" in done.output
    assert run("bench", "report", out / "r.json").exit_code == 0


def test_every_axis_can_be_chosen_on_the_command_line():
    for command in (check, bench):
        assert set(AXES) <= set(inspect.signature(command).parameters), command.__name__


def test_a_copy_has_a_bandwidth(monkeypatch):
    monkeypatch.setattr("specdec.bench.roofline.COPY_BYTES", 2**20)
    assert 1e7 < measured_bandwidth(torch.device("cpu")) < 1e13  # bytes per second, of any memory


def test_the_roofline_counts_weights_and_the_keys_that_were_there():
    target, draft = tiny_llama(), tiny_llama(1)
    counts = specdec.Speculation(num_target_calls=3, num_draft_calls=5)
    rows = [RowTimes(0.1, 0.2, [1, 2, 4]), RowTimes(0.1, 0.2, [1, 1])]
    read = bytes_read(target, draft, counts, 1, rows, [10, 20], 2.0)
    cached = (10 + 1) + (10 + 1 + 2) + (20 + 1)
    assert read == 4 * weight_bytes(target) + 6 * weight_bytes(draft) + 2.0 * cached
    table = target.get_input_embeddings().weight
    assert weight_bytes(target) == sum(p.nbytes for p in target.parameters()) - table.nbytes


def test_the_pair_that_ships_stands_in_for_what_is_not_said():
    from specdec.cli.bench_run import Wanted
    from specdec.cli.demo import shipped_pair
    from specdec.errors import ConfigError

    wanted = Wanted(None, None, None, None, "3", "1", {}, None, None, 8, None, 3, None, True, True, True, 0)
    found = wanted.with_defaults()
    assert found.target == str(shipped_pair() / "target") and found.draft == str(shipped_pair() / "draft")
    assert found.prompts == shipped_pair() / "prompts.json" and found.limit == 16
    assert found.drafters()[:2] == ("none", "draft_model") and "prompt_lookup" in found.drafters()
    assert replace(wanted, limit=120).with_defaults().limit == 120
    with pytest.raises(ConfigError, match="--draft x without --target"):
        replace(wanted, draft="x").with_defaults()
