"""How kernels of a GPU divide groups of elements among programs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fxsplit.compressors.grouping import Layout

BLOCK = 4096
"""Elements that a program looks at together when it goes over all of them."""

PROGRAMS = 528
"""At most so many programs go over one group, unless it is huge: four for each multiprocessor of an H200."""

MIN_GROUP = 1024
"""Groups up to this size are left to torch, which does many of them at a time."""

MIN_RUN = 32
"""Shorter runs are scattered: reading them one by one wastes most of what is read."""

_NOTHING = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _NOTHING
    return torch.cuda.device(device)


def is_taken(values: Tensor, layout: Layout) -> bool:
    """Whether there are kernels for it: not for float64, many small groups, and more than ranks can count."""
    many = layout.group_size <= MIN_GROUP and layout.groups > 1
    return values.element_size() <= 4 and not many and layout.group_size < 1 << 31


def is_scattered(layout: Layout) -> bool:
    """Whether the elements of a group are too far apart to be read one after the other."""
    return layout.outer > 1 and layout.inner < MIN_RUN


def programs_of(layout: Layout) -> int:
    """Into how many programs a group is divided."""
    return min(-(-layout.group_size // BLOCK), max(1, PROGRAMS // layout.groups))


def sizes_of(layout: Layout) -> tuple[int, int, int]:
    """What kernels are told of the groups: elements of one, their number, and the length of a run."""
    return layout.group_size, layout.groups, layout.inner


def indexing(layout: Layout) -> dict[str, Any]:
    """How kernels find elements of a group."""
    wide = layout.numel >= (1 << 31) - (1 << 20)
    return {"INDEX": tl.int64 if wide else tl.int32, "ONE_RUN": layout.outer == 1}


def warps_of(block: int) -> int:
    """Warps of a program that holds a whole block: 16 to 32 elements a thread, up to 32 warps."""
    return min(32, max(1, block // 512))


def power_of_2(number: int) -> int:
    """The least power of two that is not less than a number; faster than Triton's own."""
    return 1 << max(0, number - 1).bit_length()
