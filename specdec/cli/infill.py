"""`specdec infill`: fill in masked places of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli.common import (
    Count,
    DeviceOption,
    DraftTokens,
    DtypeOption,
    Folder,
    check_temperature,
    quiet_transformers,
)


def infill(
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="TEXT", help='Text with masks: "def f(<mask:12>):" has one of 12 tokens.'),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Or a file with such text.")] = None,
    lines: Annotated[
        list[str] | None,
        typer.Option(metavar="A-B", help="Lines of --file to rewrite, in the same number of tokens (may be repeated)."),
    ] = None,
    model: Annotated[
        str | None, Folder(help="An XLNet checkpoint with its tokenizer; by default the small one for Python.")
    ] = None,
    drafter: Annotated[
        str, typer.Option(metavar="NAME", help="self, ahead, ngram, or none for one token per call.")
    ] = "self",
    num_speculative_tokens: Annotated[int, DraftTokens(help="Tokens drafted per step, 1 to 32.")] = 5,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Sample instead of filling greedily.")] = False,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="Sampling temperature, by default 1.")] = None,
    top_k: Annotated[int | None, Count(help="Sample among the N most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Sample among the most likely tokens of this total probability.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Sampling seed; by default a new one each time.")
    ] = None,
    mask_token_id: Annotated[
        int | None, Count(help="The mask token, if neither tokenizer nor config names one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, calls and tokens as a line of JSON.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Fill in masked places of a text.

    Exactly as the model would at one token per call, in fewer calls.

    Reads as much text around the masks as the model has positions for.
    """
    import specdec
    from specdec.errors import ConfigError, DrafterError, InputError
    from specdec.files.loading import find_checkpoint, load_model, load_tokenizer, resolve_device
    from specdec.infill.checks import DRAFTERS
    from specdec.infill.masked_text import mask_lines, parse_masks
    from specdec.network.any_subset.model import XLNet

    if (text is None) == (file is None):
        raise InputError("pass either --text TEXT or --file FILE")
    if lines and file is None:
        raise InputError("--lines names lines of a file; pass --file with it")
    if drafter not in (*DRAFTERS, "none"):
        raise DrafterError(f"--drafter {drafter} cannot draft for infilling; choose {', '.join(DRAFTERS)} or none")
    check_temperature(temperature, "leave --do-sample and --temperature out")
    of_samples = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
    for name, value in of_samples.items():
        if value is not None and not do_sample:
            raise ConfigError(f"{name} {value} applies only to sampling; add --do-sample")
    place = resolve_device(device)
    folder = find_checkpoint(str(model or shipped_model()), "model")
    quiet_transformers()
    tokenizer = load_tokenizer(folder, "model")
    source = read_text(file) if file is not None else str(text)
    masked = mask_lines(source, lines, tokenizer) if lines else parse_masks(source, tokenizer)
    network = load_model(folder, "model", place, dtype)
    network.to(network.get_input_embeddings().weight.dtype)  # transformers leaves some of XLNet's tensors in float32
    mask_token = next(
        (
            token
            for token in (mask_token_id, tokenizer.mask_token_id, XLNet(network).mask_token_id)
            if token is not None
        ),
        None,
    )
    if mask_token is None:
        raise ConfigError(f"the tokenizer in {str(folder)!r} has no mask token; pass --mask-token-id N")
    window, first = masked.around(XLNet(network).max_positions or len(masked.mask))
    out: Any = specdec.infill(
        network,
        window.token_ids[None],
        window.mask[None],
        drafter=None if drafter == "none" else drafter,
        num_speculative_tokens=num_speculative_tokens,
        do_sample=do_sample,
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        mask_token_id=mask_token,
        return_dict_in_generate=True,
    )
    token_ids = masked.token_ids.clone()
    token_ids[first : first + len(window.mask)] = out.sequences[0].cpu()
    filled = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not as_json:
        typer.echo(filled)
        return
    speculation = out.speculation
    calls = speculation.num_target_calls + speculation.num_draft_calls
    record = {"text": filled, "num_tokens": speculation.num_new_tokens, "num_calls": calls}
    typer.echo(json.dumps({**record, "speculation": speculation.to_dict()}))


def shipped_model() -> Path:
    """The small model for Python source that comes with specdec."""
    from specdec.errors import InputError

    folder = Path(__file__).parent.parent / "assets" / "infill_model"
    if not folder.is_dir():
        raise InputError("this installation has no infilling model; pass --model FOLDER")
    return folder


def read_text(path: Path) -> str:
    from specdec.errors import InputError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"file {str(path)!r} cannot be read as text: {error}") from None
