"""The probe: does a network over a cache of this layout give the model's own logits?

It compares the network with the model's uncached forward on a few made-up tokens: prefill, verification of wrong
drafts, a different rewind in each row, verification again. A model whose logits differ is refused, so none is served
wrongly.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.layout import Layout, Ragged, Repad
from specdec.batch.rows import Rows
from specdec.errors import UnsupportedModelError
from specdec.kept import kept_with
from specdec.kernels.dispatch import KERNEL_ERRORS
from specdec.network.attachments import check_tokens_apart, dequantised, is_4_bit
from specdec.network.base import evaluating, num_embeddings_of
from specdec.network.captured.graphs import syncs_refused
from specdec.network.fused import FusedNetwork
from specdec.network.invariant.experts import has_experts
from specdec.network.invariant.network import InvariantNetwork
from specdec.network.invariant.swap import batch_invariant, unproven_widths
from specdec.network.refusals import OWN_GENERATE
from specdec.network.stock import StockNetwork, SwappedNetwork

# Differences that rounding can explain, relative to the spread of the logits. Trained models in bfloat16 show 0.01 to
# 0.02, routers that flip 0.15, wrong masks or positions 0.35 and more. A float64 model gets more than float64 would
# need, because the rotary tables and norms of transformers are float32 whatever the model is.
PROBE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
TF32_TOLERANCE = 0.02  # of float32 models on a GPU, where products may round to TF32
PROBE_ATTEMPTS = 3  # with other tokens each: a router's near-tie that rounds either way is not an error of the cache
# What models raise over a cache or a mask that they were not made for, and kernels on a GPU that cannot run them.
PROBE_ERRORS: tuple[type[Exception], ...] = (
    AttributeError, AssertionError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError,
    *KERNEL_ERRORS,
)  # fmt: skip

NetworkType = type[FusedNetwork] | type[InvariantNetwork] | type[StockNetwork]


def probe_once(model: PreTrainedModel, network_type: NetworkType, layout: Layout) -> None:
    """Raise UnsupportedModelError unless such a network gives the model's logits. The same question is asked once."""
    key = ("probe", *probe_key(model, network_type, layout))
    kept_with(model, key, lambda: _sound_difference(model, network_type, layout))


def _sound_difference(model: PreTrainedModel, network_type: NetworkType, layout: Layout) -> float:
    """The first difference within the tolerance; raises UnsupportedModelError if all attempts exceed it."""
    check_tokens_apart(model)
    tolerance = probe_tolerance(model)
    for attempt in range(PROBE_ATTEMPTS):
        try:
            with dequantised(model):
                difference = probe(model, network_type, attempt, layout)
        except PROBE_ERRORS as error:
            if isinstance(error, UnsupportedModelError):
                raise
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot run over a {layout.name} cache ({type(error).__name__}: "
                f"{str(error)[:200]}); {_remedy(model, network_type, layout)}"
            ) from error

        if difference <= tolerance:
            return difference

    raise UnsupportedModelError(
        f"{type(model).__name__} gives other logits over a {layout.name} cache than without a cache (relative "
        f"difference {difference:.1e}, limit {tolerance:.0e} in {model.dtype}); {_remedy(model, network_type, layout)}"
    )


def probe_key(model: PreTrainedModel, *what: object) -> tuple:
    """All that the outcome of a probe depends on, apart from the weights."""
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
            probe_once(model, network_type, Repad())
        except UnsupportedModelError:
            pass
        else:
            return "pass layout='repad', which serves it"
    return OWN_GENERATE


def autocast_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The dtype that `torch.autocast` makes the model compute in; None where it is not active."""
    kind = model.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def probe_tolerance(model: PreTrainedModel) -> float:
    """The largest difference that rounding explains in the model's dtype, in autocast's, or in that of its products."""
    if any(map(is_4_bit, model.modules())):
        return PROBE_TOLERANCE[torch.bfloat16]
    if (dtype := autocast_dtype(model)) is not None:
        return PROBE_TOLERANCE.get(dtype, PROBE_TOLERANCE[torch.bfloat16])
    if model.dtype == torch.float32 and model.device.type == "cuda":
        return TF32_TOLERANCE if torch.get_float32_matmul_precision() != "highest" else PROBE_TOLERANCE[model.dtype]
    return PROBE_TOLERANCE.get(model.dtype, PROBE_TOLERANCE[torch.bfloat16])


@torch.no_grad()
def probe(
    model: PreTrainedModel,
    network_type: NetworkType,
    seed: int = 0,
    layout: Layout | None = None,
    captured: bool = False,
) -> float:
    """The distance of the network's logits from uncached ones, at the worst position; see `relative_difference`.

    Two rows of made-up tokens are prefilled, verified with drafts that turn wrong in a different column of each row,
    rewound and verified again. captured: by captured steps, where the network has them.

    Raises UnsupportedModelError if nothing was cached.
    """
    width, num_true = 4, [1, 3]  # tokens of a step, and how many of the first step's tokens each row keeps
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 64
    # Two rows of 8 tokens at most, so that few kernels are compiled: those that decode steps need anyway.
    longest = max(1, min(8, positions - width - num_true[0]))
    prompt_lengths = [longest, max(1, longest - 3)]
    sequences = [
        probe_tokens(model, length + kept + width, seed + row)
        for row, (length, kept) in enumerate(zip(prompt_lengths, num_true, strict=True))
    ]

    with evaluating(model), _reference_modules(model, network_type):
        expected = [
            model(input_ids=ids[None].to(model.device), use_cache=False, return_dict=True).logits[0]
            for ids in sequences
        ]

    rows = Rows([ids[:n] for ids, n in zip(sequences, prompt_lengths, strict=True)], 2 * width, 0, model.device)
    network = network_type(model, len(rows), rows.capacity, layout=layout)
    if not captured:
        network.captures = False
    differences = []

    def compare(row: int, logits: torch.Tensor, begin: int) -> None:
        differences.append(relative_difference(logits, expected[row][begin : begin + len(logits)]))

    with network.running():
        network.compile_ahead(len(rows), longest, (width,))
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
        raise UnsupportedModelError(f"{type(model).__name__} keeps no keys and values in its cache; {OWN_GENERATE}")
    return torch.tensor(differences).max().item()  # NaN if any is


def _reference_modules(model: PreTrainedModel, network_type: NetworkType) -> AbstractContextManager[Any]:
    """What a network is compared with: the model's modules, and of a mixture's exact networks those with the kernels in
    them. Their own check compares these with the stock ones in a way that experts chosen otherwise do not disturb."""
    is_exact = issubclass(network_type, (InvariantNetwork, SwappedNetwork))
    return batch_invariant(model) if is_exact and has_experts(model) else nullcontext()


def capture_problem(model: PreTrainedModel, network_type: NetworkType) -> str:
    """Why such a network's captured steps cannot serve the model, in words; empty if they can."""
    try:
        with syncs_refused():
            difference = probe(model, network_type, captured=True)
    except PROBE_ERRORS as error:  # an UnsupportedModelError is a ValueError
        return f"{type(error).__name__}: {str(error)[:200]}"
    if not difference <= (tolerance := probe_tolerance(model)):
        return f"they give other logits (relative difference {difference:.1e}, limit {tolerance:.0e})"
    return ""


def check_bits_once(model: PreTrainedModel) -> None:
    """`check_bits`, the first time."""
    kept_with(model, ("bits", *probe_key(model, Ragged())), lambda: check_bits(model))


def check_bits(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError unless the short forward gives a token the same bits in steps of every kind.

    Two rows are prefilled, decoded token by token alone, and verified together from different places. On GPUs on which
    nobody has compared the tiles of longer prompts, a row is also the beginning of such prompts.
    """
    width, lengths = 2, (3, 2)
    rows = [probe_tokens(model, length + width, seed).to(model.device) for seed, length in enumerate(lengths)]

    def network_of(num_rows: int) -> InvariantNetwork:
        network = InvariantNetwork(model, num_rows, 64)
        network.captures = False
        return network

    alone = []
    for ids in rows:
        with (network := network_of(1)).running():
            steps = [
                network.forward(ids[None, i : i + 1], torch.tensor([i], device=model.device), i + 1).logits[0]
                for i in range(len(ids))
            ]
        alone.append(torch.cat(steps))

    prompts = Rows([ids[:n].cpu() for ids, n in zip(rows, lengths, strict=True)], 2 * width, 0, model.device)
    with (network := network_of(2)).running():
        first = network.prefill(prompts)
        tokens = torch.stack([ids[n:] for ids, n in zip(rows, lengths, strict=True)])
        starts = torch.tensor(lengths, device=model.device)
        verified = network.forward(tokens, starts, max(lengths) + width).logits
    pairs = [
        (torch.cat([first[row : row + 1], verified[row]]), alone[row][length - 1 :])
        for row, length in enumerate(lengths)
    ]
    for columns in unproven_widths(model):
        ids = torch.cat([rows[0], probe_tokens(model, columns - len(rows[0]), columns).to(model.device)])[None]
        network = InvariantNetwork(model, 1, columns)
        network.captures = False
        with network.running():
            pairs.append((network.kept.text(ids, starts[:1] * 0, columns, ()).logits[0, : len(rows[0])], alone[0]))

    for together, single in pairs:
        if not torch.equal(together, single):
            raise UnsupportedModelError(
                f"{type(model).__name__} on {model.device}: {int((together != single).sum())} of {single.numel()} "
                "logits of prefill and verification differ in their bits from those of single tokens"
            )


def probe_tokens(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """[length] int64: small ids in random order, because the special ids of multimodal checkpoints are large."""
    vocab_size = min(num_embeddings_of(model), 89)
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
