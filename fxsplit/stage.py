"""A stage: one part of the split model, and the ports by which values enter and leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxsplit.compressors import Compressor, Lossless
from fxsplit.trace.replay import check
from fxsplit.trace.transforms import transforms_closed


class Mode(NamedTuple):
    """Which of a model's recorded graphs runs.

    Attributes:
        variant: number of the recording: another way of calling the model, or another way through it.
        training: the mode of the model.
    """

    variant: int
    training: bool


CLIENT = -1
"""The stage number of the client as a source: it feeds the model's inputs."""


@dataclass(frozen=True)
class Edge:
    """One value that goes from one stage to another.

    Attributes:
        value: name of the node that makes it.
        source: the stage that makes it; `CLIENT` for an input of the model.
        target: the stage that uses it; the number of stages for an output of the model.
        compressor: of the value, forward.
        gradient_compressor: of its gradient, backward.
    """

    value: str
    source: int
    target: int
    compressor: Compressor = field(default_factory=Lossless)
    gradient_compressor: Compressor = field(default_factory=Lossless)


@dataclass(frozen=True)
class _NodeRef:
    name: str


@dataclass(frozen=True)
class GraphRecord:
    """A graph as plain data: what a stage is shipped as. Each row is name, operation, target, arguments."""

    rows: tuple[tuple[str, str, Any, Any, Any], ...]

    @property
    def is_guarded(self) -> bool:
        """Whether the graph may refuse a batch."""
        return any(target is check for _, _, target, _, _ in self.rows)

    @classmethod
    def of(cls, graph: Graph) -> GraphRecord:
        """The record of a graph."""
        refer = lambda node: _NodeRef(node.name)  # noqa: E731
        return cls(
            tuple(
                (n.name, n.op, n.target, _map(n.args, Node, refer), _map(n.kwargs, Node, refer))
                for n in graph.nodes
            )
        )

    def build(self, replace_device: Mapping[torch.device, torch.device]) -> Graph:
        """The graph, with device arguments recorded at tracing replaced by those of this stage."""
        graph = Graph()
        nodes: dict[str, Node] = {}

        def resolve(value: Any) -> Any:
            value = _map(value, _NodeRef, lambda ref: nodes[ref.name])
            return _map(value, torch.device, lambda device: replace_device.get(device, device))

        for name, op, target, args, kwargs in self.rows:
            node = graph.create_node(op, target, resolve(args), resolve(kwargs), name=name)
            nodes[name] = node
        return graph


def _map(value: Any, kind: type[Any], function: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(v, kind, function) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(v, kind, function) for v in value)
    if isinstance(value, dict):
        return {key: _map(v, kind, function) for key, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_map(v, kind, function) for v in (value.start, value.stop, value.step)))
    return value


@dataclass(frozen=True)
class StageGraph:
    """What a stage computes in one mode.

    Attributes:
        graph: takes the values of `inputs` in order and returns the tuple of the values named in `outputs`.
        inputs: the edges by which values enter, in the order of the graph's inputs.
        outputs: the names of the values that leave.
        edges: the edges by which they leave; one value may leave by several.
        draws_random_numbers: whether it moved a random number generator when it was recorded.
    """

    graph: GraphRecord
    inputs: tuple[Edge, ...]
    outputs: tuple[str, ...]
    edges: tuple[Edge, ...]
    draws_random_numbers: bool = False


_Forward: TypeAlias = Callable[..., tuple[Any, ...]]


def _as_it_is(forward: _Forward) -> _Forward:
    return forward


class StageModule(nn.Module):
    """One stage as an ordinary module: it holds the model's own submodules and parameters, under their own names.

    Called with the values of its input edges, it returns the tuple of the values that leave it, in its present
    mode. It can be pickled.
    """

    def __init__(self, tree: nn.Module, graphs: Mapping[Mode, StageGraph], traced_device: torch.device) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in tree.__dict__.items() if k not in ("training",)})
        self._fxsplit_graphs = dict(graphs)
        self._fxsplit_traced_device = traced_device
        self._fxsplit_forwards: dict[Mode, _Forward] = {}
        self._fxsplit_transform: Callable[[_Forward], _Forward] = _as_it_is

    def ports(self, mode: Mode) -> StageGraph:
        """Edges and graph of a mode."""
        return self._fxsplit_graphs[mode]

    @property
    def graphs(self) -> Mapping[Mode, StageGraph]:
        """Edges and graph of every mode."""
        return self._fxsplit_graphs

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """The values that leave the stage, as first recorded."""
        return self.run(Mode(0, self.training), *inputs)

    def run(self, mode: Mode, *inputs: Any) -> tuple[Any, ...]:
        """The values that leave the stage in a mode."""
        if mode not in self._fxsplit_forwards:
            self._fxsplit_forwards[mode] = self._fxsplit_transform(self._build(self._fxsplit_graphs[mode]))
        with transforms_closed():
            return self._fxsplit_forwards[mode](self, *inputs)

    def transform_forwards(self, transform: Callable[[_Forward], _Forward]) -> None:
        """Has each mode's forward, a function of this module and the inputs, replaced before it first runs."""
        self._fxsplit_transform = transform
        self._fxsplit_forwards.clear()

    def _build(self, stage_graph: StageGraph) -> _Forward:
        module = GraphModule(nn.Module(), Graph(), class_name="Stage")
        module.graph = stage_graph.graph.build(self._device_map())
        forward: _Forward = type(module).forward
        return forward

    def _device_map(self) -> dict[torch.device, torch.device]:
        tensors: Iterable[Tensor] = (*self.parameters(), *self.buffers())
        home = next((tensor.device for tensor in tensors), self._fxsplit_traced_device)
        return {self._fxsplit_traced_device: home}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fxsplit_forwards": {}, "_fxsplit_transform": _as_it_is}
