"""Stages of a cost table: given the cuts, which nodes are in which part and which values become edges."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

from fxsplit.compressors.base import Compressor
from fxsplit.compressors.exact import exact_coding
from fxsplit.compressors.learned import split_learned
from fxsplit.compressors.registry import Asked, compressor, compressors
from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.errors import CompressorError
from fxsplit.planning.devices import Placement
from fxsplit.planning.parts import NO_COMPRESSOR, Edge, Part, is_local
from fxsplit.planning.profile import NodeSeconds, Profile, Split, seconds_per_mac
from fxsplit.planning.recompute import Needs
from fxsplit.spec import TensorSpec
from fxsplit.trace.effects import layout_name

AUTO = "auto"
"""Default of `gradient_compressor`: what the compressor of the activations wants for gradients."""

SAME = "same"
"""The gradients go through the compressor of the activations."""


@dataclass(frozen=True)
class Codecs:
    """The compressors of the two directions, one for each cut; an edge has those of the cut before its target.

    Attributes:
        forward: compress activations.
        backward: compress their gradients.
        edges: value and target stage of edges that have others -> theirs, there and back.
    """

    forward: tuple[Compressor, ...]
    backward: tuple[Compressor, ...]
    edges: Mapping[tuple[str, int], tuple[Compressor, Compressor]] = field(default_factory=dict)

    @classmethod
    def of(cls, forward: Asked, backward: Asked, cuts: int) -> Codecs:
        """From what users write; `AUTO` takes for each cut what its compressor wants, `SAME` the same.

        Raises:
            CompressorError: unknown ones, or not one for each cut.
        """
        cuts = max(cuts, 1)
        found = compressors(forward, cuts)
        if isinstance(backward, str) and backward in (AUTO, SAME):
            back = found if backward == SAME else tuple(each.for_gradients() for each in found)
            back = tuple(split_learned(each)[1] for each in back)
        else:
            back = compressors(backward, cuts)
        for each in back:
            if split_learned(each)[0] is not None:
                raise CompressorError(
                    "a learned compressor is none for gradients",
                    found=each,
                    hint="the gradient goes back through its layers by itself",
                )
        return cls(found, back)

    @property
    def all(self) -> tuple[Compressor, ...]:
        """Each that is used."""
        return tuple(dict.fromkeys((*self.forward, *self.backward, *chain.from_iterable(self.edges.values()))))

    def of_edge(self, value: str, target: int) -> tuple[Compressor, Compressor]:
        """The compressors of an activation that a stage gets, and of its gradient."""
        return self.edges.get((value, target)) or (self.forward[target - 1], self.backward[target - 1])

    def edge(self, value: Value, source: int, target: int, workers: tuple[str, ...]) -> Edge:
        """The edge of `value` between two stages.

        The model's inputs and outputs cross without loss, and so does what may not be compressed. A gradient
        has the shape and dtype of its value and flows back wherever the value depends on a parameter.
        """
        wire, gradient, forward, backward = value.nbytes, 0, NO_COMPRESSOR, NO_COMPRESSOR
        if is_local(source, target, workers):
            wire = 0
        elif not value.is_compressible and value.spec is not None and target != len(workers):
            wire = exact_coding(value.spec).wire_bytes(value.spec)
        elif value.is_compressible:
            gradient = value.nbytes
            if source != -1 and target != len(workers) and value.spec is not None:
                there, back = self.of_edge(value.name, target)
                try:
                    wire, gradient = _wire_bytes(there, back, value.spec)
                except CompressorError as error:
                    raise error.at(f"edge {value.name}, stage {source} to {target}") from None
                forward, backward = str(there), str(back)
        return Edge(value.name, source, target, value.spec, value.nbytes, wire, gradient, forward, backward)


def _wire_bytes(there: Compressor, back: Compressor, spec: TensorSpec) -> tuple[int, int]:
    """Bytes of a value and of its gradient; the gradient is that of what a learned compressor makes."""
    learned, _ = split_learned(there)
    crossing = spec if learned is None else learned.reduced(spec)
    return there.wire_bytes(spec), back.wire_bytes(crossing)


@dataclass(frozen=True)
class _Sums:
    """Of the nodes of a stage."""

    modules: tuple[str, ...]
    macs: int
    parameter_bytes: int
    static_bytes: int
    saved_bytes: int
    seconds: NodeSeconds
    split: Split
    is_measured: bool


@dataclass(frozen=True)
class Stages:
    """A cost table cut at the nodes `positions`, ascending indices, one fewer than there are placements.

    With `needs`, one a stage, only these values cross; without, every value that is used.
    """

    costs: CostTable
    placements: tuple[Placement, ...]
    positions: tuple[int, ...]
    needs: tuple[Needs, ...] = ()
    profile: Profile = field(default_factory=Profile)
    states: int | None = 0

    @cached_property
    def workers(self) -> tuple[str, ...]:
        """The worker of each stage."""
        return tuple(placement.worker for placement in self.placements)

    def edges(self, codecs: Codecs) -> tuple[Edge, ...]:
        """Every value made by one stage and needed by another, one edge for each that needs it."""
        return tuple(
            codecs.edge(value, source, target, self.workers)
            if is_whole
            else _layout_edge(value, max(source, 0), target)
            for value, source, target, is_whole in self.crossings
        )

    @cached_property
    def crossings(self) -> list[tuple[Value, int, int, bool]]:
        """Value, source, target and whether it is sent whole or its layout alone, of each edge; in their order."""
        found = []
        for value in self.costs.values:
            source = -1 if value.producer < 0 else self._stage_of(value.producer)
            found += [(value, source, target, True) for target in self._targets(value) if target != source]
            found += [
                (value, source, target, False)
                for target, needs in enumerate(self.needs)
                if value.name in needs.layouts
            ]
        return sorted(found, key=lambda each: (each[1] if each[3] else max(each[1], 0), each[2]))

    def parts(self, edges: Iterable[Edge], chunks: int = 1, live: Sequence[int] | None = None) -> tuple[Part, ...]:
        """What each stage holds and costs; `live` of the `chunks` micro-batches are kept at one time, or all."""
        received: dict[int, int] = defaultdict(int)
        for edge in edges:
            if not is_local(edge.source, edge.target, self.workers):
                received[edge.target] += edge.raw_bytes
        inserted = _inserted_macs(edges)
        parts = []
        for stage, placement in enumerate(self.placements):
            own = self._sums[stage]
            calls_s = chunks * own.seconds.call_s
            learned_s = inserted[stage] * seconds_per_mac(placement)
            forward_s = own.seconds.forward_s + calls_s + learned_s
            kept = own.saved_bytes + received[stage]
            backward_s = own.seconds.backward_s + chunks * own.seconds.backward_call_s + 2 * learned_s
            share = chunks if live is None else live[stage]
            part = Part(
                stage=stage,
                device=placement.spelling,
                worker=placement.worker,
                modules=own.modules,
                macs=own.macs + inserted[stage],
                parameter_bytes=own.parameter_bytes,
                memory_bytes=own.static_bytes + -(-kept * share // chunks),
                kept_bytes=kept,
                forward_s=forward_s,
                step_s=forward_s + backward_s,
                input_s=own.split.input * backward_s,
                weight_s=own.split.weight * backward_s,
                is_measured=own.is_measured,
            )
            parts.append(part)
        return tuple(parts)

    def _split(self, stage: int, placement: Placement) -> Split:
        """Of a stage's backward; nobody waits for gradients of the model's inputs, so there is but one part."""
        is_awaited = any(
            v.is_compressible and s >= 0 and t == stage and whole for v, s, t, whole in self.crossings
        )
        return self.profile.split(placement) if is_awaited else Split(1.0, 0.0)

    @cached_property
    def _sums(self) -> list[_Sums]:
        """What the nodes of each stage cost, whatever the codecs and the micro-batches."""
        homes = _module_stages(self.costs.nodes, self._stage_of)
        sums = []
        for stage, placement in enumerate(self.placements):
            nodes = self.costs.nodes[self._start(stage) : self._start(stage + 1)]
            done = [*nodes, *(self.costs[name] for name in (self.needs[stage].recomputed if self.needs else ()))]
            seconds = [self.profile.node(node, placement) for node in done]
            own = _Sums(
                _whole_modules(nodes, homes),
                sum(node.forward_macs for node in done),
                sum(node.parameter_bytes for node in nodes),
                sum(node.static_bytes(self.states) for node in nodes),
                sum(node.saved_bytes for node in done),
                NodeSeconds(
                    sum(each.forward_s for each in seconds),
                    sum(each.backward_s for each in seconds),
                    sum(each.call_s for each in seconds),
                    sum(each.backward_call_s for each in seconds),
                ),
                self._split(stage, placement),
                self.profile.is_measured(placement, done),
            )
            sums.append(own)
        return sums

    def _start(self, stage: int) -> int:
        """Index of the first node of a stage; past the last stage, of the end."""
        return 0 if stage == 0 else self.positions[stage - 1] if stage < len(self.placements) else len(self.costs)

    def stage_of(self) -> list[int]:
        """The stage of each node."""
        return [self._stage_of(node) for node in range(len(self.costs))]

    def _targets(self, value: Value) -> list[int]:
        """The stages that get the value whole; the number of stages stands for the client, which gets outputs."""
        used = list(dict.fromkeys(self._user(consumer) for consumer in value.consumers))
        if not self.needs:
            return used
        needing = [stage for stage, needs in enumerate(self.needs) if value.name in needs.values]
        return needing + [target for target in used if target == len(self.placements)]

    def _stage_of(self, node: int) -> int:
        return bisect_right(self.positions, node)

    def _user(self, consumer: int) -> int:
        """The stage of a consumer; the model's output counts as one stage more."""
        return len(self.placements) if consumer >= len(self.costs) else self._stage_of(consumer)


def _inserted_macs(edges: Iterable[Edge]) -> dict[int, int]:
    """MACs of the layers that learned compressors put into each stage."""
    macs: dict[int, int] = defaultdict(int)
    for edge in edges:
        learned, _ = split_learned(compressor(edge.compressor))
        if learned is not None and edge.spec is not None:
            for stage, count in zip((edge.source, edge.target), learned.forward_macs(edge.spec), strict=True):
                macs[stage] += count
    return macs


def _layout_edge(value: Value, source: int, target: int) -> Edge:
    """Shape and dtype of a value: no tensor, and no bytes to speak of."""
    name = layout_name(value.name)
    return Edge(name, source, target, None, 0, 0, 0, NO_COMPRESSOR, NO_COMPRESSOR)


def _module_stages(nodes: Sequence[NodeCost], stage_of: Callable[[int], int]) -> dict[str, set[int]]:
    """For each module, the stages in which it or a module inside it makes a node."""
    homes: dict[str, set[int]] = defaultdict(set)
    for index, node in enumerate(nodes):
        for module in _ancestry(node.module):
            homes[module].add(stage_of(index))
    return homes


def _whole_modules(nodes: Iterable[NodeCost], homes: dict[str, set[int]]) -> tuple[str, ...]:
    """The outermost modules of `nodes` that are in one stage only."""
    whole: dict[str, None] = {}
    for node in nodes:
        outermost = next((module for module in _ancestry(node.module) if len(homes[module]) == 1), None)
        if outermost is not None:
            whole[outermost] = None
    return tuple(whole)


def _ancestry(module: str) -> list[str]:
    """The module and those around it, outermost first: 'a.b.c' gives 'a', 'a.b', 'a.b.c'; the model none."""
    names = module.split(".") if module else []
    return [".".join(names[: depth + 1]) for depth in range(len(names))]
