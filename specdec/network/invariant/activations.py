"""Gated activations that one kernel computes, by the class of the activation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from specdec.kernels.linear.gated import gelu_tanh_mul, silu_mul

GATED: dict[type, Callable[[Tensor], Tensor]] = {
    nn.SiLU: silu_mul,
    SiLUActivation: silu_mul,
    GELUTanh: gelu_tanh_mul,
}
