"""vLLM beside specdec on one GPU: the same checkpoints, prompts and numbers of new tokens, in processes of their own.

    PYTHONPATH=. python benchmarks/peer_vllm.py build --folder DIR
    PYTHONPATH=. python benchmarks/peer_vllm.py run --folder DIR --out results.json
    PYTHONPATH=. python benchmarks/peer_vllm.py run --folder DIR --sides ours --out results.json
    PYTHONPATH=. python benchmarks/peer_vllm.py run --folder DIR --sides vllm --methods plain,draft --ks 1,2,3 --out ...

build: writes stand-ins (stand_in.py) of a target and a draft as checkpoints, and prompts of token ids. run: one process
for ours and one for each method and K of vLLM; every result is added to the record as soon as it is there, and what the
record has is not measured again. Tokens per second are counted as in `one_line.py`: with the prefill, and after it by
the difference from a call for one token.

vLLM runs offline and in the process that asks (no server), without prefix caching, every row to its full length.
Methods: plain, its batch-invariant mode, n-gram, and the draft model. Its tokens are compared with ours: bits differ
unless both fix the order of their sums alike, so fewer equal rows say that rounding differs, not who is right.

vLLM must be importable: in this environment, in another one (--vllm-python), or unpacked in a folder (--vllm-path, as
`vllm_bundle.sh` packs it for a machine without internet).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORKERS = {"ours": HERE / "peer_ours.py", "vllm": HERE / "peer_vllm_worker.py"}
METHODS = ("plain", "batch_invariant", "ngram", "draft")  # of vLLM
DRAFTING = ("ngram", "draft")
WANTED = "0.25.1"  # the version that the record in results/ is about
# Read by vLLM when it is imported: in-process, no request to the internet, and no sampler that must be compiled first.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "run"))
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoints, prompts and outputs")
    parser.add_argument("--pair", type=Path, help="build: folder with target/, draft/, prompts.json; the shipped one")
    parser.add_argument("--shapes", default="8B,0.6B", help="build: target,draft, of stand-ins")
    parser.add_argument("--prompts", type=int, default=32, help="build: how many")
    parser.add_argument("--context", type=int, default=512, help="build: tokens of a prompt")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sides", default="ours,vllm", help="run: ours, vllm")
    parser.add_argument("--methods", default=",".join(METHODS), help="run: of vLLM")
    parser.add_argument("--ks", default="5", help="run: numbers of draft tokens, of both")
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="run: timed calls")
    parser.add_argument("--vllm-python", default=sys.executable, help="an interpreter that has vLLM")
    parser.add_argument("--vllm-path", type=Path, help="a folder that vLLM is unpacked in")
    parser.add_argument("--vllm-options", default="{}", help="JSON: further arguments of vLLM's LLM")
    parser.add_argument("--vllm-speculative", default="{}", help="JSON: further entries of its speculative_config")
    parser.add_argument("--out", type=Path, help="run: the record")
    arguments = parser.parse_args(argv)
    if arguments.what == "run":
        check_run(parser, arguments)
    return arguments


def check_run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse before anything is measured, ours included."""
    if arguments.out is None:
        parser.error("run needs --out, the file of the record")
    for name, given, known in (
        ("sides", arguments.sides.split(","), WORKERS), ("methods", arguments.methods.split(","), METHODS),
    ):  # fmt: skip
        if unknown := set(given) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is unknown; choose among {', '.join(known)}")
    for name in ("vllm_options", "vllm_speculative"):
        try:
            json.loads(getattr(arguments, name))
        except json.JSONDecodeError as error:
            parser.error(f"--{name.replace('_', '-')} is not JSON: {error}")
    if not (arguments.folder / "prompts.json").is_file():
        parser.error(f"{arguments.folder} has no prompts.json; run `build --folder {arguments.folder}` first")
    have, need = len(json.loads((arguments.folder / "prompts.json").read_text())), max(numbers(arguments.batch_sizes))
    if need > have:
        parser.error(f"--batch-sizes: {need} rows need as many prompts, the folder has {have}; build it with --prompts")
    if "vllm" in arguments.sides.split(","):
        reason = missing_vllm(arguments)
        if reason is not None:
            parser.error(
                f"vLLM cannot be imported by {Path(arguments.vllm_python).name}: {reason}; run `pip install "
                f"vllm=={WANTED}` there, name an interpreter that has it with --vllm-python, unpack vllm_bundle.sh's "
                "parts and pass --vllm-path, or measure ours alone with --sides ours"
            )


def missing_vllm(arguments: argparse.Namespace) -> str | None:
    """Why vLLM cannot be imported; None if it can."""
    command = [arguments.vllm_python, "-c", "import vllm"]
    done = subprocess.run(command, env=vllm_environment(arguments.vllm_path), capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]


def vllm_environment(path: Path | None, method: str = "plain") -> dict[str, str]:
    """What the user has set stays; the folder is on the path for vLLM alone, because it brings other packages along."""
    settings = {**SETTINGS, **os.environ}
    if method == "batch_invariant":
        settings["VLLM_BATCH_INVARIANT"] = "1"
    if path is not None:
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path.resolve()), settings.get("PYTHONPATH")]))
    return settings


def build(arguments: argparse.Namespace) -> None:
    """Checkpoints in bfloat16 on a GPU, in float32 on a CPU."""
    import torch
    from gpu_timing import prompts_of
    from stand_in import SHAPES, inflate
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import specdec

    pair = arguments.pair or Path(specdec.__file__).parent / "assets" / "demo_pair"
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    for role, shape in zip(("target", "draft"), arguments.shapes.split(","), strict=True):
        small = AutoModelForCausalLM.from_pretrained(pair / role, dtype=torch.float32)
        model = inflate(small, SHAPES[shape], dtype, arguments.device)
        model.generation_config.eos_token_id = None
        model.save_pretrained(arguments.folder / role)
        print(role, "of shape", shape, "is written", flush=True)
        del model
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    # For `specdec generate` and `specdec bench` on the same checkpoints; vLLM gets token ids.
    AutoTokenizer.from_pretrained(pair / "target").save_pretrained(arguments.folder / "target")
    ids = prompts_of(pair, arguments.prompts, arguments.context, "cpu").tolist()
    (arguments.folder / "prompts.json").write_text(json.dumps(ids))
    about = {"stand_ins": f"{arguments.shapes.replace(',', ' and ')} of Qwen3 from {pair.name}"}
    (arguments.folder / "about.json").write_text(json.dumps({**about, "dtype": str(dtype).removeprefix("torch.")}))


def settings_of(arguments: argparse.Namespace) -> list[tuple[str, str, int | None]]:
    """(side, method, K) of each process; ours measures all its methods in one."""
    found: list[tuple[str, str, int | None]] = [("ours", "all", None)] if "ours" in arguments.sides.split(",") else []
    if "vllm" in arguments.sides.split(","):
        for method in arguments.methods.split(","):
            ks = numbers(arguments.ks) if method in DRAFTING else [None]
            found += [("vllm", method, k) for k in ks]
    return found


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    import torch
    from gpu_timing import Record

    from specdec.files.environment import environment

    record = Record.resumed(arguments.out, {
        **environment(torch.device(arguments.device), ["benchmarks/peer_vllm.py", *argv]),
        **json.loads((arguments.folder / "about.json").read_text()), "new_tokens": arguments.new_tokens,
    })  # fmt: skip
    done = {(run["side"], run["method"], run["K"]) for run in record.content.get("runs", [])}
    for side, method, k in settings_of(arguments):
        if (side, method, k) in done:
            continue
        for entry in run_worker(arguments, side, method, k):
            record.add("results", {"side": side, **entry})
        record.add("runs", {"side": side, "method": method, "K": k})
    print(table(record.content.get("results", [])))
    ours = [entry for entry in record.content.get("results", []) if entry["side"] == "ours"]
    return int(any(len(set(entry["equal_to_plain"].split("/"))) > 1 for entry in ours))


def run_worker(arguments: argparse.Namespace, side: str, method: str, k: int | None) -> list[dict]:
    """A worker's entries. They come in a file, because vLLM logs to the standard output."""
    options = {
        "folder": str(arguments.folder), "method": method, "k": k, "ks": numbers(arguments.ks),
        "batch_sizes": numbers(arguments.batch_sizes), "new_tokens": arguments.new_tokens, "rounds": arguments.rounds,
        "device": arguments.device, "options": json.loads(arguments.vllm_options),
        "speculative": json.loads(arguments.vllm_speculative),
    }  # fmt: skip
    python = sys.executable if side == "ours" else arguments.vllm_python
    environment = dict(os.environ) if side == "ours" else vllm_environment(arguments.vllm_path, method)
    if side == "ours":
        parts = [str(HERE.parent), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, parts))
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        subprocess.run([python, str(WORKERS[side]), json.dumps(options), str(results)], env=environment, check=True)
        return json.loads(results.read_text())


def table(results: Sequence[dict]) -> str:
    """Tokens per second after the prefill / with it, prefill in ms, rows equal to our plain decoding."""
    lines = ["| | batch | tokens/s after / with the prefill | prefill ms (worst) | equal |", "|---|--:|--:|--:|--:|"]
    for entry in results:
        k = f", K = {entry['K']}" if entry["K"] else ""
        speeds = f"{entry['tokens_per_second']} / {entry['tokens_per_second_with_prefill']}"
        prefill = f"{entry['prefill_ms']} ({entry['worst_prefill_ms']})"
        equal = entry["equal_to_plain"] or "not compared"
        name = f"{entry['side']} {entry['method']}{k}"
        lines.append(f"| {name} | {entry['batch_size']} | {speeds} | {prefill} | {equal} |")
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    if arguments.what == "build":
        build(arguments)
        return 0
    return run(arguments, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
