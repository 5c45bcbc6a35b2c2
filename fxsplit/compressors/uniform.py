"""Uniform quantization: one range for the tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxsplit.compressors.quantization import Quantization


@dataclass(frozen=True)
class Uniform(Quantization):
    """2**bits equally spaced values from the tensor's minimum to its maximum.

    Args:
        bits: bits an element, 2 to 16.

    Wire: codes, uint8 `[ceil(n * bits / 8)]`; table `[2, 1]`, minimum and step. The error of an element is at
    most half a step.

    Raises:
        CompressorError: `bits` is not an integer in that range.

    >>> str(Uniform(bits=4))
    'uniform4'
    """

    name: ClassVar[str] = "uniform"

    @property
    def split_bits(self) -> int:
        """No bits choose a bucket: there is one."""
        return 0

    def ranges(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The minimum and the maximum of all values."""
        low, high = torch.aminmax(values)
        return low.double().reshape(1), high.double().reshape(1)
