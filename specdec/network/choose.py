"""Which models can be decoded over a ragged cache, decided before the first token.

Names and flags give precise refusals for what is known not to work. For everything else a probe compares the ragged
cache with the model's own uncached forward on a few made-up tokens: ragged prefill, verification of wrong drafts, a
different rewind in each row, verification again. A model that disagrees is refused, so none is served wrongly.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.layout import Layout, Ragged, Repad
from specdec.batch.rows import Rows
from specdec.errors import ConfigError, UnsupportedModelError
from specdec.network.base import Network, evaluating
from specdec.network.fused import FusedNetwork, can_fuse
from specdec.network.invariant.network import InvariantDraftNetwork, InvariantNetwork, can_shorten
from specdec.network.stock import StockNetwork

SERVED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
RECURRENT_LAYERS = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "ssm", "rwkv", "hybrid")
# These attend to later tokens unless they are told to be decoders.
ONE_LENGTH_PER_BATCH = ("gpt_neo",)
BIDIRECTIONAL = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
# Differences that rounding can explain, relative to the spread of the logits. Trained models in bfloat16 show 0.01 to
# 0.02, routers that flip 0.15, wrong masks or positions 0.35 and more.
# Rotary tables and norms of transformers are float32, whatever the model is.
PROBE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
TF32_TOLERANCE = 0.02
PROBE_ATTEMPTS = 3  # with other tokens each: a router's near-tie that rounds either way is not an error of the cache
# What models raise over a cache or a mask that they were not made for.
PROBE_ERRORS = (
    AttributeError, AssertionError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
MAX_STEP_WIDTH = 33  # tokens of a row in one verify forward, at most


NetworkType = type[FusedNetwork] | type[InvariantNetwork] | type[StockNetwork]


def build_network(
    model: PreTrainedModel,
    max_rows: int,
    num_slots: int,
    max_length: int | None = None,
    layout: Layout | None = None,
    must_be_exact: bool = True,
) -> Network:
    """The fastest network that serves `model`. max_length: no row grows longer, though drafts may reach behind it.
    must_be_exact: whether the output depends on this model's bits. A target's always does; only a draft model may pass
    False. Each takes extra queries; whether the model does, `specdec/network/extra_queries.py` finds out.

    Raises UnsupportedModelError if none does, naming the layout that would.
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
    """The fastest that serves `model`; raises UnsupportedModelError if none does. See `build_network`."""
    for can_serve, network_type in ((can_fuse, FusedNetwork), (can_shorten, InvariantNetwork)):
        if autocast_dtype(model) is not None or (network_type is InvariantNetwork and layout.one_length):
            continue  # autocast is for a model's own modules
        if can_serve(model):
            try:
                _probe_once(model, network_type, layout)
            except UnsupportedModelError:
                pass  # something about it is edited; its own modules decide
            else:
                is_draft = network_type is InvariantNetwork and not must_be_exact
                return InvariantDraftNetwork if is_draft else network_type
    _probe_once(model, StockNetwork, layout)
    return StockNetwork


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError unless `model` is a transformers decoder with a generation config."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}; pass a transformers PreTrainedModel "
            "(of a wrapped model, the one inside)"
        )
    refuse_encoder_decoder(model)
    if getattr(model, "generation_config", None) is None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot generate; load it with AutoModelForCausalLM")


def refuse_encoder_decoder(model: PreTrainedModel) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model; specdec serves decoder-only causal LMs"
        )


def check_architecture(model: PreTrainedModel, layout: Layout | None = None) -> None:
    """Refuse by name what cannot work."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    kind = getattr(config, "model_type", name)
    refuse_encoder_decoder(model)
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no language modelling head; load it with AutoModelForCausalLM")
    if getattr(config, "is_decoder", True) is False and kind in BIDIRECTIONAL:
        raise UnsupportedModelError(
            f"{name} was built with is_decoder=False and attends to later tokens; set config.is_decoder = True"
        )
    layer_types = [str(layer_type) for layer_type in getattr(config, "layer_types", None) or []]
    recurrent = [layer_type for layer_type in layer_types if any(word in layer_type for word in RECURRENT_LAYERS)]
    if recurrent or getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{name} keeps recurrent state{f' (layer type {recurrent[0]!r})' if recurrent else ''} that cannot be "
            "rewound to the accepted tokens; use transformers' own generate for it"
        )
    other = [layer_type for layer_type in layer_types if layer_type not in SERVED_LAYERS]
    if other:
        # Indexers and compressors matter beyond some length only, so a probe would not notice them.
        raise UnsupportedModelError(
            f"{name} caches more than keys and values (layer type {other[0]!r}); use transformers' own generate for it"
        )
    if kind == "moshi":
        raise UnsupportedModelError(
            f"{name} slides a window over its cache but not over its masks, so its text depends on how it is cached; "
            "use transformers' own generate for it"
        )
    if kind == "doge" and "create_masks_for_generate" not in vars(type(model)):
        raise UnsupportedModelError(
            f"{name} attends to later tokens in this version of transformers, whose cached decoding then differs from "
            "its own forward; upgrade transformers"
        )
    if kind in ONE_LENGTH_PER_BATCH and not (layout and layout.one_length):
        raise UnsupportedModelError(f"{name} builds its masks for one length per batch; pass layout='repad' for it")


def check_lengths(model: PreTrainedModel, max_length: int, role: str) -> None:
    """Refuse sequences that the model has no positions for, or whose rotation would change midway."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"prompt and new tokens make {max_length} tokens, but the {role} {type(model).__name__} "
            f"has {limit} positions; shorten the prompt or lower max_new_tokens"
        )
    floor_scale = getattr(config, "floor_scale", None)
    tuned = getattr(config, "attn_temperature_tuning", False) and not all(getattr(config, "no_rope_layers", None) or [])
    if tuned and floor_scale is not None and max_length + MAX_STEP_WIDTH >= floor_scale:
        # Llama 4 takes one position per column, not per row, for the temperature of its layers without rotation.
        raise UnsupportedModelError(
            f"prompt and new tokens make {max_length} tokens; the {role}'s attention temperature follows the longest "
            f"row from floor_scale={floor_scale} on; keep within {floor_scale - MAX_STEP_WIDTH - 1} tokens"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    # One rotation, or one per layer type.
    for rotation in rope.values() if "rope_type" not in rope else [rope]:
        if not isinstance(rotation, dict) or rotation.get("rope_type") not in ("dynamic", "longrope"):
            continue
        original = rotation.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None) or limit
        if original is not None and max_length > original:
            raise UnsupportedModelError(
                f"prompt and new tokens make {max_length} tokens; the {role}'s {rotation['rope_type']!r} rotation "
                f"changes for a whole batch beyond {original}, so rows would depend on each other; keep within "
                f"{original} tokens"
            )


_probed: WeakKeyDictionary[PreTrainedModel, dict[tuple, float]] = WeakKeyDictionary()


def _probe_once(model: PreTrainedModel, network_type: NetworkType, layout: Layout) -> None:
    key = probe_key(model, network_type, layout)
    known = _probed.setdefault(model, {})
    if key in known:
        return
    tolerance = probe_tolerance(model)
    for attempt in range(PROBE_ATTEMPTS):
        try:
            difference = probe(model, network_type, attempt, layout)
        except PROBE_ERRORS as error:
            if isinstance(error, UnsupportedModelError):
                raise
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot run over a {layout.name} cache ({type(error).__name__}: "
                f"{str(error)[:200]}); {_remedy(model, network_type, layout)}"
            ) from error
        if difference <= tolerance:
            known[key] = difference
            return
    raise UnsupportedModelError(
        f"{type(model).__name__} gives other logits over a {layout.name} cache than without a cache (relative "
        f"difference {difference:.1e}, limit {tolerance:.0e} in {model.dtype}); {_remedy(model, network_type, layout)}"
    )


def probe_key(model: PreTrainedModel, *what: object) -> tuple:
    """What the outcome of a probe depends on, weights apart."""
    *others, layout = what
    assert isinstance(layout, Layout)
    return (
        *others,
        layout.one_length,
        model.dtype,
        autocast_dtype(model),
        model.device,
        model.config._attn_implementation,
        model.config.to_json_string(use_diff=False),
    )


def _remedy(model: PreTrainedModel, network_type: NetworkType, refused: Layout) -> str:
    """What to do with a model that one layout cannot serve."""
    if not refused.one_length:
        try:
            _probe_once(model, network_type, Repad())
        except UnsupportedModelError:
            pass
        else:
            return "pass layout='repad', which serves it"
    return "use transformers' own generate for it"


def autocast_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """What `torch.autocast` makes the model compute in, None where it is not active."""
    kind = model.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def probe_tolerance(model: PreTrainedModel) -> float:
    """The largest difference that rounding explains in the model's dtype, or in autocast's."""
    if (dtype := autocast_dtype(model)) is not None:
        return PROBE_TOLERANCE.get(dtype, PROBE_TOLERANCE[torch.bfloat16])
    if model.dtype == torch.float32 and model.device.type == "cuda":
        return TF32_TOLERANCE if torch.get_float32_matmul_precision() != "highest" else PROBE_TOLERANCE[model.dtype]
    return PROBE_TOLERANCE.get(model.dtype, PROBE_TOLERANCE[torch.bfloat16])


@torch.no_grad()
def probe(model: PreTrainedModel, network_type: NetworkType, seed: int = 0, layout: Layout | None = None) -> float:
    """How far ragged logits are from uncached ones, at the worst position; see `relative_difference`.

    Two rows of made-up tokens are prefilled, verified with drafts that turn wrong in a different column of each row,
    rewound and verified again. Raises UnsupportedModelError if nothing was cached.
    """
    width, num_true = 4, [1, 3]  # the tokens of a step, and how many of them each row keeps after the first
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 64
    longest = max(1, min(9, positions - width - num_true[0]))
    prompt_lengths = [longest, max(1, longest - 3)]
    sequences = [
        probe_tokens(model, length + kept + width, seed + row)
        for row, (length, kept) in enumerate(zip(prompt_lengths, num_true, strict=True))
    ]
    with evaluating(model):
        expected = [
            model(input_ids=ids[None].to(model.device), use_cache=False, return_dict=True).logits[0]
            for ids in sequences
        ]
    rows = Rows([ids[:n] for ids, n in zip(sequences, prompt_lengths, strict=True)], 2 * width, 0, model.device)
    network = network_type(model, len(rows), rows.capacity, layout=layout)
    differences = []

    def compare(row: int, logits: torch.Tensor, begin: int) -> None:
        differences.append(relative_difference(logits, expected[row][begin : begin + len(logits)]))

    with network.running():
        first = network.prefill(rows)
        for row, length in enumerate(prompt_lengths):
            compare(row, first[row : row + 1], length - 1)
        starts = list(prompt_lengths)
        for kept in (num_true, [width, width]):
            batch = torch.stack([ids[s : s + width] for ids, s in zip(sequences, starts, strict=True)])
            for row, n in enumerate(kept):
                batch[row, n:] = sequences[1 - row][0]  # a wrong draft: only the first n are the row's own
            used_slots = max(starts) + width
            logits = network.forward(
                batch.to(model.device), torch.tensor(starts, device=model.device), used_slots
            ).logits
            for row, n in enumerate(kept):
                compare(row, logits[row, :n], starts[row])
                starts[row] += n
    if not any(layer.is_initialized for layer in network.cache.layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps no keys and values in its cache; use transformers' own generate for it"
        )
    return torch.tensor(differences).max().item()  # NaN if any is


def probe_tokens(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """[length] int64, small ids in no order: special ids of multimodal checkpoints are large ones."""
    vocab_size = min(model.get_input_embeddings().weight.shape[0], 89)
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def relative_difference(logits: Tensor, expected: Tensor) -> float:
    """The root mean square of logits - expected over the spread of `expected`, at the worst position.

    [positions, vocab] each. Only the upper half of the vocabulary counts: models mask tokens with large negative
    logits, next to which any difference is small. Positions where the model itself gives NaN do not count; they are
    reported when they occur.
    """
    sound = ~expected.isnan().any(-1)
    logits, expected = logits[sound].float(), expected[sound].float()
    if not len(expected):
        return 0.0
    median = expected.median(-1, keepdim=True).values
    logits, expected = logits.clamp(min=median), expected.clamp(min=median)
    spread = (expected - median).square().mean(-1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    worst = ((logits - expected).square().mean(-1).sqrt() / spread).max()
    return worst.item()
