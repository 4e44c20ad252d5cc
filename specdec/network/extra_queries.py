"""Whether a model takes queries next to its text (`specdec/batch/columns.py`), found out before the first token.

After every place of the text such a query must see what it would see if it and those before it were the text. So the
model's own uncached forward over the text up to there and the queries after it says what is right, and masks,
positions or embeddings that a model treats in ways of its own show as a difference.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from specdec.batch.layout import Layout, Ragged
from specdec.batch.rows import Rows
from specdec.draft import ExtraQueries
from specdec.errors import UnsupportedModelError
from specdec.kept import kept_with
from specdec.network.attachments import dequantised
from specdec.network.base import Network, evaluating
from specdec.network.choose import build_network
from specdec.network.probe import (
    PROBE_ATTEMPTS,
    PROBE_ERRORS,
    probe_key,
    probe_tokens,
    probe_tolerance,
    relative_difference,
)

WIDTH, NUM_EXTRA, PROMPT_LENGTHS = 3, 2, (4, 2)


def check_extra_queries(model: PreTrainedModel, layout: Layout | None = None) -> None:
    """Raise UnsupportedModelError unless steps with extra queries give what the model's own forward gives."""
    layout = layout or Ragged()
    kept_with(model, ("extra queries", *probe_key(model, layout)), lambda: _sound_difference(model, layout))


def _sound_difference(model: PreTrainedModel, layout: Layout) -> float:
    """The first difference within the tolerance; raises UnsupportedModelError if all attempts exceed it."""
    name, tolerance, difference = type(model).__name__, probe_tolerance(model), 0.0
    num_slots = max(PROMPT_LENGTHS) + WIDTH * (1 + NUM_EXTRA)
    network = build_network(model, len(PROMPT_LENGTHS), num_slots, layout=layout)

    for attempt in range(PROBE_ATTEMPTS):
        try:
            with dequantised(model):
                difference = probe(model, network, attempt)
        except PROBE_ERRORS as error:
            raise UnsupportedModelError(
                f"{name} does not take queries next to its text ({type(error).__name__}: {str(error)[:200]}); use "
                "another drafter for it"
            ) from error
        if difference <= tolerance:
            return difference

    raise UnsupportedModelError(
        f"{name} gives other logits for queries next to its text than for the same in its place (relative difference "
        f"{difference:.1e}, limit {tolerance:.0e} in {model.dtype}); use another drafter for it"
    )


@torch.no_grad()
def probe(model: PreTrainedModel, network: Network, seed: int) -> float:
    """How far a step's logits are from uncached ones, those of the text and those of the queries, at the worst place.
    See `relative_difference`."""
    embed, device = model.get_input_embeddings(), model.device
    texts = [probe_tokens(model, length + WIDTH, seed + row) for row, length in enumerate(PROMPT_LENGTHS)]
    extra = embed(probe_tokens(model, NUM_EXTRA, seed + len(texts)).to(device)) / 2  # no token's own embedding
    queries = ExtraQueries(extra, torch.arange(1, NUM_EXTRA + 1, device=device))
    rows = Rows([ids[:n] for ids, n in zip(texts, PROMPT_LENGTHS, strict=True)], WIDTH, 0, device)
    step = torch.stack([ids[n:] for ids, n in zip(texts, PROMPT_LENGTHS, strict=True)]).to(device)
    with network.running():
        network.prefill(rows)
        output = network.forward(step, rows.lengths, network.cache.num_slots, extra_queries=queries)
        assert output.extra_logits is not None
        behind = [output.extra_logits(torch.full_like(rows.lengths, column)) for column in range(WIDTH)]
    differences = []
    with evaluating(model):
        for row, (ids, length) in enumerate(zip(texts, PROMPT_LENGTHS, strict=True)):
            for column in range(WIDTH):
                end = length + column
                inputs = torch.cat([embed(ids[: end + 1].to(device)), extra])[None]
                expected = model(inputs_embeds=inputs, use_cache=False, return_dict=True).logits[0, end:]
                found = torch.cat([output.logits[row, column : column + 1], behind[column][row]])
                differences.append(relative_difference(found, expected))
    return torch.tensor(differences).max().item()
