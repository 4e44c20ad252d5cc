"""Linear layers in the weight layout that is fastest for oneDNN's GEMM on a CPU.

`torch.nn.functional.linear` passes few-row products (decoding one token, verifying several) to a general GEMM that
reads the weights far below the memory bandwidth. oneDNN's kernel over pre-packed weights, which torch.compile's CPU
backend uses, measured 2 to 5 times faster at 1 to 48 rows. Packing costs a copy of the weights, so it is done only if
that copy easily fits into free memory; otherwise the module's own weights are used directly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.network.free_memory import free_bytes

MAX_SHARE_OF_FREE_MEMORY = 0.5


def can_pack(weights: Sequence[Tensor]) -> bool:
    """Whether these weights, on a CPU, have a packed GEMM and room for a packed copy."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    dtypes = {weight.dtype for weight in weights}
    fast = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        fast.add(torch.bfloat16)
    if not dtypes <= fast or any(weight.device.type != "cpu" for weight in weights):
        return False

    needed = sum(weight.nbytes for weight in weights)
    return needed <= MAX_SHARE_OF_FREE_MEMORY * free_bytes(torch.device("cpu"))


class MergedLinear:
    """Linear layers that share their input, as one product: y = [x W1' + b1, x W2' + b2, ...]."""

    def __init__(self, linears: Sequence[nn.Linear], pack: bool):
        weights = [linear.weight.detach() for linear in linears]
        biases = [linear.bias for linear in linears]
        self.parts = None if pack else [(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        if pack:
            self.bias = _merge_biases(weights, biases)
            merged = weights[0] if len(weights) == 1 else torch.cat(weights)
            # The second argument is the expected row count; layouts for 8 rows measured best at 1 to 48.
            self.weight = torch.ops.mkldnn._reorder_linear_weight(merged.contiguous(), 8)

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out1 + out2 + ...]"""
        if self.parts is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        outputs = [F.linear(x, weight, bias) for weight, bias in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x), [tokens, out]."""
        if self.parts is None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return residual + self(x)


def _merge_biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
            for weight, bias in zip(weights, biases, strict=True)
        ]
    )
