"""The C library's memory allocator in worker processes."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_KEPT_BYTES = (1 << 31) - 1
_LARGEST_BYTES = 1 << 30
_PAD_BYTES = 64 << 20


def keep_memory() -> bool:
    """Lets this process keep the memory that tensors on the CPU have given back, for those of the next step.

    By default glibc gets each large tensor from the kernel and gives it back when it is freed, so that every step
    pays for clearing and mapping its activations page by page; this saves that, and the process stays at its peak.
    It is for worker processes, which do nothing else; the client's process is the user's.

    Returns:
        whether the C library took it: glibc does, others may not.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_TOP_PAD, _PAD_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
