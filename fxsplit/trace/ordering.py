"""Other orders of the same graph: what may be run earlier without changing any number, and the graph run so.

The order of a recorded graph is that of the model's Python. Nodes whose values do not depend on each other may be
swapped, but for what no edge of the graph says: random numbers are drawn from one generator, memory is changed in
place, and a sum of three gradients or more is rounded by the order of its terms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from torch.fx import Graph, GraphModule, Node

from fxsplit.errors import PlanError
from fxsplit.trace.activations import is_activation
from fxsplit.trace.effects import changed_buffers, changed_values, draws_random_numbers
from fxsplit.trace.traced import TracedGraph, TracedModel, constants_of, make_graph_module

_OUTER = ("placeholder", "get_attr", "output")


def order_of_effects(module: GraphModule) -> dict[Node, tuple[Node, ...]]:
    """For each node, the earlier ones that it must stay behind though it does not use their values."""
    behind: dict[Node, dict[Node, None]] = defaultdict(dict)
    nodes = [node for node in module.graph.nodes if node.op not in _OUTER]
    drawing = [node for node in nodes if any(draws_random_numbers(node, mode) for mode in (False, True))]
    for chain in (drawing, *_sums_of_gradients(module)):
        for first, second in pairwise(chain):
            behind[second][first] = None
    reads = {node: {used.name for used in node.all_input_nodes} | {node.name} for node in nodes}
    for place, node in enumerate(nodes):
        if changed_values(node) or changed_buffers(node):
            for earlier in nodes[:place]:
                if _meet(node, earlier, reads):
                    behind[node][earlier] = None
            for later in nodes[place + 1 :]:
                if _meet(node, later, reads):
                    behind[later][node] = None
    return {node: tuple(found) for node, found in behind.items()}


def _meet(changing: Node, node: Node, reads: Mapping[Node, set[str]]) -> bool:
    """Whether a node looks at, or changes, what another one changes."""
    values, buffers = set(changed_values(changing)), set(changed_buffers(changing))
    return bool(values & (reads[node] | set(changed_values(node))) or buffers & set(changed_buffers(node)))


def _sums_of_gradients(module: GraphModule) -> list[list[Node]]:
    """The users of each value or parameter that three or more use, if it has a gradient."""
    users: dict[object, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" or is_activation(node):
            users[node] = [user for user in node.users if user.op not in _OUTER]
        if node.op == "call_module":
            for parameter in module.get_submodule(str(node.target)).parameters():
                users.setdefault(id(parameter), []).append(node)
    places = {node: place for place, node in enumerate(module.graph.nodes)}
    return [sorted(found, key=places.__getitem__) for found in users.values() if len(found) > 2]


def reordered(traced: TracedModel, cut: str, moved: Sequence[str]) -> TracedModel:
    """The model with nodes run before a cut that its own order has behind it; its numbers are the same.

    Args:
        traced: the model; it stays as it is.
        cut: name of the module at whose first node the cut is.
        moved: names of the nodes.

    Raises:
        PlanError: a node is not in the graph of some mode, or cannot be run there.
    """
    if not moved:
        return traced
    done: dict[int, TracedGraph] = {}
    for graph in traced.graphs.values():
        if id(graph) not in done:
            module = copied(traced, graph.module)
            _move(module, graph.cut_points.get(cut, ""), moved)
            done[id(graph)] = replace(graph, module=module)
    return replace(traced, graphs={mode: done[id(graph)] for mode, graph in traced.graphs.items()})


def _move(module: GraphModule, boundary: str, moved: Sequence[str]) -> None:
    nodes = {node.name: node for node in module.graph.nodes}
    missing = [name for name in (boundary, *moved) if name not in nodes]
    if missing:
        raise PlanError(
            "the plan runs a node earlier that is not in the graph",
            found=", ".join(missing),
            hint="plan again for this model, with this version of torch",
        )
    places = {node: place for place, node in enumerate(module.graph.nodes)}
    behind, start, early = order_of_effects(module), places[nodes[boundary]], set(moved)
    for name in sorted(moved, key=lambda each: places[nodes[each]]):
        node = nodes[name]
        needed = [n for n in (*node.all_input_nodes, *behind.get(node, ())) if n.op not in _OUTER]
        late = [n.name for n in needed if places[n] >= start and n.name not in early]
        if late:
            raise PlanError("the plan runs a node earlier than what it needs", where=name, found=", ".join(late))
        for used in node.all_input_nodes:
            if used.op == "get_attr" and places[used] > start:
                nodes[boundary].prepend(used)
        nodes[boundary].prepend(node)
    module.graph.lint()
    module.recompile()


def copied(traced: TracedModel, module: GraphModule) -> GraphModule:
    """The same graph over the same parameters, to be changed."""
    copy, made = Graph(), dict[Node, Node]()
    for node in module.graph.nodes:
        made[node] = copy.node_copy(node, lambda n: made[n])
        made[node].meta = dict(node.meta)
        made[node].name = node.name
    return make_graph_module(traced.model, copy, constants_of(module, module.graph), type(traced.model).__name__)
