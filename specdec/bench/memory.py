"""Peak memory of a call: of the GPU, or of the process on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

MIB = 2**20
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak since construction. On a CPU it includes the models and everything else that the process holds."""

    def __init__(self, device: torch.device):
        self.device = device
        self.is_known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.is_known = self._reset_process()

    @staticmethod
    def _reset_process() -> bool:
        """Reset the process's peak in Linux; returns False if that is not possible."""
        try:
            CLEAR_REFS.write_text("5")
        except OSError:
            return False
        return True

    def mib(self) -> float | None:
        """None if the system does not report it."""
        if not self.is_known:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB
        lines = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(lines[0].split()[1]) / 1024 if lines else None
