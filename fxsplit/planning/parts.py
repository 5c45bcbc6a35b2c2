"""What a plan consists of: the parts, the edges between them, and the cuts that the edges cross."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fxsplit.compressors import compressor
from fxsplit.errors import CompressorError
from fxsplit.planning import document
from fxsplit.planning.devices import CLIENT
from fxsplit.planning.document import Reader, boolean, integer, list_of, number, read_object, refuse, text
from fxsplit.spec import TensorSpec

NO_COMPRESSOR = "none"
"""Spelling of the compressor that sends tensors as they are."""


@dataclass(frozen=True)
class Part:
    """One stage: what it holds and what it costs, for one batch.

    Attributes:
        stage: its index, from 0.
        device: its device, as written in the device list.
        worker: name of the worker process.
        modules: the outermost modules that are wholly inside, in execution order.
        macs: forward multiply-accumulate operations.
        parameter_bytes: bytes of its parameters and buffers.
        memory_bytes: an estimate: its parameters and buffers, gradients, the optimizer's state, and for as many
            micro-batches as the schedule lets it keep, what its nodes save for their backwards and what it
            receives from other workers.
        kept_bytes: what of that is saved and received for the whole batch.
        forward_s: predicted seconds of its forwards of all micro-batches.
        step_s: predicted seconds of their forwards and backwards.
        input_s: of backwards in two parts, predicted seconds of the parts that the stage before waits for.
        weight_s: predicted seconds of the other parts.
        is_measured: whether these come from what was measured on the device, or from an estimate.
    """

    stage: int
    device: str
    worker: str
    modules: tuple[str, ...]
    macs: int
    parameter_bytes: int
    memory_bytes: int
    kept_bytes: int
    forward_s: float
    step_s: float
    input_s: float
    weight_s: float
    is_measured: bool = False


@dataclass(frozen=True)
class Edge:
    """One value that one stage makes and another uses; a value used by several stages has an edge to each.

    Attributes:
        value: name of the node that makes it.
        source: stage that makes it; -1 for an input of the model, which the client has.
        target: stage that uses it; the number of stages for an output of the model, which the client gets.
        spec: shape and dtype of a batch, or None for a value that is not a tensor.
        raw_bytes: bytes of it, uncompressed.
        wire_bytes: bytes of it on the wire; 0 between stages of one worker.
        gradient_wire_bytes: bytes of its gradient on the wire; 0 where no gradient flows.
        compressor: spelling of the compressor of the value; 'none' is lossless.
        gradient_compressor: spelling of the compressor of its gradient.
    """

    value: str
    source: int
    target: int
    spec: TensorSpec | None
    raw_bytes: int
    wire_bytes: int
    gradient_wire_bytes: int
    compressor: str
    gradient_compressor: str

    @property
    def is_compressed(self) -> bool:
        """Whether a compressor other than 'none' works on it in either direction."""
        return (self.compressor, self.gradient_compressor) != (NO_COMPRESSOR, NO_COMPRESSOR)


@dataclass(frozen=True)
class Cut:
    """A place where one stage ends and the next begins.

    Attributes:
        name: the module with whose first call the next stage begins.
        stage: index of the stage that begins.
        edges: the edges between different workers that cross it, also those that only pass by: from an
            earlier stage or the model's inputs to a later stage or the model's outputs.
    """

    name: str
    stage: int
    edges: tuple[Edge, ...]

    @property
    def raw_bytes(self) -> int:
        """Bytes that cross it forward, uncompressed."""
        return sum(edge.raw_bytes for edge in self.edges)

    @property
    def wire_bytes(self) -> int:
        """Bytes that cross it forward, on the wire."""
        return sum(edge.wire_bytes for edge in self.edges)

    @property
    def gradient_wire_bytes(self) -> int:
        """Bytes of gradients that cross it backward, on the wire."""
        return sum(edge.gradient_wire_bytes for edge in self.edges)

    @property
    def compressor(self) -> str:
        """Spelling of the compressor on it; several, if its edges differ; 'none' if nothing is compressed."""
        used = dict.fromkeys(edge.compressor for edge in self.edges if edge.compressor != NO_COMPRESSOR)
        return ", ".join(used) or NO_COMPRESSOR


def is_local(source: int, target: int, workers: tuple[str, ...]) -> bool:
    """Whether both ends of an edge are on one worker; the model's inputs and outputs are the client's."""
    made_at = CLIENT if source == -1 else workers[source]
    used_at = CLIENT if target == len(workers) else workers[target]
    return made_at == used_at


def edges_across(stage: int, edges: Iterable[Edge], workers: tuple[str, ...]) -> tuple[Edge, ...]:
    """The edges between different workers that cross the cut before `stage`."""
    return tuple(
        edge
        for edge in edges
        if edge.source < stage <= edge.target and not is_local(edge.source, edge.target, workers)
    )


def check_edge(edge: Edge, workers: tuple[str, ...], where: str) -> None:
    """Check that an edge fits the stages and does not contradict itself.

    Raises:
        PlanError: it does not.
    """
    stages = len(workers)
    if not -1 <= edge.source < edge.target <= stages or edge.source == stages:
        refuse(where, f"from {edge.source} to {edge.target}", f"forward, from -1 to {stages}")
    if edge.raw_bytes != (edge.spec.nbytes if edge.spec is not None else 0):
        refuse(f"{where}.raw_bytes", edge.raw_bytes, f"the bytes of {edge.spec}")
    costs = edge.wire_bytes or edge.gradient_wire_bytes or edge.is_compressed
    if costs and is_local(edge.source, edge.target, workers):
        refuse(where, edge.value, "no compressor and no bytes on the wire within one worker")


def read_codec(data: object, where: str) -> str:
    """The spelling of a compressor that there is."""
    spelling = text(data, where)
    try:
        for each in spelling.split(";"):
            compressor(each.strip())
    except CompressorError as error:
        refuse(where, spelling, f"{error.what}: {error.allowed}")
    return spelling


PART_READERS: Mapping[str, Reader[Any]] = {
    "stage": integer(0),
    "device": text,
    "worker": text,
    "modules": list_of(text),
    "macs": integer(0),
    "parameter_bytes": integer(0),
    "memory_bytes": integer(0),
    "kept_bytes": integer(0),
    "forward_s": number,
    "step_s": number,
    "input_s": number,
    "weight_s": number,
    "is_measured": boolean,
}
EDGE_READERS: Mapping[str, Reader[Any]] = {
    "value": text,
    "source": integer(-1),
    "target": integer(0),
    "spec": document.spec,
    "raw_bytes": integer(0),
    "wire_bytes": integer(0),
    "gradient_wire_bytes": integer(0),
    "compressor": read_codec,
    "gradient_compressor": read_codec,
}
CUT_READERS: Mapping[str, Reader[Any]] = {
    "name": text,
    "stage": integer(1),
    "raw_bytes": integer(0),
    "wire_bytes": integer(0),
    "gradient_wire_bytes": integer(0),
    "compressor": text,
}


def read_part(data: object, where: str) -> Part:
    """A part of a saved plan."""
    return Part(**read_object(data, where, PART_READERS))


def read_edge(data: object, where: str) -> Edge:
    """An edge of a saved plan."""
    return Edge(**read_object(data, where, EDGE_READERS))


def read_cut(data: object, where: str) -> dict[str, Any]:
    """A cut of a saved plan, without its edges, which the plan tells."""
    return read_object(data, where, CUT_READERS)
