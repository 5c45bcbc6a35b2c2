"""The common base of all passes; it polices the contract."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxsplit.errors import FxsplitError, PassError


@dataclass(frozen=True)
class Pass(PassBase, ABC):
    """A rewrite of a graph, in place. Its fields are its options.

    A second run of a pass changes nothing, and `modified` is true exactly when the graph changed. Both are held
    by tests over every pass; that the graph is well formed and the module the same one is checked at each run.
    """

    name: ClassVar[str]

    @final
    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Runs the pass.

        Raises:
            PassError: the graph does not meet the pass's requirements, or the pass broke its contract.
        """
        self.requires(graph_module)
        try:
            result = self.call(graph_module)
        except FxsplitError:
            raise
        except Exception as error:
            raise PassError(f"pass {self.name} failed: {error}", where=type(error).__name__) from error
        if not isinstance(result, PassResult) or result.graph_module is not graph_module:
            raise PassError(f"pass {self.name} must return the module it was given", found=type(result).__name__)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of constants that are no tensors, which are meant to be there
                graph_module.graph.lint()
        except Exception as error:
            raise PassError(f"pass {self.name} left a graph that is not well formed", found=str(error)) from error
        if result.modified:
            graph_module.recompile()
        self.ensures(graph_module)
        return result

    @abstractmethod
    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrites the graph in place."""

    def require_stages(self, graph_module: GraphModule) -> None:
        """Refuses a graph whose nodes have no stage yet."""
        for node in graph_module.graph.nodes:
            if node.op not in ("placeholder", "get_attr", "output") and "stage" not in node.meta:
                raise PassError(
                    f"pass {self.name} needs a stage on every node",
                    where=f"node {node.name}, {node.stack_trace}",
                    hint="run assign_stages first",
                )
