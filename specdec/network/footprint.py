"""How much memory a model takes here: its weights, what our network adds to them, and the cache of a token."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.batch.layout import Layout
from specdec.network.base import Network, vocab_size_of
from specdec.network.choose import build_network
from specdec.network.fused import FusedNetwork

PROBE_SLOTS = 8


@dataclass(frozen=True)
class Footprint:
    """weights: bytes of parameters and buffers. packed: of the copies that a CPU's products read instead of them.
    kv_per_token: of keys and values of all layers, per row and token. logits_per_token: of one position's logits."""

    weights: int
    packed: int
    kv_per_token: float
    logits_per_token: int

    def total(self, rows: int, tokens: int, step_width: int) -> int:
        """With a cache of `tokens` for each row, and a step over `step_width` tokens of each; without activations."""
        cache = rows * tokens * self.kv_per_token
        return int(self.weights + self.packed + cache + rows * step_width * self.logits_per_token)


def footprint(model: PreTrainedModel, layout: Layout | None = None) -> Footprint:
    """By building what `generate` builds. Raises UnsupportedModelError if the layout does not serve the model."""
    network = build_network(model, 1, PROBE_SLOTS, layout=layout)
    weights = unique_bytes([*model.parameters(), *model.buffers()])
    logits = vocab_size_of(model) * model.dtype.itemsize
    return Footprint(weights, packed_bytes(network), cached_bytes(network) / PROBE_SLOTS, logits)


def kv_bytes_per_token(model: PreTrainedModel, layout: Layout | None = None) -> float:
    return cached_bytes(build_network(model, 1, PROBE_SLOTS, layout=layout)) / PROBE_SLOTS


@torch.no_grad()
def cached_bytes(network: Network) -> int:
    """Of a cache of one row and `PROBE_SLOTS` tokens, measured after a forward over one token."""
    device = network.model.device
    with network.running():
        nothing = torch.zeros(1, dtype=torch.long, device=device)
        network.forward(nothing[:, None], nothing, 1)
    return network.cache.nbytes


def packed_bytes(network: Network) -> int:
    """Bytes of the packed copies that the fused network multiplies by on a CPU."""
    if not isinstance(network, FusedNetwork) or network.weights.head.parts is not None:
        return 0
    return sum(module.weight.nbytes for module in network.model.modules() if isinstance(module, nn.Linear))


def unique_bytes(tensors: list[Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def available_bytes(device: torch.device) -> int:
    """What the device could still give, beside what this process holds."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
