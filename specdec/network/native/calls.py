"""The structures that `step.cpp` takes, as ctypes sees them, and its functions."""

from __future__ import annotations

import os
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from specdec.network.native.build import library

WRITE, ADD, GATED = range(3)  # what `specdec_linear` does with what is at `out`: over it, to it, silu(gate) * up


class Linear(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("inputs", c_int64), ("outputs", c_int64))


class Layer(Structure):
    _fields_ = (
        *((name, Linear) for name in ("qkv", "attention_out", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, c_float) for name in ("attention_eps", "mlp_eps", "head_eps", "scaling")),
        ("window", c_int64),
        *((name, c_void_p) for name in ("keys", "values", "visible", "saved")),
    )


class Step(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_threads", "num_layers", "rows", "width", "hidden", "heads", "kv_heads")),
        *((name, c_int64) for name in ("head_dim", "intermediate", "first_row", "num_slots", "used_slots")),
        *((name, c_void_p) for name in ("slots", "positions", "cos", "sin", "hidden_states", "workspace")),
        ("layers", POINTER(Layer)),
    )


_has_forked = False


def _note_fork() -> None:
    # The threads of a pool do not exist in a forked process, and OpenMP would wait for them forever.
    global _has_forked
    _has_forked = True


os.register_at_fork(after_in_child=_note_fork)


def num_threads() -> int:
    """As many as torch uses; one in a forked process."""
    return 1 if _has_forked else torch.get_num_threads()


class Native:
    """The library's functions. Raises RuntimeError where there is none."""

    def __init__(self) -> None:
        loaded = library()
        if loaded is None:
            raise RuntimeError("there is no native decode step here")
        self._workspace, self._layers = loaded.specdec_workspace, loaded.specdec_layers
        self._linear, self._large_pages = loaded.specdec_linear, loaded.specdec_large_pages
        self._workspace.argtypes, self._workspace.restype = [POINTER(Step)], c_int64
        self._layers.argtypes, self._layers.restype = [POINTER(Step)], None
        self._linear.argtypes = [POINTER(Linear), c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64]
        self._linear.restype = None
        self._large_pages.argtypes, self._large_pages.restype = [c_void_p, c_int64], c_int

    def workspace_floats(self, step: Step) -> int:
        return self._workspace(byref(step))

    def layers(self, step: Step) -> None:
        self._layers(byref(step))

    def linear(self, weights: Linear, x: Tensor, out: Tensor, into: int) -> Tensor:
        """x: [tokens, in or more] float32, whose rows are contiguous. out: [tokens, out], returned. into: WRITE, ADD or
        GATED."""
        assert x.dtype == out.dtype == torch.float32 and x.stride(1) == 1 and out.is_contiguous()
        stride, threads = x.stride(0), num_threads()
        self._linear(byref(weights), x.data_ptr(), stride, len(x), out.data_ptr(), into, threads)
        return out

    def large_pages(self, memory: Tensor) -> bool:
        """Ask for large pages before `memory` is written to; whether the system agreed."""
        return bool(self._large_pages(memory.data_ptr(), memory.nbytes))
