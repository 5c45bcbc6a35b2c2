"""Floating point numbers of 8 bits, with one scale for the tensor or for each group of elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxsplit.compressors.base import Compressor
from fxsplit.compressors.floating import check_floating, plain, wide_dtype
from fxsplit.compressors.grouping import Layout, check_group, check_rounding, group_of, tiles
from fxsplit.compressors.kernels import finite_extremes, float_kernels_for, kernels_for
from fxsplit.compressors.scheme import Scheme, seeds_of, value_table
from fxsplit.compressors.torch_kernels import block_size
from fxsplit.errors import CompressorError, nearest
from fxsplit.spec import TensorSpec

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
"""The formats and their dtypes; the largest number of either is 0.875 times a power of two."""

ALL_NUMBERS = 256
"""Of 8 bits."""

TABLE_SHARE = 64
"""Tables for groups have at most one in so many numbers of the tensor, two for each of a group's 8-bit numbers."""


@dataclass(frozen=True)
class Float8(Compressor):
    """Elements as 8-bit floating point numbers, after division by a power of two.

    The scale is the least power of two that brings every element of its group into the range of the format, so
    that dividing and multiplying by it are exact: the only error is the rounding to the format's significant bits.
    An element x is off by at most |x| * 2**-4 (e4m3) or |x| * 2**-3 (e5m2), or by scale * 2**-10 or
    scale * 2**-17 where that is more; the largest |x| is between 224 and 448, or 28672 and 57344, scales. With
    stochastic rounding it is off by at most twice as much.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433.

    Args:
        format: "e4m3", 4 significant bits, for activations; or "e5m2", 3 bits and a range 2**14 times wider,
            for gradients.
        group: which elements share a scale; see `Quantization`.
        rounding: "nearest", ties to even; or "stochastic", one of the two numbers around x / scale, so that the
            mean of what is received is x. The random numbers depend on the element's place and on its group's
            extremes and a few of its elements (`scheme.seeds_of`). See `Quantization`.

    Wire: uint8 of the tensor's shape, the bits of the 8-bit numbers; and the scale `[1]` for group "tensor" and
    `[groups]` for others, float64 for a float64 tensor and float32 for all others.

    Raises:
        CompressorError: an option is none of these.

    >>> str(Float8(format="e5m2"))
    'fp8(format=e5m2)'
    """

    name: ClassVar[str] = "fp8"

    format: str = "e4m3"
    group: str | int = field(default="tensor", kw_only=True)
    rounding: str = field(default="nearest", kw_only=True)

    def __post_init__(self) -> None:
        """Checks the options."""
        check_group(self.group, f"{self.name}: group")
        check_rounding(self.rounding, f"{self.name}: rounding")
        if self.format not in FORMATS:
            raise CompressorError(
                "unknown format",
                where=f"{self.name}: format",
                found=repr(self.format),
                allowed=", ".join(FORMATS),
                hint=nearest(str(self.format), FORMATS),
            )

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The specs of the numbers and of the scales.

        Raises:
            CompressorError: the dtype of `spec` is not a floating point type of 16, 32 or 64 bits, or the tensor
                cannot be divided into blocks of `group` elements.
        """
        check_floating(self, spec)
        groups = self._layout(spec).groups
        return TensorSpec(spec.shape, torch.uint8), TensorSpec((groups,), wide_dtype(spec.dtype))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Numbers and scales of `x`, of any shape and strides.

        On an accelerator this waits for the device once, to know the largest values.

        Raises:
            CompressorError: `x` is not floating point, holds NaN or infinity, or cannot be divided into blocks
                of `group` elements.
        """
        numbers_spec, scale_spec = self.wire(TensorSpec.of(x))
        values, layout, wide = plain(x).view(-1), self._layout(TensorSpec.of(x)), scale_spec.dtype
        if values.numel() == 0:
            scale = self._scales(torch.zeros(scale_spec.shape, dtype=torch.float64), wide)
            return torch.empty(numbers_spec.shape, dtype=torch.uint8, device=x.device), scale.to(x.device)
        extremes = finite_extremes(self, values, layout)
        low, high = extremes.cpu()
        largest = torch.maximum(high, -low)
        scale = self._scales(largest, wide).to(x.device)
        if self.rounding == "stochastic":
            kernels, seeds = float_kernels_for(values.device, values.numel()), seeds_of(values, layout, extremes)
            numbers = kernels.round_at_random(values, 1 / scale.double(), seeds, layout, FORMATS[self.format])
        else:
            numbers, inverse = values.new_empty(values.numel(), dtype=FORMATS[self.format]), 1 / scale
            size = min(block_size(values.device), values.numel())
            scaled = values.new_empty(size, dtype=wide)
            for tile in tiles(layout, size):
                block = scaled[: tile.numel].view(tile.shape)
                tile.of(numbers).copy_(torch.mul(tile.of(values), tile.by_group(inverse), out=block))
        return numbers.view(torch.uint8).view(x.shape), scale

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """Numbers times scales, in the dtype of `spec`.

        Raises:
            CompressorError: the payload is not what `wire(spec)` announces.
        """
        self.check_payload(payload, spec)
        (numbers, scale), layout = payload, self._layout(spec)
        codes = numbers.reshape(-1)
        # By table: few processors can convert these numbers.
        every = torch.arange(ALL_NUMBERS, dtype=torch.uint8, device=scale.device)
        every = every.view(FORMATS[self.format]).to(scale.dtype)
        if layout.groups == 1 or layout.groups * ALL_NUMBERS <= spec.numel // TABLE_SHARE:
            table = value_table(every * scale[:, None])
            return kernels_for(codes.device, spec.numel).decode(codes, table, Scheme(layout, 8, 8), spec)
        limits, decoded = torch.finfo(spec.dtype), torch.empty(spec.numel, dtype=spec.dtype, device=scale.device)
        for tile in tiles(layout, block_size(scale.device)):
            found = every[tile.of(codes).to(torch.int32)].mul_(tile.by_group(scale))
            tile.of(decoded).copy_(found.clamp_(limits.min, limits.max))
        return decoded.view(spec.shape)

    def _layout(self, spec: TensorSpec) -> Layout:
        return Layout.of(spec, group_of(self.group, spec, 8, wide_dtype(spec.dtype).itemsize))

    def _scales(self, largest: Tensor, wide: torch.dtype) -> Tensor:
        """The powers of two, in a dtype in which they and their inverses are normal, however small the values.

        Args:
            largest: float64 `[groups]` on the CPU, the largest magnitudes.
            wide: the dtype.
        """
        fraction, exponent = torch.frexp(largest)  # fraction in [0.5, 1)
        top = math.frexp(torch.finfo(FORMATS[self.format]).max)[1]
        lowest = 2 - math.frexp(torch.finfo(wide).max)[1]
        exponent = (exponent - top + (fraction > 0.875)).clamp_(min=lowest)
        return (exponent.long() + 1023 << 52).view(torch.float64).to(wide)  # `ldexp` and `exp2` may be off
