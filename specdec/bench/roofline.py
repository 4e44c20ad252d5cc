"""How close a call came to the memory's limit: decoding reads all weights and the cached keys in every forward.

The roofline is the least time in which the device could have read everything the forwards of a run had to read: the
weights of the target once per target forward, those of the draft once per draft forward, and each row's keys and values
once per step it took part in. The ratio of that time to the measured time is 1 for a perfect decoder of the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from specdec.bench.latency import RowTimes, synchronise
from specdec.engine.metrics import Speculation
from specdec.network.free_memory import free_bytes

COPY_BYTES = 2**30  # at most; a fourth of the free memory if that is less
NUM_COPIES = 10


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written by a large copy."""
    size = min(COPY_BYTES, free_bytes(device) // 4)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(NUM_COPIES):
        target.copy_(source)
    synchronise(device)
    return 2 * size * NUM_COPIES / (time.perf_counter() - begin)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes a forward reads: every parameter except the embedding table, of which it looks up only a few rows.

    A table that is also the output projection counts.
    """
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = getattr(head, "weight", None) is table
    return sum(p.nbytes for p in model.parameters() if p is not table or tied)


def bytes_read(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    speculation: Speculation,
    num_prefills: int,
    rows: Sequence[RowTimes],
    prompt_lengths: Sequence[int],
    kv_bytes_per_token: float,
) -> float:
    """Bytes read by the run whose steps `rows` records. A lower bound: the draft's small cache is left out."""
    forwards = (speculation.num_target_calls + num_prefills) * weight_bytes(target)
    if draft is not None:
        forwards += (speculation.num_draft_calls + num_prefills) * weight_bytes(draft)
    cached = 0
    for times, length in zip(rows, prompt_lengths, strict=True):
        for step, accepted in enumerate(times.accept_lengths):
            cached += length if step else 0  # the first is the prompt's own forward, with an empty cache
            length += accepted
    return forwards + cached * kv_bytes_per_token
