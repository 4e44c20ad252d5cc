"""The fastest network that serves a model, chosen before the first token.

Refusals by name come first (`refusals.py`). Then each network that might serve the model is probed (`probe.py`), and
the first that gives the model's own logits is taken. On a GPU the batch-invariant ones come first, because a library's
bits depend on how many tokens it computes at once: with them the output is plain greedy decoding's, token for token,
and their steps are captured.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from specdec.batch.layout import Layout, Ragged
from specdec.errors import ConfigError, SpecDecError
from specdec.kept import kept_with
from specdec.kernels.dispatch import KERNEL_ERRORS
from specdec.network.attachments import attachment, rounds_inputs, state_of
from specdec.network.base import Network, on_device_of
from specdec.network.fused import FusedNetwork, can_fuse
from specdec.network.invariant.network import InvariantDraftNetwork, InvariantNetwork, can_shorten
from specdec.network.invariant.swap import check_settings, is_batch_invariant, make_batch_invariant
from specdec.network.native.build import is_switched_on
from specdec.network.native.network import NativeNetwork, can_run_natively
from specdec.network.probe import NetworkType, autocast_dtype, capture_problem, check_bits_once, probe_key, probe_once
from specdec.network.refusals import ONE_LENGTH_PER_BATCH, check_architecture
from specdec.network.stock import CapturedStock, CapturedSwapped, StockNetwork, SwappedNetwork

logger = logging.getLogger(__name__)

# Where the batch-invariant kernels serve by themselves. On a CPU their references are for tests: `batch_invariant`.
EXACT_DEVICES = ("cuda",)
CAPTURING_DEVICES = ("cuda",)
# What speaks against kernels: ours to say so, or a GPU that cannot run them.
REFUSALS: tuple[type[Exception], ...] = (SpecDecError, *KERNEL_ERRORS)


class Service(NamedTuple):
    """How a model is served.

    is_exact: whether a token's logits have the same bits however many others are computed with it. reason: why these
    modules and kernels, in words.
    """

    network_type: NetworkType
    is_exact: bool
    reason: str


def build_network(
    model: PreTrainedModel,
    max_rows: int,
    num_slots: int,
    max_length: int | None = None,
    layout: Layout | None = None,
    must_be_exact: bool = True,
    exact: bool = True,
) -> Network:
    """Build the fastest network that serves `model`.

    max_rows, num_slots: rows of the cache, and tokens of each. max_length: no row grows longer, though drafts may reach
    past it. must_be_exact: whether the output depends on this model's bits. A target's always does; only a draft model
    may pass False. exact: False keeps the model's own modules and kernels on a GPU too. Every network takes extra
    queries; `extra_queries.py` checks whether the model does.

    Raises UnsupportedModelError if no network serves the model, and names the layout that would.
    """
    layout = layout or Ragged()
    check_architecture(model, layout)
    if model.config.model_type in ONE_LENGTH_PER_BATCH and num_slots > model.config.max_position_embeddings:
        raise ConfigError(
            f"prompt, new tokens and drafts make {num_slots} tokens, but {type(model).__name__} has masks for "
            f"{model.config.max_position_embeddings}; shorten the prompt or lower max_new_tokens"
        )

    service = service_of(model, layout, must_be_exact, exact)
    if must_be_exact and exact:
        _say_once(model, service)
    if must_be_exact:
        kept_with(model, warn_of_rounding, lambda: warn_of_rounding(model))
    return service.network_type(model, max_rows, num_slots, max_length, layout)


def service_of(
    model: PreTrainedModel, layout: Layout | None = None, must_be_exact: bool = True, exact: bool = True
) -> Service:
    """How `model` is served; raises UnsupportedModelError if it is not. The arguments are those of `build_network`."""
    layout = layout or Ragged()
    devices = EXACT_DEVICES, CAPTURING_DEVICES
    settings = autocast_dtype(model), torch.get_float32_matmul_precision(), is_switched_on(), devices
    key = "service", layout.one_length, must_be_exact, exact

    def find() -> Service:
        with torch.inference_mode(False), on_device_of(model):
            return _service_of(model, layout, must_be_exact, exact)

    return kept_with(model, key, find, (*settings, *state_of(model)))


def _service_of(model: PreTrainedModel, layout: Layout, must_be_exact: bool, exact: bool) -> Service:
    reason = "exact=False keeps the model's own modules and kernels"
    if is_batch_invariant(model):
        short = _short(model, layout, must_be_exact)
        return short or Service(_with_kernels(model, layout), True, "batch_invariant is active around this call")

    if exact and model.device.type in EXACT_DEVICES:
        reason, service = _settings_problem(model), None
        if not reason:
            service = _short(model, layout, must_be_exact)
        if not reason and service is None:
            reason = attachment(model)
        if not reason and service is None and must_be_exact:
            service, reason = _swapped(model, layout)
        if service is not None:
            return service

    if model.device.type not in EXACT_DEVICES:
        reason = "the sums are those of this device's libraries, which may round several tokens otherwise than one"
        if autocast_dtype(model) is None and can_fuse(model):
            if can_run_natively(model) and _is_sound(model, NativeNetwork, layout):
                return Service(NativeNetwork, False, reason)
            if _is_sound(model, FusedNetwork, layout):
                return Service(FusedNetwork, False, reason)
    return Service(_own_modules(model, layout), False, reason)


def _short(model: PreTrainedModel, layout: Layout, must_be_exact: bool) -> Service | None:
    """The short forward, for the classes that it knows."""
    if layout.one_length or not can_shorten(model) or not _is_sound(model, InvariantNetwork, layout, must_be_exact):
        return None
    kind = InvariantNetwork if must_be_exact else InvariantDraftNetwork
    return Service(kind, True, "batch-invariant kernels over the model's weights")


def _swapped(model: PreTrainedModel, layout: Layout) -> tuple[Service | None, str]:
    """The model's modules with the kernels swapped in, or why they cannot be."""
    key = ("swapped", *probe_key(model, layout))
    problem = kept_with(model, key, lambda: _swap_problem(model, layout))
    if problem:
        return None, problem
    reason = "batch-invariant kernels in the model's own modules while it decodes"
    return Service(_with_kernels(model, layout), True, reason), reason


def _swap_problem(model: PreTrainedModel, layout: Layout) -> str:
    """Why the kernels cannot be swapped in, in words; empty if they can."""
    try:
        make_batch_invariant(model)()
        probe_once(model, SwappedNetwork, layout)
    except REFUSALS as error:
        return str(error)
    return ""


def _with_kernels(model: PreTrainedModel, layout: Layout) -> NetworkType:
    """The modules with the kernels in them, which may be there already, captured where they can be. Steps captured with
    kernels and without are kept apart. Raises UnsupportedModelError if they do not serve."""
    probe_once(model, SwappedNetwork, layout)
    return CapturedSwapped if _captures(model, CapturedSwapped, layout) else SwappedNetwork


def _own_modules(model: PreTrainedModel, layout: Layout) -> NetworkType:
    """The modules as they are, captured where they can be. Raises UnsupportedModelError if they do not serve."""
    probe_once(model, StockNetwork, layout)
    return CapturedStock if _captures(model, CapturedStock, layout) else StockNetwork


def _captures(model: PreTrainedModel, kind: NetworkType, layout: Layout) -> bool:
    """Whether steps of these modules can be captured: nothing in them waits for the host or is called by it."""
    if model.device.type not in CAPTURING_DEVICES or layout.one_length:
        return False
    if attachment(model) or autocast_dtype(model) is not None:  # a replay would pass by what is not there any more
        return False
    problem = kept_with(model, ("captured", kind, *probe_key(model, layout)), lambda: capture_problem(model, kind))
    if problem:
        logger.info("%s: steps are not captured: %s", type(model).__name__, problem)
    return not problem


def _is_sound(model: PreTrainedModel, kind: NetworkType, layout: Layout, bit_by_bit: bool = False) -> bool:
    """Whether it gives the model's own logits. Where it does not, something about the model is edited, and its own
    modules decide. bit_by_bit: also whether a token's bits depend on what is computed with it."""

    def try_out() -> bool:
        try:
            probe_once(model, kind, layout)
            if bit_by_bit:
                check_bits_once(model)
        except REFUSALS as error:
            logger.info("%s does not serve %s: %s", kind.__name__, type(model).__name__, error)
            return False
        return True

    return kept_with(model, ("sound", bit_by_bit, *probe_key(model, kind, layout)), try_out)


def _settings_problem(model: PreTrainedModel) -> str:
    """Why batch-invariant kernels cannot serve here, in words; empty if nothing about devices, dtypes and torch's
    settings speaks against it."""
    if autocast_dtype(model) is not None:
        return "torch.autocast is for a model's own modules"
    try:
        check_settings(model)
    except SpecDecError as error:
        return str(error)
    return ""


def warn_of_rounding(model: PreTrainedModel) -> bool:
    """Log that tokens may depend on how many others are computed with them; whether that is so."""
    rounding = rounds_inputs(model)
    if rounding:
        logger.warning(
            "%s rounds its inputs to 8 bits at %s, which turns a last bit into a step of 1/127: drafts and "
            "batches may change the text, as a cache does in transformers' own generate",
            type(model).__name__,
            rounding,
        )
    return bool(rounding)


def _say_once(model: PreTrainedModel, service: Service) -> None:
    """Log how a model on a GPU is served, once for each answer."""
    if model.device.type not in EXACT_DEVICES:
        return

    def say() -> bool:
        level = logging.INFO if service.is_exact else logging.WARNING
        exactness = "exact" if service.is_exact else "not exact in every bit"
        logger.log(level, "%s is served %s: %s", type(model).__name__, exactness, service.reason)
        return True

    kept_with(model, ("said", service.reason), say)
