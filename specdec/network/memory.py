"""How much memory a model and its caches take, and whether the caches of a generation fit on the GPU."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.batch.layout import Layout, Ragged
from specdec.errors import ConfigError
from specdec.kept import kept_with
from specdec.network.base import Network, on_device_of, vocab_size_of
from specdec.network.choose import build_network, service_of
from specdec.network.free_memory import free_bytes
from specdec.network.fused import FusedNetwork
from specdec.network.invariant.network import InvariantNetwork
from specdec.network.kept_forwards import release_others
from specdec.network.probe import NetworkType, probe_key

GIB = 2**30
PROBE_SLOTS = 8  # tokens of the cache whose size is measured
# A host swaps and overcommits: a cache that is larger than its free memory may still be served.
LIMITED_DEVICES = ("cuda",)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes here.

    weights: parameters and buffers. packed: the copies that a CPU's products read instead of the weights.
    kv_per_token: keys and values of all layers, per row and token. logits_per_token: the logits of one position.
    """

    weights: int
    packed: int
    kv_per_token: float
    logits_per_token: int

    def total(self, rows: int, tokens: int, step_width: int) -> int:
        """Bytes with a cache of `tokens` for each row and a step over `step_width` tokens, without activations."""
        cache = rows * tokens * self.kv_per_token
        return int(self.weights + self.packed + cache + rows * step_width * self.logits_per_token)


def footprint(model: PreTrainedModel, layout: Layout | None = None) -> Footprint:
    """Measured by building what `generate` builds; raises UnsupportedModelError if the layout does not serve it."""
    layout = layout or Ragged()
    network = build_network(model, 1, PROBE_SLOTS, layout=layout)

    weights = unique_bytes([*model.parameters(), *model.buffers()])
    kv_per_token = kv_bytes_per_token(cast(NetworkType, type(network)), model, layout)
    logits = vocab_size_of(model) * model.dtype.itemsize
    return Footprint(weights, packed_bytes(network), kv_per_token, logits)


def packed_bytes(network: Network) -> int:
    """Bytes of the packed copies that the native and the fused network multiply by on a CPU."""
    if not isinstance(network, FusedNetwork) or not network.weights.is_packed:
        return 0
    return sum(module.weight.nbytes for module in network.model.modules() if isinstance(module, nn.Linear))


def unique_bytes(tensors: list[Tensor]) -> int:
    """Bytes of tensors of which several may share their memory, as tied weights do."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def check_memory(
    target: Network,
    layout: Layout,
    max_rows: int,
    num_slots: int,
    draft_model: PreTrainedModel | None = None,
    exact: bool = True,
) -> None:
    """Raise ConfigError if the keys and values of the target and of a draft model do not fit.

    max_rows, num_slots: rows of each cache, and tokens of each row. exact: as in `build_network`. What is kept for
    other models is given back first where it is in the way.

    Activations are not counted, so a generation that passes may still run out of memory. Only `LIMITED_DEVICES` are
    asked.
    """
    device = target.model.device
    if device.type not in LIMITED_DEVICES:
        return

    needs = {"target": cache_bytes(cast(NetworkType, type(target)), target.model, max_rows, num_slots, layout)}
    if draft_model is not None:
        draft_type = service_of(draft_model, layout, must_be_exact=False, exact=exact).network_type
        needs["draft model"] = cache_bytes(draft_type, draft_model, max_rows, num_slots, layout)

    needed = sum(bytes_ for bytes_, _ in needs.values())
    if not needed:
        return
    freed = sum(freed_bytes for _, freed_bytes in needs.values())
    available = free_bytes(device) + freed
    if needed > available:
        release_others(target.model, draft_model)
        gc.collect()  # models and caches that only reference cycles keep
        available = free_bytes(device) + freed

    if needed > available:
        parts = ", ".join(f"{name} {bytes_ / GIB:.2f} GiB" for name, (bytes_, _) in needs.items())
        raise ConfigError(
            f"keys and values of {max_rows} rows of {num_slots} tokens need {needed} bytes ({parts}), but "
            f"{device} has {available} bytes ({available / GIB:.2f} GiB) available; decode fewer prompts at a "
            "time or lower max_new_tokens"
        )


def cache_bytes(
    network_type: NetworkType, model: PreTrainedModel, max_rows: int, num_slots: int, layout: Layout
) -> tuple[int, int]:
    """Bytes that running such a network allocates for its cache, and bytes of an earlier cache freed before."""
    rows, slots, freed = network_type.plan(model, max_rows, num_slots)
    needed = int(rows * slots * kv_bytes_per_token(network_type, model, layout)) if rows else 0
    return needed, freed


def kv_bytes_per_token(network_type: NetworkType, model: PreTrainedModel, layout: Layout) -> float:
    """Bytes of the keys and values of all layers, per row and token."""
    if issubclass(network_type, InvariantNetwork):
        heads, head_dim = model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
        return 2 * len(model.model.layers) * heads * head_dim * model.dtype.itemsize

    # Other families cache in shapes of their own, so the size is measured once, in a forward over one token.
    key = ("bytes of a token", *probe_key(model, network_type, layout))
    return kept_with(model, key, lambda: measured_bytes(network_type(model, 1, PROBE_SLOTS, layout=layout)))


@torch.no_grad()
def measured_bytes(network: Network) -> float:
    """Bytes that the network's cache takes for a token of a row, found by a forward over one token."""
    device = network.model.device
    with on_device_of(network.model), network.running():
        nothing = torch.zeros(1, dtype=torch.long, device=device)
        network.forward(nothing[:, None], nothing, 1)
        cache = network.cache  # a captured network has rounded its size up
        return cache.nbytes / (cache.max_rows * cache.num_slots)
