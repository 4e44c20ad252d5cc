"""Which models can be decoded over a ragged cache, decided before the first token.

Names and flags give precise refusals for what is known not to work. For everything else a probe compares the ragged
cache with the model's own uncached forward on a few made-up tokens: ragged prefill, verification of wrong drafts, a
different rewind in each row, verification again. A model that disagrees is refused, so none is served wrongly.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from specdec.errors import UnsupportedModelError
from specdec.fused import FusedNetwork, can_fuse
from specdec.network import Network
from specdec.rows import Rows
from specdec.stock import StockNetwork, evaluating

RECURRENT_LAYERS = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "ssm", "rwkv", "hybrid")
# Differences that rounding can explain, relative to the largest logit. Wrong masks or positions give far more.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 0.08, torch.float16: 0.02}


def build_network(model: PreTrainedModel, max_rows: int, num_slots: int) -> Network:
    """The fastest network that serves `model`.

    Raises UnsupportedModelError if none does.
    """
    check_architecture(model)
    network_type = FusedNetwork if can_fuse(model) else StockNetwork
    _probe_once(model, network_type)
    return network_type(model, max_rows, num_slots)


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse by name what cannot work."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    kind = getattr(config, "model_type", name)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; specdec serves decoder-only causal LMs")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no language modelling head; load it with AutoModelForCausalLM")
    if getattr(config, "is_decoder", True) is False and kind in ("bert", "roberta", "electra", "camembert", "roformer"):
        raise UnsupportedModelError(
            f"{name} was built with is_decoder=False and attends to later tokens; set config.is_decoder = True"
        )
    recurrent = [t for t in getattr(config, "layer_types", None) or [] if any(r in str(t) for r in RECURRENT_LAYERS)]
    if recurrent or getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{name} keeps recurrent state{f' (layer type {recurrent[0]!r})' if recurrent else ''} that cannot be "
            "rewound to the accepted tokens; use transformers' own generate for it"
        )
    if kind == "gpt_neo" or (kind == "falcon" and config.alibi) or kind == "doge":
        raise UnsupportedModelError(
            f"{name} builds its masks for one length per batch and has no ragged layout yet; "
            "use transformers' own generate for it"
        )


def check_lengths(model: PreTrainedModel, max_length: int, role: str) -> None:
    """Refuse sequences that the model has no positions for, or whose rotation would change midway."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise UnsupportedModelError(
            f"prompt and new tokens make {max_length} tokens, but the {role} {type(model).__name__} "
            f"has {limit} positions; shorten the prompt or lower max_new_tokens"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") if isinstance(rope, dict) else None
    if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
        original = original or getattr(config, "original_max_position_embeddings", None) or limit
        if original is not None and max_length > original:
            raise UnsupportedModelError(
                f"prompt and new tokens make {max_length} tokens; the {role}'s {rope['rope_type']!r} rotation "
                f"changes for a whole batch beyond {original}, so rows would depend on each other; keep within {original} tokens"
            )


_probed: WeakKeyDictionary[PreTrainedModel, dict[tuple, float]] = WeakKeyDictionary()


def _probe_once(model: PreTrainedModel, network_type: type[Network]) -> None:
    key = (network_type, model.dtype, model.device, model.config._attn_implementation)
    known = _probed.setdefault(model, {})
    if key in known:
        return
    try:
        difference = probe(model, network_type)
    except (
        AttributeError,
        AssertionError,
        IndexError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot run over a ragged cache ({type(error).__name__}: "
            f"{str(error)[:200]}); use transformers' own generate for it"
        ) from error
    tolerance = PROBE_TOLERANCE.get(model.dtype, PROBE_TOLERANCE[torch.bfloat16])
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives other logits over a ragged cache than without a cache (relative difference "
            f"{difference:.1e}, limit {tolerance:.0e} in {model.dtype}); use transformers' own generate for it"
        )
    known[key] = difference


@torch.no_grad()
def probe(model: PreTrainedModel, network_type: type[Network]) -> float:
    """The largest difference between ragged and uncached logits, relative to the largest logit."""
    config = model.config.get_text_config(decoder=True)
    # Small ids in no order: special ids of multimodal checkpoints are large ones.
    text = (torch.arange(34) * 7919 + 11) % min(config.vocab_size, 89)
    sequences = [text[:17], text[17:]]
    prompt_lengths, width, committed = [9, 6], 4, [1, 3]
    with evaluating(model):
        expected = [model(input_ids=ids[None].to(model.device), use_cache=False).logits[0] for ids in sequences]
    rows = Rows([ids[:n] for ids, n in zip(sequences, prompt_lengths, strict=True)], 2 * width, 0, model.device)
    network = network_type(model, len(rows), rows.capacity)
    scale = max(logits.abs().max().item() for logits in expected)
    differences = []

    def compare(row: int, logits: torch.Tensor, begin: int) -> None:
        differences.append((logits - expected[row][begin : begin + len(logits)]).abs().max().item() / scale)

    with network.running():
        first = network.prefill(rows)
        for row, n in enumerate(prompt_lengths):
            compare(row, first[row : row + 1], n - 1)
        starts = rows.lengths.clone()
        for num_true in (committed, [width, width]):
            # Only the first num_true tokens are the sequence's own; the rest are drafts to be rejected.
            batch = torch.stack(
                [
                    torch.cat([ids[s : s + n], (ids[s + n : s + width] + 1) % 83])
                    for ids, s, n in zip(sequences, starts.tolist(), num_true, strict=True)
                ]
            )
            logits = network.forward(batch.to(model.device), starts, int(starts.max()) + width).logits
            for row, n in enumerate(num_true):
                compare(row, logits[row, :n], int(starts[row]))
            starts = starts + torch.tensor(num_true, device=starts.device)
    return max(differences)
