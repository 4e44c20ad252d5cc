"""How much memory a device has left; one answer for all that ask before they allocate."""

from __future__ import annotations

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that this process could still allocate on `device`, including those that torch holds without using them.

    Devices other than CUDA's are taken to share the host's memory.
    """
    if device.type != "cuda":
        return psutil.virtual_memory().available

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
