"""`specdec doctor`: what a model supports, before anything is generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec.cli.common import Count, DeviceOption, DraftOption, DraftTokensOption, DtypeOption, print_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.check.doctor import Diagnosis, Lacking
    from specdec.drafter import Drafter
    from specdec.network.memory import Footprint

MIB = 2**20
DEFAULT_LENGTH = 1024


def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The target's checkpoint.")],
    draft: DraftOption = None,
    batch_size: Annotated[int, Count(help="Rows decoded together, for the memory.")] = 8,
    length: Annotated[
        int | None, Count(help="Tokens per row, prompt and new ones; by default 1024, or the model's limit if lower.")
    ] = None,
    num_speculative_tokens: DraftTokensOption = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Say how a model is served.

    Layouts, exactness, drafters that fit, memory.

    Loads and probes the model, generates nothing.

    Exit status: 0 if the model, the draft and the memory suffice, 2 if one of them does not.
    """
    from specdec.check.doctor import diagnose
    from specdec.cli.common import by_kind, quiet_transformers, say_dequantised
    from specdec.files.loading import find_checkpoint, load_model, load_tokenizer, resolve_device
    from specdec.network.refusals import check_model

    place = resolve_device(device)
    folder = find_checkpoint(model, "target")
    draft, look_ahead = by_kind(draft, None)
    draft_folder = None if draft is None else find_checkpoint(draft, "draft")
    quiet_transformers()
    target = load_model(folder, "target", place, dtype)
    check_model(target)
    say_dequantised(folder, target)
    tokenizer = load_tokenizer(folder, "target")
    draft_model = None if draft_folder is None else load_model(draft_folder, "draft", place, dtype)
    if length is None:
        positions = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
        length = min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH)
    drafters, own = candidates(draft_model, tokenizer, draft_folder if look_ahead is None else Path(look_ahead))
    found = diagnose(target, drafters, draft_model, own, batch_size, length, num_speculative_tokens)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        print_diagnosis(found)
    if found.problems:
        raise typer.Exit(2)


def candidates(
    draft: PreTrainedModel | None, tokenizer: object, folder: Path | None
) -> tuple[dict[str, Drafter | Lacking], str | None]:
    """Every registered drafter, or what it lacks; and the name of the drafter in `folder`.

    draft: the model in the folder; None where it holds no model, but look-ahead embeddings.
    """
    from specdec.check.doctor import Lacking
    from specdec.drafters.registry import DRAFTERS, drafter_class, resolve
    from specdec.errors import DrafterError
    from specdec.files.loading import check_same_tokenizer

    given: Drafter | None = None
    if draft is not None or folder is not None:
        given = resolve(str(folder) if draft is None else draft)
    found: dict[str, Drafter | Lacking] = {}
    for name, entry in DRAFTERS.items():
        if entry.is_complete:
            try:
                found[name] = resolve(name)
            except DrafterError as error:  # a library is missing
                found[name] = Lacking(str(error))
        elif given is not None and isinstance(given, drafter_class(name)):
            found[name] = given
        else:
            found[name] = Lacking(f"not available by name: pass {entry.path}(...)")
    if given is None:
        found["draft_model"] = Lacking("needs a draft model: pass --draft FOLDER")
    elif folder is not None:
        try:
            check_same_tokenizer(tokenizer, folder)  # type: ignore[arg-type]
        except DrafterError as error:
            found[given.name] = Lacking(str(error))
    return found, None if given is None else given.name


def print_diagnosis(found: Diagnosis) -> None:
    model, exactness = found.model, found.exactness
    typer.echo(
        f"{model['class']} ({model['model_type']}), {model['num_parameters'] / 1e6:.1f}M parameters, {model['dtype']} "
        f"on {model['device']}, vocabulary {model['vocab_size']}, up to {model['max_length'] or 'any number of'} tokens"
    )

    typer.echo("\nLayouts")
    layouts = [
        [name, served.network or "not served", "yes" if served.is_exact else "no", served.reason]
        for name, served in found.layouts.items()
    ]
    print_table(["layout", "network", "exact", ""], layouts)

    typer.echo("\nExactness")
    typer.echo(exactness.note)
    kinds = ", ".join(f"{count} {kind}" for kind, count in exactness.modules.items())
    if exactness.invariant:
        typer.echo(f"batch_invariant: yes, {exactness.network} network ({kinds} and the attention have kernels)")
    else:
        typer.echo(f"batch_invariant: no ({kinds} have kernels)")
    for line in dict.fromkeys([exactness.reason, *exactness.obstacles]):
        if line:
            typer.echo(f"  {line}")

    typer.echo("\nDrafters")
    print_table(["drafter", "fits", ""], [[n, "yes" if f.fits else "no", f.reason] for n, f in found.drafters.items()])
    if found.memory is not None:
        print_memory(found)

    typer.echo("\n" + ", ".join(f"{name} {version}" for name, version in found.versions.items()))
    for problem in found.problems:
        typer.echo(f"NOT SERVED: {problem}")


def print_memory(found: Diagnosis) -> None:
    memory = found.memory
    assert memory is not None
    typer.echo("\nMemory")

    def row(name: str, part: Footprint) -> list[str]:
        cache = part.kv_per_token * memory.length * memory.batch_size
        cells = [part.weights / MIB, part.packed / MIB, part.kv_per_token / 1024, cache / MIB]
        return [name, *(f"{value:.1f}" for value in cells)]

    rows = [row(name, part) for name, part in (("target", memory.target), ("draft", memory.draft)) if part is not None]
    print_table(["model", "weights MiB", "packed MiB", "cache KiB per token", "cache MiB"], rows)
    typer.echo(
        f"{memory.batch_size} rows of {memory.length} tokens: {memory.total / MIB:.0f} MiB with weights and a step's "
        f"logits, without activations; {memory.still_needed / MIB:.0f} MiB of it besides the weights, where "
        f"{memory.available / MIB:.0f} are free; {memory.max_rows} rows fit; {memory.kept / MIB:.0f} MiB are kept for "
        "later calls"
    )
