"""The benchmark of the one-line call, every part on a CPU; and how speeds of calls are counted."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import families
import pytest
import torch
from checkpoints import PROMPTS, save_checkpoint
from tiny import tiny_llama

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def load():
    """Imports a module of benchmarks/, whose scripts find each other on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models") / "tiny-pair"
    save_checkpoint(root / "target", tiny_llama(0))
    save_checkpoint(root / "draft", tiny_llama(1, num_hidden_layers=1))
    (root / "prompts.json").write_text(json.dumps(PROMPTS[:4]))
    return root


@pytest.fixture
def run(load, pair, tmp_path, one_thread):
    """Runs the script on tiny models; returns its exit status and record."""

    def one_line(*arguments: str) -> tuple[int, dict]:
        out = tmp_path / "record.json"
        tiny = ["--device", "cpu", "--pair", str(pair), "--shapes", "own", "--size", "tiny", "--out", str(out)]
        short = ["--context", "12", "--new-tokens", "6", "--family-context", "12", "--family-new-tokens", "6"]
        status = load("one_line").main([*tiny, *short, *arguments])
        return status, json.loads(out.read_text())

    return one_line


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_speed_is_counted_with_the_prefill_and_after_it(load):
    times = load("call_timing").CallTimes(rows=2, new_tokens=5, whole=[1.0, 9.0, 2.0], prefill=[0.4, 0.1, 3.0])
    assert times.with_prefill == 2 * 5 / 2.0
    assert times.after_prefill == pytest.approx(2 * 4 / 1.6)
    found = times.summary()
    assert (found["prefill_ms"], found["worst_prefill_ms"]) == (400.0, 3000.0)
    assert load("call_timing").CallTimes(1, 5, [1.0], [1.5]).summary()["tokens_per_second"] is None


def test_all_rounds_together_make_five_calls_for_the_prefill(load):
    share = load("call_timing").share
    assert [[share(number, rounds) for number in range(rounds)] for rounds in (1, 3, 7)] == [
        [5], [2, 2, 1], [1, 1, 1, 1, 1, 0, 0],
    ]  # fmt: skip


def test_decode_compares_all_ways(run, capsys):
    status, record = run("--parts", "decode", "--batch-sizes", "1,2", "--rounds", "2")
    assert status == 0 and record["oracle"][0]["equal_to_transformers_on_wrapped"] == "1/1"
    cells = [(entry["batch_size"], entry["way"], entry["method"]) for entry in record["decode"]]
    ours = [(way, method) for way in ("one line", "wrapped") for method in ("plain", "lookup", "draft")]
    theirs = {1: ["plain", "draft"], 2: ["plain"]}
    assert cells == [
        (batch, *cell) for batch in (1, 2) for cell in [*ours, *(("transformers", name) for name in theirs[batch])]
    ]
    for entry in record["decode"]:
        assert len(entry["seconds"]) == 2 and len(entry["prefill_seconds"]) == 5
        assert entry["equal_to_plain"] == f"{entry['batch_size']}/{entry['batch_size']}" and len(entry["hashes"]) == 1
    assert [entry["method"] for entry in record["ratios"]] == ["plain", "lookup", "draft"] * 2
    assert capsys.readouterr().out.count("\n| 2 | ") == 3


def test_a_measured_batch_size_is_not_measured_again(run):
    run("--parts", "decode", "--batch-sizes", "1", "--rounds", "1")
    _, record = run("--parts", "decode", "--batch-sizes", "1,2", "--rounds", "1")
    assert [entry["batch_size"] for entry in record["ratios"]] == [1] * 3 + [2] * 3
    assert len(record["resumed_by"]) == 1


def test_a_wrong_token_of_ours_is_seen(load, run, monkeypatch):
    """Also if only the second of several calls writes it."""
    decode, calls = load("one_line_decode").Setting.decode, []

    def wrong(self, cell, ids, new_tokens):
        out = decode(self, cell, ids, new_tokens)
        if cell == ("one line", "draft") and new_tokens > 1:
            calls.append(cell)
            out[-1, -1] += len(calls) == 2
        return out

    monkeypatch.setattr(load("one_line_decode").Setting, "decode", wrong)
    status, record = run("--parts", "decode", "--batch-sizes", "2", "--rounds", "1")
    assert status == 1
    (entry,) = (e for e in record["decode"] if (e["way"], e["method"]) == ("one line", "draft"))
    assert entry["equal_to_plain"] == "1/2" and len(entry["hashes"]) == 2


def test_faces_are_compared_with_generate(load, run, monkeypatch, capsys):
    status, record = run("--parts", "faces", "--batch-sizes", "1,3", "--rounds", "1")
    faces = ["generate", "generate_many", "engine"]
    cells = [(entry["method"], entry["face"]) for entry in record["faces"] if entry["batch_size"] == 3]
    assert cells == [*(("plain", face) for face in faces), *(("draft", face) for face in [*faces, "custom_generate"])]
    assert status == 0 and all(e["equal_to_plain"] == f"{e['batch_size']}/{e['batch_size']}" for e in record["faces"])
    assert all(entry["over_generate"] == 1 for entry in record["faces"] if entry["face"] == "generate")
    assert capsys.readouterr().out.count("\n| 3 | draft | ") == 4

    by_engine = load("one_line_faces").by_engine
    monkeypatch.setattr(load("one_line_faces"), "by_engine", lambda *all: [row[:-1] for row in by_engine(*all)])
    status, record = run("--parts", "faces", "--batch-sizes", "2", "--rounds", "1")
    assert status == 1 and {e["equal_to_plain"] for e in record["faces"] if e["face"] == "engine"} >= {"0/2"}


def test_ratios_name_what_is_slower_than_wrapped(load):
    script = load("one_line_decode")
    times = {
        script.Cell(way, method): load("call_timing").CallTimes(1, 11, [seconds], [1.0])
        for way, seconds in (("one line", 3.0), ("wrapped", 2.0), ("transformers", 6.0))
        for method in script.METHODS
    }
    times[script.Cell("one line", "plain")].whole = [2.0]
    entries = [{"batch_size": 1, **entry} for entry in script.ratios(times)]
    plain, lookup, _ = entries
    assert (plain["over_wrapped"], plain["over_transformers"]) == (1.0, 5.0)
    assert (lookup["over_wrapped"], lookup["over_wrapped_with_prefill"]) == (0.5, 0.667)
    assert script.slower({"ratios": entries}) == ["batch 1 lookup 0.5 / 0.667", "batch 1 draft 0.5 / 0.667"]


def test_families_are_compared_with_transformers(load, run, capsys):
    names = ["gpt_neox", "gpt2", "qwen3_moe"]
    status, record = run("--parts", "families", "--families", ",".join(names), "--batch-sizes", "1,2", "--rounds", "1")
    assert status == 0 and [entry["family"] for entry in record["families"]] == names
    for entry in record["families"]:
        assert entry["service"]["reason"] is not None and "not_served" not in entry
        for rows in (1, 2):
            found = entry[f"batch {rows}"]
            assert found["lookup_equal_to_plain"] == found["transformers_equal_to_plain"] == f"{rows}/{rows}"
            assert set(found["over_transformers"]) == {"plain", "lookup"}
    assert "\n| gpt_neox | " in capsys.readouterr().out
    _, record = run("--parts", "families", "--families", "gpt2,opt", "--rounds", "1")
    assert [entry["family"] for entry in record["families"]] == [*names, "opt"], "gpt2 was there already"


def test_a_family_that_is_said_to_be_exact_must_be(load, run, monkeypatch):
    said = argparse.Namespace(network_type=dict, is_exact=True, reason="")
    monkeypatch.setattr(load("one_line_families"), "service_of", lambda model: said)
    decode = load("one_line_families").decode

    def wrong(model, method, ids, new_tokens):
        out, speculation = decode(model, method, ids, new_tokens)
        if method == "lookup":
            out[0, -1] += 1
        return out, speculation

    monkeypatch.setattr(load("one_line_families"), "decode", wrong)
    arguments = ["--parts", "families", "--families", "llama", "--batch-sizes", "2", "--rounds", "1"]
    status, record = run(*arguments)
    assert status == 1 and record["families"][0]["batch 2"]["lookup_equal_to_plain"] == "1/2"
    said.is_exact, said.reason = False, "its kernels"
    status, record = run(*arguments[:3], "mistral", *arguments[4:])
    assert record["families"][1]["service"] == {"network": "dict", "is_exact": False, "reason": "its kernels"}
    assert load("one_line_families").wrong(record["families"]) == ["llama"]


def test_what_is_not_served_is_recorded(load, run, monkeypatch):
    def refuses(*arguments):
        raise load("one_line_families").SpecDecError("no kernel")

    monkeypatch.setattr(load("one_line_families"), "measure_batch", refuses)
    status, record = run("--parts", "families", "--families", "llama")
    assert status == 0 and record["families"][0]["not_served"] == "SpecDecError: no kernel"


def test_no_family_is_begun_after_the_deadline(run, tmp_path):
    run("--parts", "families", "--families", "llama", "--rounds", "1", "--batch-sizes", "1")
    _, record = run("--parts", "families", "--families", "opt", "--seconds", "0")
    assert [entry["family"] for entry in record["families"]] == ["llama"]


def test_families_are_those_of_the_tests(load):
    models = load("random_models")
    assert set(models.FAMILIES) <= set(families.SERVED) and len(models.DEFAULT_FAMILIES) == 16


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "falcon", "cohere", "gemma2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_families_have_a_real_size(load, name):
    """Without their weights: a size that a config of this family does not know would leave its default."""
    models = load("random_models")
    model = models.built(models.family_config(name, models.SIZES["real"]), torch.bfloat16, "meta")
    parameters = list(model.parameters())
    assert 0.3e9 < sum(parameter.numel() for parameter in parameters) < 1.5e9
    assert {(parameter.device.type, parameter.dtype) for parameter in parameters} == {("meta", torch.bfloat16)}
    text = model.config.get_text_config()
    assert text.num_hidden_layers == 16 and text.hidden_size == 2048 and not text.tie_word_embeddings


def test_a_first_call_is_measured(load, capsys):
    tiny = ["--shapes", "tiny,tiny", "--device", "cpu", "--dtype", "float32", "--context", "8", "--new-tokens", "3"]
    assert load("one_line_first").main(["--method", "draft", "--num-speculative-tokens", "2", *tiny]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < found["first_token_seconds"] < found["call_seconds"]
    assert found["second_call"]["first_token_seconds"] > 0 and found["context"] == 8


def test_the_second_process_finds_the_kernels_of_the_first(load):
    """And the first finds none; each method has caches of its own."""
    script, found, entries = load("one_line_first"), [], []

    def start(command, environment):
        folders = [Path(environment[name]) for name in script.CACHES]
        found.append((command[command.index("--method") + 1], [path.exists() for path in folders], set(folders)))
        for path in folders:
            path.mkdir(exist_ok=True)
        assert environment["PYTHONPATH"].startswith(str(BENCHMARKS.parent))
        return {"first_token_seconds": 1.0}

    script.measure(["plain", "draft"], "8B,0.6B", ["--device", "cuda"], entries.append, start)
    assert [(method, any(there), all(there)) for method, there, _ in found] == [
        ("plain", False, False), ("plain", True, True), ("draft", False, False), ("draft", True, True),
    ]  # fmt: skip
    assert found[0][2] == found[1][2] and not found[1][2] & found[2][2] and len(found[0][2]) == 5
    assert [entry["kernel_cache"] for entry in entries] == ["empty", "warm"] * 2


def test_first_is_a_part(load, run, monkeypatch, capsys):
    """A method whose two processes are in the record is not measured again."""
    commands = []

    def start(command, environment):
        commands.append(command)
        return {"first_token_seconds": 1.5, "second_call": {"first_token_seconds": 0.5}}

    monkeypatch.setattr(load("one_line_first"), "run_worker", start)
    run("--parts", "first", "--methods", "plain")
    _, record = run("--parts", "first", "--methods", "plain,lookup")
    assert [(e["method"], e["kernel_cache"]) for e in record["first"]] == [
        ("plain", "empty"), ("plain", "warm"), ("lookup", "empty"), ("lookup", "warm"),
    ]  # fmt: skip
    run("--show")
    assert capsys.readouterr().out.count("| plain | warm | 1.5 | 0.5 |") == 3
    assert commands[0][-6:] == ["--dtype", "float32", "--context", "12", "--num-speculative-tokens", "5"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--parts decoed", "--parts: decoed is unknown; choose among decode, faces, first, families"),
        ("--shapes 8B", "--shapes: 8B names 1 shapes; give target,draft"),
        ("--first-shapes 8B,9B", "--first-shapes: 9B is unknown"),
        ("--methods plian", "--methods: plian is unknown"),
        ("--show", "out.json; measure one without --show"),
        ("--families lama", "unknown families lama; choose among gpt_neox"),
    ],
)
def test_wrong_arguments_are_refused_at_once(load, tmp_path, capsys, wrong, words):
    with pytest.raises(SystemExit):
        load("one_line").main(["--device", "cpu", "--out", str(tmp_path / "out.json"), *wrong.split()])
    assert words in capsys.readouterr().err and not (tmp_path / "out.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(load, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load("one_line").main(["--out", str(tmp_path / "out.json")])
    assert "torch sees no CUDA device here; --device cpu" in capsys.readouterr().err
