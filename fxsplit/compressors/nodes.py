"""The graph nodes of a compressor: encode on one side of an edge, decode on the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fxsplit.compressors.base import Compressor
from fxsplit.spec import TensorSpec


class Encode(nn.Module):
    """Turns a tensor into the packet that crosses the edge.

    A packet is `(carrier, *payload)`: the payload is what the compressor makes; the carrier has the tensor's
    shape and dtype but a single element of memory, and leads the gradient back in autograd's graph.
    """

    def __init__(self, compressor: Compressor) -> None:
        super().__init__()
        self.compressor = compressor

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The packet of `x`."""
        packet: tuple[Tensor, ...] = _Encode.apply(x, self.compressor)
        return packet

    def extra_repr(self) -> str:
        """The compressor's spelling."""
        return str(self.compressor)


class Decode(nn.Module):
    """Rebuilds the tensor on the other side; its gradient goes back through the gradient compressor."""

    def __init__(self, compressor: Compressor, gradient_compressor: Compressor) -> None:
        super().__init__()
        self.compressor = compressor
        self.gradient_compressor = gradient_compressor

    def forward(self, packet: tuple[Tensor, ...]) -> Tensor:
        """The tensor that was encoded, as the compressor gives it back."""
        carrier, *payload = packet
        x: Tensor = _Decode.apply(carrier, self.compressor, self.gradient_compressor, *payload)
        return x

    def extra_repr(self) -> str:
        """Both compressors' spellings."""
        return f"{self.compressor}, gradient {self.gradient_compressor}"


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, compressor: Compressor) -> tuple[Tensor, ...]:
        payload = compressor.encode(x)
        ctx.mark_non_differentiable(*payload)
        return x.new_zeros(()).expand(x.shape), *payload

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None  # straight through: the gradient does not see the rounding


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, compressor: Compressor, back: Compressor, *payload: Tensor) -> Tensor:
        ctx.back = back
        ctx.payload_count = len(payload)
        # `.data`: the next operation may work in place, which autograd refuses on a view made in here.
        return compressor.decode(payload, TensorSpec.of(carrier)).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        received = ctx.back.decode(ctx.back.encode(gradient), TensorSpec.of(gradient))
        return received, None, None, *(None,) * ctx.payload_count
