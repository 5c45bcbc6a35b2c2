"""The compiled loops of `chain`; importing this loads numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from fxsplit.compressors.numba_support import kernel


@kernel
def shortest_paths(
    forward: Any, backward: Any, weights: Any, limits: Any, hops: Any, pair: Any, leaves_out: bool,
    longest_there: float, longest_back: float,
) -> Any:  # fmt: skip
    """Least sums by device and place, where each stage begins, and the device before it."""
    devices, places = forward.shape
    cost = np.full((devices, places), np.inf)
    begin = np.zeros((devices, places), np.int64)
    before = np.full((devices, places), -1, np.int64)
    window = np.zeros(places, np.int64)
    entry = np.full(places, np.inf)
    for device in range(devices):
        for place in range(places):
            entry[place] = np.inf
            if device == 0:
                if place == 0:
                    entry[place] = 0.0
                continue
            for source in range(0 if leaves_out else device - 1, device):
                way = cost[source, place] + hops[pair[source, device], place]
                if way < entry[place]:
                    entry[place] = way
                    before[device, place] = source
            entry[place] -= forward[device, place] + backward[device, place]
        if device == 0 and leaves_out:
            cost[0, 0] = 0.0
        head, tail, low = 0, 0, 0
        for place in range(1, places):
            start = place - 1
            if entry[start] < np.inf:
                while tail > head and entry[window[tail - 1]] >= entry[start]:
                    tail -= 1
                window[tail] = start
                tail += 1
            while low < place and _is_too_much(
                forward, backward, weights, limits, device, low, place, longest_there, longest_back
            ):
                low += 1
            while tail > head and window[head] < low:
                head += 1
            if tail > head:
                chosen = window[head]
                cost[device, place] = entry[chosen] + forward[device, place] + backward[device, place]
                begin[device, place] = chosen
    return cost, begin, before


@kernel
def _is_too_much(
    forward: Any, backward: Any, weights: Any, limits: Any, device: int, start: int, end: int,
    longest_there: float, longest_back: float,
) -> bool:  # fmt: skip
    """Whether a stage from one place to another is too long, or too large for its device."""
    if forward[device, end] - forward[device, start] > longest_there:
        return True
    if backward[device, end] - backward[device, start] > longest_back:
        return True
    for kind in range(weights.shape[0]):
        if weights[kind, end] - weights[kind, start] > limits[device, kind]:
            return True
    return False
