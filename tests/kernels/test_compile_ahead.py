"""Kernels that are compiled ahead of their first launch: compiled once, and not run."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specdec.kernels import dispatch
from specdec.kernels.compile_ahead import compile_ahead, in_background, wait_for_background
from specdec.kernels.dispatch import compiling_only
from specdec.kernels.linear.in_order_linear import in_order_linear

triton = pytest.importorskip("triton")


def test_a_launch_only_compiles_inside(monkeypatch):
    seen = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, grid, warmup, **options: seen.append(warmup))

    def function(x_ptr):
        pass

    kernel = dispatch.Kernel(function)
    kernel[(1,)](None)
    with compiling_only():
        kernel[(1,)](None)
        with pytest.raises(KeyboardInterrupt), compiling_only():
            raise KeyboardInterrupt
        kernel[(1,)](None)
    kernel[(1,)](None)
    assert seen == [False, True, True, False]


def test_a_launch_goes_to_the_gpu_of_its_operands(monkeypatch):
    places, current = [], [0]

    @contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, **options: places.append(current[-1]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: self.ndim)  # stands in for the number

    def function(x_ptr):
        pass

    kernel, one, scalar = dispatch.Kernel(function), torch.zeros(1), torch.zeros(())
    kernel[(1,)](None, one)
    kernel[(1,)](scalar, one)
    kernel[(1,)](SimpleNamespace(base=one), scalar)  # a tensor descriptor
    kernel[(1,)](x_ptr=one)
    kernel[(1,)](3)
    assert places == [1, 0, 1, 1, 0] and current == [0]


def test_amds_numbers_are_not_nvidias(monkeypatch):
    device, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))  # a GPU of AMD's
    for hip, expected in ((None, (9, 4)), ("6.4", (0, 0))):
        dispatch.nvidia_capability.cache_clear()
        monkeypatch.setattr(torch.version, "hip", hip)
        assert dispatch.nvidia_capability(device) == expected and dispatch.nvidia_capability(cpu) == (0, 0)
    dispatch.nvidia_capability.cache_clear()


@pytest.mark.parametrize(
    ("capability", "properties", "expected"),
    [
        ((9, 0), {}, 232448),
        ((8, 9), {"shared_memory_per_block_optin": 101376, "shared_memory_per_block": 49152}, 101376),
        ((9, 4), {"shared_memory_per_block": 65536}, 65536),  # AMD's
        ((8, 0), {}, 49152),
    ],
)
def test_how_much_shared_memory_a_program_may_take(monkeypatch, capability, properties, expected):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "nvidia_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    dispatch.shared_memory.cache_clear()
    assert dispatch.shared_memory(device) == expected
    assert dispatch.shared_memory(torch.device("cpu")) == 232448
    dispatch.shared_memory.cache_clear()


def test_a_capture_waits_for_what_compiles_in_the_background():
    done = []

    def fail():
        raise RuntimeError("a kernel that cannot be compiled; its launch will say so")

    in_background(lambda: (time.sleep(0.05), done.append(1)))
    in_background(fail)
    wait_for_background()
    assert done == [1]
    wait_for_background()


def test_whatever_is_launched_can_be_compiled_alone():
    """With `triton.jit` it would run ahead, on operands that nothing has computed yet."""
    sources = [path.read_text() for path in (Path(__file__).resolve().parents[2] / "kernels").rglob("*.py")]
    launched = {name for source in sources for name in re.findall(r"\b(_\w+)\[", source)}
    plain = {name for source in sources for name in re.findall(r"@triton\.jit[^\n]*\n\s+def (\w+)", source)}
    assert launched & {"_rms_norm_kernel", "_top_k_kernel"} and launched & plain == set()


@pytest.mark.gpu
def test_what_is_compiled_ahead_is_not_run_and_not_compiled_again():
    generator = torch.Generator(device="cuda").manual_seed(0)
    weights = [torch.randn(size, 72, device="cuda", generator=generator).bfloat16() for size in (40, 56, 136)]
    x = torch.randn(5, 72, device="cuda", generator=generator).bfloat16()
    compiled = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda *args, **options: compiled.append(1)
    try:
        before = torch.cuda.memory_allocated()
        with compile_ahead(x.device):
            for weight in weights:
                in_order_linear(x, weight)
        num_compiled = len(compiled)
        assert torch.cuda.memory_allocated() == before
        outs = [in_order_linear(x, weight) for weight in weights]
        assert len(compiled) == num_compiled
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    for out, weight in zip(outs, weights, strict=True):
        torch.testing.assert_close(out.float(), x.float() @ weight.float().T, rtol=0.02, atol=0.05)
