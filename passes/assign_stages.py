"""Gives every node its stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxsplit.errors import PlanError, nearest
from fxsplit.passes.base import Pass


@dataclass(frozen=True)
class AssignStages(Pass):
    """Writes `node.meta["stage"]`: a new stage begins at the first node of each cut's module.

    Inputs, parameters and the output have no stage: they are wherever they are needed.

    Attributes:
        boundaries: name of the first node of each stage but the first, in the order of execution.
    """

    name: ClassVar[str] = "assign_stages"
    boundaries: tuple[str, ...]

    def requires(self, graph_module: GraphModule) -> None:
        """Every boundary is a node of the graph."""
        names = [node.name for node in graph_module.graph.nodes]
        for boundary in self.boundaries:
            if boundary not in names:
                raise PlanError(
                    "a stage begins at a node that is not in the graph",
                    found=boundary,
                    hint=f"nearest: {nearest(boundary, names)}",
                )

    def call(self, graph_module: GraphModule) -> PassResult:
        """Counts the boundaries passed on the way down the graph."""
        stage, modified = 0, False
        for node in graph_module.graph.nodes:
            stage += node.name in self.boundaries
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            modified |= node.meta.get("stage") != stage
            node.meta["stage"] = stage
        return PassResult(graph_module, modified)
