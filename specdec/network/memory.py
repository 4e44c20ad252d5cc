"""Whether the caches of a generation fit on the GPU, asked before anything of them is allocated."""

from __future__ import annotations

import gc
from typing import cast
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from specdec.batch.layout import Layout
from specdec.drafter import Drafter
from specdec.engine.target import Target
from specdec.errors import ConfigError
from specdec.network.choose import choose_network
from specdec.network.footprint import PROBE_SLOTS, cached_bytes
from specdec.network.invariant.network import InvariantNetwork
from specdec.network.probe import NetworkType, probe_key

GIB = 2**30
_measured: WeakKeyDictionary[PreTrainedModel, dict[tuple, float]] = WeakKeyDictionary()


def check_memory(target: Target, drafter: Drafter, max_rows: int, num_slots: int) -> None:
    """Raise ConfigError if the keys and values of the target and of a draft model do not fit.

    max_rows, num_slots: rows, and tokens of each, that the caches are to hold. Activations are not counted, so what
    passes may still run out of memory. Devices that do not tell what is free, such as a CPU, are not asked.
    """
    model, layout = target.network.model, target.layout
    available = free_bytes(model.device)
    if available is None:
        return
    network_type = cast(NetworkType, type(target.network))
    needs = {"target": cache_bytes(network_type, model, max_rows, num_slots, layout)}
    if drafter.kv_model is not None:
        draft, its_layout = drafter.kv_model, drafter.layout or layout
        needs["draft model"] = cache_bytes(
            choose_network(draft, its_layout, must_be_exact=False), draft, max_rows, num_slots, its_layout
        )
    needed, freed = (sum(need[i] for need in needs.values()) for i in (0, 1))
    if needed > available + freed:
        gc.collect()  # models and caches that only cycles keep
        available = free_bytes(model.device) or 0
    available += freed
    if needed > available:
        parts = ", ".join(f"{name} {bytes_ / GIB:.2f} GiB" for name, (bytes_, _) in needs.items())
        raise ConfigError(
            f"keys and values of {max_rows} rows of {num_slots} tokens need {needed} bytes ({parts}), but "
            f"{model.device} has {available} bytes ({available / GIB:.2f} GiB) available; decode fewer prompts at a "
            "time or lower max_new_tokens"
        )


def cache_bytes(
    network_type: NetworkType, model: PreTrainedModel, max_rows: int, num_slots: int, layout: Layout
) -> tuple[int, int]:
    """Bytes that running such a network allocates for its cache, and bytes of an earlier cache freed before."""
    rows, slots, freed = network_type.plan(model, max_rows, num_slots)
    return (int(rows * slots * kv_bytes_per_slot(network_type, model, layout)) if rows else 0), freed


def kv_bytes_per_slot(network_type: NetworkType, model: PreTrainedModel, layout: Layout) -> float:
    """Of keys and values of all layers, per row."""
    if issubclass(network_type, InvariantNetwork):
        heads, head_dim = model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
        return 2 * len(model.model.layers) * heads * head_dim * model.dtype.itemsize
    # Other families cache what they like: seen once, in a forward over one token.
    known, key = _measured.setdefault(model, {}), probe_key(model, network_type, layout)
    if key not in known:
        known[key] = cached_bytes(network_type(model, 1, PROBE_SLOTS, layout=layout)) / PROBE_SLOTS
    return known[key]


def free_bytes(device: torch.device) -> int | None:
    """What this process could allocate, with what torch holds without using it; None if the device does not tell."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
