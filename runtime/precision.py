"""Whether a device can do what autocast asks of it: found out before the first step, not in the middle of it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch.nn import functional as F

from fxsplit.errors import DeviceError
from fxsplit.trace.replay import Surroundings


def check_autocast(surroundings: Surroundings, devices: Iterable[torch.device]) -> None:
    """Refuses an autocast to a dtype that one of the devices cannot compute with.

    Args:
        surroundings: the caller's.
        devices: of the stages of this worker.

    Raises:
        DeviceError: the device has no such arithmetic.
    """
    wanted = dict(surroundings.autocast)
    for device in dict.fromkeys(devices):
        dtype = wanted.get(device.type)
        if dtype is not None and (reason := _refusal(device, dtype)) is not None:
            raise DeviceError(
                f"autocast to {str(dtype).removeprefix('torch.')} is not for this device",
                where=str(device),
                found=reason,
                allowed="float16 with a GradScaler on a GPU of compute capability 5.3, bfloat16 from 8.0 on",
                hint="choose the other dtype, or do without autocast",
            )


@cache
def _refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        least = {torch.bfloat16: (8, 0), torch.float16: (5, 3)}.get(dtype, (0, 0))
        return f"compute capability {capability[0]}.{capability[1]}" if capability < least else None
    try:
        x = torch.zeros(2, 2, dtype=dtype, device=device)
        F.layer_norm(F.linear(x, x), (2,))
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None
