"""No compression: the tensor itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxsplit.compressors.base import Compressor
from fxsplit.spec import TensorSpec


@dataclass(frozen=True)
class Lossless(Compressor):
    """Sends the tensor as it is: any dtype, bit for bit, NaN and infinity included.

    >>> str(Lossless())
    'none'
    """

    name: ClassVar[str] = "none"

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The spec itself."""
        return (spec,)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The tensor, detached and contiguous; it shares memory with `x` where `x` is contiguous already."""
        # A lazily conjugated or negated view is not yet the bytes that it stands for.
        return (x.detach().resolve_conj().resolve_neg().contiguous(),)

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """The tensor that was sent; shares memory with the payload.

        Raises:
            CompressorError: the payload is not one tensor of `spec`.
        """
        self.check_payload(payload, spec)
        return payload[0].contiguous()
