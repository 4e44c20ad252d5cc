"""The scripts in benchmarks/, on a tiny pair: they run, record and refuse."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import PROMPTS, save_checkpoint
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

import specdec
from specdec import Speculation, StepReport
from specdec.bench.measure import Result
from specdec.bench.methods import Batch, Method, Pair
from specdec.drafters.look_ahead import LookAheadEmbeddings
from specdec.kernels.commit.token_statistics import token_statistics
from specdec.policies.heads.acceptance_head import AcceptanceHead

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ARGUMENTS = ["--num-prompts", "2", "--max-new-tokens", "6", "--repeats", "2", "--batch-sizes", "1,2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pair of random models as it lies on disk."""
    root = tmp_path_factory.mktemp("models") / "tiny-pair"
    save_checkpoint(root / "target", tiny_llama(0))
    save_checkpoint(root / "draft", tiny_llama(1, num_hidden_layers=1))
    (root / "prompts.json").write_text(json.dumps(PROMPTS[:4]))
    return root


@pytest.fixture(scope="module")
def load():
    """Imports a module of benchmarks/, whose scripts find each other on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


def test_decode_measures_and_keeps_a_record(load, folder, tmp_path, capsys):
    out = tmp_path / "new" / "out.json"
    arguments = [
        "--models",
        str(folder),
        "--json",
        str(out),
        *ARGUMENTS,
        "--num-speculative-tokens",
        "2",
        "--profile",
    ]
    assert load("decode").main(arguments) == 0
    record = json.loads(out.read_text())
    # batch 1: plain, three assisted, two lookups, our plain, two drafters; batch 2: the same without the five
    assert sorted(entry["batch_size"] for entry in record["results"]) == [1] * 9 + [2] * 4
    assert record["command"].startswith("python decode.py --models tiny-pair --json out.json")
    assert str(folder.parent) not in out.read_text()
    printed = capsys.readouterr().out
    assert printed.count("\n| specdec draft_model | 1 | 2 |") == 4  # speed, latency, positions, stages


def test_layouts_shows_what_each_costs(load, folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    script = load("layouts")
    assert (
        script.main(["--models", str(folder), "--json", str(out), *ARGUMENTS, "--pools", "1,3", "--group-size", "2"])
        == 0
    )
    record = json.loads(out.read_text())
    ours = [entry for entry in record["results"] if entry["is_ours"]]
    assert [entry["options"]["layout"] for entry in ours] == ["ragged", "repad", "grouped"] * 2
    assert all(sum(entry["stages"]["share"].values()) == pytest.approx(1) for entry in ours)
    rates = {rate["pool"]: rate["grouping_rate"] for rate in record["grouping"]}
    assert rates[1] == 1.0 and 0 <= rates[3] <= 1  # one row always ends in one column
    assert "| specdec repad | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--batch-sizes 0", "--num-speculative-tokens 0", "--models nowhere"])
def test_wrong_arguments_are_refused_at_once(load, folder, wrong):
    with pytest.raises(SystemExit) as refused:
        load("decode").main(["--models", str(folder), "--num-prompts", "4", *wrong.split()])
    assert refused.value.code == 2


@pytest.fixture(scope="module")
def compared(load, folder) -> tuple[int, dict, str]:
    """Exit status, record and standard output of a comparison of length policies."""
    printed, out = io.StringIO(), folder.parent / "policies.json"
    options = ["--models", str(folder), "--json", str(out), "--plot", str(out.with_suffix(".png")), *ARGUMENTS]
    with contextlib.redirect_stdout(printed):
        status = load("policies").main([*options, "--num-speculative-tokens", "2,4"])
    return status, json.loads(out.read_text()), printed.getvalue()


def test_policies_are_compared_with_the_best_fixed_k(compared, folder):
    status, record, printed = compared
    assert status == 0 and (folder.parent / "policies.png").stat().st_size > 1000
    kinds = ["plain", "fixed", "confidence", "cost_model", "oracle"]
    assert [(e["kind"], e["batch_size"]) for e in record["policies"]] == [(k, b) for b in (1, 2) for k in kinds]
    for entry in record["policies"]:
        assert entry["kind"] in printed
        assert (entry["gain"]["repeats"] == [0, 0]) == (entry["kind"] == "fixed")
        if entry["kind"] == "oracle":  # of what it drafts all is accepted
            counts = entry["speculation"]
            assert counts["num_draft_tokens"] == counts["num_accepted_draft_tokens"]


def test_an_oracle_drafts_what_will_be_accepted(load):
    assert load("policy_ways").run_lengths(np.array([True, True, False, True])) == [2, 1, 0, 1]
    assert load("policy_ways").run_lengths(np.array([], dtype=bool)) == []


def test_settings_are_chosen_on_other_prompts_than_they_are_judged_on(load):
    ways = [load("policy_ways").Way("fixed", k, k, None) for k in (2, 4)]
    seconds = {2: [1.0, 9.0, 1.0, 9.0], 4: [2.0, 1.0, 2.0, 1.0]}  # 2 is faster on prompts 0 and 2, 4 on the others
    results = [
        Result(Method(way.name, 1, True, None, None), [[7] * 6] * 4, 4, Speculation(), [seconds[way.most]])
        for way in ways
    ]
    (entry,) = load("policy_table").judged(ways, results)
    assert entry["setting"] == 2 and entry["tokens_per_second"]["median"] == 12 / 18


def test_one_prompt_cannot_choose_and_judge(load, folder):
    with pytest.raises(SystemExit) as refused:
        load("policies").main(["--models", str(folder), "--num-prompts", "1"])
    assert refused.value.code == 2


@pytest.mark.parametrize("script", ["policies", "guarantee"])
def test_a_processs_own_time_is_for_one_thread(load, folder, script, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit) as refused:
        load(script).main(["--models", str(folder), "--clock", "cpu"])
    assert refused.value.code == 2


@pytest.mark.parametrize("max_new_tokens", [2, 100])
def test_the_guarantee_is_measured_by_drafter_and_batch(load, folder, tmp_path, max_new_tokens):
    """A tiny model's time is no measure: the exit status may be either."""
    out = tmp_path / "guarantee.json"
    options = ["--models", str(folder), "--json", str(out), "--num-prompts", "2", "--repeats", "1"]
    load("guarantee").main([*options, "--batch-sizes", "1,3", "--max-new-tokens", str(max_new_tokens)])
    found = json.loads(out.read_text())["guarantee"]
    assert [(e["batch_size"], e["drafter"].split(",")[0]) for e in found] == [
        (size, drafter) for size in (1, 3) for drafter in ("draft", "random draft", "prompt_lookup")
    ]
    assert all(e["over_plain"]["median"] > 0 and len(e["plain"]["repeats"]) == 1 for e in found)


def test_single_cells_of_the_guarantee_become_one_record(load, folder, tmp_path):
    parts = [tmp_path / name for name in ("random.json", "lookup.json")]
    for part in parts:
        options = ["--models", str(folder), "--json", str(part), "--num-prompts", "2", "--repeats", "2"]
        load("guarantee").main([*options, "--batch-sizes", "2", "--max-new-tokens", "4", "--drafters", part.stem])
    out = tmp_path / "whole.json"
    load("guarantee").main(["--merge", str(parts[1]), str(parts[0]), "--json", str(out)])
    record = json.loads(out.read_text())
    assert [entry["drafter"].split(",")[0] for entry in record["guarantee"]] == ["random draft", "prompt_lookup"]
    assert len(record["runs"]) == 2 and record["runs"][0]["max_new_tokens"] == 4
    assert all(len(entry["control_over_plain"]["repeats"]) == 2 for entry in record["guarantee"])


def test_the_guarantee_is_about_full_batches_behind_the_first_steps(load, monkeypatch):
    """By hand: a prefill, 70 steps that take one second and give 1 token to each of 2 rows, but the first 32 take ten;
    behind them one row is alone."""
    guarantee, clock = load("guarantee"), [0.0]

    def generate(*args, on_commit, **options):
        for step in range(90):
            clock[0] += 10.0 if step <= 32 else 1.0
            rows = np.arange(2 if step <= 70 else 1)
            ended = np.full(len(rows), step == 70)
            ones = np.ones(len(rows), dtype=int)
            on_commit(StepReport(rows, ones, ones, ones, ended, ones, ones[:, None], is_prefill=step == 0))

    monkeypatch.setattr(specdec, "generate", generate)
    pair, batch = Pair("tiny", None, None, []), Batch(range(2), torch.ones(2, 3), torch.ones(2, 3))
    assert guarantee.speed_behind_first_steps(pair, batch, {}, 90, lambda: clock[0]) == 2.0


def test_look_ahead_is_measured_by_number_of_tokens(load, folder, tmp_path, capsys):
    out, target = tmp_path / "out.json", AutoModelForCausalLM.from_pretrained(folder / "target")
    made = LookAheadEmbeddings(3, target.config.hidden_size)
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    made.trained_for(target, {}).save(tmp_path)
    options = ["--models", str(folder), "--look-ahead", str(tmp_path), "--json", str(out), *ARGUMENTS]
    assert load("look_ahead").main(options) == 0
    record = json.loads(out.read_text())
    found = [(e["method"], e["num_speculative_tokens"]) for e in record["results"] if e["batch_size"] == 2]
    lengths = [("specdec look_ahead", k) for k in (1, 2, 3)]
    assert found == [("transformers plain", None), ("specdec plain", None), *lengths, ("specdec prompt_lookup", 5)]
    for entry in record["results"]:
        if entry["method"] == "specdec plain":
            assert entry["plain_calls_per_call"] == entry["speedup_over_specdec_plain"]["median"] == 1.0
        assert (entry["plain_calls_per_call"] is None) == (not entry["is_ours"])
    assert "| 2 | specdec look_ahead | 3 | 2/2 |" in capsys.readouterr().out
    with pytest.raises(specdec.ConfigError, match="tokens 4 exceeds the 3 look-ahead"):
        load("look_ahead").main([*options, "--num-speculative-tokens", "2,4"])


@torch.no_grad()
def test_a_stand_ins_hidden_states_are_the_small_models(load, demo_pair):
    """Behind the map; and the head that reads them says the same."""
    stand_in = load("stand_in")
    draft, head = demo_pair.draft, AcceptanceHead.load(load("pairs").DEMO_PAIR / "draft")
    big, to_small_hidden = stand_in.stand_in(draft, stand_in.SHAPES["tiny"], torch.float32, "cpu")
    ids = torch.randint(3, 2000, (2, 40), generator=torch.Generator().manual_seed(0))
    small, large = (model(input_ids=ids, output_hidden_states=True) for model in (draft, big))
    expected, mapped = small.hidden_states[-1], large.hidden_states[-1] @ to_small_hidden
    torch.testing.assert_close(mapped, expected, rtol=0, atol=1e-4)  # of a float32 sum over 448
    statistics = [token_statistics(out.logits[0], ids[0])[None] for out in (small, large)]
    found = head.log_acceptance(mapped[:1], statistics[1]).exp()
    torch.testing.assert_close(found, head.log_acceptance(expected[:1], statistics[0]).exp(), rtol=0, atol=1e-4)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # what is batch-invariant on a CPU needs it
    yield
    torch.set_num_threads(before)


def test_policies_are_compared_on_stand_ins(load, tmp_path, one_thread):
    """The shipped pair's own head on a pair of another shape, and a record that says so."""
    out = tmp_path / "out.json"
    options = "--target-shape tiny --draft-shape tiny --num-prompts 2 --max-new-tokens 4 --repeats 3 --seconds 0"
    options += " --num-speculative-tokens 3 --kinds fixed,acceptance_head --thresholds acceptance_head=0.6"
    assert load("policies").main([*options.split(), "--exclude-prefill", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["stand_ins"] == "tiny and tiny of Qwen3 from demo_pair" and record["prefill"] == "excluded"
    assert [entry["way"] for entry in record["every_way"]] == ["fixed 3", "acceptance_head 0.6"]
    assert [entry["kind"] for entry in record["policies"]] == ["fixed", "acceptance_head"]
    assert all(len(entry["tokens_per_second"]["repeats"]) == 1 for entry in record["every_way"])  # of 0 seconds


def test_what_stopping_rules_can_gain(load, tmp_path, capsys):
    out = tmp_path / "out.json"
    script = load("stopping")
    script.main(["--num-prompts", "4", "--max-new-tokens", "12", "--draft-costs", "0.1", "--json", str(out)])
    (found,) = json.loads(out.read_text())["gain_by_draft_cost"].values()
    assert set(script.SETS) == {name.removeprefix("fitted: ") for name in found if name.startswith("fitted")}
    assert found["oracle"] >= max(found.values()) and "| 0.1 | oracle |" in capsys.readouterr().out


def test_refitted_predictions_learn_what_decides_acceptance(load):
    script, random = load("stopping"), np.random.default_rng(0)
    found = []
    for _ in range(8):
        accepted = random.random(80) < 0.6
        features = np.stack([random.normal(size=80), np.where(accepted, 2.0, -2.0) + random.normal(size=80)], 1)
        found.append(script.Replay(script.Trace(accepted, np.full(80, 0.6), np.full(80, 0.6)), features))
    told, untold = (script.refitted(found, [column]) for column in (1, 0))
    right = [np.mean((trace.acceptance > 0.5) == trace.accepted) for traces in (told, untold) for trace in traces[1::2]]
    assert min(right[:4]) > 0.9 > max(right[4:])
    assert told[0].acceptance.min() >= 0 and told[0].acceptance.max() <= 1


@pytest.mark.parametrize("wrong", ["--target-shape 14B", "--kinds slow", "--thresholds fixed=0.5"])
def test_policies_refuses_what_it_cannot_compare(load, folder, wrong):
    with pytest.raises(SystemExit) as refused:
        load("policies").main(["--models", str(folder), *wrong.split()])
    assert refused.value.code == 2
