"""Which values are computed again on the receiving side because that is cheaper than sending them.

Masks, position ids and rotary tables follow from the model's inputs or from shapes alone. Sent, each costs its
bytes and a packet; computed again, it costs its operations and whatever they need. For every stage this is a
minimum cut, solved exactly: a value is on the near side if the stage does without it, on the far side if the
stage has it. (AOTAutograd's partitioner puts what is saved and what is recomputed for a backward in the same
way: `torch._functorch.partitioners.min_cut_rematerialization_partition`.)

    begin -> v          seconds to compute v again; infinite if it cannot be
    v -> v'             seconds to send v; nothing if it is on the stage's worker, or crosses anyway
    u' -> v             infinite, for each input u of v: to compute v again, the stage has to have u
    v' -> end           infinite, for each value v that the stage's own nodes use

Where only the layout of u is read (shape, dtype, device), the layout stands for u: it is sent as a packet without
bytes, or follows from u where the stage has u.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx

from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.planning.devices import CLIENT, Placement
from fxsplit.planning.links import Links
from fxsplit.planning.profile import PACKET_S, seconds_per_mac

OPERATION_S = 1e-5
"""Estimated seconds of one torch operation on a small tensor."""

MEMORY_BYTES_PER_S = 5e9
"""Estimated rate at which an operation reads and writes large tensors."""


@dataclass(frozen=True)
class Needs:
    """What one stage has to get from elsewhere.

    Attributes:
        recomputed: names of the nodes that it computes again, in the order of the graph.
        values: names of the values that are sent to it.
        layouts: names of the values of which only the layout is sent.
    """

    recomputed: tuple[str, ...] = ()
    values: frozenset[str] = frozenset()
    layouts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Flow:
    """The values of a cost table as a graph: who makes, who uses."""

    costs: CostTable
    values: Mapping[str, Value] = field(init=False)
    inputs: Mapping[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        inputs: dict[str, list[str]] = defaultdict(list)
        for value in self.costs.values:
            for consumer in value.consumers:
                if consumer < len(self.costs):
                    inputs[self.costs.nodes[consumer].name].append(value.name)
        object.__setattr__(self, "values", {value.name: value for value in self.costs.values})
        object.__setattr__(self, "inputs", {name: tuple(used) for name, used in inputs.items()})

    def maker(self, name: str) -> NodeCost | None:
        """The node that makes a value; None for an input of the model."""
        producer = self.values[name].producer
        return self.costs.nodes[producer] if producer >= 0 else None

    def is_sendable(self, name: str) -> bool:
        """Whether it is a tensor or a number: a tuple of tensors is sent as its tensors."""
        maker = self.maker(name)
        return self.values[name].spec is not None or maker is None or maker.output_bytes == 0

    def nbytes(self, name: str) -> int:
        """Bytes of a value; of all tensors in it, if it is a tuple or an object."""
        maker = self.maker(name)
        return self.values[name].nbytes or (maker.output_bytes if maker else 0)

    def needs(self, used: Uses, recomputed: frozenset[str], local: frozenset[str]) -> Needs:
        """What is sent to a stage that uses these values and computes those nodes again."""
        whole = set(used.whole - recomputed)
        layouts = set(used.layouts)
        for name in recomputed:
            maker = self.maker(name)
            assert maker is not None
            whole |= {u for u in self.inputs.get(name, ()) if u not in maker.layout_inputs}
            layouts |= set(maker.layout_inputs)
        whole |= layouts & local  # what is here needs no stand-in
        whole -= recomputed
        order = sorted(recomputed, key=lambda name: self.values[name].producer)
        return Needs(tuple(order), frozenset(whole), frozenset(layouts - whole - recomputed))


@dataclass(frozen=True)
class Uses:
    """The values from elsewhere that the nodes of one stage use: whole, or of which they read the layout alone."""

    whole: frozenset[str]
    layouts: frozenset[str]

    @classmethod
    def of(cls, costs: CostTable, stage: int, stage_of: Sequence[int]) -> Uses:
        """Those of a stage."""
        whole, layouts = set[str](), set[str]()
        for value in costs.values:
            if value.producer >= 0 and stage_of[value.producer] == stage:
                continue
            for consumer in value.consumers:
                if consumer < len(costs) and stage_of[consumer] == stage:
                    is_layout = value.name in costs.nodes[consumer].layout_inputs
                    (layouts if is_layout else whole).add(value.name)
        return cls(frozenset(whole), frozenset(layouts - whole))


def least_needs(
    costs: CostTable, placements: Sequence[Placement], stage_of: Sequence[int], links: Links
) -> tuple[Needs, ...]:
    """For every stage, what is sent to it and what it computes again, so that the sum of both takes least time.

    Args:
        costs: of the batch.
        placements: one a stage.
        stage_of: the stage of each node of the cost table.
        links: what the links are assumed to do.
    """
    flow = Flow(costs)
    homes = {v.name: CLIENT if v.producer < 0 else placements[stage_of[v.producer]].worker for v in costs.values}
    found = []
    for stage, placement in enumerate(placements):
        used = Uses.of(costs, stage, stage_of)
        local = frozenset(name for name, home in homes.items() if home == placement.worker)
        rates = {home: links.between(home, placement.worker).bytes_per_s for home in set(homes.values())}

        def send_s(name: str, rates: Mapping[str, float] = rates) -> float:
            return PACKET_S + flow.values[name].nbytes / rates[homes[name]]

        found.append(flow.needs(used, _recomputed(flow, used, local, send_s, seconds_per_mac(placement)), local))
    return tuple(found)


def _recomputed(
    flow: Flow, used: Uses, local: frozenset[str], send_s: Callable[[str], float], mac_s: float
) -> frozenset[str]:
    candidates = [name for name in used.whole - local if _is_recomputable(flow, name)]
    if not candidates and not used.layouts:
        return frozenset()
    free = local | {name for name in used.whole if not _is_recomputable(flow, name)}
    graph = nx.DiGraph()
    pending, done = [*candidates, *used.layouts], set[str]()
    while pending:
        name = pending.pop()
        if name in done:
            continue
        done.add(name)
        if name in free:
            graph.add_edge(("begin", name), ("have", name), capacity=0)
        elif flow.is_sendable(name):
            graph.add_edge(("begin", name), ("have", name), capacity=_nanoseconds(send_s(name)))
        else:
            graph.add_edge(("begin", name), ("have", name))
        # With the value comes its layout; alone, it costs a packet without bytes.
        graph.add_edge(("have", name), ("layout", name), capacity=_nanoseconds(PACKET_S))
        maker = flow.maker(name)
        if maker is None or name in free or not _is_recomputable(flow, name):
            graph.add_edge("begin", ("begin", name))
            continue
        graph.add_edge("begin", ("begin", name), capacity=_nanoseconds(_compute_s(flow, maker, mac_s)))
        for of in flow.inputs.get(name, ()):
            graph.add_edge(("layout" if of in maker.layout_inputs else "have", of), ("begin", name))
            pending.append(of)
    graph.add_edges_from((("have", name), "end") for name in candidates)
    graph.add_edges_from((("layout", name), "end") for name in used.layouts)
    _, (near, _) = nx.minimum_cut(graph, "begin", "end")
    return frozenset(name for name in done if ("begin", name) not in near)


def _nanoseconds(seconds: float) -> int:
    """Whole numbers, so that the flow is exact."""
    return round(seconds * 1e9)


def _is_recomputable(flow: Flow, name: str) -> bool:
    maker = flow.maker(name)
    return maker is not None and maker.is_repeatable and not flow.values[name].is_activation


def _compute_s(flow: Flow, node: NodeCost, mac_s: float) -> float:
    read = sum(flow.nbytes(name) for name in flow.inputs.get(node.name, ()) if name not in node.layout_inputs)
    moved = node.operations * (read + node.output_bytes)
    return node.operations * OPERATION_S + moved / MEMORY_BYTES_PER_S + node.forward_macs * mac_s
