"""Which of our kernels computes what a model's norm does, found by trying it out on random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from specdec.errors import UnsupportedModelError
from specdec.kernels.linear.norms import layer_norm, rms_norm

EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
# Norms that were tried out, by `what_matters`.
_rms_norms: dict[tuple, tuple[float, bool, bool] | None] = {}
_layer_norms: dict[tuple, bool] = {}


def rms_norm_variant(name: str, module: nn.Module) -> tuple[float, bool, bool]:
    """As `find_rms_norm_variant`; raises UnsupportedModelError, naming the module, if there is none."""
    variant = find_rms_norm_variant(module)
    if variant is None:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) is not an RMSNorm that the kernel knows; it has no short forward"
        )
    return variant


def find_rms_norm_variant(module: nn.Module) -> tuple[float, bool, bool] | None:
    """eps, unit_offset and round_first of the kernel that computes what the module does on random numbers."""
    key = what_matters(module)
    if key not in _rms_norms:
        _rms_norms[key] = _find_rms_norm_variant(module)
    return _rms_norms[key]


@torch.no_grad()
def _find_rms_norm_variant(module: nn.Module) -> tuple[float, bool, bool] | None:
    eps, weight = epsilon_of(module), weight_alone(module)
    if eps is None or weight is None or weight.dim() != 1:
        return None
    errors = {}
    for unit_offset, round_first in product((False, True), (True, False)):
        error = norm_error(
            module, partial(rms_norm, eps=eps, unit_offset=unit_offset, round_first=round_first, implementation="torch")
        )
        if error is not None:
            errors[unit_offset, round_first] = error
    return (eps, *min(errors, key=errors.__getitem__)) if errors else None


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a LayerNorm of transformers' own (Cohere's, without a bias) is the kernel's, on random numbers."""
    if not type(module).__name__.endswith("LayerNorm"):
        return False
    key = what_matters(module)
    if key not in _layer_norms:
        _layer_norms[key] = _is_layer_norm(module)
    return _layer_norms[key]


@torch.no_grad()
def _is_layer_norm(module: nn.Module) -> bool:
    eps, weight = epsilon_of(module), weight_alone(module)
    if eps is None or weight is None or weight.dim() > 2:
        return False
    return norm_error(module, partial(layer_norm, bias=None, eps=eps, implementation="torch")) is not None


def what_matters(module: nn.Module) -> tuple:
    """The same for modules that are alike: one of them is tried out for all."""
    parameters = tuple((p.dtype, p.device, p.shape) for p in module.parameters(recurse=False))
    return type(module), type(module).forward, parameters, tuple(getattr(module, name, None) for name in EPSILON_NAMES)


def epsilon_of(module: nn.Module) -> float | None:
    epsilons = [getattr(module, key) for key in EPSILON_NAMES if isinstance(getattr(module, key, None), float)]
    return epsilons[0] if len(epsilons) == 1 else None


def weight_alone(module: nn.Module) -> Tensor | None:
    """The module's weight if it has no other parameter."""
    parameters = dict(module.named_parameters(recurse=False))
    return parameters["weight"] if parameters.keys() == {"weight"} else None


def norm_error(module: Any, norm: Callable[..., Tensor]) -> float | None:
    """The mean difference between the module and norm(x, weight); None if it is more than rounding.

    A copy with random weights is asked, so that weights of one or zero hide nothing.
    """
    weight = module.weight
    twin = copy.copy(module)
    twin._parameters = {}  # the copy shares the module's own
    generator = torch.Generator().manual_seed(0)
    twin.weight = nn.Parameter(torch.randn(weight.shape, generator=generator).to(weight), requires_grad=False)
    # Small numbers too, where eps counts.
    x = torch.randn(64, *weight.shape, generator=generator).movedim(0, -1) * torch.logspace(-3, 1, 64)
    x = x.movedim(-1, 0).to(weight)
    expected = type(module).forward(twin, x)
    if not isinstance(expected, Tensor) or expected.dtype != x.dtype or expected.shape != x.shape:
        return None
    difference = (norm(x, twin.weight).double() - expected.double()).abs()
    # Two roundings of the result, or of the factor before it.
    if (difference > 4 * torch.finfo(x.dtype).eps * expected.double().abs() + 1e-6).any():
        return None
    return difference.mean().item()
