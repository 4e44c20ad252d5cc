"""torch's operations with a fixed order in their place: the same numbers, and bits that are a row's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specdec.errors import UnsupportedModelError
from specdec.network.invariant.in_order import InOrder, in_order_operations, watching_for_tokens

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(7, 33, generator=GENERATOR)
WEIGHT = torch.randn(33, 9, generator=GENERATOR)
BIAS = torch.randn(9, generator=GENERATOR)
MANY = torch.randn(4, 33, 5, generator=GENERATOR)

# Name of the operation behind it, and what a module would write.
CALLS = {
    "mm": lambda x: x @ WEIGHT,
    "addmm": lambda x: F.linear(x, WEIGHT.t(), BIAS),
    "bmm": lambda x: torch.bmm(x.expand(4, -1, -1), MANY).transpose(0, 1),
    "_softmax": lambda x: torch.softmax(x, -1),
    "_softmax of half": lambda x: F.softmax(x.half(), dim=1, dtype=torch.float32),
    "_softmax over the middle": lambda x: torch.softmax(x.view(-1, 3, 11), 1),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "sum over the middle": lambda x: x.view(-1, 3, 11).sum(1),
    "sum in float32": lambda x: x.half().sum(-1, dtype=torch.float32),
    "mean": lambda x: x.pow(2).mean(-1, keepdim=True),
    "mean without the dimension": lambda x: x.mean(1),
    "std": lambda x: x.std(-1, keepdim=True),
    "std of all": lambda x: torch.std(x, dim=1, unbiased=False),
    "topk": lambda x: x.topk(5, -1)[0],
    "topk indices": lambda x: x.topk(5, 1, sorted=False)[1].sort(-1)[0],
    "native_layer_norm": lambda x: F.layer_norm(x, (33,), WEIGHT[:, 0].contiguous(), None, 1e-5),
    "rms_norm": lambda x: F.rms_norm(x, (33,), None, 1e-5),
}


class Recorder(InOrder):
    def __init__(self):
        super().__init__()
        self.replaced = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in in_order_operations():
            self.replaced.append(func)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_torchs_and_a_rows_own(name, without_gradients):
    """Fails if an operation is not replaced, or reduces another dimension."""
    call, mode = CALLS[name], Recorder()
    with without_gradients(), mode:
        together = call(X)
        alone = [call(X[row : row + 1]) for row in range(len(X))]
    assert mode.replaced
    assert torch.equal(torch.cat(alone), together)
    torch.testing.assert_close(together, call(X), rtol=1e-4, atol=1e-5)


def test_the_fused_norm_of_newer_versions_is_replaced():
    if not hasattr(torch.ops.aten, "_fused_rms_norm"):
        pytest.skip("this torch has no fused RMSNorm")
    weight = WEIGHT[:, 0].contiguous()
    with torch.no_grad(), InOrder():
        out, _ = torch.ops.aten._fused_rms_norm(X, [33], weight, None)
    torch.testing.assert_close(out, F.rms_norm(X, (33,), weight))


def test_integers_are_summed_as_they_are():
    with InOrder():
        assert torch.arange(6).view(2, 3).sum(-1).tolist() == [3, 12]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: X.sum((0, 1)), "over dimensions"),
        (lambda: torch.addmm(BIAS, X, WEIGHT, beta=0.5), "beta=0.5"),
        (lambda: X.topk(2, largest=False), "smallest"),
        (lambda: F.layer_norm(X, (7, 33)), "over 2 dimensions"),
        (lambda: X.double() @ WEIGHT.double(), "float64"),
    ],
)
def test_what_has_no_kernel_is_refused(call, words):
    with torch.no_grad(), InOrder(), pytest.raises(UnsupportedModelError, match=words):
        call()


@pytest.mark.parametrize("name", ["mm", "sum", "_softmax", "mean", "topk", "std"])
def test_nothing_may_go_over_the_tokens(name):
    with torch.no_grad(), InOrder(), watching_for_tokens(33), pytest.raises(UnsupportedModelError, match="of tokens"):
        CALLS[name](X)
