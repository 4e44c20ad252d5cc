"""The checker must be able to fail: planted bugs are bugs, planted ties are ties, equal output is neither."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import transformers
from refusals import assert_refused
from tiny import VOCAB, plain_greedy, tiny_llama
from torch import nn
from transformers.models.llama import modeling_llama

import specdec
from specdec.check import equivalence, oracle, referee
from specdec.check.equivalence import check_equivalence, first_differences
from specdec.check.padding import until_end
from specdec.check.referee import TIE_MULTIPLE, Judgement, KeepFloat64, Referee, last_logits
from specdec.check.settings import greedy_settings
from specdec.drafters.synthetic import Synthetic
from specdec.errors import ConfigError, DrafterError, InputError
from specdec.verify import verification as verify

PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 7], [11], [40, 3, 9, 22, 31], [17, 17], [8, 50, 4, 9])]
NEW = 12


@pytest.fixture
def model():
    return tiny_llama()


def check(model, **options):
    defaults = dict(drafter=tiny_llama(1), batch_size=2, num_speculative_tokens=3, max_new_tokens=NEW)
    return check_equivalence(model, PROMPTS, **{**defaults, **options})


def plant(monkeypatch, change):
    """Let `change(sequences, input_ids)` loose on what our decoding returns."""
    stock = oracle.generate
    monkeypatch.setattr(oracle, "generate", lambda model, ids, *a, **k: change(stock(model, ids, *a, **k), ids))


@pytest.mark.parametrize("drafter", ["prompt_lookup", None, "model"])
def test_equal_outputs(model, drafter):
    done = []
    drafter = tiny_llama(1) if drafter == "model" else drafter
    report = check(model, drafter=drafter, on_progress=lambda stage, count: done.append((stage, count)))
    assert report.equivalent and report.num_equal == 5 and not report.divergences
    assert report.plain_tokens_per_second > 0 and report.speculative_tokens_per_second > 0
    for stage in ("plain", "speculative"):
        assert sum(count for name, count in done if name == stage) == 5
    assert report.speculation.num_new_tokens == sum(len(plain_greedy(model, p, max_new_tokens=NEW)) for p in PROMPTS)


def test_the_report_is_json(model):
    report = json.loads(json.dumps(check(model).to_dict()))
    assert {
        "equivalent", "num_prompts", "num_equal", "divergences", "mean_acceptance_length", "draft_acceptance_rate",
        "plain_tokens_per_second", "speculative_tokens_per_second", "tie_multiple", "margin_dtype", "versions", "dtype",
    } <= report.keys()  # fmt: skip
    assert report["equivalent"] is True and report["versions"]["transformers"] == transformers.__version__
    assert specdec.check_equivalence is check_equivalence


def test_a_changed_token_is_a_bug(model, monkeypatch):
    """Row 3 is the second row of the second batch: would catch indices that restart with each batch."""

    def change(sequences, ids):
        if ids.shape == (2, 5) and ids[1, -1] == 17 and sequences.shape[1] == 5 + NEW:
            sequences[1, 5 + 7] = (sequences[1, 5 + 7] + 1) % VOCAB
            sequences[1, 5 + 9] = (sequences[1, 5 + 9] + 1) % VOCAB
        return sequences

    expected = plain_greedy(model, PROMPTS[3], max_new_tokens=NEW)
    plant(monkeypatch, change)
    report = check(model)
    assert not report.equivalent and not report.only_ties and report.num_equal == 4
    (found,) = report.divergences
    assert (found.prompt, found.position, found.kind) == (3, 7, "bug")
    assert (found.expected_token_id, found.actual_token_id) == (expected[7], (expected[7] + 1) % VOCAB)
    ids = torch.cat([PROMPTS[3], torch.tensor(expected[:7])])
    logits = model(ids[None]).logits[0, -1]
    margin = (logits[found.expected_token_id] - logits[found.actual_token_id]).item()
    assert found.margin == pytest.approx(margin, abs=1e-4) and margin > 0.01
    assert report.margin_dtype == "float64" and report.margin_note == ""
    # The noise of float32 at logits of size 10, never that of a wrong cache or mask.
    assert 0 < found.noise_all_tokens < 1e-4 and 0 < found.rounding < 1e-4 and found.noise <= found.noise_all_tokens


def test_a_verifier_that_believes_its_drafter_is_a_bug(model, monkeypatch):
    stock = verify.greedy_commit

    def believe(scores, draft_ids, *arguments):
        return stock(scores, draft_ids, *arguments[:-1], draft_ids >= 0)

    monkeypatch.setattr(verify, "greedy_commit", believe)
    model.generation_config.eos_token_id = None
    report = check(model)
    assert report.num_equal < 5 and all(found.kind == "bug" for found in report.divergences)
    assert report.speculation.draft_acceptance_rate == 1.0


def with_twins(model):
    """A model in which the first token of prompt 0 has a twin with the very same logits; and both, in argmax order."""
    token = plain_greedy(model, PROMPTS[0], max_new_tokens=1)[0]
    twin = (token + 1) % VOCAB
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[token]
    return sorted([token, twin])


def test_an_exact_tie_is_a_tie(model, monkeypatch):
    first, second = with_twins(model)
    plant(monkeypatch, lambda sequences, ids: torch.where(sequences == first, second, sequences))
    report = check(model, batch_size=5)
    found = report.divergences[0]
    assert (found.prompt, found.position) == (0, 0)
    assert (found.expected_token_id, found.actual_token_id) == (first, second)
    assert found.margin == 0.0 and found.kind == "tie"
    assert not report.equivalent and report.only_ties


@pytest.mark.parametrize(
    ("change", "expected_is_missing"),
    [
        (lambda sequences, ids: sequences[:, :-2], False),
        (lambda sequences, ids: torch.cat([sequences, sequences[:, -1:] * 0 + 9], 1), True),
    ],
)
def test_a_missing_token_is_a_bug(model, monkeypatch, change, expected_is_missing):
    model.generation_config.eos_token_id = None
    plant(monkeypatch, change)
    report = check(model)
    assert report.num_equal == 0
    for found in report.divergences:
        assert (found.expected_token_id is None) == expected_is_missing
        assert (found.actual_token_id is None) != expected_is_missing
        assert found.position == (NEW if expected_is_missing else NEW - 2)
        assert found.kind == "bug" and found.margin is None


def test_writing_on_behind_the_end_is_a_bug(model, monkeypatch):
    """Prompt 0 ends after three tokens while its neighbours go on; then something follows its end."""
    end = plain_greedy(model, PROMPTS[0], max_new_tokens=NEW)[2]
    model.generation_config.eos_token_id = [end, 2]
    assert check(model).equivalent
    num_new = len(plain_greedy(model, PROMPTS[0], max_new_tokens=NEW))
    assert num_new <= 3

    def change(sequences, ids):
        if sequences.shape[1] > 5 + num_new:
            sequences[0, 5 + num_new] = 9
        return sequences

    plant(monkeypatch, change)
    (found,) = check(model, batch_size=5).divergences
    assert (found.prompt, found.position, found.expected_token_id, found.kind) == (0, num_new, None, "bug")


def test_other_generation_settings_are_ignored_and_told(model):
    own = model.generation_config
    outputs = [plain_greedy(model, prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    settings = {"repetition_penalty": 3.0, "do_sample": True, "min_new_tokens": 9, "suppress_tokens": [outputs[0][0]]}
    for name, value in {**settings, "temperature": 0.5, "top_k": 3}.items():
        setattr(own, name, value)
    report = check(model)
    assert report.equivalent and report.ignored_settings == settings
    assert model.generation_config is own and own.repetition_penalty == 3.0
    with greedy_settings(model):
        assert oracle.run_plain(model, PROMPTS, NEW).outputs == outputs
    with pytest.raises(ZeroDivisionError), greedy_settings(model):
        _ = 1 / 0
    assert model.generation_config is own


def test_first_differences():
    expected = [[1, 2, 3], [1, 2], [1], [4]]
    assert first_differences(expected, [[1, 2, 3], [1, 2, 3], [], [5]]) == {1: 2, 2: 0, 3: 0}


@pytest.mark.parametrize(
    ("row", "kept"),
    [([5, 2, 0, 0], [5, 2]), ([5, 6], [5, 6]), ([0, 0, 2], [0, 0, 2]), ([5, 2, 0, 7], [5, 2, 0, 7]), ([2], [2])],
)
def test_only_padding_behind_the_end_is_cut(row, kept):
    assert until_end(row, (2,), 0) == kept


def test_ties_are_what_rounding_explains():
    for sign in (1, -1):
        assert Judgement(sign * TIE_MULTIPLE * 1e-7, 0.0, 1e-7, 0.0).is_tie
        assert Judgement(sign * TIE_MULTIPLE * 1e-7, 0.0, 0.0, 1e-7).is_tie
        assert not Judgement(sign * TIE_MULTIPLE * 1.01e-7, 1e-7, 1e-7, 1e-7).is_tie
    assert Judgement(0.0, 0.0, 0.0, 0.0).is_tie and not Judgement(1e-15, 0.0, 0.0, 0.0).is_tie


@pytest.mark.parametrize("k", [1, 3, 8])
def test_both_ways_of_decoding_are_the_model(model, k):
    """Chunks that overlap, skip a token or start elsewhere would be off by far more than rounding."""
    for num_prompt, num_new in itertools.product((1, 2, 5, 9), (0, 1, 4, 7)):
        ids = (torch.arange(num_prompt + num_new) * 7 + 3) % VOCAB
        expected = model(ids[None]).logits[:, -(k + 1) :]
        one, several = Referee(model, k, batch_size=3).decode_both_ways(ids, num_prompt)

        case = f"{num_prompt} prompt tokens, {num_new} new ones"
        assert one.shape == expected.shape and several.shape == (3, *expected.shape[1:]), case
        assert torch.allclose(one, expected, atol=1e-4, rtol=0), case
        assert torch.allclose(several, expected.expand(3, -1, -1), atol=1e-4, rtol=0), case


def test_margins_are_float64_throughout(model, monkeypatch):
    """transformers computes norms and rotations in float32 even of a float64 model."""
    exact, ids = model.double(), torch.arange(3, 20)
    ours, theirs = last_logits(exact, ids)[0], exact(ids[None]).logits[0, -1]

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotation(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq.double()
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotation)
    truth = exact(ids[None]).logits[0, -1]
    assert (ours - truth).abs().max() < 1e-11 < 1e-8 < (theirs - truth).abs().max()


def test_float32_means_float64_inside():
    x = torch.ones(1, dtype=torch.float64)
    with KeepFloat64():
        assert {x.to(torch.float32).dtype, x.float().dtype, x.softmax(0, dtype=torch.float32).dtype} == {torch.float64}


class OnlyFloat32(nn.Module):
    def forward(self, x):
        if x.dtype == torch.float64:
            raise RuntimeError("\"norm\" not implemented for 'Double'")
        return x


def test_margins_fall_back_to_float32_and_say_so(model, monkeypatch):
    model.model.norm = OnlyFloat32()
    judge = Referee(model, 3, 2)
    assert judge.margin_dtype == "float32" and "no float64" in judge.margin_note
    assert "not implemented for 'Double'" in judge.margin_note

    monkeypatch.setattr(referee, "free_bytes", lambda device: 1)
    judge = Referee(tiny_llama().bfloat16(), 3, 2)
    assert judge.margin_dtype == "bfloat16"
    assert judge.margin_note.count("a copy needs") == 2
    assert referee.lacking_memory(model, torch.float64)


def test_bfloat16_rounding_is_measured(model):
    ids = torch.arange(3, 20)
    verdict = Referee(model.bfloat16(), 3, 2).judge(ids[:5], ids[5:].tolist(), 7, 9)
    assert 1e-3 < verdict.rounding < 1.0 and verdict.noise <= verdict.noise_all_tokens < 1.0


def test_refusals_come_before_any_token(model, monkeypatch):
    for prompts, options, error, message in [
        ([], {}, InputError, "no prompts"),
        ([torch.tensor([3]), torch.tensor([], dtype=torch.long)], {}, InputError, "prompt 1 is empty"),
        ([torch.tensor([[3]])], {}, InputError, r"prompt 0 is \[1, 1\]"),
        (["text"], {}, InputError, "prompt 0 is str"),
        ([torch.tensor([3]), torch.tensor([3, VOCAB])], {}, InputError, "prompt 1: .*contains 61"),
        ([torch.tensor([3.0])], {}, InputError, "prompt 0: .*dtype"),
        (PROMPTS, {"batch_size": 0}, ConfigError, "batch_size=0"),
        (PROMPTS, {"max_new_tokens": True}, ConfigError, "max_new_tokens=True"),
        (PROMPTS, {"num_speculative_tokens": 33}, ConfigError, "33 exceeds 32"),
        (PROMPTS, {"drafter": "nonesuch"}, DrafterError, "unknown drafter 'nonesuch'; known are"),
        (PROMPTS, {"drafter": Synthetic(0.5, [])}, DrafterError, "continuations"),
        ([*PROMPTS, torch.arange(3, 60).repeat(9)], {}, ConfigError, "has 512 positions"),
    ]:
        monkeypatch.setattr(equivalence, "run_plain", None)
        monkeypatch.setattr(equivalence, "run_speculative", None)
        assert_refused(error, message, check_equivalence, model, prompts, **{"drafter": "prompt_lookup", **options})


def test_rounding_in_bfloat16_is_never_called_a_bug():
    """Some of these rows differ, and every difference is a tie, also where one- and two-token forwards round alike."""
    model, generator = tiny_llama(initializer_range=0.1).bfloat16(), torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator) for length in range(4, 28)]
    reports = [check_equivalence(model, prompts, "prompt_lookup", 8, k, max_new_tokens=24) for k in (1, 5)]
    assert sum(len(report.divergences) for report in reports) > 0
    assert all(report.only_ties for report in reports)
