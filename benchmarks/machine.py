"""What a benchmark ran on, in words."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch


def machine(*packages: str) -> str:
    """GPUs if there are any, cores, and the versions of torch and of other packages."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU"
    versions = (f"{name} {version(name)}" for name in packages)
    return ", ".join(
        (devices, f"{os.cpu_count()} cores", platform.machine(), f"torch {torch.__version__}", *versions)
    )
