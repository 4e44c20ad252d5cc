"""vLLM as a peer: our side on a CPU, vLLM's side against a stand-in for it, and what is said where it is missing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import save_checkpoint
from tiny import tiny_llama

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROMPTS = [[5, 6, 7, 8], [9, 9, 10, 3], [11, 4, 11, 4]]


@pytest.fixture(scope="module")
def load():
    """Imports a module of benchmarks/, whose scripts find each other on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture
def folder(tmp_path) -> Path:
    """As `build` leaves it, of other models."""
    for role, seed in (("target", 0), ("draft", 1)):
        model = tiny_llama(seed)
        model.generation_config.eos_token_id = None
        save_checkpoint(tmp_path / role, model)
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "about.json").write_text(json.dumps({"stand_ins": "tiny", "dtype": "float32"}))
    return tmp_path


def options(folder, method="all", k=None, **changes):
    return {
        "folder": str(folder), "method": method, "k": k, "ks": [1, 3], "batch_sizes": [1, 3], "new_tokens": 6,
        "rounds": 1, "device": "cpu", "options": {}, "speculative": {}, **changes,
    }  # fmt: skip


class FakeVLLM:
    """Writes what it is told, and counts 4 drafts with 6 accepted tokens a call."""

    __version__ = "0"

    def __init__(self, rows):
        self.rows, self.calls, self.arguments = rows, 0, {}

    def LLM(self, model, **arguments):
        self.arguments = arguments
        return self

    def SamplingParams(self, **sampling):
        assert sampling["temperature"] == 0 and sampling["ignore_eos"]
        return sampling["max_tokens"]

    def generate(self, prompts, count, use_tqdm):
        self.calls += 1
        rows = [self.rows[PROMPTS.index(prompt["prompt_token_ids"])][:count] for prompt in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=row)]) for row in rows]

    def get_metrics(self):
        if self.arguments["speculative_config"] is None:
            return []
        names = {"num_drafts": 4, "num_accepted_tokens": 6, "num_draft_tokens": 8}
        return [SimpleNamespace(name=f"vllm:spec_decode_{name}", value=n * self.calls) for name, n in names.items()]


def test_both_sides_are_compared(load, folder, monkeypatch):
    ours = load("peer_ours").work(options(folder))
    methods = [("plain", None), ("draft", 1), ("draft", 3), ("lookup", 1), ("lookup", 3), ("cost_model", None)]
    assert [(e["method"], e["K"], e["batch_size"]) for e in ours] == [(*m, rows) for rows in (1, 3) for m in methods]
    assert all(entry["equal_to_plain"] == f"{entry['batch_size']}/{entry['batch_size']}" for entry in ours)
    assert all(len(entry["prefill_seconds"]) == 5 and entry["tokens_per_second_with_prefill"] > 0 for entry in ours)

    rows = json.loads((folder / "ours.json").read_text())["plain"]["3"]
    assert [len(row) for row in rows] == [6, 6, 6]
    rows[1][-1] += 1  # as another order of sums would
    fake = FakeVLLM(rows)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    found = load("peer_vllm_worker").work(options(folder, "draft", 3))
    assert [entry["equal_to_plain"] for entry in found] == ["1/1", "2/3"]
    assert [entry["vllm_mean_acceptance_length"] for entry in found] == [2.5, 2.5]
    draft = {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": 3}
    assert fake.arguments["speculative_config"] == draft
    assert fake.arguments["max_model_len"] == 20 and not fake.arguments["enable_prefix_caching"]
    found = load("peer_vllm_worker").work(options(folder, "plain", new_tokens=5, batch_sizes=[1]))
    assert found[0]["equal_to_plain"] is None, "ours was measured for six tokens"
    assert found[0]["vllm_mean_acceptance_length"] is None and fake.arguments["speculative_config"] is None


def test_the_users_options_come_last(load, folder):
    worker, more = load("peer_vllm_worker"), {"num_speculative_tokens": 4, "prompt_lookup_max": 3}
    given = options(folder, "ngram", 2, options={"dtype": "float16"}, speculative=more)
    found = worker.llm_options(given, folder)
    assert found["dtype"] == "float16"
    assert found["speculative_config"] == {"method": "ngram", "prompt_lookup_min": 2, **more}


@pytest.fixture
def main(load, folder, monkeypatch):
    """Runs the script with workers that only say which they are; returns exit status, record and these."""
    script, started = load("peer_vllm"), []

    def worker(arguments, side, method, k):
        started.append((side, method, k))
        speed = {"tokens_per_second": 2.0, "tokens_per_second_with_prefill": 1.0}
        prefill = {"prefill_ms": 3, "worst_prefill_ms": 4}
        return [{"method": method, "K": k, "batch_size": 1, "equal_to_plain": script.equal, **speed, **prefill}]

    monkeypatch.setattr(script, "run_worker", worker)
    monkeypatch.setattr(script, "equal", "1/1", raising=False)

    def run(*arguments):
        out = folder / "record.json"
        fixed = ["run", "--folder", str(folder), "--device", "cpu", "--batch-sizes", "1", "--out", str(out)]
        return script.main([*fixed, *arguments]), json.loads(out.read_text()), started

    return run


def test_each_setting_is_a_process_and_is_run_once(load, main, monkeypatch, capsys):
    monkeypatch.setattr(load("peer_vllm"), "missing_vllm", lambda arguments: None)
    main("--sides", "ours")
    status, record, started = main("--ks", "2,3")
    drafting = [("vllm", method, k) for method in ("ngram", "draft") for k in (2, 3)]
    plain = [("vllm", "plain", None), ("vllm", "batch_invariant", None)]
    assert started == [("ours", "all", None), *plain, *drafting] and status == 0
    assert len(record["results"]) == 7 and record["stand_ins"] == "tiny"
    assert "| vllm draft, K = 3 | 1 | 2.0 / 1.0 | 3 (4) | 1/1 |" in capsys.readouterr().out


def test_a_wrong_output_of_ours_is_an_error_and_of_vllm_it_is_not(load, main, monkeypatch):
    monkeypatch.setattr(load("peer_vllm"), "missing_vllm", lambda arguments: None)
    monkeypatch.setattr(load("peer_vllm"), "equal", "0/1")
    assert main("--sides", "vllm", "--methods", "plain")[0] == 0
    assert main("--sides", "ours")[0] == 1


def test_a_missing_vllm_is_named_before_anything_runs(main, folder, tmp_path, capsys):
    """In an interpreter without site packages there is none, wherever the tests run."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    with pytest.raises(SystemExit):
        main("--vllm-python", str(python))
    error = " ".join(capsys.readouterr().err.split())
    assert "vLLM cannot be imported by python: ModuleNotFoundError: No module named 'vllm'" in error
    for remedy in ("pip install vllm==", "--vllm-python", "--vllm-path", "--sides ours"):
        assert remedy in error
    assert not (folder / "record.json").exists()


def test_vllm_is_found_in_its_folder(load, tmp_path, monkeypatch):
    """Which is on the path of its processes alone."""
    script = load("peer_vllm")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    (tmp_path / "vllm.py").write_text("")
    arguments = SimpleNamespace(vllm_python=sys.executable, vllm_path=tmp_path)
    assert script.missing_vllm(arguments) is None
    found = script.vllm_environment(tmp_path, "batch_invariant")
    assert found["VLLM_BATCH_INVARIANT"] == "1" and found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert found["VLLM_NO_USAGE_STATS"] == "0", "what the user has set stays"
    assert "VLLM_BATCH_INVARIANT" not in script.vllm_environment(tmp_path, "plain")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--sides theirs", "--sides: theirs is unknown; choose among ours, vllm"),
        ("--methods eagle", "--methods: eagle is unknown"),
        ("--batch-sizes 4", "4 rows need as many prompts, the folder has 3; build it with --prompts"),
        ("--vllm-options {", "--vllm-options is not JSON"),
        ("--folder nowhere", "nowhere has no prompts.json; run `build --folder nowhere` first"),
    ],
)
def test_wrong_arguments_are_refused_at_once(main, capsys, wrong, words):
    with pytest.raises(SystemExit):
        main(*wrong.split())
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_worker_is_a_process(load, folder, monkeypatch):
    """Its results come in a file; what it prints does not matter."""
    script = load("peer_vllm")
    echo = folder / "echo.py"
    echo.write_text("import sys\nprint('a log')\nopen(sys.argv[2], 'w').write('[' + sys.argv[1] + ']')")
    monkeypatch.setitem(script.WORKERS, "vllm", echo)
    arguments = script.argparse.Namespace(
        folder=folder, ks="2,3", batch_sizes="1,2", new_tokens=4, rounds=1, device="cpu", vllm_options='{"seed": 1}',
        vllm_speculative="{}", vllm_python=sys.executable, vllm_path=None,
    )  # fmt: skip
    (found,) = script.run_worker(arguments, "vllm", "draft", 2)
    assert (found["method"], found["k"], found["ks"], found["options"]) == ("draft", 2, [2, 3], {"seed": 1})


def test_stand_ins_are_built(load, tmp_path):
    load("peer_vllm").main([
        "build", "--folder", str(tmp_path), "--device", "cpu", "--shapes", "tiny,tiny", "--prompts", "2",
        "--context", "9",
    ])  # fmt: skip
    assert [len(row) for row in json.loads((tmp_path / "prompts.json").read_text())] == [9, 9]
    about = json.loads((tmp_path / "about.json").read_text())
    assert about == {"stand_ins": "tiny and tiny of Qwen3 from demo_pair", "dtype": "float32"}
    for role in ("target", "draft"):
        assert json.loads((tmp_path / role / "config.json").read_text())["hidden_size"] == 448
        assert (tmp_path / role / "model.safetensors").is_file()
    assert (tmp_path / "target" / "tokenizer.json").is_file()


def test_the_bundle_says_how_it_is_used():
    done = subprocess.run([str(BENCHMARKS / "vllm_bundle.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "--unpack OUT DIR" in done.stderr
