"""Which values of a graph are activations: what a lossy compressor may be put on."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from fxsplit.module_tree import get_attribute
from fxsplit.trace.patches import MASK_MODULES


def activations(module: GraphModule) -> set[Node]:
    """The nodes whose floating point values depend on a parameter.

    Masks, positions and rotary tables do not: an error in them is no small error of an activation, and
    quantizing a mask of minus infinities has no meaning. Dependence goes through floating point tensors alone,
    so that a mask shaped or typed after an activation is none.
    """
    found: set[Node] = set()
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output") or getattr(node.target, "__module__", None) in MASK_MODULES:
            continue
        if node.op == "get_attr":
            if isinstance(get_attribute(module, str(node.target)), nn.Parameter):
                found.add(node)
            continue
        spec = node.meta.get("spec")
        if spec is not None and not (spec.is_floating_point or spec.dtype.is_complex):
            continue
        own = node.op == "call_module" and any(True for _ in module.get_submodule(str(node.target)).parameters())
        if own or (not _is_size(node) and any(i in found for i in node.all_input_nodes)):
            found.add(node)
    return found


def is_compressible(node: Node, trained: set[Node]) -> bool:
    """Whether a lossy compressor may be put on the node's value: a real floating point activation."""
    spec = node.meta.get("spec")
    return node in trained and spec is not None and spec.is_floating_point


def _is_size(node: Node) -> bool:
    if node.target is getattr:
        return str(node.args[1]) == "shape"
    return node.target in ("size", "numel", "nelement")
