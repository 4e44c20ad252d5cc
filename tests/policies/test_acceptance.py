"""Estimates of acceptance: what a policy looks at is what the trained head says."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCAB, tiny_llama

from specdec import ConfigError
from specdec.draft import Shown
from specdec.drafters.draft_model import DraftModel
from specdec.kernels.commit.token_statistics import token_statistics
from specdec.policies.by_estimate import ByAcceptanceHead
from specdec.policies.estimates import DiscoEstimate, DraftProbability, HeadEstimate
from specdec.policies.heads.acceptance_head import AcceptanceHead
from specdec.policies.heads.disco import Disco
from tests.policies.test_length import DISCO, HIDDEN, random_head


@pytest.mark.parametrize("rows", [1, 3])
def test_the_head_written_out_is_the_head(rows):
    head = random_head(AcceptanceHead, hidden_size=HIDDEN, num_blocks=3, rejection_weight=6.0)
    logits, hidden = 4 * torch.randn(rows, VOCAB), torch.randn(rows, HIDDEN)
    tokens = torch.randint(0, VOCAB, (rows,))
    expected = head.log_acceptance(hidden, token_statistics(logits, tokens)).exp()
    estimate = HeadEstimate(head)
    shown = Shown(0, tokens, logits, hidden)
    found = estimate(shown)
    assert found == pytest.approx(expected.detach().double().numpy(), abs=1e-5)
    estimate.is_on_cpu, estimate.layers = (
        False,
        [(torch.from_numpy(weight), torch.from_numpy(bias)) for weight, bias in estimate.layers],
    )
    assert estimate(shown) == pytest.approx(found, abs=1e-5)
    logits[0, 0] = torch.nan
    assert estimate(shown)[0] == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimates_on_a_gpu_are_those_of_the_heads(dtype):
    """Replayed for other tokens, places and numbers of rows than they were captured for."""
    head = random_head(AcceptanceHead, hidden_size=HIDDEN, num_blocks=3, rejection_weight=6.0)
    disco = random_head(Disco)
    by_probability, by_disco, by_head = DraftProbability(), DiscoEstimate(disco.cuda()), HeadEstimate(head.cuda())
    for place, rows in enumerate((3, 1, 3, 4, 5)):
        logits, hidden = (4 * torch.randn(rows, 9001)).to(dtype).cuda(), torch.randn(rows, HIDDEN).to(dtype).cuda()
        shown = Shown(place, torch.randint(0, 9001, (rows,)).cuda(), logits, hidden)
        statistics = token_statistics(logits, shown.token_ids, "torch")
        log_q = statistics[:, 0]
        for estimate, expected, atol in (
            (by_probability, log_q, 1e-5),
            (by_head, head.log_acceptance(hidden, statistics), 1e-4),
            (by_disco, disco.log_acceptance(logits, place), 1e-4),
        ):
            assert estimate(shown) == pytest.approx(expected.exp().double().detach().cpu().numpy(), abs=atol)
    assert len(by_head._graphs.captured) == 3
    logits[1] = torch.nan
    assert by_head(shown)[1] == 0.0


def test_a_pair_is_looked_at_once(tmp_path, monkeypatch):
    """Until the head, a model or the file is another."""
    checks = []
    monkeypatch.setattr(AcceptanceHead, "check", lambda self, *models: checks.append(self))
    target, draft = tiny_llama(0), DraftModel(tiny_llama(1))
    one, other = (random_head(AcceptanceHead, hidden_size=HIDDEN) for _ in range(2))

    def looked(head, target=target):
        before = len(checks)
        policy = ByAcceptanceHead(head=head)
        policy.check(target, draft)
        return len(checks) > before, policy._estimate.head

    assert looked(one) == (True, one) and looked(one) == (False, one)
    assert looked(other) == (True, other) and looked(one) == (True, one)
    with torch.no_grad():
        one.out.bias.add_(1)
    assert looked(one)[0] and not looked(one)[0]
    assert looked(one, tiny_llama(0))[0] and looked(one)[0]
    with torch.no_grad():
        draft.model.lm_head.weight[0].zero_()
    assert looked(one)[0] and not looked(one)[0]
    one.trained_for(target, draft.model, {}).save(tmp_path)
    assert looked(tmp_path)[0] and not looked(str(tmp_path))[0]
    other.trained_for(target, draft.model, {}).save(tmp_path)
    found = looked(tmp_path)
    assert found[0] and torch.equal(found[1].out.weight, other.out.weight)
    with pytest.raises(ConfigError, match="head is a Disco"):
        looked(DISCO)
