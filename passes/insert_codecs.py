"""Puts encode and decode nodes on the edges that cross between workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxsplit.compressors import Compressor, Lossless
from fxsplit.compressors.exact import exact_coding
from fxsplit.compressors.inserted import InsertedModules, is_inserted
from fxsplit.compressors.learned import split_learned
from fxsplit.compressors.nodes import Decode, Encode
from fxsplit.passes.base import Pass
from fxsplit.trace.activations import is_compressible


@dataclass(frozen=True)
class InsertCodecs(Pass):
    """Inserts encode and decode nodes for each activation that crosses between workers.

    Encode is at the end of the stage that makes the value, decode in front of its first user.

    Values that are no floating point activations cross exactly: booleans as bits, integers (token ids, positions,
    padding masks) in as few bits as their range needs, all others as they are.

    A learned compressor becomes two modules with weights, before encode and behind decode; what crosses is the
    smaller tensor between them.

    Attributes:
        workers: the worker of each stage.
        cuts: name of each cut.
        compressors: for each cut, the compressor of what the stage behind it receives from earlier stages.
        gradient_compressors: for each cut, the compressor of the gradients, on the way back.
        edges: value and target stage of edges that have others -> their compressors, there and back.
        inserted: the modules of learned compressors, made as they are needed.
        device: where the model is.
    """

    name: ClassVar[str] = "insert_codecs"
    workers: tuple[str, ...]
    cuts: tuple[str, ...]
    compressors: tuple[Compressor, ...]
    gradient_compressors: tuple[Compressor, ...]
    edges: Mapping[tuple[str, int], tuple[Compressor, Compressor]] = field(default_factory=dict)
    inserted: InsertedModules = field(default_factory=InsertedModules, compare=False)
    device: torch.device | None = None

    def requires(self, graph_module: GraphModule) -> None:
        """Every node has its stage."""
        self.require_stages(graph_module)

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrites the edges one by one."""
        modified, inserted = False, Counter[int]()
        for node in list(graph_module.graph.nodes):
            if (
                node.op in ("get_attr", "output")
                or node.meta.get("spec") is None
                or self._is_own(graph_module, node)
            ):
                continue
            stages = {user.meta["stage"] for user in node.users if "stage" in user.meta}
            home = node.meta.get("stage", 0)  # the client has the model's inputs
            for stage in sorted(stages - {home}):
                codecs = self._codecs(node, stage)
                is_lossless = all(isinstance(codec, Lossless) for codec in codecs)
                is_local = self.workers[stage] == self.workers[home]
                if not is_lossless and not is_local and not self._has_codec(graph_module, node, stage):
                    modified = True
                    self._insert(graph_module, node, stage, inserted[stage], codecs)
                    inserted[stage] += is_compressible(node)
        return PassResult(graph_module, modified)

    def _codecs(self, node: Node, stage: int) -> tuple[Compressor, Compressor]:
        """The compressors of a value and of its gradient, if it has one."""
        if is_compressible(node) and node.op != "placeholder":
            plain = self.compressors[stage - 1], self.gradient_compressors[stage - 1]
            return self.edges.get((node.name, stage), plain)
        return exact_coding(node.meta["spec"]), Lossless()

    @staticmethod
    def _is_own(graph_module: GraphModule, node: Node) -> bool:
        """Whether the pass has put the node there."""
        return node.op == "call_module" and is_inserted(str(node.target))

    @staticmethod
    def _has_codec(graph_module: GraphModule, node: Node, stage: int) -> bool:
        """Whether what the stage uses of the node is encoded already."""
        users = [user for user in node.users if user.meta.get("stage") == stage]
        return all(
            user.op == "call_module" and isinstance(graph_module.get_submodule(str(user.target)), Decode)
            for user in users
        )

    def _insert(
        self, graph_module: GraphModule, node: Node, stage: int, index: int, codecs: tuple[Compressor, Compressor]
    ) -> None:
        graph, source = graph_module.graph, node.meta.get("stage", 0)
        users = [user for user in graph.nodes if user in node.users and user.meta.get("stage") == stage]
        learned, codec = split_learned(codecs[0])
        back = codecs[1]
        front: dict[str, nn.Module] = {}
        behind: dict[str, nn.Module] = {}
        crossing = node.meta["spec"]
        if learned is not None:
            down, up = self.inserted.pair(self.cuts[stage - 1], index, learned, crossing, self._device()).items()
            front, behind = dict([down]), dict([up])
            crossing = learned.reduced(crossing)
        if learned is None or not (isinstance(codec, Lossless) and isinstance(back, Lossless)):
            front[f"{node.name}_to_{stage}_encode"] = Encode(codec)
            behind = {f"{node.name}_to_{stage}_decode": Decode(codec, back), **behind}
        # At the end of the stage, as the stage sends it: so the gradient that comes back is added to the others
        # in the same order, and what the stage does to the value in place is seen.
        stage_nodes = [n for n in graph.nodes if n.meta.get("stage") == source]
        value, last = node, (stage_nodes or [n for n in graph.nodes if n.op == "placeholder"])[-1]
        for name, module in front.items():
            with graph.inserting_after(last):
                value = last = self._call(graph_module, name, module, value, source, node)
            if is_inserted(name):
                value.meta.update(spec=crossing, is_activation=True)
        for name, module in behind.items():
            with graph.inserting_before(users[0]):
                value = self._call(graph_module, name, module, value, stage, node)
            value.meta["spec"] = node.meta["spec"] if is_inserted(name) else crossing
        for user in users:
            user.replace_input_with(node, value)

    def _device(self) -> torch.device:
        return self.device or torch.device("cpu")

    @staticmethod
    def _call(
        graph_module: GraphModule, name: str, module: nn.Module, value: Node, stage: int, node: Node
    ) -> Node:
        graph_module.add_submodule(name, module)
        called = graph_module.graph.call_module(name, (value,))
        called.meta.update(stage=stage, module=node.meta.get("module", ""))
        called.stack_trace = node.stack_trace
        return called
