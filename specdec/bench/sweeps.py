"""Methods with forced acceptance: the gain of a drafter that is right with a given probability."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec.bench.latency import StepClock
from specdec.bench.methods import Batch, Decoded, Method, Pair, generate
from specdec.drafters.synthetic import Synthetic

SYNTHETIC = "specdec synthetic"


def forced_acceptance(
    pair: Pair,
    reference: Sequence[list[int]],
    rates: Sequence[float],
    ks: Sequence[int],
    batch_sizes: Sequence[int],
    max_new_tokens: int,
    exact: bool = True,
) -> list[Method]:
    """One method per rate, K and batch size. reference: the target's greedy continuations, the source of drafts."""
    continuations = [torch.tensor(tokens) for tokens in reference]

    def method(rate: float, k: int, batch_size: int) -> Method:
        def decode(batch: Batch, clock: StepClock | None = None) -> Decoded:
            drafter = Synthetic(rate, [continuations[index] for index in batch.prompt_indices])
            return generate(pair, batch, drafter, k, max_new_tokens, clock, {"exact": exact})

        return Method(f"{SYNTHETIC} {rate:g}", batch_size, True, k, decode)

    return [method(rate, k, size) for size in batch_sizes for rate in rates for k in ks]
