"""Casts: the tensor in a floating point dtype of 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxsplit.compressors.base import Compressor
from fxsplit.compressors.floating import check_floating, narrow, plain, widen
from fxsplit.compressors.grouping import Layout, check_rounding
from fxsplit.compressors.kernels import finite_extremes, float_kernels_for
from fxsplit.compressors.scheme import seeds_of
from fxsplit.spec import TensorSpec


@dataclass(frozen=True)
class Cast(Compressor):
    """Base of the casts. A subclass says to which dtype.

    Wire: one tensor of the same shape in `dtype`, 2 bytes an element. Where the tensor is of that dtype already,
    it is sent as it is. There is no `group`: these numbers have their own exponents, and nothing is shared.

    Args:
        rounding: "nearest" number of the dtype, ties to even (from float64 by way of float32); or "stochastic",
            one of the two around the element, so that the mean of what is received is the element, also of those
            too small for the dtype. The random numbers depend on the element's place and on the tensor's
            extremes and a few of its elements (`scheme.seeds_of`); the sender alone needs them. It is off by at
            most twice as much.

    Raises:
        CompressorError: `rounding` is neither.
    """

    dtype: ClassVar[torch.dtype]

    rounding: str = field(default="nearest", kw_only=True)

    def __post_init__(self) -> None:
        """Checks the rounding."""
        check_rounding(self.rounding, f"{self.name}: rounding")

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The same shape in `dtype`.

        Raises:
            CompressorError: the dtype of `spec` is not a floating point type of 16, 32 or 64 bits.
        """
        check_floating(self, spec)
        return (TensorSpec(spec.shape, self.dtype),)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """`x` in `dtype`; it shares memory with `x` where `x` is contiguous and of that dtype already.

        On an accelerator this waits for the device once, to know that the values are finite.

        Raises:
            CompressorError: `x` is not floating point, holds NaN or infinity, or values beyond the dtype's.
        """
        check_floating(self, TensorSpec.of(x))
        values = plain(x)
        if self.rounding == "nearest" or x.dtype == self.dtype or x.numel() == 0:
            return (narrow(self, values, self.dtype),)
        return (self._rounded_at_random(values.view(-1)).view(x.shape),)

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """The values in the dtype of `spec`.

        Raises:
            CompressorError: the payload is not what `wire(spec)` announces.
        """
        self.check_payload(payload, spec)
        return widen(payload[0].contiguous(), spec.dtype)

    def _rounded_at_random(self, values: Tensor) -> Tensor:
        layout, device = Layout(1, 1, values.numel()), values.device
        extremes = finite_extremes(self, values, layout)
        if not bool(extremes.to(values.dtype).to(self.dtype).isfinite().all()):
            narrow(self, values, self.dtype)  # refuses them as it does when it rounds to the nearest
        one = torch.ones(1, dtype=torch.float64, device=device)
        kernels = float_kernels_for(device, values.numel())
        return kernels.round_at_random(values, one, seeds_of(values, layout, extremes), layout, self.dtype)


@dataclass(frozen=True)
class Float16(Cast):
    """IEEE half precision: 11 significant bits, magnitudes up to 65504.

    An element is off by at most 2**-11 of itself, and below 2**-14 by at most 2**-25: gradients without loss
    scaling may vanish. Values that round to more than 65504 are refused, not clamped.

    >>> str(Float16())
    'fp16'
    """

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[torch.dtype] = torch.float16


@dataclass(frozen=True)
class BFloat16(Cast):
    """The upper half of float32: 8 significant bits and float32's range.

    An element is off by at most 2**-8 of itself. Where `fp16` overflows or gradients vanish in it, this
    does neither.

    >>> str(BFloat16())
    'bf16'
    """

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16
