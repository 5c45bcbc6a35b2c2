"""What a traced model costs: one row a node, one row a value that may cross a cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fxsplit.errors import PlanError
from fxsplit.spec import TensorSpec


@dataclass(frozen=True)
class NodeCost:
    """Costs of one graph node for the whole batch.

    Attributes:
        name: the node's name in the graph.
        module: qualified name of the module that made it ('' for the model itself).
        kind: class of the called module, or the name of the function.
        forward_macs: multiply-accumulate operations of its forward.
        output_bytes: bytes of the tensors it returns.
        parameter_bytes: bytes of the parameters and buffers it is the first to use.
        operations: torch operations in it: one, or those inside a module or function that is kept whole.
        is_repeatable: whether it may run again elsewhere: no parameters, random numbers or changes in place.
        layout_inputs: names of the values of which it reads no more than shape, dtype and device.
        backward_macs: multiply-accumulate operations of its backward: gradients of its parameters and of those
            inputs that depend on a parameter; twice the forward's if not given.
        saved_bytes: what it is the first to keep from its forward for a backward, parameters left out; the bytes
            that it returns if not given.
        trainable_bytes: the part of `parameter_bytes` that has gradients; all of it if not given.
        behind: names of earlier nodes that it must stay behind though it does not use their values (random
            numbers, changes in place, the order of sums).
    """

    name: str
    module: str
    kind: str
    forward_macs: int
    output_bytes: int
    parameter_bytes: int
    operations: int = 1
    is_repeatable: bool = False
    layout_inputs: tuple[str, ...] = ()
    backward_macs: int = -1
    saved_bytes: int = -1
    trainable_bytes: int = -1
    behind: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        defaults = {
            "backward_macs": 2 * self.forward_macs,
            "saved_bytes": self.output_bytes,
            "trainable_bytes": self.parameter_bytes,
        }
        for name, value in defaults.items():
            if getattr(self, name) < 0:
                object.__setattr__(self, name, value)

    @property
    def forward_flops(self) -> int:
        """Floating point operations of its forward: two a MAC."""
        return 2 * self.forward_macs

    @property
    def backward_flops(self) -> int:
        """Floating point operations of its backward."""
        return 2 * self.backward_macs

    def static_bytes(self, states: int | None) -> int:
        """Bytes that stay from step to step: parameters, buffers, gradients and `states` of an optimizer.

        For inference, which has neither gradients nor an optimizer, `states` is None.
        """
        trained = 0 if states is None else self.trainable_bytes + self.optimizer_bytes(states)
        return self.parameter_bytes + trained

    def optimizer_bytes(self, states: int) -> int:
        """Bytes of an optimizer that keeps `states` tensors for each parameter: 0 SGD, 1 momentum, 2 Adam."""
        return states * self.trainable_bytes


@dataclass(frozen=True)
class Value:
    """A value of the graph that later nodes use, and that crosses every cut between its maker and them.

    Attributes:
        name: name of the node that makes it.
        producer: index of that node in `CostTable.nodes`; -1 for an input of the model.
        consumers: ascending indices of the nodes that use it; `len(nodes)` stands for the model's output.
        spec: shape and dtype, or None for a value that is not a tensor (sizes, masks that are None).
        is_activation: whether it depends on a parameter: such floating point tensors may be compressed.
    """

    name: str
    producer: int
    consumers: tuple[int, ...]
    spec: TensorSpec | None
    is_activation: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the value, uncompressed."""
        return self.spec.nbytes if self.spec is not None else 0

    @property
    def is_compressible(self) -> bool:
        """Whether a lossy compressor may be put on it."""
        return self.is_activation and self.spec is not None and self.spec.is_floating_point


@dataclass(frozen=True)
class CostTable:
    """Costs of a traced model at one batch size, keyed by node name.

    Attributes:
        model: class name of the model.
        fingerprint: digest of the model's structure, by which a saved plan knows its model.
        batch_size: samples in the batch that was priced.
        nodes: one row a node, in execution order; model inputs and plain parameters have no row.
        values: every value that could cross a cut.
        cut_points: module name -> index of the first node of its first call: a stage may begin there.
        uncounted: operations without a formula for their MACs, named so that no one takes them for free.
    """

    model: str
    fingerprint: str
    batch_size: int
    nodes: tuple[NodeCost, ...]
    values: tuple[Value, ...]
    cut_points: Mapping[str, int]
    uncounted: tuple[str, ...] = ()
    _by_name: dict[str, NodeCost] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {node.name: node for node in self.nodes})

    def __getitem__(self, name: str) -> NodeCost:
        return self._by_name[name]

    def __len__(self) -> int:
        return len(self.nodes)

    def reordered(self, cut: str, moved: Sequence[str]) -> CostTable:
        """The costs with nodes run before a cut that the model's own order has behind it.

        Args:
            cut: name of the module at whose first node the cut is.
            moved: names of the nodes.

        Raises:
            PlanError: there are no such nodes.
        """
        if not moved:
            return self
        early = set(moved)
        if cut not in self.cut_points or not early <= self._by_name.keys():
            raise PlanError("the plan runs nodes earlier that are not in the model", found=", ".join(moved))
        start = self.cut_points[cut]
        names = [node.name for node in self.nodes]
        order = [i for i, n in enumerate(names) if i < start or n in early]
        order += [i for i, n in enumerate(names) if i >= start and n not in early]
        place = {old: new for new, old in enumerate(order)} | {-1: -1, len(names): len(names)}
        values = [
            replace(v, producer=place[v.producer], consumers=tuple(sorted(place[c] for c in v.consumers)))
            for v in self.values
        ]
        points = sorted(((place[i], name.count("."), name) for name, i in self.cut_points.items()))
        return replace(
            self,
            nodes=tuple(self.nodes[i] for i in order),
            values=tuple(sorted(values, key=lambda v: v.producer)),
            cut_points={name: i for i, _, name in points},
        )

    @property
    def forward_macs(self) -> int:
        """MACs of the whole forward."""
        return sum(node.forward_macs for node in self.nodes)

    @property
    def backward_macs(self) -> int:
        """MACs of the whole backward."""
        return sum(node.backward_macs for node in self.nodes)

    @property
    def saved_bytes(self) -> int:
        """Bytes that a whole forward keeps for its backward, beside parameters."""
        return sum(node.saved_bytes for node in self.nodes)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(node.parameter_bytes for node in self.nodes)
