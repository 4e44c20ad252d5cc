"""Compiles `step.cpp` for this machine's processor, once, and loads it.

The library is plain C behind ctypes: it includes no header of torch or Python, so that compiling takes a second or two.
It is linked to the OpenMP that torch brought along, because two would keep two sets of threads.

It lies in `specdec/native` of the user's cache folder (XDG_CACHE_HOME), under a name made of all that it depends on:
its source, the compiler's arguments, torch and the processor. Whatever is in the way, a compiler that is missing or a
folder that is read-only, is said in one log line, and there is no native step.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SWITCH = "SPECDEC_NATIVE"  # 0 turns it off
SOURCE = Path(__file__).with_name("step.cpp")
SOURCES = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-Wno-psabi")
COMPILERS = ("g++", "c++")  # unless CXX names another
TIMEOUT_S = 120
MACHINES = ("x86_64", "aarch64")


class BuildError(Exception):
    """Why there is no library, in words."""


def is_switched_on() -> bool:
    """Whether networks are chosen with it in mind."""
    return os.environ.get(SWITCH, "1") != "0"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step; None where there is none."""
    try:
        return loaded(cache_folder())
    except (BuildError, OSError) as error:
        level = logging.WARNING if is_supported() else logging.INFO
        logger.log(level, "no native decode step, torch's operations serve instead: %s", error)
        return None


def is_supported() -> bool:
    return sys.platform == "linux" and platform.machine() in MACHINES


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec" / "native"


def loaded(folder: Path) -> ctypes.CDLL:
    """The library in `folder`, compiled if it is not there or cannot be loaded. Raises BuildError or OSError."""
    if not is_supported():
        raise BuildError(f"{sys.platform} on {platform.machine()} is not one of Linux on {', '.join(MACHINES)}")
    path = folder / f"step-{key()}.so"
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            logger.info("%s is compiled again: %s", path, error)

    import fcntl  # which other systems lack

    folder.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return ctypes.CDLL(str(path))  # by another process that held the lock
        except OSError:
            compile_to(path)
    return ctypes.CDLL(str(path))


def key() -> str:
    """Changes with all that the compiled library depends on."""
    parts = [
        *(source.read_text() for source in SOURCES),
        *FLAGS,
        torch.__version__,
        str(openmp()),
        platform.machine(),
        processor(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def processor() -> str:
    """The processor's model and features."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.split(":")[0].strip() in names)


def openmp() -> Path | None:
    """The OpenMP library that came with torch; None if torch uses the system's."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return found[0] if found else None


def compile_to(path: Path) -> None:
    """Write the library there in one move. Raises BuildError with the compiler's last words."""
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler ({named or ', '.join(COMPILERS)}) was found; install one or set CXX")
    logger.info("compiling the native decode step for this machine, once, into %s", path)

    own = openmp()
    libraries = ["-fopenmp"] if own is None else [str(own), f"-Wl,-rpath,{own.parent}"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder, "step.o"), Path(folder, "step.so")
        _run([compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", str(compiled)])
        _run([compiler, "-shared", "-Wl,-z,defs", str(compiled), *libraries, "-o", str(linked)])
        os.replace(linked, path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {TIMEOUT_S} s") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
