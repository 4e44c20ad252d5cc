"""`check_sampling` passes for what is right and fails for what is wrong, whole and from the command line."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch
from checkpoints import word_tokenizer
from tiny import tiny_llama
from typer.testing import CliRunner

import specdec
from specdec.check import sampling as sampling_check
from specdec.check.sampling import CONTROL, check_sampling, joint_of, tiny_model, whole_sequence_test
from specdec.check.ways import Way
from specdec.draft import Draft
from specdec.drafters.draft_model import DraftModel
from specdec.errors import ConfigError
from specdec.kernels.commit import sampled_commit as module

VOCAB = 12
TARGET = tiny_llama(0, vocab_size=VOCAB, eos_token_id=None, initializer_range=0.25)
OTHER = tiny_llama(5, vocab_size=VOCAB, eos_token_id=None, initializer_range=0.25)
PROMPTS = [torch.tensor([3, 4, 5]), torch.tensor([7, 3])]
WAY = Way("draft_model", 3, 400)


def check(drafter=OTHER, verifications=("token",), num_samples=600, **options):
    return check_sampling(
        TARGET, PROMPTS, [WAY], {"draft_model": drafter}, verifications, num_samples, max_new_tokens=5, **options
    )


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 3}])
def test_what_is_right_passes_and_the_planted_bug_is_found(options):
    found = check(verifications=("token", "block"), options=options)
    assert found.passed
    assert [test.is_control for test in found.tests] == [False, False, True] * 2
    assert all(test.tokens_per_step > 1 for test in found.tests), "drafts were verified"
    own = [test for test in found.tests if test.kind == "next token"]
    assert all(test.num_places > 2 and 0 < test.detectable_distance < 0.2 for test in own)
    assert all(test.rejected == test.is_control for test in found.tests)
    report = found.to_dict()
    assert report["passed"] and report["tests"][0]["detectable_distance"] > 0
    json.dumps(report)


class WrongDistribution(DraftModel):
    """Planted: reports another q than it sampled from."""

    def propose(self, rows, max_tokens):
        draft = super().propose(rows, max_tokens)
        return Draft(draft.token_ids, None if draft.probs is None else torch.softmax(draft.probs.log() * 3, -1))


def test_a_drafter_that_lies_about_its_distribution_fails():
    found = check(WrongDistribution(OTHER))
    assert not found.passed
    assert [test.passed for test in found.tests] == [True, True, False, True]


def test_a_wrong_residual_fails_both_tests(monkeypatch):
    monkeypatch.setattr(module, "final_mass", lambda target, ids, probs, accepted, scales: target.at(accepted))
    found = check()
    assert [test.rejected for test in found.tests] == [True, True, True, True]


def test_a_control_that_is_not_found_fails():
    """A perfect draft leaves nothing for the planted bug to change: the check must say that it shows nothing."""
    found = check(DraftModel(TARGET))
    assert [test.passed for test in found.tests] == [True, True, True, False] and not found.passed


def test_the_seed_decides():
    one, same, other = (check(num_samples=200, seed=seed).tests[2].statistic for seed in (1, 1, 2))
    assert one == same != other


def test_plain_decoding_is_refused():
    with pytest.raises(ConfigError, match="pass a drafter"):
        check_sampling(TARGET, PROMPTS, [Way("none", None, 8)], {})


def test_too_few_samples_to_test_anything_are_refused():
    """Neither "differs" nor a planted bug that was found: nothing has been tested."""
    with pytest.raises(ConfigError, match=r"num_samples=50.* raise num_samples \(--num-samples\)"):
        check(num_samples=50)
    with pytest.raises(ConfigError, match=r"max_new_tokens=1 verifies no draft"):
        check_sampling(TARGET, PROMPTS, [WAY], {"draft_model": OTHER}, max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"nothing could be.*1200 continuations.*'temperature': 0\.0001.*nearer"):
        check(options={"temperature": 1e-4})


def test_the_models_own_settings_are_put_aside():
    model = tiny_llama(0, vocab_size=VOCAB, eos_token_id=None, initializer_range=0.25)
    model.generation_config.repetition_penalty = 1.7
    found = check_sampling(model, PROMPTS[:1], [WAY], {"draft_model": OTHER}, ("token",), 200, 4)
    assert found.passed and found.ignored_settings == {"repetition_penalty": 1.7}
    assert model.generation_config.repetition_penalty == 1.7


def test_the_joint_of_the_tiny_model_is_neither_flat_nor_peaked():
    joint = joint_of(tiny_model(3), torch.tensor([1, 2, 1, 0]))
    assert joint.sum() == pytest.approx(1) and (joint * 6000 > 10).sum() > 60
    assert joint.max() / joint.min() > 5
    state = torch.random.get_rng_state()
    tiny_model(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_whole_sequence_test_finds_the_planted_bug():
    device = torch.device("cpu")
    right, wrong = (whole_sequence_test(method, 3000, 0, 1e-4, device) for method in ("block", CONTROL))
    assert not right.rejected and wrong.rejected and wrong.p_value < 1e-20


# ---- the command line


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = word_tokenizer(VOCAB)
    for name, model in (("target", TARGET), ("draft", OTHER)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.json").write_text(json.dumps(["w3 w4 w5", "w7 w3"]))
    return folder


def run(pair, *options):
    from specdec.cli.app import app

    arguments = ["check", "--target", pair / "target", "--prompts", pair / "prompts.json", *options]
    return CliRunner().invoke(app, list(map(str, arguments)))


SMALL = ("--sampling", "--num-samples", 200, "--max-new-tokens", 4, "--num-speculative-tokens", 3)


def test_the_command_succeeds_and_writes_its_reports(pair, tmp_path):
    out, junit = tmp_path / "report.json", tmp_path / "report.xml"
    result = run(pair, *SMALL, "--draft", pair / "draft", "--json", out, "--junit", junit, "--top-k", 6, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "sampled output follows the target" in result.stdout and "found" in result.stdout
    assert "top_k=6" in result.stdout and "seed 3" in result.stdout
    report = json.loads(out.read_text())
    assert report["passed"] and report["seed"] == 3 and report["options"]["top_k"] == 6 and len(report["tests"]) == 6
    suite = ElementTree.parse(junit).getroot()[0]
    assert suite.get("tests") == "6" and suite.get("failures") == "0"


def test_the_command_fails_on_a_bug(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "final_mass", lambda target, ids, probs, accepted, scales: target.at(accepted))
    junit = tmp_path / "report.xml"
    result = run(pair, *SMALL, "--draft", pair / "draft", "--verification", "token", "--junit", junit)
    assert result.exit_code == 1 and "DIFFERS" in result.stdout and "FAILED" in result.stdout
    assert ElementTree.parse(junit).getroot()[0].get("failures") != "0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*SMALL,), "pass --draft FOLDER or --drafter NAME"),
        ((*SMALL, "--drafter", "none"), "pass a drafter"),
        ((*SMALL, "--drafter", "prompt_lookup", "--verification", "tree"), "'tree' is unknown"),
        ((*SMALL, "--drafter", "prompt_lookup", "--layout", "repad"), "--layout has no meaning"),
        (("--sampling", "--drafter", "prompt_lookup", "--num-samples", 50), "num_samples=50"),
        (("--drafter", "prompt_lookup", "--seed", 3), "--seed 3 applies only to sampling; add --sampling"),
    ],
)
def test_bad_input(pair, options, message):
    result = run(pair, *options)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_the_stated_level_is_shared_out():
    found = check(num_samples=200)
    assert {test.alpha for test in found.tests} == {sampling_check.ALPHA / 12}
    assert specdec.__version__ == found.to_dict()["versions"]["specdec"]
