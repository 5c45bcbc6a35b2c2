"""What travels between workers, and how autograd continues on the other side."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from fxsplit.compressors import Lossless
from fxsplit.compressors.base import Memory
from fxsplit.compressors.nodes import decode, encode
from fxsplit.errors import CompressorError, PlanError
from fxsplit.runtime.streams import Marks, brought, mark, to_host
from fxsplit.spec import TensorSpec
from fxsplit.stage import Edge


class Key(NamedTuple):
    """Names one packet: which run, which edge, which micro-batch, which direction."""

    run: int
    value: str
    source: int
    target: int
    micro_batch: int
    backward: bool

    def __str__(self) -> str:
        what = "gradient of" if self.backward else "value"
        return f"{what} {self.value} (stage {self.source} to {self.target}, micro-batch {self.micro_batch})"


@dataclass(frozen=True)
class Packet:
    """One value of an edge.

    Attributes:
        payload: what the compressor made of the tensor; the tensor itself if it is not compressed.
        spec: of the tensor; None if the value is no tensor.
        requires_grad: whether the sender waits for a gradient.
        value: the value, if it is no tensor.
        checksum: of key and payload, if the packet crosses a link; see `checksum_of`.
        marks: behind the work that makes the payload, if that is on a GPU; they stay in their process.
        origin: the sender, and the packet's number among all from there to its receiver, if it crosses a link.
        is_lent: whether what is on a GPU is the sender's own memory, which the receiver must leave as it is.
    """

    payload: tuple[Tensor, ...]
    spec: TensorSpec | None = None
    requires_grad: bool = False
    value: Any = None
    checksum: int | None = None
    marks: Marks = ()
    origin: tuple[str, int] | None = None
    is_lent: bool = False

    @property
    def raw_bytes(self) -> int:
        """Bytes before compression."""
        return self.spec.nbytes if self.spec is not None else 0

    @property
    def wire_bytes(self) -> int:
        """Bytes of tensors that cross the link."""
        return sum(tensor.nbytes for tensor in self.payload)


def checksum_of(key: Key, packet: Packet) -> int:
    """CRC-32 of what a packet is, and of the bytes of its payload, as far as that is on the CPU.

    What goes from GPU to GPU is not looked at.
    """
    names = (
        *key,
        packet.origin,
        packet.spec,
        packet.requires_grad,
        [(str(t.dtype), *t.shape) for t in packet.payload],
    )
    found = zlib.crc32(repr(names).encode())
    for tensor in packet.payload:
        if tensor.numel() and not tensor.is_cuda:
            found = zlib.crc32(elements_of(tensor).view(torch.uint8).numpy().data, found)
    return found


def elements_of(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory, whatever its strides; a view, [elements]."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def pack(value: Any, edge: Edge, key: Key, memory: Memory | None = None) -> Packet:
    """Encodes the value of an edge (or its gradient) for sending.

    Args:
        value: the value.
        edge: where it goes.
        key: what it is.
        memory: what the compressor kept of the value before; None: it works without.

    Raises:
        CompressorError: the compressor does not take this tensor; the message names the edge.
    """
    if not isinstance(value, Tensor):
        _refuse_gradients_in(value, key)
        return Packet((), value=value)
    codec = edge.gradient_compressor if key.backward else edge.compressor
    tensor = value.detach()
    spec = TensorSpec.of(tensor)
    if isinstance(codec, Lossless):
        return Packet((tensor,), spec, value.requires_grad)
    try:
        return Packet(encode(codec, tensor, memory), spec, value.requires_grad)
    except CompressorError as error:
        raise error.at(f"the {key}, edge {edge.value}, stage {edge.source} to {edge.target}") from error


def ready_to_send(
    key: Key, packet: Packet, direct: torch.device | None, origin: tuple[str, int] | None = None
) -> Packet:
    """A packet whose tensors own just their elements, with its checksum.

    Args:
        key: what it is.
        packet: to be sent to another process.
        direct: the CUDA device from which tensors go directly; others go by way of the CPU.
        origin: the sender, and the packet's number.
    """
    compact = replace(packet, payload=tuple(_compact(tensor, direct) for tensor in packet.payload), origin=origin)
    return replace(compact, checksum=checksum_of(key, compact))


def _compact(tensor: Tensor, direct: torch.device | None) -> Tensor:
    """A tensor that owns just its elements: RPC would send the whole storage of a slice.

    Args:
        tensor: to be sent.
        direct: the CUDA device from which tensors go directly; others go by way of the CPU.
    """
    tensor = tensor.detach()
    if tensor.is_cuda and tensor.device != direct:
        return to_host(tensor)
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        return tensor.clone(memory_format=torch.preserve_format)
    return tensor


def marked(packet: Packet) -> Packet:
    """The packet, with marks behind what is queued now on the current streams of its payload's devices."""
    marks = mark(packet.payload)
    return replace(packet, marks=marks) if marks else packet


def _refuse_gradients_in(value: Any, key: Key) -> None:
    """An object takes its tensors along as they are: a gradient would not find its way back through it."""
    held = [*pytree.tree_leaves(value), *getattr(value, "__dict__", {}).values()]
    if any(isinstance(item, Tensor) and item.requires_grad for item in held):
        raise PlanError(
            f"an object with tensors that need a gradient crosses a cut: the {key}",
            found=f"a {type(value).__name__}",
            allowed="tensors, and tuples, lists and dicts of them",
            hint="cut where single tensors cross",
        )


def unpack(packet: Packet, edge: Edge, backward: bool, device: torch.device, memory: Memory | None = None) -> Any:
    """Decodes a packet on the receiver's device, with what the compressor kept of the value before, if it did.

    What comes out is for the current stream of the device.
    """
    if packet.spec is None:
        return packet.value
    codec = edge.gradient_compressor if backward else edge.compressor
    payload = brought(packet.payload, packet.marks, device)
    if packet.is_lent:
        payload = tuple(t.clone() if t is lent else t for t, lent in zip(payload, packet.payload, strict=True))
    return payload[0] if isinstance(codec, Lossless) else decode(codec, payload, packet.spec, memory)


class GradientTap:
    """Lets autograd begin at a received tensor and keeps the gradient that arrives there.

    The tensor is no leaf, so that the stage may change it in place, as the unsplit model does.

    Attributes:
        tensor: the received tensor.
        anchor: where autograd's graph ends behind the tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        # The graph must not lead back to this object: such a circle through C++ is never freed.
        self._arrival = _Arrival()
        start: list[Tensor] = [tensor.data]  # a view could not be changed in place
        with torch.enable_grad():  # the client's stages run inside an autograd function's forward
            self.anchor = torch.empty(0, requires_grad=True)
            self.tensor: Tensor = _Tap.apply(self.anchor, start, self._arrival)

    @property
    def gradient(self) -> Tensor | None:
        """What arrived; None before the backward, and if nothing did."""
        return self._arrival.gradient


class _Arrival:
    """Where a gradient is put down."""

    gradient: Tensor | None = None


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, start: list[Tensor], arrival: _Arrival) -> Tensor:
        ctx.arrival = arrival
        return start.pop()  # not an argument of its own: autograd would take the result for a view of it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.arrival.gradient = gradients[0]
        return None, None, None
