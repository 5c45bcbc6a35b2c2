"""Launching Triton's kernels with less work on the host.

Triton looks at every argument of every launch to find the compiled kernel, and asks the driver about each
address, which takes several times as long as the launch. Here all that the choice depends on is looked up at
once, and the driver is called with arguments that are in place but for the addresses.
"""

from __future__ import annotations

import ctypes
import functools
import re
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

MAX_KEPT = 1024
"""Launches that are remembered of each kernel."""


class Launcher:
    """A kernel of Triton whose arguments are tensors, then integers, then constants.

    >>> Launcher(kernel)((programs,), (x, y), (count,), {"BLOCK": 1024}, num_warps=8)  # doctest: +SKIP
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._launches: dict[tuple[Any, ...], _Launch] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Tensor, ...],
        integers: tuple[int, ...],
        constants: dict[str, Any],
        **options: Any,
    ) -> None:
        """Launches it on the current stream of the current device.

        Args:
            grid: programs in each of up to three dimensions.
            tensors: of this device, or pinned.
            integers: of at most 64 bits, not negative.
            constants: by name.
            options: of the compilation, such as `num_warps`; the same ones at every launch with the same
                constants, which always come in the same order.
        """
        # Triton compiles anew for other dtypes, addresses that are not multiples of 16, and some integers. Each
        # thread has launches of its own, since it writes addresses into them.
        addresses = [tensor.data_ptr() for tensor in tensors]
        kinds = [(tensor.dtype, address & 15) for tensor, address in zip(tensors, addresses, strict=True)]
        key = (get_ident(), tensors[0].device, grid, integers, *kinds, *constants.values())
        launch = self._launches.get(key)
        if launch is not None and launch(addresses):
            return
        compiled = self._kernel[grid](*tensors, *integers, **constants, **options)
        if compiled is None or launch is not None:  # under the interpreter there is nothing to keep
            return
        if len(self._launches) >= MAX_KEPT:
            self._launches.clear()
        if _Launch.can_do(compiled, len(tensors), integers):
            self._launches[key] = _Launch(compiled, grid, len(tensors), integers, tensors[0].device)


class _Launch:
    """A compiled kernel with all that it is launched with but the addresses."""

    def __init__(
        self, compiled: Any, grid: tuple[int, ...], tensors: int, integers: tuple[int, ...], device: torch.device
    ) -> None:
        self._compiled = compiled  # or its code would be unloaded
        self._device, self._tensors = device.index, tensors
        passed = [integer for integer in integers if integer != 1]
        count = len(_parameters(compiled))
        # Behind the integers, addresses of memory that these kernels do not need.
        self._values = (ctypes.c_uint64 * count)(*[0] * tensors, *passed, *[0] * (count - tensors - len(passed)))
        start, size = ctypes.addressof(self._values), ctypes.sizeof(ctypes.c_uint64)
        self._places = (ctypes.c_void_p * count)(*(start + size * i for i in range(count)))
        metadata = compiled.metadata
        self._shape = (*(*grid, 1, 1)[:3], 32 * metadata.num_warps, 1, 1, metadata.shared)

    @staticmethod
    def can_do(compiled: Any, tensors: int, integers: tuple[int, ...]) -> bool:
        """Whether the kernel is one that can be launched so: that is known of those of CUDA that are simple."""
        metadata = compiled.metadata
        simple = getattr(metadata, "num_ctas", 1) == 1 and not getattr(metadata, "launch_cooperative_grid", False)
        simple = simple and not getattr(metadata, "launch_pdl", False)
        if not simple or "ptx" not in compiled.asm or _driver() is None:
            return False
        wide = [parameter.endswith("64") for parameter in _parameters(compiled)]
        number = tensors + sum(integer != 1 for integer in integers)
        return all(wide[:tensors]) and number <= len(wide) <= number + 2 and all(wide[number:])

    def __call__(self, addresses: list[int]) -> bool:
        """Launches it; whether that could be done."""
        self._values[: self._tensors] = addresses  # type: ignore[assignment]
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        # The driver copies what it is given. It returns not 0 if, say, this thread has not used CUDA before.
        return not _driver()(self._compiled.function, *self._shape, stream, self._places, None)


def _parameters(compiled: Any) -> list[str]:
    """The types of a kernel's parameters, as "u64" and "u32", in order."""
    header = re.search(r"\.entry[^(]*\(([^)]*)\)", compiled.asm["ptx"])
    return re.findall(r"\.param\s+\.(\w+)", header.group(1)) if header else []


@functools.cache
def _driver() -> Any:
    """`cuLaunchKernel`, which keeps the interpreter's lock; None where there is no such driver."""
    try:
        function = ctypes.PyDLL("libcuda.so.1").cuLaunchKernel
    except (OSError, AttributeError):
        return None
    number = ctypes.c_uint
    function.argtypes = (
        *(ctypes.c_void_p, number, number, number, number, number, number, number),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
    )
    function.restype = ctypes.c_int
    return function
