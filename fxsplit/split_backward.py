"""A backward in two parts: first the gradients that another stage waits for, then those of the parameters.

The idea is that of zero-bubble pipelines (Qi et al., 2023, arXiv:2401.10241): only the gradients of a stage's
inputs are on the critical path. Autograd's graph is divided at the nodes that lead both to an input and to
parameters (a convolution, say): the first part runs the graph towards the inputs and keeps the gradients that
arrive at those nodes; the second part runs each of them once more, towards its parameters alone. Batch norms,
which find all their gradients together, are run once, in the first part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

_Root = tuple[list[GradientEdge], list[Tensor]]

_AT_ONCE = ("NativeBatchNormBackward", "CudnnBatchNormBackward", "MiopenBatchNormBackward")


class SplitBackward:
    """Runs the first part when it is made, and the second one when it is told to.

    Where a parameter is reached from several nodes (tied weights), or nothing is waited for, the whole backward
    is run in the first part, since its sums would be rounded, or counted, differently.

    Args:
        outputs: the values whose gradients came.
        gradients: one for each.
        anchors: leaves of the graph, at which the gradients of the inputs come out.
    """

    def __init__(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], anchors: Sequence[Tensor]) -> None:
        self._parts: list[tuple[_Root, list[Tensor]]] = []
        roots = [output.grad_fn for output in outputs]
        leading, order = _leading_to(
            {id(anchor) for anchor in anchors}, [root for root in roots if root is not None]
        )
        junctions = _junctions(leading, order)
        if junctions is None or not anchors:
            if outputs:
                torch.autograd.backward(list(outputs), list(gradients))
            return
        at_once = [p for node in list(junctions) if node.name().startswith(_AT_ONCE) for p in junctions.pop(node)]
        arrived: dict[Node, tuple[Tensor | None, ...]] = {}
        hooks = [node.register_prehook(_Keeper(node, arrived)) for node in junctions]
        pairs = list(zip(outputs, gradients, strict=True))
        first = [(o, g) for o, g in pairs if o.grad_fn in leading]
        try:
            if first:
                torch.autograd.backward(
                    [o for o, _ in first],
                    [g for _, g in first],
                    retain_graph=True,
                    inputs=[*anchors, *at_once],
                )
        finally:
            for hook in hooks:
                hook.remove()
        for node, parameters in junctions.items():
            given = [(i, g) for i, g in enumerate(arrived.get(node, ())) if g is not None]
            if given:
                edges = [GradientEdge(node, i) for i, _ in given]
                self._parts.append(((edges, [g for _, g in given]), parameters))
        for output, gradient in pairs:
            if output.grad_fn is not None and output.grad_fn not in leading:
                edge = GradientEdge(output.grad_fn, output.output_nr)
                self._parts.append((([edge], [gradient]), []))

    def finish(self) -> None:
        """The second part: adds to the parameters' gradients."""
        for (edges, gradients), parameters in self._parts:
            torch.autograd.backward(edges, gradients, inputs=parameters or None)
        self._parts.clear()


class _Keeper:
    """Keeps what arrives at a node; a class, so that it does not hold more than it must."""

    def __init__(self, node: Node, arrived: dict[Node, tuple[Tensor | None, ...]]) -> None:
        self._node = node
        self._arrived = arrived

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        self._arrived[self._node] = gradients


def _leading_to(ends: set[int], roots: Sequence[Node]) -> tuple[set[Node], list[Node]]:
    """The nodes from which an end is reached, and all nodes, those behind others first."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    while stack:
        node, is_left = stack.pop()
        if is_left:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((after, False) for after, _ in node.next_functions if after is not None)
    leading: set[Node] = set()
    for node in order:
        if _variable(node) in ends or any(after in leading for after, _ in node.next_functions):
            leading.add(node)
    return leading, order


def _variable(node: Node) -> int | None:
    variable: Any = getattr(node, "variable", None)
    return None if variable is None else id(variable)


def _junctions(leading: set[Node], order: Sequence[Node]) -> dict[Node, list[Tensor]] | None:
    """The nodes that lead to inputs and to parameters, with these; None if one is reached from several."""
    behind: dict[Node, dict[int, Tensor]] = {}  # of nodes that lead to no input: the parameters they lead to
    found: dict[Node, list[Tensor]] = {}
    taken: set[int] = set()
    for node in order:
        others = [after for after, _ in node.next_functions if after is not None and after not in leading]
        parameters = {key: p for after in others for key, p in behind[after].items()}
        if node not in leading:
            variable: Any = getattr(node, "variable", None)
            behind[node] = {id(variable): variable} if variable is not None else parameters
        elif parameters:
            if taken & parameters.keys():
                return None
            taken |= parameters.keys()
            found[node] = list(parameters.values())
    return found
