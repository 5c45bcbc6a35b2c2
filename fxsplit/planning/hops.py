"""Seconds of all that one stage sends to another, for very many candidates at once."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fxsplit.compressors import Compressor, Lossless
from fxsplit.compressors.learned import split_learned
from fxsplit.planning.bounds import FloatArray, HopBound
from fxsplit.planning.devices import Placement
from fxsplit.planning.problem import Option, Problem
from fxsplit.planning.profile import PACKET_S

IntArray = NDArray[np.int64]

Pair = tuple[int, int]
"""A stage that sends and one that receives; one past the last stage receives the model's outputs."""

Number = TypeVar("Number", np.int64, np.float64)

FIXED = EDGES, GRADIENTS, RAW, CODED, CODED_RAW = range(5)  # then the bytes by codec, there and back
"""Rows of the sums over edges; then come the bytes by codec, there and back."""

_Hop = tuple[FloatArray, FloatArray, FloatArray, FloatArray]


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


LEAST = (
    _COUNT, _COUNT_BACK, LEAST_RAW, BYTES, BYTES_BACK,
    ENCODE, _WIRE, _DECODE, _TOTAL, ENCODE_BACK, _WIRE_BACK, _DECODE_BACK, _TOTAL_BACK,
) = range(13)  # fmt: skip
"""Columns of `least_columns`."""

TICK_S = 1e-12
"""Unit of its times: whole numbers, which sums of differences do not round."""

_MOST_TICKS = 10**15


def least_columns(problem: Problem, option: Option, weights: IntArray, source: int, target: int) -> IntArray:
    """What an edge for each use adds to the sums between two stages, each with the least of its codecs.

    Args:
        problem: what may be chosen.
        option: the stages' devices and the number of micro-batches.
        weights: [uses, columns], see `FIXED`.
        source: the stage that sends; -1 for the model's inputs.
        target: the stage that receives; their number for the model's outputs.

    Returns:
        [uses, 13], see `LEAST`.
    """
    made = np.zeros((len(weights), len(LEAST)), np.int64)
    made[:, :3] = weights[:, :3]
    columns, first = weights.T, len(FIXED) + len(problem.codecs_there)
    if target == len(option.placements):  # the client gets outputs as they are
        made[:, BYTES], made[:, BYTES_BACK] = columns[len(FIXED)], columns[first]
        return made
    cut, ends = option.cuts[target - 1], (option.placements[max(source, 0)], option.placements[target])
    for count, start, at, codecs, allowed, sender, receiver in (
        (EDGES, len(FIXED), ENCODE, problem.codecs_there, problem.forward[cut], *ends),
        (GRADIENTS, first, ENCODE_BACK, problem.codecs_back, problem.backward[cut], ends[1], ends[0]),
    ):
        made[:, BYTES if count == EDGES else BYTES_BACK] = columns[[start + i for i in allowed]].min(0)
        hops = [
            hop_seconds(problem, option.chunks, columns, count, columns[start + i], codecs[i], sender, receiver)[
                :3
            ]
            for i in allowed
        ]
        seconds = np.array([(*hop, sum(hop)) for hop in hops]).min(0)
        made[:, at : at + 4] = np.minimum(seconds / TICK_S, _MOST_TICKS).T.astype(np.int64)
    return made


def least_hops(problem: Problem, sums: IntArray, workers: tuple[str, str]) -> tuple[HopBound, HopBound]:
    """The bounds of a hop, there and back, from the sums of `least_columns`: [13, ...]."""

    def bound(count: int, at: int, sender: str, receiver: str) -> HopBound:
        encode, wire, decode, total = (TICK_S * sums[at + piece] for piece in range(4))
        latency = problem.links.between(sender, receiver).latency_s * (sums[count] > 0)
        return HopBound(total, latency, encode, wire, decode)

    return bound(_COUNT, ENCODE, *workers), bound(_COUNT_BACK, ENCODE_BACK, *reversed(workers))


def add_hop(hops: dict[Pair, HopBound], pair: Pair, hop: HopBound) -> None:
    """Adds a hop: the model's inputs go with what the first stage makes, and a latency is paid once."""
    known = hops.get(pair)
    if known is not None:
        latency = np.maximum(known.latency, hop.latency)
        hop = HopBound(
            known.total + hop.total,
            latency,
            known.encode + hop.encode,
            known.wire + hop.wire,
            known.decode + hop.decode,
        )
    hops[pair] = hop
