"""What a model gets here, before anything is generated: layouts, exactness, drafters, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.batch.layout import LAYOUTS, Layout, Ragged
from specdec.drafter import Drafter
from specdec.errors import SpecDecError, UnsupportedModelError
from specdec.files.environment import machine, versions
from specdec.network.base import vocab_size_of
from specdec.network.choose import build_network, service_of
from specdec.network.free_memory import free_bytes
from specdec.network.invariant.swap import batch_invariant, invariant_forward
from specdec.network.kept_forwards import kept_bytes
from specdec.network.memory import PROBE_SLOTS, Footprint, footprint
from specdec.network.refusals import check_architecture, check_lengths
from specdec.options.speculation import check_drafter

# What each network is, by its class.
NETWORKS = {
    "FusedNetwork": "fused",
    "NativeNetwork": "native",
    "InvariantNetwork": "invariant",
    "SwappedNetwork": "swapped",
    "CapturedSwapped": "swapped, captured",
    "StockNetwork": "stock",
    "CapturedStock": "stock, captured",
}
EXACT_NOTE = "exact: greedy output is plain greedy decoding's, token for token, at any batch and with any drafter"
HALF_NOTE = (
    "half precision: batches and drafts round otherwise than single tokens, so greedy tokens may differ; only "
    "batch-invariant kernels are exact"
)
MAX_NAMED = 5  # modules that are named one by one


@dataclass(frozen=True)
class Served:
    """network: one of `NETWORKS`; None where the layout does not serve the model. is_exact: whether its bits depend on
    no batch. reason: why it is served so, or not."""

    network: str | None
    reason: str = ""
    is_exact: bool = False


@dataclass(frozen=True)
class Exactness:
    """Of the model's dtype as it is, and under `batch_invariant`.

    note: what equality rests on without it. modules: swapped in, kind and number. obstacles: modules without a kernel,
    the first few. invariant: whether `batch_invariant` accepts the model, proven by its own check; reason: if not, why.
    network: what serves the invariant model.
    """

    note: str
    modules: dict[str, int]
    obstacles: list[str]
    invariant: bool
    reason: str = ""
    network: str | None = None


@dataclass(frozen=True)
class DrafterFit:
    """Whether a drafter serves the model, or what it needs or lacks."""

    fits: bool
    reason: str = ""


@dataclass(frozen=True)
class Lacking:
    """Stands in for a drafter that cannot be built here. reason: what it needs or lacks."""

    reason: str


@dataclass(frozen=True)
class Memory:
    """Bytes that a generation takes.

    target, draft: see `Footprint`. total: with `batch_size` rows of `length` tokens and a step's logits, without
    activations. still_needed: the total without the weights, which are loaded already. available: free bytes of the
    device. max_rows: how many rows of that length fit. kept: bytes that earlier generations left allocated, which
    `specdec.release()` gives back.
    """

    target: Footprint
    draft: Footprint | None
    batch_size: int
    length: int
    total: int
    still_needed: int
    available: int
    max_rows: int
    kept: int

    @property
    def fits(self) -> bool:
        return self.still_needed <= self.available


@dataclass(frozen=True)
class Diagnosis:
    """layouts, drafters: by name. problems: why the answer is no; empty if all that was asked for is served."""

    model: dict[str, Any]
    layouts: dict[str, Served]
    exactness: Exactness
    drafters: dict[str, DrafterFit]
    memory: Memory | None
    versions: dict[str, str]
    machine: dict[str, Any]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"served": not self.problems, **asdict(self)}


def diagnose(
    model: PreTrainedModel,
    drafters: Mapping[str, Drafter | Lacking],
    draft: PreTrainedModel | None,
    draft_name: str | None,
    batch_size: int,
    length: int,
    num_speculative_tokens: int,
) -> Diagnosis:
    """Find out what the model gets, without generating.

    drafters: by name, those to check and those that cannot be built. draft: the draft model, for its memory.
    draft_name: the drafter that drafts with it. length: tokens of a row, prompt and new ones.
    """
    layouts = {name: served(model, layout()) for name, layout in LAYOUTS.items()}
    usable = [name for name, found in layouts.items() if found.network is not None]
    layout = LAYOUTS[usable[0]]() if usable else None
    problems = [] if usable else [f"no layout serves the target: {next(iter(layouts.values())).reason}"]
    try:
        check_lengths(model, length)
    except SpecDecError as error:
        problems.append(str(error))
    fits = {name: fit(drafter, model, length, layout) for name, drafter in drafters.items()}
    if draft_name is not None and not fits[draft_name].fits:
        problems.append(f"the draft does not fit: {fits[draft_name].reason}")
        draft = None
    memory = None
    if layout is not None:
        memory = memory_for(model, draft, layout, batch_size, length, num_speculative_tokens)
        if not memory.fits:
            problems.append(
                f"{batch_size} rows of {length} tokens need {memory.still_needed / 2**20:.0f} MiB besides the weights, "
                f"{memory.available / 2**20:.0f} are free: {memory.max_rows} rows fit"
            )
    return Diagnosis(
        describe(model), layouts, exactness(model), fits, memory, versions(), machine(model.device), problems
    )


def describe(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    return {
        "class": type(model).__name__,
        "model_type": config.model_type,
        "num_parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "vocab_size": vocab_size_of(model),
        "max_length": getattr(config, "max_position_embeddings", None),
        "attention": model.config._attn_implementation,
    }


def served(model: PreTrainedModel, layout: Layout) -> Served:
    """Find out by building the network, which probes the model over this layout's cache."""
    try:
        check_architecture(model, layout)
        service = service_of(model, layout)
    except UnsupportedModelError as error:
        return Served(None, str(error))
    return Served(NETWORKS[service.network_type.__name__], service.reason, service.is_exact)


def exactness(model: PreTrainedModel) -> Exactness:
    modules, obstacles = swappable(model)
    half = model.dtype in (torch.bfloat16, torch.float16)
    with suppress(UnsupportedModelError):
        if service_of(model).is_exact:
            return Exactness(EXACT_NOTE, modules, [], True, "", NETWORKS[service_of(model).network_type.__name__])
    note = HALF_NOTE if half else "equal to plain greedy up to ties within rounding, which `specdec check` judges"
    num_threads = torch.get_num_threads()
    try:
        if model.device.type == "cpu":
            torch.set_num_threads(1)  # the kernels' references are exact in one thread only
        with batch_invariant(model):
            network = build_network(model, 1, PROBE_SLOTS)
    except SpecDecError as error:
        return Exactness(note, modules, obstacles[:MAX_NAMED], False, str(error))
    finally:
        torch.set_num_threads(num_threads)
    reason = "" if model.device.type == "cuda" else "on a CPU by slow references in one thread, for tests"
    return Exactness(note, modules, obstacles, True, reason, NETWORKS[type(network).__name__])


def swappable(model: PreTrainedModel) -> tuple[dict[str, int], list[str]]:
    """Modules that `batch_invariant` has kernels for, kind -> number; and why others have none."""
    found: Counter[str] = Counter()
    obstacles = []
    for name, module in model.named_modules():
        try:
            if invariant_forward(name, module) is not None:
                found[type(module).__name__] += 1
        except UnsupportedModelError as error:
            obstacles.append(str(error))
    return dict(found), obstacles


def fit(drafter: Drafter | Lacking, model: PreTrainedModel, length: int, layout: Layout | None) -> DrafterFit:
    """Whether the drafter can draft for the model over caches of this layout."""
    if isinstance(drafter, Lacking):
        return DrafterFit(False, drafter.reason)

    try:
        check_drafter(drafter, model, layout or Ragged(), length)
    except SpecDecError as error:
        return DrafterFit(False, str(error))
    return DrafterFit(True)


def memory_for(
    model: PreTrainedModel,
    draft: PreTrainedModel | None,
    layout: Layout,
    batch_size: int,
    length: int,
    num_speculative_tokens: int,
) -> Memory:
    width = num_speculative_tokens + 1
    slots = length + width  # a step may write a draft after the longest row's last token
    target = footprint(model, layout)
    parts = [(target, width)]
    drafted = None
    if draft is not None and getattr(draft.config, "model_type", None) != "xlnet":
        drafted = footprint(draft, layout)
        parts.append((drafted, 1))
    total = sum(part.total(batch_size, slots, step) for part, step in parts)
    taken = sum(part.total(0, slots, step) for part, step in parts)
    per_row = sum(part.total(1, slots, step) for part, step in parts) - taken
    available = free_bytes(model.device)
    return Memory(
        target, drafted, batch_size, length, total, total - taken, available, available // max(per_row, 1), kept_bytes()
    )
