"""The stamped copy of the one-launch step: where its stamps stand, and what is made of them; on a CPU."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from specdec.kernels.persistent import step_triton as persistent_step_triton

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("step_timeline")


def test_every_phase_is_stamped_behind_its_barrier_and_before_the_next(script):
    source = script.stamped(inspect.getsource(persistent_step_triton))
    [kernel] = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == "persistent_step_kernel"]
    assert "clock_ptr" in [argument.arg for argument in kernel.args.args]
    [loop] = [node for node in kernel.body if isinstance(node, ast.For) and "num_layers" in ast.unparse(node.iter)]
    names = ("_wait", "_arrive", "_stamp")
    calls = [
        ast.unparse(node.value)
        for node in loop.body
        if isinstance(node, ast.Expr) and ast.unparse(node.value).startswith(names)
    ]
    assert len(calls) == 4 * len(script.PHASES)
    for phase in range(len(script.PHASES)):
        waits, passed, done, arrives = calls[4 * phase : 4 * phase + 4]
        assert waits.startswith("_wait(") and arrives.startswith("_arrive(")
        assert passed.endswith(f"+ {phase}) * 2 + {script.PASSED})")
        assert done.endswith(f"+ {phase}) * 2 + {script.DONE})")


def test_phases_of_a_clock(script):
    """Two layers, three programs: each phase works 1, 2 or 4 µs, and its barrier takes one."""
    num, now = len(script.PHASES), 0
    clock = torch.zeros(2, num, 2, 3, dtype=torch.long)
    for layer in range(2):
        for phase in range(num):
            clock[layer, phase, script.PASSED] = torch.tensor([now, now, now + 500])
            clock[layer, phase, script.DONE] = torch.tensor([now + 1000, now + 2000, now + 4500])
            now += 5500
    for entry in script.phases(clock):
        assert entry["microseconds"] == 5.5 and entry["barrier"] == 1.0
        assert entry["slowest_work"] == 4.0 and entry["median_work"] == 2.0 and entry["last_begins_late_by"] == 0.5
