"""One forward of the pipeline, as the client knows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxsplit.runtime.transport import CLIENT_NAME
from fxsplit.stage import Edge, Mode


@dataclass
class Run:
    """One forward of the pipeline, and what its backward needs.

    Attributes:
        number: its name in the keys of its packets.
        mode: what runs.
        edges: the edges that bring the outputs.
        needs_gradient: (micro-batch, index of the edge) -> whether that output leads a gradient back.
        inputs: the edges that took inputs away for which the caller wants a gradient, by micro-batch and leaf.
        outputs_at: the worker that the model's outputs go to: the client's, or the one that makes the loss.
    """

    number: int
    mode: Mode
    chunks: int
    edges: tuple[Edge, ...] = ()
    needs_gradient: set[tuple[int, int]] = field(default_factory=set)
    inputs: list[tuple[int, int, Edge]] = field(default_factory=list)
    outputs_at: str = CLIENT_NAME
