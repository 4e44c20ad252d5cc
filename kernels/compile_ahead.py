"""Compiling several kernels at a time, before they are needed.

Triton compiles a kernel when it is first launched, one after the other, and the device waits for each: some twenty
kernels before the first token. `compile_ahead` runs the same calls without launching anything, and compiles what they
would have launched in threads. What is compiled is kept on disk by Triton, so this happens once per machine.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from specdec.kernels.dispatch import compiling_only, triton

MOST_THREADS = 16

logger = logging.getLogger(__name__)


@contextmanager
def compile_ahead(device: torch.device) -> Iterator[None]:
    """Kernels that are launched inside are compiled and not run; all of them are ready at its end.

    What the calls inside return has no meaning.
    """
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS))
    loading, begin = _Loading(pool, device), time.perf_counter()
    with pool, compiling_only(), triton.AsyncCompileMode(loading):
        yield
    if loading.num_kernels:
        logger.info("%d kernels are ready after %.1f s", loading.num_kernels, time.perf_counter() - begin)


class _Loading:
    """An executor that also loads what it has compiled, which takes another compiler run: the launcher's."""

    def __init__(self, pool: ThreadPoolExecutor, device: torch.device):
        self.pool, self.device, self.num_kernels = pool, device, 0

    def submit(self, compile_one: Callable[[], Any]) -> Future:
        self.num_kernels += 1

        def compile_and_load() -> Any:
            with torch.cuda.device(self.device):
                compiled = compile_one()
                assert compiled.run is not None  # reading it loads the kernel
            return compiled

        return self.pool.submit(compile_and_load)


_background: set[Future] = set()


def in_background(call: Callable[[], None]) -> None:
    """Start a call that compiles ahead, and go on."""
    pool = ThreadPoolExecutor(1)
    _background.add(pool.submit(call))
    pool.shutdown(wait=False)


def wait_for_background() -> None:
    """Returns when nothing compiles in the background any more. What failed there will fail again, and be reported,
    where it is launched."""
    while _background:
        _background.pop().exception()
