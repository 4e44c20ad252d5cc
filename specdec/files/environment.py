"""The conditions of a measurement: versions, machine, revision, command. Contains no path of the machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers

from specdec.version import __version__


def versions() -> dict[str, str]:
    return {
        "specdec": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        # With it transformers refits the confidence threshold of assisted decoding after every round.
        "scikit-learn": version_of("scikit-learn"),
    }


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment(device: torch.device, command: Sequence[str]) -> dict:
    """Machine, versions, revision and command line."""
    sha, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {
        "machine": machine(device),
        "versions": versions(),
        "git_sha": sha,
        "git_dirty": None if changes is None else bool(changes),
        "command": shlex.join(map(without_folders, command)),
    }


def machine(device: torch.device) -> dict:
    import psutil

    found = {
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "processor": processor(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average_1min": round(psutil.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git(*arguments: str) -> str | None:
    """git's output in the checkout that this package runs from; None if it is not run from a checkout."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        answer = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def without_folders(argument: str) -> str:
    """A command-line argument with each path reduced to its last part."""
    return "=".join(Path(part).name if "/" in part else part for part in argument.split("="))
