"""What the one-line call gets: its speed, its first token, and which families it serves exactly.

    PYTHONPATH=. python benchmarks/one_line.py --parts decode --out results.json
    PYTHONPATH=. python benchmarks/one_line.py --parts faces --out results.json
    PYTHONPATH=. python benchmarks/one_line.py --parts first --out results.json
    PYTHONPATH=. python benchmarks/one_line.py --parts families --out results.json

decode: `specdec.generate(model, ...)` on models as they were loaded, beside the same call within `batch_invariant` of
target and draft ("wrapped"), and beside transformers' own. Models are stand-ins (stand_in.py). Outputs are compared
with plain greedy decoding, and that with transformers' own on the batch-invariant model. Tokens per second are given
with the prefill and after it; the latter and the prefill come from calls for one token.

faces: the same pair by `generate`, `generate_many`, `Engine` and transformers' `custom_generate=speculative(...)`.

first: seconds from entering `generate` to the first token in a fresh process, with empty caches of compiled kernels and
with those that the first process left.

families: families of transformers at about a billion random parameters: `generate` of transformers, ours plain and by
prompt lookup; whether lookup changes a token, and whether the family is said to be exact.

A record is continued: batch sizes and families that are in --out are not measured again, so a part can be spread over
several calls (--batch-sizes, --families, --seconds). Exits with 1 if an exact output differs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import one_line_decode
import one_line_faces
import one_line_families
import one_line_first
import torch
from gpu_timing import Record, copy_bandwidth, prompts_of
from random_models import DEFAULT_FAMILIES, SIZES
from stand_in import SHAPES, inflate
from transformers import AutoModelForCausalLM, PreTrainedModel

import specdec
from specdec.files.environment import environment

PARTS = ("decode", "faces", "first", "families")
PAIR = Path(specdec.__file__).parent / "assets" / "demo_pair"
OWN = "own"


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--pair", type=Path, default=PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--shapes", default="8B,0.6B", help=f"target,draft: of stand-ins; {OWN}: the pair as it is")
    parser.add_argument("--first-shapes", default="8B,0.6B", help="target,draft: of random weights, for `first`")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch-sizes", help="by default 1,8,32; of families 1,8")
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of all parts but families")
    parser.add_argument("--new-tokens", type=int, default=128, help="of `decode` and `faces`")
    parser.add_argument("--num-speculative-tokens", type=int, default=5, help="of all parts but families")
    parser.add_argument("--methods", default="plain,draft", help="of `first`")
    parser.add_argument("--families", default=",".join(DEFAULT_FAMILIES))
    parser.add_argument("--size", choices=SIZES, default="real", help="of families")
    parser.add_argument("--family-context", type=int, default=128)
    parser.add_argument("--family-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each kind")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after this time no further family is begun")
    parser.add_argument("--show", action="store_true", help="measure nothing, print the tables of --out")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.show and not arguments.out.is_file():
        parser.error(f"--show: there is no record {arguments.out}; measure one without --show")
    check(parser, arguments)
    return arguments


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse before anything is loaded."""
    shapes = [] if arguments.shapes == OWN else arguments.shapes.split(",")
    for name, given, known in (
        ("parts", arguments.parts.split(","), PARTS),
        ("methods", arguments.methods.split(","), one_line_first.METHODS),
        ("shapes", shapes, SHAPES),
        ("first-shapes", arguments.first_shapes.split(","), SHAPES),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is unknown; choose among {', '.join(known)}")
        if "shapes" in name and given and len(given) != 2:
            parser.error(f"--{name}: {','.join(given)} names {len(given)} shapes; give target,draft")
    try:
        one_line_families.check_families(arguments.families.split(","))
    except ValueError as error:
        parser.error(str(error))
    if arguments.device == "cuda" and not arguments.show and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu with --shapes own --size tiny tries the script out")


def loaded(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    models = {}
    for index, role in enumerate(("target", "draft")):
        model = AutoModelForCausalLM.from_pretrained(arguments.pair / role, dtype=torch.float32)
        if arguments.shapes != OWN:
            model = inflate(model, SHAPES[arguments.shapes.split(",")[index]], dtype, arguments.device)
        models[role] = model.to(arguments.device, dtype).eval()
        models[role].generation_config.eos_token_id = None
        models[role].generation_config.pad_token_id = 0
    return models


def on_pair(arguments: argparse.Namespace, dtype: torch.dtype, record: Record) -> int:
    """The parts that need the stand-ins, which are built once, and not at all if nothing is left to measure."""
    asked = numbers(arguments.batch_sizes or "1,8,32")
    kept = {"decode": "ratios", "faces": "faces"}  # what is in the record once a batch size is complete
    left = {}
    for part in set(kept) & set(arguments.parts.split(",")):
        done = {entry["batch_size"] for entry in record.content.get(kept[part], [])}
        left[part] = [size for size in asked if size not in done]
    if not any(left.values()):
        return 0

    if arguments.device == "cuda":
        record.add("copy", {"gb_s": round(copy_bandwidth() / 1e9)})
        torch.cuda.empty_cache()
    models = loaded(arguments, dtype)
    ids = prompts_of(arguments.pair, max(asked), arguments.context, arguments.device)
    k, new_tokens, rounds, wrong = arguments.num_speculative_tokens, arguments.new_tokens, arguments.rounds, 0
    if left.get("decode"):
        setting = one_line_decode.Setting(models, k, new_tokens, rounds)
        wrong += one_line_decode.measure(setting, ids, left["decode"], record.add)
    if left.get("faces"):
        add = partial(record.add, "faces")
        wrong += one_line_faces.measure(models, ids, left["faces"], k, new_tokens, rounds, add)
    one_line_families.let_go(*models.values())
    return wrong


def first(arguments: argparse.Namespace, dtype: torch.dtype, record: Record) -> int:
    options = ["--device", arguments.device, "--dtype", str(dtype).removeprefix("torch.")]
    options += ["--context", str(arguments.context)]
    options += ["--num-speculative-tokens", str(arguments.num_speculative_tokens)]
    done = {entry["method"] for entry in record.content.get("first", []) if entry["kernel_cache"] == "warm"}
    methods = [method for method in arguments.methods.split(",") if method not in done]
    one_line_first.measure(methods, arguments.first_shapes, options, lambda entry: record.add("first", entry))
    return 0


def families(arguments: argparse.Namespace, dtype: torch.dtype, record: Record, deadline: float) -> int:
    done = {entry["family"] for entry in record.content.get("families", [])}
    one_line_families.measure(
        [family for family in arguments.families.split(",") if family not in done], SIZES[arguments.size], dtype,
        torch.device(arguments.device), numbers(arguments.batch_sizes or "1,8"), arguments.family_context,
        arguments.family_new_tokens, arguments.rounds, lambda entry: record.add("families", entry), deadline,
    )  # fmt: skip
    return len(one_line_families.wrong(record.content.get("families", [])))


def show(content: dict[str, Any]) -> None:
    """The tables of a record, and what is slower than it should be."""
    if "first" in content:
        print(one_line_first.table(content["first"]))
    if "decode" in content:
        print(one_line_decode.table(content))
        for line in one_line_decode.slower(content):
            print(f"below {one_line_decode.ALMOST} of the wrapped call: {line}")
    if "faces" in content:
        print(one_line_faces.table(content["faces"]))
    if "families" in content:
        print(one_line_families.table(content["families"]))
        for line in one_line_families.slower(content["families"]):
            print(f"slower than transformers: {line}")


def main(argv: Sequence[str] | None = None) -> int:
    begin = time.perf_counter()
    arguments = parsed(argv)
    if arguments.show:
        show(json.loads(arguments.out.read_text()))
        return 0

    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    if arguments.device == "cpu":
        torch.set_num_threads(1)  # as batch_invariant needs it there
    shapes = arguments.shapes if arguments.shapes == OWN else arguments.shapes.replace(",", " and ") + " of Qwen3"
    record = Record.resumed(arguments.out, {
        **environment(torch.device(arguments.device), ["benchmarks/one_line.py", *(argv or sys.argv[1:])]),
        "stand_ins": f"{shapes} from {arguments.pair.name}", "dtype": str(dtype).removeprefix("torch."),
        "context": arguments.context, "new_tokens": arguments.new_tokens,
    })  # fmt: skip
    parts, wrong = arguments.parts.split(","), 0
    if "first" in parts:  # while this process holds nothing on the device
        wrong += first(arguments, dtype, record)
    if {"decode", "faces"} & set(parts):
        wrong += on_pair(arguments, dtype, record)
    if "families" in parts:
        wrong += families(arguments, dtype, record, begin + arguments.seconds)
    show(record.content)
    return int(wrong > 0)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
