"""Two devices where the branches of a model may go to either side: a minimum cut, solved exactly.

Stages are runs of the model's order of execution. A model with branches has more ways to be cut in two: any set of
nodes with which all that they need is on the client too. With one micro-batch nothing overlaps, so that a step is
a sum: of each node on its side, and of each value that crosses, forward and backward, with the codec that is least
for it. The least sum is a minimum cut (Stone, Multiprocessor scheduling with the aid of network flow algorithms,
1977), and bounds every plan of these two devices with one micro-batch:

    begin -> n          seconds of n on the server, forward and backward
    n -> end            seconds of n on the client
    maker -> v          seconds to send v, and its gradient back; of an input, from begin
    v -> user           infinite: a user on the server needs v there
    user -> maker       infinite: nothing goes forward from the server to the client
    n -> n it is behind infinite: random numbers, changes in place and sums keep their order

The client's nodes, run first, are a prefix of another order of the same graph, so that such a division runs as a
cut of the model in that order (`fxsplit.trace.ordering`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx

from fxsplit.compressors import Compressor, Lossless
from fxsplit.compressors.learned import split_learned
from fxsplit.costs import CostTable, Value
from fxsplit.errors import CompressorError, PlanError
from fxsplit.planning.devices import Placement
from fxsplit.planning.links import Links
from fxsplit.planning.profile import PACKET_S, Profile
from fxsplit.planning.stages import Codecs

MOST_NODES = 2_000
"""Nodes of a model for which the cut is looked for: the time of a maximum flow grows faster than they do."""

_Side = frozenset[int]


@dataclass(frozen=True)
class Bipartition:
    """The best way to divide a model between two devices.

    Attributes:
        client: names of the nodes on the client, in the order of the graph.
        server: names of the nodes on the other device.
        step_s: predicted seconds of a training step with one micro-batch; no division comes below it.
        is_run: whether the client has the nodes up to one place, so that a plan with one cut, or none, is this.
    """

    client: tuple[str, ...]
    server: tuple[str, ...]
    step_s: float
    is_run: bool

    def moved(self, costs: CostTable) -> tuple[str, ...]:
        """The client's nodes that the model's own order has behind the server's first one."""
        if not self.server:
            return ()
        names, here = [node.name for node in costs.nodes], set(self.client)
        first = next(place for place, name in enumerate(names) if name not in here)
        return tuple(name for name in names[first:] if name in here)


@dataclass(frozen=True)
class Division:
    """What is divided, and what may be chosen.

    Attributes:
        costs: of the model.
        placements: the client's device and the other one, of another worker.
        links: between them.
        profile: speeds.
        there: codecs for activations.
        back: codecs for gradients.
    """

    costs: CostTable
    placements: tuple[Placement, Placement]
    links: Links
    profile: Profile
    there: tuple[Compressor, ...] = (Lossless(),)
    back: tuple[Compressor, ...] = (Lossless(),)

    def __post_init__(self) -> None:
        if self.placements[0].worker == self.placements[1].worker:
            found = " and ".join(placement.spelling for placement in self.placements)
            raise PlanError("a model is divided between two workers", found=found, allowed="two different ones")

    def node_s(self, index: int, side: int) -> float:
        """Seconds of a node on one of the devices, forward and backward."""
        seconds = self.profile.node(self.costs.nodes[index], self.placements[side])
        return seconds.forward_s + seconds.backward_s + seconds.call_s + seconds.backward_call_s

    def value_s(self, value: Value) -> tuple[float, float]:
        """Least seconds to send a value, and its gradient back, without latencies; 0 where no gradient flows."""
        client, server = self.placements
        kind = (-1, 1) if value.producer < 0 else (0, 1)
        there, back = list[float](), list[float]()
        for codec in self.there:
            for gradient_codec in self.back:
                try:
                    edge = Codecs((codec,), (gradient_codec,)).edge(value, *kind, (client.worker, server.worker))
                except CompressorError:  # not for this value
                    continue
                used = codec if edge.is_compressed else Lossless()
                used_back = gradient_codec if edge.is_compressed else Lossless()
                there.append(self._hop_s(edge.raw_bytes, edge.wire_bytes, used, client, server))
                if edge.gradient_wire_bytes:
                    count = edge.gradient_wire_bytes
                    back.append(self._hop_s(edge.raw_bytes, count, used_back, server, client))
        return min(there), min(back, default=0.0)

    def _hop_s(self, raw: int, wire: int, codec: Compressor, sender: Placement, receiver: Placement) -> float:
        rest = split_learned(codec)[1]
        encode, decode = self.profile.codec(rest, sender), self.profile.codec(rest, receiver)
        coding_s = encode.call_s + decode.call_s + (encode.encode_s_per_byte + decode.decode_s_per_byte) * raw
        return PACKET_S + coding_s + wire / self.links.between(sender.worker, receiver.worker).bytes_per_s

    def crossing(self, client: _Side) -> Iterator[Value]:
        """The values that go from the client to the server."""
        for value in self.costs.values:
            is_here = value.producer < 0 or value.producer in client
            used = [node for node in value.consumers if node < len(self.costs)]
            if is_here and any(node not in client for node in used):
                yield value

    def step_s(self, client: _Side) -> float:
        """Seconds of a step with these nodes on the client."""
        seconds = sum(self.node_s(index, 0 if index in client else 1) for index in range(len(self.costs)))
        sent = [self.value_s(value) for value in self.crossing(client)]
        one, other = (placement.worker for placement in self.placements)
        latency = self.links.between(one, other).latency_s if sent else 0.0
        latency += self.links.between(other, one).latency_s if any(back for _, back in sent) else 0.0
        return seconds + sum(there + back for there, back in sent) + latency


def best_bipartition(division: Division) -> Bipartition:
    """The least step with one micro-batch over all divisions in which nothing goes forward to the client.

    Budgets are not kept, and nothing is computed twice. A latency is paid once for each direction, which no cut
    can say: so the best cut, the best one without gradients, and no cut at all are compared.

    Raises:
        PlanError: the model has more than `MOST_NODES` nodes.
    """
    costs = division.costs
    if len(costs) > MOST_NODES:
        allowed = f"{MOST_NODES} nodes"
        raise PlanError("the model is too large for a minimum cut", found=len(costs), allowed=allowed)
    everything = frozenset(range(len(costs)))
    sides = [everything, _least_cut(division, with_gradients=True), _least_cut(division, with_gradients=False)]
    best = min(sides, key=division.step_s)
    names = [node.name for node in costs.nodes]
    return Bipartition(
        tuple(name for index, name in enumerate(names) if index in best),
        tuple(name for index, name in enumerate(names) if index not in best),
        division.step_s(best),
        best == frozenset(range(len(best))),
    )


def _least_cut(division: Division, *, with_gradients: bool) -> _Side:
    """The nodes on the client's side of a minimum cut, which pays for no latency."""
    graph, costs = nx.DiGraph(), division.costs
    for index in range(len(costs)):
        graph.add_edge("begin", index, capacity=_picoseconds(division.node_s(index, 1)))
        graph.add_edge(index, "end", capacity=_picoseconds(division.node_s(index, 0)))
    places = {node.name: place for place, node in enumerate(costs.nodes)}
    for place, node in enumerate(costs.nodes):
        graph.add_edges_from((place, places[name]) for name in node.behind)
    for value in costs.values:
        used = [node for node in value.consumers if node < len(costs)]
        if not used:
            continue
        there_s, back_s = division.value_s(value)
        maker: object = "begin" if value.producer < 0 else value.producer
        if with_gradients or not back_s:
            graph.add_edge(maker, value.name, capacity=_picoseconds(there_s + back_s))
        else:
            graph.add_edge(maker, value.name)
        for user in used:
            graph.add_edge(value.name, user)
            if value.producer >= 0:
                graph.add_edge(user, value.producer)
    _, (client, _) = nx.minimum_cut(graph, "begin", "end")
    return frozenset(node for node in client if isinstance(node, int))


def _picoseconds(seconds: float) -> int:
    """Whole numbers, so that the flow is exact."""
    return round(seconds * 1e12)
