"""Launching Triton's kernels with less work on the host.

Triton looks at every argument of every launch to find the compiled kernel, which takes several times as long
as the launch. Here all that the choice depends on is looked up at once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

MAX_KEPT = 1024
"""Launches that are remembered of each kernel."""


class Launcher:
    """A kernel of Triton whose arguments are tensors, then integers, then constants.

    >>> Launcher(kernel)((programs,), (x, y), (count,), {"BLOCK": 1024}, num_warps=8)  # doctest: +SKIP
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

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
            integers: of at most 64 bits.
            constants: by name.
            options: of the compilation, such as `num_warps`; the same ones at every launch with the same
                constants, which always come in the same order.
        """
        # Triton compiles anew for other dtypes, addresses that are not multiples of 16, and some integers.
        addresses = tuple((tensor.dtype, tensor.data_ptr() & 15) for tensor in tensors)
        key = (tensors[0].device, addresses, integers, *constants.values())
        if (found := self._compiled.get(key)) is not None:
            compiled, ordered = found
            compiled[(*grid, 1, 1)[:3]](*tensors, *integers, *ordered)
            return
        compiled = self._kernel[grid](*tensors, *integers, **constants, **options)
        if compiled is not None:  # as it is under the interpreter
            if len(self._compiled) >= MAX_KEPT:
                self._compiled.clear()
            names = self._kernel.arg_names
            self._compiled[key] = compiled, tuple(constants[name] for name in names if name in constants)
