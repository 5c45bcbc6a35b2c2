"""Cuts for very long models and many devices: dynamic programming over prefixes, nearly linear in the nodes.

GPipe's step of a chain is the sum of all forward times of a micro-batch, plus chunks - 1 times the longest of
them, and the same backward. With limits F and B on the longest, the least sum is a shortest path: one pass over
the nodes for each device, with a sliding window minimum over the places where its stage may begin. What remains
is a search over two numbers: a box of limits has as its bound the sum at its largest limits and the longest at its
smallest, and is halved until it cannot hold anything better. Inference is the forward half of it; in a steady
stream of batches the longest counts alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fxsplit.planning.bounds import FloatArray

IntArray = NDArray[np.int64]

MOST_PASSES = 400
"""Passes of dynamic programming for one number of chunks; what is then left makes the gap."""

GAP = 1e-9
"""Relative gap at which the search ends."""


@dataclass(frozen=True)
class Chain:
    """A model cut into consecutive stages, for one number of chunks; at the places a stage may begin or end.

    Attributes:
        forward: [devices, places], seconds of all nodes before a place, forward.
        backward: the same, backward.
        weights: [limits, places], sums of MACs, of bytes, ... before a place.
        limits: [devices, limits], how much of each weight a stage may have; infinite for no limit.
        there: [pairs of devices, places, codecs, 4], seconds of a hop forward: total, encoder, link, decoder.
        back: the same, backward.
        pair: [devices, devices], which pair two devices are.
        leaves_out: whether devices may be left out; the first may then begin and end at place 0.
        weight: what the longest counts: chunks - 1.
        total: what the sum counts: 1, or 0 in a steady stream.
    """

    forward: FloatArray
    backward: FloatArray
    weights: FloatArray
    limits: FloatArray
    there: FloatArray
    back: FloatArray
    pair: IntArray
    leaves_out: bool
    weight: float
    total: float = 1.0

    def of(self, devices: Sequence[int]) -> Chain:
        """The same with these devices alone."""
        kept = list(devices)
        return replace(
            self,
            forward=self.forward[kept],
            backward=self.backward[kept],
            limits=self.limits[kept],
            pair=self.pair[np.ix_(kept, kept)],
        )


class Path(NamedTuple):
    """A way to cut.

    Attributes:
        value: the step, or infinite if there is none; then nothing else is said.
        devices: those that have a stage.
        places: where their stages but the first begin.
        longest: the longest piece of work of a micro-batch, forward and backward.
    """

    value: float
    devices: tuple[int, ...]
    places: tuple[int, ...]
    longest: tuple[float, float]


class _Found(NamedTuple):
    sum_s: float  # as much of it as counts
    path: Path


def has_path(chain: Chain) -> bool:
    """Whether there is a way to cut within the limits."""
    return bool(np.isfinite(_solve(chain, np.inf, np.inf).sum_s))


def best_path(chain: Chain) -> tuple[Path, float]:
    """The best way to cut, and a bound below which none comes."""
    whole = _solve(chain, np.inf, np.inf)
    best, passes = whole.path, 1
    if not np.isfinite(best.value):
        return best, float("inf")
    # What is better has no greater sum of the longest, since no sum is less.
    has_back = bool(chain.backward.any() or chain.back[..., 1:].any())
    most = (sum(best.longest), sum(best.longest) if has_back else 0.0)
    boxes = [(whole.sum_s, 0, (0.0, 0.0), most, whole)]
    while boxes and boxes[0][0] < best.value * (1.0 - GAP) and passes < MOST_PASSES:
        _, _, least, most, found = heapq.heappop(boxes)
        axis = 0 if most[0] - least[0] >= most[1] - least[1] else 1
        middle = (least[axis] + most[axis]) / 2
        if not least[axis] < middle < most[axis]:
            continue
        upper = (middle, least[1]) if axis == 0 else (least[0], middle)
        lower = (middle, most[1]) if axis == 0 else (most[0], middle)
        inner = found
        if found.path.longest[axis] > middle:  # else the same way is the best with the lower limits, too
            inner = _solve(chain, *lower)
            best = min(best, inner.path)
        passes += 1
        for low, high, each in ((upper, most, found), (least, lower, inner)):
            bound = each.sum_s + chain.weight * sum(low)
            if bound < best.value:
                heapq.heappush(boxes, (bound, 2 * passes + (each is found), low, high, each))
    return best, min([best.value, *(box[0] for box in boxes)])


def _solve(chain: Chain, longest_there: float, longest_back: float) -> _Found:
    """The least sum with no piece of work longer than these."""
    there, back = _hops(chain.there, longest_there), _hops(chain.back, longest_back)
    from fxsplit.planning.chain_loops import shortest_paths  # loads the compiler

    cost, begin, before = shortest_paths(
        chain.forward, chain.backward, chain.weights, chain.limits, there[0] + back[0], chain.pair,
        chain.leaves_out, longest_there, longest_back,
    )  # fmt: skip
    last = cost[:, -1] if chain.leaves_out else np.append(np.full(len(cost) - 1, np.inf), cost[-1, -1])
    device, place = int(np.argmin(last)), cost.shape[1] - 1
    if not np.isfinite(last[device]):
        return _Found(np.inf, Path(float("inf"), (), (), (0.0, 0.0)))
    sum_s, devices, places, longest = float(last[device]), [device], list[int](), [0.0, 0.0]
    while True:
        start = int(begin[device, place])
        longest[0] = max(longest[0], chain.forward[device, place] - chain.forward[device, start])
        longest[1] = max(longest[1], chain.backward[device, place] - chain.backward[device, start])
        source = int(before[device, start]) if device > 0 else -1
        if source < 0:
            break
        pair = chain.pair[source, device]
        longest[0], longest[1] = max(longest[0], there[1][pair, start]), max(longest[1], back[1][pair, start])
        places.append(start)
        device, place = source, start
        devices.append(device)
    sum_s *= chain.total
    there_s, back_s = float(longest[0]), float(longest[1])
    value = sum_s + chain.weight * (there_s + back_s)
    return _Found(sum_s, Path(value, tuple(reversed(devices)), tuple(reversed(places)), (there_s, back_s)))


def _hops(seconds: FloatArray, longest: float) -> tuple[FloatArray, FloatArray]:
    """By pair and place: the least total of a codec none of whose pieces is too long, and its longest piece."""
    pieces = seconds[..., 1:].max(-1)
    totals = np.where(pieces <= longest, seconds[..., 0], np.inf)
    chosen = totals.argmin(-1)[..., None]
    return np.take_along_axis(totals, chosen, -1)[..., 0], np.take_along_axis(pieces, chosen, -1)[..., 0]


def chosen_codecs(seconds: FloatArray, pairs: Sequence[int], places: Sequence[int], longest: float) -> list[int]:
    """The codec of each hop of a path, as `_hops` chooses them."""
    found = []
    for pair, place in zip(pairs, places, strict=True):
        row = seconds[pair, place]
        found.append(int(np.where(row[:, 1:].max(-1) <= longest, row[:, 0], np.inf).argmin()))
    return found
