"""What devices, codecs and links take: measured where that was done, else estimated, and then said to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxsplit.compressors.base import Compressor
from fxsplit.compressors.lossless import Lossless
from fxsplit.costs import NodeCost
from fxsplit.planning.devices import Placement
from fxsplit.planning.links import Link

MACS_PER_S: Mapping[str, float] = {"cpu": 2.5e10, "cuda": 5e12, "mps": 1e12}
"""Estimated multiply-accumulate operations per second, by type of device."""

OPERATION_S: Mapping[str, float] = {"cpu": 1e-5, "cuda": 1e-5, "mps": 2e-5}
"""Estimated seconds of one torch operation beside its arithmetic, by type of device: launch and Python."""

PACKET_S = 1e-4
"""Estimated seconds to send one more value, without its bytes: to pack, post, receive and unpack it."""

CODEC_BYTES_PER_S: Mapping[str, float] = {"cpu": 5e8, "cuda": 5e10, "mps": 5e9}
"""Estimated uncompressed bytes per second of an encoder or a decoder, by type of device."""


@dataclass(frozen=True)
class CodecSpeed:
    """Seconds of a codec on a device.

    Attributes:
        encode_s_per_byte: of the encoder, for a byte before compression.
        decode_s_per_byte: of the decoder, for a byte before compression.
        call_s: of either, for a call.
    """

    encode_s_per_byte: float = 0.0
    decode_s_per_byte: float = 0.0
    call_s: float = 0.0


@dataclass(frozen=True)
class NodeSeconds:
    """Seconds of a node on a device.

    Attributes:
        forward_s: of its forward, for the batch.
        backward_s: of its backward, for the batch.
        call_s: of either, for each micro-batch, whatever its size.
    """

    forward_s: float
    backward_s: float
    call_s: float = 0.0


@dataclass(frozen=True)
class Profile:
    """Speeds of devices and codecs.

    Attributes:
        nodes: device as written -> node name -> its measured seconds.
        codecs: spelling of a compressor and type of device -> its measured speed.
        links: (sending worker, receiving worker) -> its measured link.
    """

    nodes: Mapping[str, Mapping[str, NodeSeconds]] = field(default_factory=dict)
    codecs: Mapping[tuple[str, str], CodecSpeed] = field(default_factory=dict)
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)

    def node(self, node: NodeCost, placement: Placement) -> NodeSeconds:
        """Seconds of a node where it is placed; an estimate if they were not measured."""
        measured = self.nodes.get(placement.spelling, {}).get(node.name)
        if measured is not None:
            return measured
        rate = MACS_PER_S[placement.device_type]
        call_s = node.operations * OPERATION_S[placement.device_type]
        return NodeSeconds(node.forward_macs / rate, node.backward_macs / rate, call_s)

    def codec(self, codec: Compressor, device_type: str) -> CodecSpeed:
        """The speed of a codec on a type of device; an estimate if it was not measured."""
        if isinstance(codec, Lossless):
            return CodecSpeed()
        measured = self.codecs.get((str(codec), device_type))
        rate = 1.0 / CODEC_BYTES_PER_S[device_type]
        return CodecSpeed(rate, rate, 2 * OPERATION_S[device_type]) if measured is None else measured

    def is_measured(self, placement: Placement) -> bool:
        """Whether the nodes were measured on a device."""
        return placement.spelling in self.nodes


def seconds_per_mac(placement: Placement) -> float:
    """Estimated seconds of one forward MAC on a device."""
    return 1.0 / MACS_PER_S[placement.device_type]
