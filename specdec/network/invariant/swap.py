"""Make a model batch-invariant: bit for bit the same logits for a token, however many others are computed with it.

Libraries choose the order of their sums by the number of rows, so verifying several tokens gives other bits than
decoding them one by one, and in bfloat16 other tokens. Here every Linear, LayerNorm and RMSNorm and the attention of a
transformers model run kernels whose order is fixed. transformers' own `generate` on such a model is plain greedy
decoding, and `specdec.generate` writes the same tokens with any drafter, batch size and number of draft tokens.

Three ways lead there. Modules that a kernel computes as a whole (Linear, Conv1D, norms, the experts of a mixture) get
another forward. Of the others, those that a guard catches at a product, sum or softmax (routers) run their own forward
with these operations in order (`in_order.py`). What is left is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdec.errors import ConfigError, UnsupportedModelError
from specdec.kept import kept_with
from specdec.kernels.dispatch import nvidia_capability
from specdec.kernels.linear.in_order_linear import in_order_linear
from specdec.kernels.linear.norms import layer_norm, rms_norm
from specdec.network.attention import configs_of
from specdec.network.base import evaluating
from specdec.network.invariant import attention as invariant_attention
from specdec.network.invariant.attention import INVARIANT
from specdec.network.invariant.choices import Choice, choices_given, choices_recorded, mean_share
from specdec.network.invariant.experts import (
    check_agreement,
    check_experts,
    experts_forward,
    has_experts,
    is_experts,
)
from specdec.network.invariant.guard import BatchDependentError, InvarianceGuard, own_arithmetic
from specdec.network.invariant.in_order import forward_in_order, has_order, watching_for_tokens
from specdec.network.invariant.norms import epsilon_of, find_rms_norm_variant, is_layer_norm, rms_norm_variant
from specdec.network.model_cache import cache_argument

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)
# How far swapped logits may be from the stock ones, relative to the spread of the stock ones: rounding, not errors.
LOGITS_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
# The least share of a mixture's experts that a token must choose by the kernels' router as by the stock one.
SHARED_CHOICES = 0.7


@contextmanager
def batch_invariant(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`with batch_invariant(model): ...`; the model is restored at its end, also after an error or an interrupt.

    Inference only: the swapped modules record no gradients. Raises as `make_batch_invariant` does.
    """
    restore = make_batch_invariant(model)
    try:
        yield model
    finally:
        restore()


def make_batch_invariant(model: PreTrainedModel) -> Callable[[], None]:
    """Swap the kernels in for good; the returned function restores the model.

    Raises UnsupportedModelError, naming the module, if a part cannot be made invariant, and ConfigError if the device
    or torch's settings do not allow it. On a CPU the references serve, one row at a time: slow, for tests.
    """
    if is_batch_invariant(model):
        return lambda: None
    check_settings(model)
    kinds = kept_with(model, ("batch-invariant", *invariance_key(model)), lambda: _checked(model))
    return _swap(model, kinds)


def invariance_key(model: PreTrainedModel) -> tuple:
    """All that `check_invariance` depends on, apart from the weights."""
    config, kinds = model.config, frozenset(map(type, model.modules()))
    return model.dtype, model.device, config._attn_implementation, config.to_json_string(use_diff=False), kinds


def _checked(model: PreTrainedModel) -> frozenset[type]:
    """Swap, check, restore. Returns the kinds of modules that run their own forward in order."""
    with evaluating(model):
        with choices_recorded(model) as choices:
            expected = logits_of(model)
        kinds = kinds_in_order(model)
        for name, module in model.named_modules():
            if is_experts(module):
                check_agreement(name, module)
        restore = _swap(model, kinds)
        try:
            check_logits(model, expected, choices)
            check_invariance(model)
        finally:
            restore()
    return kinds


def kinds_in_order(model: PreTrainedModel) -> frozenset[type]:
    """The kinds of modules that the guard catches at an operation of `in_order.py`; raises at any other operation."""
    kinds: frozenset[type] = frozenset()
    while True:
        restore = _swap(model, kinds)
        guard = InvarianceGuard(model)
        try:
            with guard.watching(), watching_for_tokens(PROBE_LENGTHS[0]):
                logits_of(model)
            return kinds
        except BatchDependentError as error:
            if not has_order(error.func) or "forward" in error.module.__dict__:
                raise
            kinds |= {type(error.module)}
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run with the batch-invariant attention and masks "
                f"({type(error).__name__}: {str(error)[:200]}); decode it without batch_invariant, or in float32"
            ) from error
        finally:
            restore()


def _swap(model: PreTrainedModel, kinds: frozenset[type]) -> Callable[[], None]:
    """Swap without a check; returns what restores the model. kinds: of modules that run their own forward in order."""
    invariant_attention.register()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            forward = invariant_forward(name, module)
            if forward is None and type(module) in kinds:
                check_own_forward(name, module)
                forward = partial(forward_in_order, module)
            if forward is not None:
                stack.callback(module.__dict__.pop, "forward", None)
                module.__dict__["forward"] = forward
        # Plain callbacks: a suspended context manager would restore the model as soon as the caller drops the stack.
        for config in configs_of(model):
            stack.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
            config._attn_implementation_internal = INVARIANT
        return stack.pop_all().close


def is_batch_invariant(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation == INVARIANT


def check_settings(model: PreTrainedModel) -> None:
    name = type(model).__name__
    parameters = list(model.parameters())
    devices, dtypes = {p.device for p in parameters}, {p.dtype for p in parameters if p.is_floating_point()}
    if len(devices) != 1 or next(iter(devices)).type not in ("cuda", "cpu"):
        raise UnsupportedModelError(
            f"{name} is on {', '.join(sorted(map(str, devices)))}; batch_invariant needs one CUDA device"
        )
    # Routers are often kept in float32.
    if not dtypes or not dtypes <= set(DTYPES) or len(dtypes - {torch.float32}) > 1:
        raise UnsupportedModelError(
            f"{name} has weights in {', '.join(sorted(map(str, dtypes)))}; batch_invariant serves one dtype: "
            "bfloat16, float16 or float32 (and parts in float32)"
        )
    if not uses_attention_interface(model):
        raise UnsupportedModelError(
            f"{name} does not use transformers' attention interface; its attention cannot be made batch-invariant"
        )
    if torch.get_float32_matmul_precision() != "highest":
        raise ConfigError(
            f"float32_matmul_precision={torch.get_float32_matmul_precision()!r} lets float32 products round to TF32; "
            "call torch.set_float32_matmul_precision('highest')"
        )
    if next(iter(devices)).type == "cpu" and torch.get_num_threads() > 1:
        # Each thread's share of a tensor ends in a piece that is not vectorised and may round otherwise.
        raise ConfigError(
            f"{torch.get_num_threads()} CPU threads share element-wise operations in ways that depend on the batch; "
            "move the model to a CUDA device, or call torch.set_num_threads(1)"
        )


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Some classes (StableLM, BioGPT) do use it without saying so; the guard refuses those that do not."""
    return model._supports_attention_backend or hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")


def invariant_forward(name: str, module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward to put in place of the module's own; None if the module stays as it is."""
    kind = type(module)
    if module._compiled_call_impl is not None or kind.__name__ == "OptimizedModule":
        raise UnsupportedModelError(f"{name or 'the model'} is compiled; make it batch-invariant before compiling")
    is_rms, is_mixture = kind.__name__.endswith("RMSNorm"), is_experts(module)
    if not (is_rms or is_mixture or isinstance(module, nn.Linear | nn.LayerNorm | Conv1D) or is_layer_norm(module)):
        if kind.__module__.startswith("transformers.integrations."):
            raise UnsupportedModelError(
                f"{name} ({kind.__module__}.{kind.__name__}) is quantised; it has no batch-invariant kernel"
            )
        return None
    check_own_forward(name, module)
    if hasattr(module, "parametrizations") or not has_plain_weights(module):
        raise UnsupportedModelError(
            f"{name} ({kind.__module__}.{kind.__name__}) is not a plain torch Linear (quantised or parametrised); "
            "it has no batch-invariant kernel"
        )
    if is_mixture:
        check_experts(name, module)
        return partial(experts_forward, module)
    if is_rms:
        variant = find_rms_norm_variant(module)
        return partial(forward_in_order, module) if variant is None else partial(_rms_norm, module, *variant)
    if kind is Conv1D:
        return partial(_conv_1d, module)
    if isinstance(module, nn.Linear) and kind in PLAIN_LINEARS:
        return partial(_linear, module)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        raise UnsupportedModelError(f"{name} ({kind.__name__}) is not a plain LayerNorm over the last dimension")
    eps = epsilon_of(module)
    if eps is not None and (kind is nn.LayerNorm or is_layer_norm(module)):
        return partial(_layer_norm, module, eps)
    # A class of transformers' own that adds to a Linear (routers) or a LayerNorm (Nemotron).
    return partial(forward_in_order, module)


def check_own_forward(name: str, module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) has a replaced forward (device_map offloading or another patch); "
            "load the model on one device without it"
        )


def has_plain_weights(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear | nn.LayerNorm):
        return True
    is_transformers_own = type(module).__module__.startswith("transformers.models.")
    return is_transformers_own or type(module) in (*PLAIN_LINEARS, nn.LayerNorm)


def is_invariant_forward(forward: Callable | None) -> bool:
    """Whether it is one that `make_batch_invariant` put there."""
    kinds = (_linear, _conv_1d, _layer_norm, _rms_norm, experts_forward, forward_in_order)
    return isinstance(forward, partial) and forward.func in kinds


def rms_norm_arithmetic(module: nn.Module) -> tuple[float, bool, bool]:
    """eps, unit_offset and round_first of an RMSNorm as it runs when it is swapped."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, partial) and forward.func is _rms_norm:
        return forward.args[1:]
    return rms_norm_variant(type(module).__name__, module)


@torch.no_grad()
def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    with own_arithmetic():
        return in_order_linear(x, module.weight, module.bias)


@torch.no_grad()
def _conv_1d(module: Conv1D, x: Tensor) -> Tensor:
    with own_arithmetic():
        return in_order_linear(x, module.weight.t(), module.bias)


@torch.no_grad()
def _layer_norm(module: Any, eps: float, x: Tensor) -> Tensor:
    with own_arithmetic():
        return layer_norm(x, module.weight, getattr(module, "bias", None), eps)


@torch.no_grad()
def _rms_norm(module: nn.Module, eps: float, unit_offset: bool, round_first: bool, x: Tensor) -> Tensor:
    with own_arithmetic():
        return rms_norm(x, getattr(module, "weight", None), eps, unit_offset, round_first)


def probe_ids(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """[length] int64 on the model's device: small ids in no order."""
    vocab_size = min(model.get_input_embeddings().weight.shape[0], 89)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, max(4, vocab_size), (length,), generator=generator).to(model.device)


PROBE_LENGTHS = (19, 12, 7)  # a batch of three; odd, so that no row fills a vector register or a tile


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """[tokens, vocab] of the first probe sequence."""
    ids = probe_ids(model, PROBE_LENGTHS[0], 0)[None]
    # With a mask, as some (OPT) count positions in floating point without one.
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True).logits[0]


@torch.no_grad()
def check_logits(model: PreTrainedModel, expected: Tensor, choices: list[Choice]) -> None:
    """Raise UnsupportedModelError unless the swapped model's logits are the stock ones up to rounding.

    choices: of the experts that led to the expected logits.
    """
    name = type(model).__name__
    with choices_given(model, choices) as shares:
        logits = logits_of(model)
    if mean_share(shares) < SHARED_CHOICES:
        raise UnsupportedModelError(
            f"{name} chooses other experts with the invariant kernels ({mean_share(shares):.0%} are the same, need "
            f"{SHARED_CHOICES:.0%}); its routers have a part that they do not serve"
        )
    spread = expected.float().std(-1).clamp(min=torch.finfo(torch.float32).tiny)
    differences = (logits.float() - expected.float()).square().mean(-1).sqrt() / spread
    # Where the choices cannot be given, those of single tokens may differ.
    is_opaque = has_experts(model) and not choices and model.dtype != torch.float32
    difference = (differences.median() if is_opaque else differences.max()).item()
    if not difference <= LOGITS_TOLERANCE[model.dtype]:
        raise UnsupportedModelError(
            f"{name} gives other logits with the invariant kernels (relative difference {difference:.1e}, limit "
            f"{LOGITS_TOLERANCE[model.dtype]:.0e}); it has a part that they do not serve"
        )


@torch.no_grad()
def check_invariance(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError unless the swapped model is known to be exact.

    Two looks: no operation that may depend on the batch is left; the logits of prefill, decoding, verification and a
    left-padded batch are bitwise equal.
    """
    name = type(model).__name__
    guard = InvarianceGuard(model)
    with guard.watching(), watching_for_tokens(PROBE_LENGTHS[0]):
        logits = logits_of(model)
    for what, alone, other in bit_pairs(model, logits):
        if not torch.equal(alone, other):
            count = (alone != other).sum().item()
            raise UnsupportedModelError(
                f"{name} on {model.device} is not batch-invariant: {count} of {alone.numel()} logits differ between "
                f"{what}{'; use a CUDA device' if model.device.type == 'cpu' else ''}"
            )


# GPUs on which tests compare the bits of all tiles, by their major number. On others a model is compared at some more
# widths, each of another tile.
PROVEN_GPUS = (9,)
MORE_WIDTHS = (40, 200, 700)


def unproven_widths(model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens of a forward at which nobody has compared bits on the model's GPU."""
    if model.device.type != "cuda" or nvidia_capability(model.device)[0] in PROVEN_GPUS:
        return ()
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return tuple(width for width in MORE_WIDTHS if positions is None or width <= positions)


def bit_pairs(model: PreTrainedModel, logits: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Logits that must be bitwise equal. logits: of the first probe sequence in one forward."""
    sequences = [probe_ids(model, length, seed) for seed, length in enumerate(PROBE_LENGTHS)]
    ids = sequences[0][None]
    cache = DynamicCache(config=model.config)
    pieces = [
        model(input_ids=ids[:, begin:end], use_cache=True, return_dict=True, **cache_argument(model, cache)).logits[0]
        for begin, end in ((0, 8), (8, 9), (9, 10), (10, 15), (15, 16), (16, 19))
    ]
    yield "one forward and prefill, decoding and verification", logits, torch.cat(pieces)
    for width in unproven_widths(model):
        longer = torch.cat([ids, probe_ids(model, width - ids.shape[1], width)[None]], 1)
        wide = model(input_ids=longer, use_cache=False, return_dict=True).logits[0, : ids.shape[1]]
        yield f"a prompt and the beginning of one of {width} tokens", logits, wide
    batch = torch.stack([torch.cat([ids.new_full((len(ids[0]) - len(s),), 3), s]) for s in sequences])
    mask = torch.stack([torch.arange(len(ids[0]), device=ids.device) >= len(ids[0]) - len(s) for s in sequences])
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    together = model(
        input_ids=batch, attention_mask=mask.long(), position_ids=positions, use_cache=False, return_dict=True
    ).logits
    for row, sequence in enumerate(sequences):
        alone = logits if row == 0 else model(input_ids=sequence[None], use_cache=False, return_dict=True).logits[0]
        yield "one prompt alone and in a left-padded batch", alone, together[row, -len(sequence) :]
