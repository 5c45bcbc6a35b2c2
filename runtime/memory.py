"""How much memory a worker has used."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable

import torch

_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_memory_bytes(devices: Iterable[torch.device]) -> int:
    """The most that tensors took on these devices, if they are CUDA's; else the most that the process took."""
    cuda = {device for device in devices if device.type == "cuda"}
    if cuda:
        return sum(torch.cuda.max_memory_allocated(device) for device in cuda)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
