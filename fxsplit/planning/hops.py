"""Seconds of all that one stage sends to another, for very many candidates at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fxsplit.compressors import Compressor, Lossless
from fxsplit.compressors.learned import split_learned
from fxsplit.planning.bounds import FloatArray, HopBound
from fxsplit.planning.devices import Placement
from fxsplit.planning.problem import Problem
from fxsplit.planning.profile import PACKET_S

IntArray = NDArray[np.int64]

Pair = tuple[int, int]
"""A stage that sends and one that receives; one past the last stage receives the model's outputs."""

Number = TypeVar("Number", np.int64, np.float64)

FIXED = EDGES, GRADIENTS, RAW, CODED, CODED_RAW = range(5)  # then the bytes by codec, there and back
"""Rows of the sums over edges; then come the bytes by codec, there and back."""

_Hop = tuple[FloatArray, FloatArray, FloatArray, FloatArray]


@dataclass(frozen=True)
class Least:
    """The least over the codecs that may be chosen."""

    allowed: tuple[int, ...]

    def __call__(self, arrays: Sequence[NDArray[Number]]) -> NDArray[Number]:
        """The arrays are by codec."""
        return reduce(np.minimum, [arrays[codec] for codec in self.allowed])


@dataclass(frozen=True)
class Laid:
    """The codecs that may be chosen, laid along an axis of their own."""

    allowed: tuple[int, ...]
    axis: int

    def __call__(self, arrays: Sequence[NDArray[Number]]) -> NDArray[Number]:
        """The arrays are by codec."""
        return np.concatenate([arrays[codec] for codec in self.allowed], self.axis)


Choice = Least | Laid
CodecChoices = Sequence[tuple[Choice, Choice]]


def hop_seconds(
    problem: Problem,
    chunks: int,
    sums: IntArray,
    count: int,
    wire: IntArray,
    codec: Compressor,
    sender: Placement,
    receiver: Placement,
) -> _Hop:
    """Encoder, link, decoder and latency for one micro-batch with one codec."""
    profile, link = problem.profile, problem.links.between(sender.worker, receiver.worker)
    fixed = PACKET_S * sums[count]
    is_sent = sums[count] > 0
    encode, decode = fixed, np.zeros_like(fixed)
    rest = split_learned(codec)[1]
    if not isinstance(codec, Lossless):
        there, here = profile.codec(rest, sender), profile.codec(rest, receiver)
        raw = sums[CODED_RAW] / chunks
        encode = encode + there.call_s * sums[CODED] + there.encode_s_per_byte * raw
        decode = here.call_s * sums[CODED] + here.decode_s_per_byte * raw
    return encode, wire / chunks / link.bytes_per_s, decode, link.latency_s * is_sent


def add_hop(hops: dict[Pair, HopBound], pair: Pair, by_codec: Sequence[_Hop], choose: Choice) -> None:
    """Adds a hop, with the least of each of its times over the codecs that may be chosen."""
    encode, wire, decode = (choose([hop[i] for hop in by_codec]) for i in range(3))
    total = choose([e + w + d for e, w, d, _ in by_codec])
    latency = by_codec[0][3]
    known = hops.get(pair)
    if known is not None:  # the model's inputs go with what the first stage makes; a latency is paid once
        total, latency = known.total + total, np.maximum(known.latency, latency)
        encode, wire, decode = known.encode + encode, known.wire + wire, known.decode + decode
    hops[pair] = HopBound(total, latency, encode, wire, decode)
