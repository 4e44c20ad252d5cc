"""Refusals by name: models that are known not to work, and lengths that a model has no positions for.

Names and flags give precise messages before anything runs. What they let through, the probe still checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from specdec.batch.layout import Layout
from specdec.errors import ConfigError, SpecDecError, UnsupportedModelError
from specdec.limits import MAX_STEP_WIDTH

SERVED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
RECURRENT_LAYERS = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "ssm", "rwkv", "hybrid")
# These build their attention masks for one length, which all rows of a batch share.
ONE_LENGTH_PER_BATCH = ("gpt_neo",)
# These attend to later tokens unless their config says that they are decoders.
BIDIRECTIONAL = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


PRUNING = "transformers.generation.candidate_generator"  # where the parts of a pruned draft model are defined
OWN_GENERATE = "use transformers' own generate for it"
OTHER_DRAFTER = "pass another draft model, or drafter='prompt_lookup'"


@contextmanager
def of_a_draft_model() -> Iterator[None]:
    """Refusals in it are of the draft model, and say what to draft with instead."""
    try:
        yield
    except UnsupportedModelError as error:
        said = str(error).replace(OWN_GENERATE, OTHER_DRAFTER)
        raise UnsupportedModelError(f"as a draft model: {said}") from error


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
    """Raise UnsupportedModelError for an encoder-decoder model, whatever else it is."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model; specdec serves decoder-only causal LMs"
        )


def check_architecture(model: PreTrainedModel, layout: Layout | None = None) -> None:
    """Raise UnsupportedModelError for what is known not to work: by class, config, layer types and layout."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    kind = getattr(config, "model_type", name)

    refuse_encoder_decoder(model)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if type(part).__module__ == PRUNING:
            raise UnsupportedModelError(
                f"{name} has a {type(part).__name__}: transformers pruned it when it drafted for a target with another "
                "tokenizer, and leaves it so; reload it"
            )
    if model.device.type == "meta":
        raise UnsupportedModelError(
            f"the weights of {name} are not in memory: they are offloaded (accelerate's cpu_offload, disk_offload or "
            f"device_map) or were never loaded; load them onto one device, or {OWN_GENERATE}"
        )
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
            f"{name} keeps recurrent state{f' (layer type {recurrent[0]!r})' if recurrent else ''}, which specdec does "
            f"not rewind to the accepted tokens yet; {OWN_GENERATE}"
        )

    other = [layer_type for layer_type in layer_types if layer_type not in SERVED_LAYERS]
    if other:
        # Indexers and compressors matter beyond some length only, so a probe would not notice them.
        raise UnsupportedModelError(
            f"{name} caches more than keys and values (layer type {other[0]!r}); {OWN_GENERATE}"
        )

    if kind == "moshi":
        raise UnsupportedModelError(
            f"{name} slides a window over its cache but not over its masks, so its text depends on how it is cached; "
            f"{OWN_GENERATE}"
        )
    if kind == "doge" and "create_masks_for_generate" not in vars(type(model)):
        raise UnsupportedModelError(
            f"{name} attends to later tokens in this version of transformers, whose cached decoding then differs from "
            "its own forward; upgrade transformers"
        )
    if kind in ONE_LENGTH_PER_BATCH and not (layout and layout.one_length):
        raise UnsupportedModelError(f"{name} builds its masks for one length per batch; pass layout='repad' for it")


class LengthLimit(NamedTuple):
    """The longest text that a model is served with, prompt included. cause: what stands against longer ones."""

    tokens: int
    cause: str
    error: type[SpecDecError] = UnsupportedModelError


def check_lengths(model: PreTrainedModel, max_length: int) -> None:
    """Refuse lengths that the target has no positions for, or at which rows of a batch would depend on each other.

    max_length: prompt and new tokens of the longest row.
    """
    for limit in length_limits(model):
        if max_length > limit.tokens:
            raise limit.error(f"prompt and new tokens make {max_length} tokens, {limit.cause}")


def max_text_length(model: PreTrainedModel) -> int | None:
    """The longest text that `model` is served with; None if nothing limits it."""
    return min((limit.tokens for limit in length_limits(model)), default=None)


def length_limits(model: PreTrainedModel) -> list[LengthLimit]:
    config, name = model.config.get_text_config(decoder=True), type(model).__name__
    limits = []
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        cause = f"but the target {name} has {positions} positions; shorten the prompt or lower max_new_tokens"
        limits.append(LengthLimit(positions, cause, ConfigError))
    return [*limits, *_temperature_limit(config), *_rotation_limits(config)]


def _temperature_limit(config: PreTrainedConfig) -> list[LengthLimit]:
    """Llama 4 scales attention in its layers without rotation by one position per column, not per row."""
    floor_scale = getattr(config, "floor_scale", None)
    tuned = getattr(config, "attn_temperature_tuning", False) and not all(getattr(config, "no_rope_layers", None) or [])
    if not tuned or floor_scale is None:
        return []
    most = floor_scale - MAX_STEP_WIDTH - 1
    cause = (
        f"and the target's attention temperature follows the longest row from floor_scale={floor_scale} on; keep "
        f"within {most} tokens"
    )
    return [LengthLimit(most, cause)]


def _rotation_limits(config: PreTrainedConfig) -> list[LengthLimit]:
    """Some rotations change for the whole batch as soon as one row is longer than the model was trained for."""
    rope = getattr(config, "rope_parameters", None) or {}
    rotations = [rope] if "rope_type" in rope else rope.values()  # one for all layers, or one per layer type
    limits = []
    for rotation in rotations:
        if not isinstance(rotation, dict) or rotation.get("rope_type") not in ("dynamic", "longrope"):
            continue

        original = (
            rotation.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            or getattr(config, "max_position_embeddings", None)
        )
        if original is not None:
            cause = (
                f"and the target's {rotation['rope_type']!r} rotation changes for a whole batch beyond {original}, so "
                f"rows would depend on each other; keep within {original} tokens"
            )
            limits.append(LengthLimit(original, cause))
    return limits
