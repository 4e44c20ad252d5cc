"""The decoding benchmark on a tiny pair: what it records, what it refuses to time, and how it counts."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import VOCAB, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import specdec

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ARGUMENTS = "--num-prompts 4 --max-new-tokens 12 --repeats 3 --num-speculative-tokens 2,4 --batch-sizes 1,2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pair of random models as it lies on disk."""
    root = tmp_path_factory.mktemp("models") / "tiny-pair"
    tiny_llama(0).save_pretrained(root / "target")
    tiny_llama(1, num_hidden_layers=1).save_pretrained(root / "draft")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0").save_pretrained(root / "target")
    prompts = [" ".join(f"w{(7 * i * j) % 50 + 3}" for j in range(4 + i)) for i in range(4)]
    (root / "prompts.json").write_text(json.dumps(prompts))
    return root


@pytest.fixture(scope="module")
def load():
    """Imports a module of benchmarks/, whose scripts find each other on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


def run(decode: ModuleType, folder: Path, out: Path, *more: str) -> tuple[int, dict]:
    status = decode.main(["--models", str(folder), "--json", str(out), *ARGUMENTS.split(), *more])
    return status, json.loads(out.read_text())


@pytest.fixture(scope="module")
def finished(load, folder) -> tuple[int, dict, str]:
    """Exit status, record and standard output of one run with a stage profile."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status, record = run(load("decode"), folder, folder.parent / "out.json", "--profile")
    return status, record, printed.getvalue()


def test_runs_end_to_end(finished):
    status, record, printed = finished
    assert status == 0
    assert {"machine", "versions", "git_sha", "git_dirty", "command", "device", "dtype", "seed", "models"} <= set(
        record
    )
    assert {"cpu_count", "processor", "memory_gb"} <= set(record["machine"])
    assert record["num_prompts"] == 4 and record["models"]["name"] == "tiny-pair"
    # batch 1: plain, three assisted, two lookups, our plain, two drafters of two K; batch 2: the same without the five
    assert [entry["batch_size"] for entry in record["results"]] == [1] * 11 + [2] * 6
    for entry in record["results"]:
        assert entry["num_equal"] == entry["num_prompts"] == 4
        assert len(entry["tokens_per_second"]["repeats"]) == len(entry["foreign_cores"]) == 3
        assert entry["speedup_over_plain"]["median"] > 0
        assert (entry["speedup_over_assisted"] is None) == (entry["batch_size"] > 1)
        assert ("mean_acceptance_length" in entry) == entry["method"].startswith("specdec")
    assert {entry["num_new_tokens"] for entry in record["results"]} == {record["results"][0]["num_new_tokens"]}
    assert printed.count("\n| specdec draft_model | 1 |") == 3  # two K, and one row of the stage table


def test_record_names_no_folder_of_the_machine(finished, folder):
    _, record, _ = finished
    assert str(folder.parent) not in json.dumps(record)
    assert record["command"].startswith(
        "python benchmarks/decode.py --models tiny-pair --json out.json --num-prompts 4"
    )


def test_stages_add_up_and_the_clock_is_removed(finished, load):
    _, record, _ = finished
    assert len(record["profile"]) == 6  # three methods of ours at two batch sizes
    for profile in record["profile"]:
        assert sum(profile["share"].values()) == pytest.approx(1.0)
        assert min(profile["share"].values()) >= 0 and profile["share"]["verify"] > 0
        assert (profile["share"]["draft prefill"] > 0) == (profile["method"] == "specdec draft_model")
    for places in load("stages").STAGES.values():
        assert not any(hasattr(getattr(owner, name), "__wrapped__") for owner, name in places)


def test_refuses_to_time_a_wrong_method(load, folder, tmp_path, monkeypatch, capsys):
    """One wrong token in one prompt: marked, not timed, and the exit status says so."""
    right = specdec.generate

    def wrong_once(model, input_ids, *args, drafter=None, **options):
        output = right(model, input_ids, *args, drafter=drafter, **options)
        if drafter == "prompt_lookup" and len(input_ids) == 2:
            output.sequences[0, input_ids.shape[1]] += 1
        return output

    monkeypatch.setattr(specdec, "generate", wrong_once)
    status, record = run(load("decode"), folder, tmp_path / "out.json")
    assert status == 1
    refused = [entry for entry in record["results"] if not entry["timed"]]
    assert [(entry["method"], entry["batch_size"]) for entry in refused] == [("specdec prompt_lookup", 2)] * 2
    for entry in refused:
        assert entry["num_equal"] == 2 and entry["tokens_per_second"] is None and entry["speedup_over_plain"] is None
    out, err = capsys.readouterr()
    assert out.count("NOT EQUAL") == 2
    assert "NOT EQUAL to plain decoding, not timed: specdec prompt_lookup K=2, batch 2" in err


def test_a_method_that_turns_wrong_while_timed_loses_its_times(load, folder):
    methods, measure = load("methods"), load("measure")
    pair = methods.load_pair(folder, 4, torch.float32, torch.device("cpu"))
    plain = methods.transformers_method(pair, methods.PLAIN, 1, None, 8)
    calls = []

    def decode(batch):
        calls.append(batch)
        decoded = plain.decode(batch)
        if len(calls) == 10:  # 4 prompts a run: the second timed run
            decoded.sequences[0, -1] += 1
        return decoded

    for is_ours, num_timed in ((True, 0), (False, 3)):
        calls.clear()
        method = methods.Method("turns wrong", 1, is_ours, None, decode)
        (result,) = measure.measure(pair, plain, [method], 3, lambda line: None)
        assert (result.num_equal, len(result.seconds)) == (3, num_timed)


def test_tokens_are_counted_through_the_first_end_of_sequence(load):
    methods = load("methods")
    batch = methods.Batch(range(2), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3))
    sequences = torch.tensor([[2, 0, 0, 5, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0]])  # pad 0 is also a token
    assert methods.new_tokens(methods.Decoded(sequences), batch, frozenset([2])) == [[5, 2], [0, 0, 0, 0]]


def test_speedup_is_the_median_of_paired_ratios(load):
    """Machine noise that slows both down cancels; the ratio of medians would say 1.5."""
    methods, measure = load("methods"), load("measure")
    method = methods.Method("m", 1, True, None, None)
    fast, slow = ([[1.0], [2.0], [30.0]], [[3.0], [1.5], [90.0]])
    ours, baseline = (measure.Result(method, [[7] * 6], 1, None, seconds) for seconds in (fast, slow))
    assert measure.speedup(ours, baseline).median == 3.0
    assert measure.speedup(ours, baseline).min == 0.75


def test_single_prompts_can_be_left_out_at_batch_1_only(load):
    methods, measure = load("methods"), load("measure")
    result = measure.Result(methods.Method("m", 1, True, None, None), [[7] * 6, [7] * 2], 2, None, [[1.0, 4.0]])
    assert result.tokens_per_second() == [8 / 5] and result.tokens_per_second([1]) == [0.5]
    batched = measure.Result(methods.Method("m", 2, True, None, None), [[7] * 6, [7] * 2], 2, None, [[5.0]])
    with pytest.raises(ValueError, match="batch 1, not at 2"):
        batched.tokens_per_second([1])


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([1, 2, 3] * 6, True),
        ([9, 8, *([5] * 16)], True),
        ([9, *([5] * 15)], False),  # shorter than 16 tokens together
        (list(range(32)) * 3, True),
        (list(range(33)) * 3, False),  # a longer period than 32
        (list(range(30)) * 2, False),  # two copies only
        ([*([1, 2, 3] * 6), 4], False),  # not to the end
        ([], False),
    ],
)
def test_periodic_endings(load, tokens, loops):
    assert load("loops").ends_in_loop(tokens) is loops


@pytest.mark.parametrize("wrong", ["--batch-sizes 3", "--num-speculative-tokens 0", "--models nowhere"])
def test_wrong_arguments_are_refused_at_once(load, folder, wrong):
    with pytest.raises(SystemExit) as refused:
        load("decode").main(["--models", str(folder), "--num-prompts", "4", *wrong.split()])
    assert refused.value.code == 2
