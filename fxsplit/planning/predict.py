"""Prediction of the time of a training step, from MACs, bytes and a few rates.

A batch is cut into m micro-batches that follow each other through stages and links (GPipe, Huang et al. 2019,
arXiv:1811.06965). A resource is a device, with the forward and backward of all its stages, or one direction
of the link between two workers, with all the bytes that go that way. A resource with T seconds of work for
the batch has T/m for a micro-batch. One micro-batch passes all resources one after another; the other m - 1
follow it at the pace of the busiest resource:

    step = sum(T) / m + (m - 1) / m * max(T) + latency * messages

A message is what one stage sends to another in one direction; its latency delays the micro-batch and does
not occupy the link, so that it is paid once a step and not once a micro-batch. This is an approximation: it
overlaps everything that can overlap, and takes parallel messages for consecutive ones.

The rates below are round estimates for a laptop's core and a data centre's accelerator, not measurements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fxsplit.costs import CostTable
from fxsplit.planning.budget import Budget
from fxsplit.planning.devices import CLIENT, Placement
from fxsplit.planning.parts import Edge, Part, is_local

MACS_PER_S: Mapping[str, float] = {"cpu": 2.5e10, "cuda": 5e12, "mps": 1e12}
"""Estimated multiply-accumulate operations per second, by type of device."""

BACKWARD_COST = 2.0
"""A backward takes this many forwards: a product for the inputs' gradients and one for the weights'."""

FloatArray = NDArray[np.float64]
Seconds = TypeVar("Seconds", float, FloatArray)


@dataclass(frozen=True)
class Link:
    """What the links between workers are assumed to do; the defaults are estimates for workers on one host.

    Attributes:
        bytes_per_s: bandwidth of each direction.
        latency_s: seconds from sending a message to its arrival, beyond its bytes.
    """

    bytes_per_s: float = 1e9
    latency_s: float = 3e-4

    @classmethod
    def of(cls, budget: Budget) -> Link:
        """The links as the budget assumes them."""
        bandwidth, latency = budget.bandwidth_bytes_per_s, budget.latency_s
        return cls(
            cls.bytes_per_s if bandwidth is None else bandwidth,
            cls.latency_s if latency is None else latency,
        )


def seconds_per_mac(placement: Placement) -> float:
    """Estimated seconds of one forward MAC on a device."""
    return 1.0 / MACS_PER_S[placement.device_type]


def pipelined(total: Seconds, busiest: Seconds, latency: Seconds, chunks: int) -> Seconds:
    """Seconds of a step; `total` and `busiest` are the sum and the maximum of the resources' seconds."""
    return (total + (chunks - 1) * busiest) / chunks + latency


def predicted_step_s(
    parts: Iterable[Part], edges: Iterable[Edge], workers: tuple[str, ...], link: Link, chunks: int
) -> float:
    """Predicted seconds of a training step of one batch, without the time of the compressors."""
    work: dict[object, float] = defaultdict(float)
    for part in parts:
        work[part.device] += part.step_s
    messages = set()
    for (sender, receiver), count in link_bytes(edges, workers).items():
        work[sender, receiver] = count / link.bytes_per_s
    for edge in edges:
        if not is_local(edge.source, edge.target, workers):
            messages.add((edge.source, edge.target, "activation"))
            if edge.gradient_wire_bytes:
                messages.add((edge.source, edge.target, "gradient"))
    return pipelined(sum(work.values()), max(work.values()), link.latency_s * len(messages), chunks)


def link_bytes(edges: Iterable[Edge], workers: tuple[str, ...]) -> dict[tuple[str, str], int]:
    """Bytes of a batch on the wire from one worker to another, activations and gradients together."""
    sent: dict[tuple[str, str], int] = defaultdict(int)
    for edge in edges:
        if not is_local(edge.source, edge.target, workers):
            maker = CLIENT if edge.source == -1 else workers[edge.source]
            user = CLIENT if edge.target == len(workers) else workers[edge.target]
            sent[maker, user] += edge.wire_bytes
            sent[user, maker] += edge.gradient_wire_bytes
    return dict(sent)


def lower_bound_s(
    costs: CostTable, placements: Sequence[Placement], positions: Sequence[int], chunks: int
) -> float:
    """Seconds below which `predicted_step_s` cannot come with cuts at any of the ascending `positions`.

    What is before the first position runs on the first device, what is after the last on the last device. No
    other MAC is cheaper than on the fastest device, and the busiest device has no less than when all are busy
    for equally long. Links are taken to be free.
    """
    macs = [(1.0 + BACKWARD_COST) * node.forward_macs for node in costs.nodes]
    if len(placements) == 1:
        ends = [(placements[0], sum(macs))]
    else:
        ends = [(placements[0], sum(macs[: positions[0]])), (placements[-1], sum(macs[positions[-1] :]))]
    rates = {placement.spelling: 1.0 / seconds_per_mac(placement) for placement in placements}
    fixed: dict[str, float] = defaultdict(float)
    for placement, count in ends:
        fixed[placement.spelling] += count * seconds_per_mac(placement)
    movable = max(sum(macs) - sum(count for _, count in ends), 0.0)
    total = sum(fixed.values()) + movable / max(rates.values())
    busiest = max(*fixed.values(), sum(macs) / sum(rates.values()))
    return pipelined(total, busiest, 0.0, chunks)
