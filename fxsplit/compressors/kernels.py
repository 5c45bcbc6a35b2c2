"""Which functions do the work of the quantizers on a device."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fxsplit.compressors import cpu_kernels, torch_kernels
from fxsplit.compressors.base import Compressor
from fxsplit.compressors.floating import not_finite
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.ranges import RangeRule, Ranges
from fxsplit.compressors.scheme import Scheme
from fxsplit.spec import TensorSpec

COMPILED_FROM = 1 << 14
"""For fewer elements, loading the compiler would take longer than it saves."""


class Kernels(Protocol):
    """What a module of kernels offers; see `torch_kernels`. All give the same numbers, bit for bit."""

    def extremes(self, values: Tensor, layout: Layout) -> Tensor:
        """The least and the greatest value of each group: float64 `[2, groups]`."""
        ...

    def order_statistics(self, values: Tensor, layout: Layout, ranks: Sequence[int]) -> Tensor:
        """The values of the given ranks, ascending, in each group: float64 `[groups, ranks]`."""
        ...

    def ranges(self, values: Tensor, layout: Layout, rule: RangeRule, levels: int, dtype: torch.dtype) -> Ranges:
        """The ranges that a rule asks for, and the table of `dtype` that is sent; NaN where this gives up."""
        ...

    def seeds(self, table: Tensor) -> Tensor:
        """The seed of each group, for stochastic rounding."""
        ...

    def encode(
        self, values: Tensor, minima: Tensor, inverse: Tensor, seeds: Tensor | None, scheme: Scheme
    ) -> Tensor:
        """The packed codes."""
        ...

    def decode(self, packed: Tensor, table: Tensor, scheme: Scheme, spec: TensorSpec) -> Tensor:
        """The tensor that codes and table stand for."""
        ...


def kernels_for(device: torch.device, count: int) -> Kernels:
    """The fastest kernels that work on a device, for a tensor of so many elements."""
    if device.type == "cpu" and count >= COMPILED_FROM and cpu_kernels.available():
        return cpu_kernels
    return _on_gpu(device) if device.type == "cuda" else torch_kernels


@functools.cache
def _on_gpu(device: torch.device) -> Kernels:
    if importlib.util.find_spec("triton") is not None:
        from fxsplit.compressors import cuda_kernels

        if cuda_kernels.available(device):
            return cuda_kernels
    return torch_kernels


def finite_extremes(codec: Compressor, values: Tensor, layout: Layout) -> Tensor:
    """The least and the greatest value of each group: float64 `[2, groups]`.

    On an accelerator this waits for the device once.

    Raises:
        CompressorError: there is NaN or infinity, which `codec` refuses.
    """
    extremes = kernels_for(values.device, values.numel()).extremes(values, layout)
    if not bool(extremes.isfinite().all()):
        raise not_finite(codec, values)
    return extremes


class FloatKernels(Protocol):
    """Work for which there are no kernels of a GPU's own: torch does it there. The numbers are the same."""

    def round_at_random(
        self, values: Tensor, inverse: Tensor, seeds: Tensor, layout: Layout, dtype: torch.dtype
    ) -> Tensor:
        """Stochastic rounding to a floating point dtype of 8 or 16 bits."""
        ...


def float_kernels_for(device: torch.device, count: int) -> FloatKernels:
    """The fastest that work on a device, for a tensor of so many elements."""
    compiled = device.type == "cpu" and count >= COMPILED_FROM and cpu_kernels.available()
    return cpu_kernels if compiled else torch_kernels
