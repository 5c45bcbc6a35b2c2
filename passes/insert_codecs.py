"""Puts encode and decode nodes on the edges that cross between workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxsplit.compressors import compressor
from fxsplit.compressors.nodes import Decode, Encode
from fxsplit.passes.base import Pass
from fxsplit.trace.activations import is_compressible


@dataclass(frozen=True)
class InsertCodecs(Pass):
    """Inserts an encode node behind, and a decode node before, each activation that crosses between workers.

    Values that are no floating point activations (masks, positions, token ids) cross as they are.

    Attributes:
        workers: the worker of each stage.
        compressors: for each stage but the first, the compressor of what it receives from earlier stages.
        gradient_compressor: the compressor of the gradients, on the way back.
    """

    name: ClassVar[str] = "insert_codecs"
    workers: tuple[str, ...]
    compressors: tuple[str, ...]
    gradient_compressor: str

    def requires(self, graph_module: GraphModule) -> None:
        """Every node has its stage."""
        self.require_stages(graph_module)

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrites the edges one by one."""
        modified = False
        for node in list(graph_module.graph.nodes):
            if "stage" not in node.meta or not is_compressible(node):
                continue
            stages = {user.meta["stage"] for user in node.users if "stage" in user.meta}
            for stage in sorted(stages - {node.meta["stage"]}):
                if (
                    self.compressors[stage - 1] != "none"
                    and self.workers[stage] != self.workers[node.meta["stage"]]
                ):
                    self._insert(graph_module, node, stage)
                    modified = True
        return PassResult(graph_module, modified)

    def _insert(self, graph_module: GraphModule, node: Node, stage: int) -> None:
        graph = graph_module.graph
        users = [user for user in graph.nodes if user in node.users and user.meta.get("stage") == stage]
        codec = compressor(self.compressors[stage - 1])
        modules = {"encode": Encode(codec), "decode": Decode(codec, compressor(self.gradient_compressor))}
        names = {kind: f"{node.name}_to_{stage}_{kind}" for kind in modules}
        for kind, module in modules.items():
            graph_module.add_submodule(names[kind], module)
        with graph.inserting_after(node):
            encode = graph.call_module(names["encode"], (node,))
        with graph.inserting_before(users[0]):
            decode = graph.call_module(names["decode"], (encode,))
        for new, place in ((encode, node.meta["stage"]), (decode, stage)):
            new.meta.update(stage=place, module=node.meta.get("module", ""))
            new.stack_trace = node.stack_trace
        decode.meta["spec"] = node.meta["spec"]
        for user in users:
            user.replace_input_with(node, decode)
