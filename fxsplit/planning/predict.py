"""Prediction of what a plan takes: its stages, codecs and links, in the simulation of its schedule.

The times of a micro-batch go into `fxsplit.schedules.simulate`, the simulation by which steps are checked before
they run. What the client feeds goes to a stage as if the first stage had made it: both are on the client. The
model's outputs are in the bytes of the links, and in the time of inference; in a training step they are not, since
the loss is made where the last stage is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, lcm
from typing import Any

from fxsplit.compressors import Compressor, Lossless, compressor
from fxsplit.compressors.learned import split_learned
from fxsplit.planning.devices import CLIENT, Placement
from fxsplit.planning.links import Link, Links
from fxsplit.planning.parts import NO_COMPRESSOR, Edge, Part, is_local
from fxsplit.planning.profile import PACKET_S, Profile
from fxsplit.schedules import Action, Hop, Schedule, StageTimes, Times
from fxsplit.schedules.action import dealt
from fxsplit.schedules.replicas import check_replicas, replica_counts, replicas_of, share_of
from fxsplit.schedules.simulation import replayed

OBJECTIVES = ("step", "latency", "throughput", "price")
"""What a plan may be made for: seconds of a training step, of an inference batch, of a batch in a steady stream
of inference batches, and the price of a training step."""


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        name: one of `OBJECTIVES`.
        price_per_h: device as written -> what an hour of it costs; for the price.
    """

    name: str = "step"
    price_per_h: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_training(self) -> bool:
        """Whether there are backwards."""
        return self.name in ("step", "price")

    def price_per_s(self, devices: Iterable[str]) -> float:
        """What a second of these devices costs; 1 where no price is asked for."""
        if self.name != "price":
            return 1.0
        return sum(self.price_per_h.get(device, 0.0) for device in set(devices)) / 3600.0


@dataclass(frozen=True)
class Outcome:
    """What is predicted of a plan.

    Attributes:
        seconds: of a training step, or of the forwards of a batch; infinite if they are more than were asked for.
        live: micro-batches that each stage keeps at one time, at most.
    """

    seconds: float
    live: tuple[int, ...]


def times_of(
    parts: Sequence[Part],
    edges: Iterable[Edge],
    placements: Sequence[Placement],
    links: Links,
    profile: Profile,
    chunks: int,
    *,
    with_outputs: bool = False,
) -> Times:
    """Times of one micro-batch; with outputs, of one more stage: the client, which gets them and does nothing."""
    workers = tuple(placement.worker for placement in placements)
    stages = stage_times(parts, chunks, links.between)
    if with_outputs:
        stages, placements = (*stages, StageTimes(0.0, 0.0, 0.0)), (*placements, placements[0])
    forward: dict[tuple[int, int], Hop] = defaultdict(Hop)
    backward: dict[tuple[int, int], Hop] = defaultdict(Hop)
    for edge in edges:
        if is_local(edge.source, edge.target, workers) or edge.target == len(stages):
            continue
        pair = max(edge.source, 0), edge.target
        here, there = placements[pair[0]], placements[pair[1]]
        add = (edge.raw_bytes, edge.wire_bytes, edge.compressor)
        forward[pair] = _and(forward[pair], hop_of(*add, here, there, links, profile, chunks))
        if edge.gradient_wire_bytes:
            back = (edge.raw_bytes, edge.gradient_wire_bytes, edge.gradient_compressor)
            backward[pair] = _and(backward[pair], hop_of(*back, there, here, links, profile, chunks))
    return Times(stages, forward, backward)


def stage_times(parts: Sequence[Part], chunks: int, between: Callable[[str, str], Link]) -> tuple[StageTimes, ...]:
    """Times of the stages for one micro-batch.

    Args:
        parts: the stages.
        chunks: micro-batches.
        between: the link between two workers; between the replicas of a stage, if both are the stage's.
    """
    return tuple(
        StageTimes(
            part.forward_s / chunks,
            part.input_s / chunks,
            part.weight_s / chunks,
            max(1, part.kept_bytes // chunks),
            (part.step_s - part.forward_s) / chunks,
            all_reduce_s(part.parameter_bytes, part.worker, between),
        )
        for part in parts
    )


def all_reduce_s(nbytes: Any, worker: str, between: Callable[[str, str], Link]) -> Any:
    """Seconds of the ring all-reduce of a stage's gradients; none without replicas, or without gradients.

    Each of n replicas sends 2 (n - 1) pieces, an n-th of the gradients each, one after another (Patarasuk and
    Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009).

    Args:
        nbytes: of the gradients: a number, or an array over candidates, as the result then is.
        worker: of the stage, or its replicas.
        between: the link between two workers; between the replicas of a stage, if both are the stage's.
    """
    replicas = len(replicas_of(worker))
    if replicas == 1:
        return 0.0 * nbytes
    link = between(worker, worker)
    return 2 * (replicas - 1) * (nbytes / replicas / link.bytes_per_s + (nbytes > 0) * link.latency_s)


def hop_of(
    raw_bytes: int,
    wire_bytes: int,
    codec: str | Compressor,
    sender: Placement,
    receiver: Placement,
    links: Links,
    profile: Profile,
    chunks: int,
) -> Hop:
    """What one value takes from one device to another, for one micro-batch of a batch of these bytes."""
    link: Link = links.between(sender.worker, receiver.worker)
    encode_s, decode_s = PACKET_S, 0.0
    if codec != NO_COMPRESSOR and not isinstance(codec, Lossless):
        rest = split_learned(compressor(codec))[1]
        there, here = profile.codec(rest, sender), profile.codec(rest, receiver)
        encode_s += there.call_s + there.encode_s_per_byte * raw_bytes / chunks
        decode_s += here.call_s + here.decode_s_per_byte * raw_bytes / chunks
    return Hop(encode_s, wire_bytes / chunks / link.bytes_per_s, link.latency_s, decode_s)


def _and(one: Hop, other: Hop) -> Hop:
    """Both in one packet."""
    return Hop(
        one.encode_s + other.encode_s,
        one.wire_s + other.wire_s,
        max(one.latency_s, other.latency_s),
        one.decode_s + other.decode_s,
    )


def outcome_of(
    times: Times,
    workers: Sequence[str],
    chunks: int,
    schedule: Schedule,
    objective: Objective,
    most_s: float = inf,
) -> Outcome:
    """What the simulation says; infinite seconds, without it, if a training step is seen not to be below `most_s`.

    Raises:
        PlanError: the schedule is not for these stages and micro-batches.
    """
    if objective.is_training:
        clock = schedule.simulated(workers, chunks, times, most_s)
        if clock is None:
            return Outcome(inf, (chunks,) * len(workers))
        return Outcome(clock.step_s, tuple(clock.most_live))
    check_replicas(workers, chunks)
    live = (1,) * len(workers)
    if objective.name == "throughput":
        busy: dict[object, float] = defaultdict(float)
        counts = replica_counts(workers)
        share = {n: share_of(chunks, n) / chunks for n in {lcm(a, b) for a in counts for b in counts}}
        for stage, worker in enumerate(workers):
            busy[worker] += share[counts[stage]] * times.stages[stage].forward_s
        for (source, target), hop in times.forward.items():
            busy[workers[source], "encode"] += share[counts[source]] * hop.encode_s
            busy[workers[source], workers[target]] += share[lcm(counts[source], counts[target])] * hop.wire_s
            busy[workers[target], "decode"] += share[counts[target]] * hop.decode_s
        return Outcome(chunks * max(busy.values()), live)
    return Outcome(replayed(forward_orders(workers, chunks), workers, times).step_s, live)


def forward_orders(workers: Sequence[str], chunks: int) -> dict[str, list[Action]]:
    """What each worker does in inference: the micro-batches of its first stage, then of the next."""
    orders: dict[str, list[Action]] = {worker: [] for worker in workers}
    for stage, worker in enumerate(workers):
        orders[worker] += [Action(stage, m) for m in range(chunks)]
    return dealt(orders)


def link_bytes(
    edges: Iterable[Edge], workers: tuple[str, ...], *, with_gradients: bool = True
) -> dict[tuple[str, str], int]:
    """Bytes of a batch on the wire from one worker to another, activations and gradients together."""
    sent: dict[tuple[str, str], int] = defaultdict(int)
    for edge in edges:
        if not is_local(edge.source, edge.target, workers):
            maker = CLIENT if edge.source == -1 else workers[edge.source]
            user = CLIENT if edge.target == len(workers) else workers[edge.target]
            sent[maker, user] += edge.wire_bytes
            sent[user, maker] += edge.gradient_wire_bytes if with_gradients else 0
    return dict(sent)


def moved_bytes(edges: Iterable[Edge], *, is_training: bool = True) -> int:
    """Bytes of a batch over all links, with gradients if there are any."""
    return sum(edge.wire_bytes + (edge.gradient_wire_bytes if is_training else 0) for edge in edges)
