"""The files of the acceptance head and of DISCO's classifier, the pair they belong to, and the numbers they give."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_llama

from specdec.errors import ConfigError, InputError
from specdec.files.fingerprint import SAMPLES, Fingerprint, sample
from specdec.policies.heads.acceptance_head import AcceptanceHead
from specdec.policies.heads.disco import Disco

HEADS = {"acceptance_head": lambda: AcceptanceHead(32, 2, 6.0), "disco": lambda: Disco(5, 16)}


@pytest.mark.parametrize("kind", HEADS)
def test_saved_heads_come_back(kind, tmp_path):
    head, target, drafter = HEADS[kind](), tiny_llama(0), tiny_llama(1)
    head.trained_for(target, drafter, {"steps": 3}).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{kind}.json", f"{kind}.safetensors"]
    again = type(head).load(tmp_path)
    again.check(target, drafter)
    assert again.shape == head.shape and again.recipe == {"steps": 3} and not again.training
    for name, weight in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


@pytest.mark.parametrize("kind", HEADS)
def test_other_models_are_refused(kind):
    target, drafter = tiny_llama(0), tiny_llama(1)
    head = HEADS[kind]().trained_for(target, drafter, {})
    with pytest.raises(ConfigError, match=r"another target .other weights"):
        head.check(tiny_llama(2), drafter)
    with pytest.raises(ConfigError, match=r"another drafter .other weights.*specdec train"):
        head.check(target, tiny_llama(2))
    with pytest.raises(ConfigError, match=r"another drafter .vocab_size 67 instead of 61"):
        head.check(target, tiny_llama(1, vocab_size=67))
    with pytest.raises(ConfigError, match="does not record which target"):
        HEADS[kind]().check(target, drafter)
    with pytest.raises(ConfigError, match="trained_for"):
        HEADS[kind]().save("nowhere")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_copy_in_another_dtype_is_the_same_model(dtype):
    here = Fingerprint.of(tiny_llama(0))
    assert here.difference(Fingerprint.of(tiny_llama(0).to(dtype))) is None
    assert here.difference(Fingerprint.of(tiny_llama(3).to(dtype))) is not None
    assert Fingerprint.from_dict(json.loads(json.dumps(here.to_dict()))).difference(here) is None


def test_one_changed_weight_in_the_same_dtype_is_another_model():
    model = tiny_llama(0)
    here = Fingerprint.of(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-6
    assert here.difference(Fingerprint.of(model)) == "other weights in lm_head.weight"


@pytest.mark.parametrize("kind", HEADS)
def test_damaged_files_are_named(kind, tmp_path):
    head = HEADS[kind]()
    with pytest.raises(InputError, match=f"holds no {kind}.json.*specdec train"):
        type(head).load(tmp_path)
    head.trained_for(tiny_llama(0), tiny_llama(1), {}).save(tmp_path)
    config = json.loads((tmp_path / f"{kind}.json").read_text())
    for change in ({"kind": "other"}, {"format": 99}, {"shape": {"colour": 1}}, {"target": {}}):
        (tmp_path / f"{kind}.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=r"other|format 99|does not load"):
            type(head).load(tmp_path)
    (tmp_path / f"{kind}.json").write_text(json.dumps(config))
    (tmp_path / f"{kind}.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="does not load"):
        type(head).load(tmp_path)


def test_the_weight_of_rejections_is_taken_out():
    """Trained to its optimum under the weighted loss, the head's log_acceptance is the share accepted."""
    head = AcceptanceHead(4, 0, rejection_weight=6.0).requires_grad_(False)
    share = 0.8
    with torch.no_grad():
        head.out.weight.zero_()
        # argmin of 6 (1 - a) (-log P0) + a (-log P1)
        head.out.bias.copy_(torch.tensor([6 * (1 - share), share]).log())
    assert head.log_acceptance(torch.zeros(3, 4), torch.zeros(3, 3)).exp().tolist() == pytest.approx([share] * 3)


def test_no_probability_makes_the_head_infinite():
    head = AcceptanceHead(4)
    extremes = torch.tensor([0.0, -1e-12, -50.0, float("-inf"), float("inf")])
    out = head.log_acceptance(torch.zeros(125, 4), torch.cartesian_prod(extremes, extremes, extremes))
    assert torch.isfinite(out).all() and (out <= 0).all()


def test_features_of_disco():
    logits = torch.tensor([[2.0, 1.0, float("-inf"), 0.0], [0.0, 0.0, 0.0, 0.0]])
    features = Disco(2, 8, max_place=4).features(logits, torch.tensor([1, 9]))
    q = torch.softmax(logits, -1)
    assert torch.allclose(features[:, :2], q.topk(2).values)
    assert torch.allclose(features[:, 2], torch.distributions.Categorical(q).entropy())
    assert features[:, 3].tolist() == [0.25, 1.0]


def test_the_fingerprint_of_a_large_weight_stays_within_it():
    """Its last place is no float32."""
    assert sample(torch.ones(()).expand(152_000 * 5_120 - 1)) == [1.0] * SAMPLES


def test_a_head_that_saw_less_is_refused_by_name(tmp_path):
    AcceptanceHead(32).trained_for(tiny_llama(0), tiny_llama(1), {}).save(tmp_path)
    path = tmp_path / "acceptance_head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(InputError, match=r"trained by an older version; train it again with `specdec train acc"):
        AcceptanceHead.load(tmp_path)
