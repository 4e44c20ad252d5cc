"""Where the time of a one-launch draft step goes: its kernel with timestamps of the device around each barrier.

The timestamps are added to a copy of the kernel's source, so that the product's kernel has none. Times are medians over
the layers, in microseconds; the clock advances in steps of about a quarter of a microsecond.

    python benchmarks/step_timeline.py --pair specdec/assets/demo_pair --out timeline.json
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_timing import Record, milliseconds
from stand_in import SHAPES, inflate
from torch import Tensor
from transformers import AutoModelForCausalLM

import specdec
from specdec.files.environment import environment
from specdec.kernels.persistent import step as persistent_step
from specdec.kernels.persistent import step_triton as persistent_step_triton
from specdec.network.invariant.network import InvariantForward

PHASES = ("query, key, value", "attention", "output projection", "gate and up", "down")
PASSED, DONE = range(2)  # a barrier was passed; the phase's results are stored

STAMP = """    @triton.jit
    def _stamp(clock_ptr, index):
        tl.store(clock_ptr + index * tl.num_programs(0) + tl.program_id(0), globaltimer())

"""


def stamped(source: str) -> str:
    """The kernel's source with a parameter `clock_ptr`, [layers * phases * 2, programs] int64, and timestamps."""
    before, kernel = source.split("    def persistent_step_kernel(")
    decorator = before.rindex("    @kernel(")
    imports = "    import triton.language as tl\n"
    before = before[:decorator] + STAMP + before[decorator:]
    before = before.replace(imports, imports + "    from triton.language.extra.cuda import globaltimer\n", 1)
    kernel = kernel.replace("eps, head_eps, scaling,\n", "eps, head_eps, scaling, clock_ptr,\n", 1)
    begin, end = (
        kernel.index("        for layer in tl.range(num_layers"),
        kernel.index("        head_tile = _load_rows("),
    )
    lines, phase = [], -1
    for line in kernel[begin:end].splitlines(keepends=True):
        indent, call = line[: len(line) - len(line.lstrip())], line.strip()
        if call.startswith("_arrive("):
            lines.append(f"{indent}_stamp(clock_ptr, (layer * {len(PHASES)} + {phase}) * 2 + {DONE})\n")
        lines.append(line)
        if call.startswith("_wait("):
            phase += 1
            lines.append(f"{indent}_stamp(clock_ptr, (layer * {len(PHASES)} + {phase}) * 2 + {PASSED})\n")
    assert phase == len(PHASES) - 1, f"{phase + 1} barriers per layer; this script knows {len(PHASES)}"
    return before + "    def persistent_step_kernel(" + kernel[:begin] + "".join(lines) + kernel[end:]


def stamped_kernel(folder: Path) -> Any:
    """The kernel of a module made from the stamped source; Triton reads it from its file."""
    path = folder / "stamped_step.py"
    path.write_text(stamped(inspect.getsource(persistent_step_triton)))
    spec = importlib.util.spec_from_file_location("stamped_step", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.persistent_step_kernel


class WithClock:
    """Replaces the kernel and passes it the clock's memory."""

    def __init__(self, kernel: Any, clock: Tensor):
        self.kernel, self.clock = kernel, clock

    def __getitem__(self, grid: Any) -> Callable:
        return lambda *arguments, **options: self.kernel[grid](*arguments, clock_ptr=self.clock, **options)


def phases(clock: Tensor) -> list[dict[str, Any]]:
    """clock: [layers, phases, 2, programs] nanoseconds. A phase ends when the first program passes its barrier."""
    passed, done = (clock[:, :, i].flatten(0, 1).double() / 1e3 for i in (PASSED, DONE))
    entries = []
    for number, name in enumerate(PHASES):
        at = torch.arange(number, len(passed) - 1, len(PHASES))
        begin, end = passed[at], passed[at + 1]
        work = done[at] - begin
        times = {
            "microseconds": end.amin(1) - begin.amin(1), "slowest_work": work.amax(1), "median_work": work.median(1)[0],
            "barrier": end.amin(1) - done[at].amax(1), "last_begins_late_by": begin.amax(1) - begin.amin(1),
        }  # fmt: skip
        entries.append({"phase": name, **{key: round(float(value.median()), 2) for key, value in times.items()}})
    return entries


def timeline(draft: Any, rows: int, width: int, context: int, folder: Path) -> dict[str, Any]:
    ids = torch.randint(3, 2000, (rows, width), device="cuda")
    starts = torch.full((rows,), context, device="cuda")
    num_programs = torch.cuda.get_device_properties(0).multi_processor_count
    clock = torch.zeros(draft.config.num_hidden_layers, len(PHASES), 2, num_programs, dtype=torch.long, device="cuda")

    def step_ms() -> float:
        forward = InvariantForward(draft, rows, context + 256, must_be_exact=False)
        return milliseconds(lambda: forward.graphs.replay(forward, ids, starts, context + width, ()))

    ms = step_ms()
    with mock.patch.object(persistent_step, "persistent_step_kernel", WithClock(stamped_kernel(folder), clock)):
        stamped_ms = step_ms()
    return {
        "rows": rows, "width": width, "context": context, "ms": round(ms, 3), "stamped_ms": round(stamped_ms, 3),
        "phases": phases(clock.cpu()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True, help="folder with draft/")
    parser.add_argument("--draft-shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    about = environment(torch.device("cuda"), ["benchmarks/step_timeline.py", *sys.argv[1:]])
    record = Record(
        arguments.out, {**about, "stand_in": f"{arguments.draft_shape} of Qwen3 from {arguments.pair.name}"}
    )
    small = AutoModelForCausalLM.from_pretrained(arguments.pair / "draft", dtype=torch.float32)
    draft = inflate(small, SHAPES[arguments.draft_shape], torch.bfloat16, "cuda")
    with specdec.batch_invariant(draft), tempfile.TemporaryDirectory() as folder:
        for rows, width in ((1, 1), (1, 2), (8, 1)):
            record.add("timeline", timeline(draft, rows, width, arguments.context, Path(folder)))


if __name__ == "__main__":
    main()
