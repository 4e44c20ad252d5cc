"""What length policies read of a distribution: the reference against torch, the kernel against it."""

from __future__ import annotations

import pytest
import torch

from specdec.kernels.commit import token_statistics as module
from specdec.kernels.commit.token_statistics import log_prob, token_statistics, token_statistics_of_few

interpreted = pytest.mark.interpreter
SHAPES = [(0, 8), (1, 1), (3, 37), (2, 4096), (2, 9001)]


def operands(shape, dtype=torch.float32, device="cpu"):
    """Some tokens are none; logits are a part of wider rows."""
    generator = torch.Generator().manual_seed(sum(shape))
    logits = (8 * torch.randn(shape[0], shape[1] + 3, generator=generator))[:, : shape[1]]
    tokens = torch.randint(-1, shape[1], (shape[0], 2), generator=generator)[:, 1]
    return logits.to(device, dtype), tokens.to(device)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_torchs(shape):
    logits, tokens = operands(shape)
    found = token_statistics(logits, tokens)
    assert found.shape == (shape[0], 3)
    for row, token, numbers in zip(logits, tokens.clamp(min=0), found, strict=True):
        q = torch.distributions.Categorical(logits=row)
        others = torch.cat([q.logits[:token], q.logits[token + 1 :], torch.tensor([-torch.inf])])
        torch.testing.assert_close(numbers, torch.stack([q.log_prob(token), others.max(), q.entropy()]))


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_few_rows_on_the_host_are_the_same(shape):
    logits, tokens = operands(shape)
    logits[0, :: max(shape[1] // 5, 2)] = -torch.inf
    logits[-1, shape[1] // 2] = torch.nan if shape[0] > 1 else 3.0
    found = torch.from_numpy(token_statistics_of_few(logits.numpy(), tokens.numpy()))
    torch.testing.assert_close(found, token_statistics(logits, tokens), rtol=1e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_is_torchs(shape):
    logits, tokens = operands(shape)
    expected = torch.distributions.Categorical(logits=logits).log_prob(tokens.clamp(min=0)) if len(logits) else tokens
    torch.testing.assert_close(log_prob(logits, tokens), expected.float())


def check(shape, dtype, device="cpu"):
    logits, tokens = operands(shape, dtype, device)
    # Sums of exponentials in other orders.
    found, expected = (token_statistics(logits, tokens, name) for name in ("triton", "torch"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(log_prob(logits, tokens, "triton"), log_prob(logits, tokens, "torch"), rtol=0, atol=2e-5)


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_in_the_interpreter_equals_the_reference(shape, dtype, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(module.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(3))
    check(shape, dtype)


@interpreted
def test_nan_in_the_interpreter_stays_in_its_row():
    logits, tokens = operands((3, 37))
    logits[1, 5] = torch.nan
    logits[2, 5] = -torch.inf
    for implementation in ("triton", "torch"):
        found = token_statistics(logits, tokens, implementation)
        assert found.isnan().all(1).tolist() == found.isnan().any(1).tolist() == [False, True, False]
        assert log_prob(logits, tokens, implementation).isnan().tolist() == [False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (3, 151936)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_on_a_gpu_equals_the_reference(shape, dtype):
    check(shape, dtype, "cuda")


def test_wrong_operands_are_refused():
    logits, tokens = operands((3, 37))
    for wrong in (tokens[:2], tokens.int()):
        with pytest.raises(ValueError, match="needed are"):
            token_statistics(logits, wrong)
        with pytest.raises(ValueError, match="needed are"):
            log_prob(logits, wrong)
