"""The fastest network that serves a model, chosen before the first token.

Refusals by name come first (`refusals.py`). Then each network that might serve the model is probed (`probe.py`), and
the first that gives the model's own logits is taken.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from specdec.batch.layout import Layout, Ragged
from specdec.errors import ConfigError, UnsupportedModelError
from specdec.network.base import Network
from specdec.network.fused import FusedNetwork, can_fuse
from specdec.network.invariant.network import InvariantDraftNetwork, InvariantNetwork, can_shorten
from specdec.network.probe import NetworkType, autocast_dtype, probe_once
from specdec.network.refusals import ONE_LENGTH_PER_BATCH, check_architecture
from specdec.network.stock import StockNetwork


def build_network(
    model: PreTrainedModel,
    max_rows: int,
    num_slots: int,
    max_length: int | None = None,
    layout: Layout | None = None,
    must_be_exact: bool = True,
) -> Network:
    """Build the fastest network that serves `model`.

    max_rows, num_slots: rows of the cache, and tokens of each. max_length: no row grows longer, though drafts may reach
    past it. must_be_exact: whether the output depends on this model's bits. A target's always does; only a draft model
    may pass False. Every network takes extra queries; `extra_queries.py` checks whether the model does.

    Raises UnsupportedModelError if no network serves the model, and names the layout that would.
    """
    layout = layout or Ragged()
    check_architecture(model, layout)
    if model.config.model_type in ONE_LENGTH_PER_BATCH and num_slots > model.config.max_position_embeddings:
        raise ConfigError(
            f"prompt, new tokens and drafts make {num_slots} tokens, but {type(model).__name__} has masks for "
            f"{model.config.max_position_embeddings}; shorten the prompt or lower max_new_tokens"
        )

    network_type = choose_network(model, layout, must_be_exact)
    return network_type(model, max_rows, num_slots, max_length, layout)


def choose_network(model: PreTrainedModel, layout: Layout, must_be_exact: bool = True) -> NetworkType:
    """The fastest type that serves `model`; raises UnsupportedModelError if none does. See `build_network`."""
    for can_serve, network_type in ((can_fuse, FusedNetwork), (can_shorten, InvariantNetwork)):
        if autocast_dtype(model) is not None or (network_type is InvariantNetwork and layout.one_length):
            continue  # autocast is for a model's own modules
        if not can_serve(model):
            continue

        try:
            probe_once(model, network_type, layout)
        except UnsupportedModelError:
            continue  # something about the model is edited; its own modules decide

        is_draft = network_type is InvariantNetwork and not must_be_exact
        return InvariantDraftNetwork if is_draft else network_type

    probe_once(model, StockNetwork, layout)
    return StockNetwork
