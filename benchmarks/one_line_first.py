"""The first call of a process: seconds from entering `generate` to the first token; see `one_line.py`.

Every measurement is a process of its own on models of random weights in a large shape. The first one of a method finds
empty caches of compiled kernels, the second one what the first left there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
METHODS = ("plain", "draft", "lookup")
# Whatever is compiled is kept in one of these: Triton's kernels, torch's, the driver's, and what follows XDG.
CACHES = {
    "TRITON_CACHE_DIR": "triton", "TRITON_HOME": "triton_home", "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda", "XDG_CACHE_HOME": "xdg",
}  # fmt: skip


def measure(
    methods: Sequence[str], shapes: str, options: Sequence[str], add: Callable[[dict], None],
    start: Callable[[list[str], dict[str, str]], dict[str, Any]] | None = None,
) -> None:  # fmt: skip
    """Two processes for each method. options: further arguments of the workers. start: runs one, reads its answer."""
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            environment = with_caches(Path(folder))
            for state in ("empty", "warm"):
                command = [sys.executable, str(HERE / "one_line_first.py"), "--method", method, "--shapes", shapes]
                found = (start or run_worker)([*command, *options], environment)
                add({"method": method, "kernel_cache": state, **found})


def with_caches(folder: Path) -> dict[str, str]:
    """This process's environment with all caches of compiled code in the folder, and the checkout on the path."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **{name: str(folder / part) for name, part in CACHES.items()}, "PYTHONPATH": path}


def run_worker(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The worker's last line. Its standard error, where progress is shown, goes to ours."""
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


class FirstToken:
    """A streamer that notes when the first token came; before it comes the prompt."""

    def __init__(self) -> None:
        self.puts: list[float] = []

    def put(self, value: Any) -> None:
        self.puts.append(time.perf_counter())

    def end(self) -> None:
        """Part of a streamer."""

    @property
    def seconds(self) -> float:
        return self.puts[1]


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the models, then call twice. What comes before the first call is not part of it."""
    begin = time.perf_counter()
    import torch
    from random_models import FIRST_TOKEN, random_qwen3
    from stand_in import SHAPES

    import specdec
    from specdec.bench.latency import synchronise

    imported = time.perf_counter()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    target_shape, draft_shape = (SHAPES[name] for name in arguments.shapes.split(","))
    target = random_qwen3(target_shape, dtype, device)
    options: dict[str, Any] = {"max_new_tokens": arguments.new_tokens, "do_sample": False}
    if arguments.method != "plain":
        drafter = random_qwen3(draft_shape, dtype, device) if arguments.method == "draft" else "prompt_lookup"
        options.update(drafter=drafter, num_speculative_tokens=arguments.num_speculative_tokens)
    ids = torch.randint(FIRST_TOKEN, target_shape.vocab_size, (1, arguments.context), device=device)
    mask = torch.ones_like(ids)
    synchronise(device)
    built = time.perf_counter()

    def call() -> dict[str, float]:
        streamer = FirstToken()
        entered = time.perf_counter()
        specdec.generate(target, ids, mask, streamer=streamer, **options)
        synchronise(device)
        first, last = streamer.seconds - entered, time.perf_counter() - entered
        return {"first_token_seconds": round(first, 3), "call_seconds": round(last, 3)}

    first, second = call(), call()
    return {
        **first, "second_call": second, "shapes": arguments.shapes, "context": arguments.context,
        "new_tokens": arguments.new_tokens, "import_seconds": round(imported - begin, 2),
        "build_seconds": round(built - imported, 2),
    }  # fmt: skip


def table(entries: Sequence[dict]) -> str:
    """Seconds from entering the first and the second call of a process to the first token."""
    lines = ["| method | kernel caches | first call, s | second call, s |", "|---|---|--:|--:|"]
    for entry in entries:
        seconds = f"{entry['first_token_seconds']} | {entry['second_call']['first_token_seconds']}"
        lines.append(f"| {entry['method']} | {entry['kernel_cache']} | {seconds} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One process of the measurement; its last line is JSON.")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--shapes", default="8B,0.6B", help="target,draft")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    print(json.dumps(work(parser.parse_args(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
