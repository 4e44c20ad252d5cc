"""Hidden states of prompts: what a drafter that reads features is given before the first step."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama, tiny_mistral

from specdec import batch_invariant
from specdec.batch.layout import Repad
from specdec.batch.rows import Rows
from specdec.network.choose import build_network
from specdec.network.fused import FusedNetwork
from specdec.network.invariant.network import InvariantNetwork
from specdec.network.native.network import NativeNetwork
from specdec.network.stock import StockNetwork

LENGTHS, LAYERS = [13, 9, 4], (0, 2, -1, 1)


def prefill_in_pieces(network, prompts, width, layers):
    """Logits after each row's last token, [rows, vocab], and states of all columns, [rows, longest, hidden] each."""
    rows, logits, pieces = Rows(prompts, 4, 0, torch.device("cpu")), None, []
    with network.running():
        for begin in range(0, max(LENGTHS), width):
            end = min(begin + width, max(LENGTHS))
            output = network.prefill_columns(rows.token_ids, rows.lengths, 0, begin, end, layers)
            is_reached = (rows.lengths > begin)[:, None]
            last = output.logits[:, 0]
            logits = last if logits is None else torch.where(is_reached, last, logits)
            pieces.append([state.clone() for state in output.hidden_states])
    return logits, [torch.cat(parts, 1) for parts in zip(*pieces, strict=True)]


NETWORKS = {
    "stock": lambda model: StockNetwork(model, 3, 20),
    "stock, repadded": lambda model: StockNetwork(model, 3, 20, layout=Repad()),
    "fused": lambda model: FusedNetwork(model, 3, 20),
    "fused, repadded": lambda model: FusedNetwork(model, 3, 20, layout=Repad()),
    "native": lambda model: NativeNetwork(model, 3, 20),
    "native, repadded": lambda model: NativeNetwork(model, 3, 20, layout=Repad()),
    "invariant": lambda model: build_network(model, 3, 20),
}


@pytest.mark.parametrize("width", [20, 5, 1])
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral])
@torch.no_grad()
def test_states_of_prompts_are_the_models_own(build, kind, width):
    """Of whole prompts and of pieces; the logits are the same whichever states are asked for."""
    model, generator = build(), torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 60, (length,), generator=generator) for length in LENGTHS]
    other = build()  # the same weights; transformers leaves hooks on a model that was asked for its states
    own = [other(ids[None], output_hidden_states=True) for ids in prompts]
    if kind == "invariant":
        with batch_invariant(model):
            network = NETWORKS[kind](model)
            assert isinstance(network, InvariantNetwork)
            logits, states = prefill_in_pieces(network, prompts, width, LAYERS)
            alone, _ = prefill_in_pieces(network, prompts, width, ())
    else:
        logits, states = prefill_in_pieces(NETWORKS[kind](model), prompts, width, LAYERS)
        alone, _ = prefill_in_pieces(NETWORKS[kind](model), prompts, width, ())
    assert torch.equal(logits, alone)
    for row, (length, expected) in enumerate(zip(LENGTHS, own, strict=True)):
        # 1e-4: float32 rounding through the layers with logits of order 10
        torch.testing.assert_close(logits[row], expected.logits[0, -1], rtol=1e-4, atol=1e-4)
        for layer, state in zip(LAYERS, states, strict=True):
            torch.testing.assert_close(state[row, :length], expected.hidden_states[layer][0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_that_a_model_does_not_have():
    model = tiny_llama()
    for network in (StockNetwork(model, 1, 9), FusedNetwork(model, 1, 9)):
        with network.running(), pytest.raises(IndexError):
            network.forward(torch.tensor([[5]]), torch.tensor([0]), 1, layers=(4,))
