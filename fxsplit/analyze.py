"""Analysis: what every node of a traced model costs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.errors import InputError
from fxsplit.pricing import Pricer, Uncounted, mac_counter, plain_attention, tensors_of
from fxsplit.spec import TensorSpec
from fxsplit.trace import Arguments, CallLayout, ExampleInputs, TracedModel, run_model
from fxsplit.trace.activations import is_activation
from fxsplit.trace.call import batch_size
from fxsplit.trace.effects import is_repeatable, layout_inputs, operations
from fxsplit.trace.ordering import order_of_effects
from fxsplit.trace.traced import mode_name, output_of
from fxsplit.trace.verify import undisturbed


def analyze(traced: TracedModel, example_inputs: ExampleInputs, *, count_batch_norm: bool = True) -> CostTable:
    """Prices every node of the traced model for one batch.

    The graph runs on fake tensors, so that no memory or time is spent on the batch; where it decides on data,
    it runs for real, forward alone. MACs come from the formulas of `torch.utils.flop_counter` (two FLOPs a MAC),
    and the forward of a batch norm counts as two MACs an element. A warning names the nodes with operations that
    have no formula.

    Args:
        traced: the model, as `trace` returned it.
        example_inputs: inputs of the batch size to price, called in the way that was traced.
        count_batch_norm: whether batch norm counts; the totals published with weights leave it out.

    Raises:
        InputError: the inputs do not fit the traced call.
    """
    leaves = traced.leaves(Arguments.of(example_inputs))
    module, training = traced.primary.module, traced.model.training
    try:
        pricer, uncounted = _price(traced.model, module, leaves, training, True, count_batch_norm)
    except Exception:  # fake tensors stop at whatever depends on data, in many ways; the real run is the judge
        try:
            pricer, uncounted = _price(traced.model, module, leaves, training, False, count_batch_norm)
        except Exception as error:
            raise InputError(
                f"the model raised {type(error).__name__} on the batch to price, in {mode_name(training)} mode",
                where=f"{type(traced.model).__name__}, batch of {batch_size(leaves)}",
                found=str(error).partition("\n")[0],
                hint="give inputs of a batch that the model takes in this mode, or set the other mode",
            ) from error
    if uncounted:
        warnings.warn(
            f"no MAC formula for {_listed(uncounted)}: counted as zero in {type(traced.model).__name__} "
            f"({mode_name(training)} mode)",
            stacklevel=2,
        )
    nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    index = {node: i for i, node in enumerate(nodes)}
    parameter_bytes, trainable_bytes = _parameter_bytes(module, nodes)
    behind = order_of_effects(module)
    points = {name: index[node] for name, node in _cut_nodes(traced).items() if node in index}
    return CostTable(
        model=type(traced.model).__name__,
        fingerprint=traced.fingerprint,
        batch_size=batch_size(leaves),
        nodes=tuple(
            NodeCost(
                n.name,
                n.meta["module"],
                _kind(module, n),
                pricer.prices[n].forward_macs,
                _bytes(pricer.results[n]),
                parameter_bytes[n],
                operations(n),
                is_repeatable(n),
                tuple(used.name for used in layout_inputs(n)),
                pricer.prices[n].backward_macs,
                pricer.prices[n].saved_bytes,
                trainable_bytes[n],
                tuple(other.name for other in behind.get(n, ())),
            )
            for n in nodes
        ),
        values=_values(module, index, pricer.results),
        cut_points=dict(sorted(points.items(), key=lambda item: (item[1], item[0].count(".")))),
        uncounted=tuple(sorted(uncounted)),
    )


def _price(
    model: nn.Module, module: GraphModule, leaves: Sequence[Any], training: bool, fake: bool, batch_norm: bool
) -> tuple[Pricer, dict[str, dict[str, None]]]:
    counter = mac_counter(batch_norm, by_module=False)
    notes, tensors = Uncounted(), [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    pricer = Pricer(module, counter, notes, mode)
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, training))
        stack.enter_context(torch.no_grad())
        stack.enter_context(plain_attention())
        if mode is not None:
            stack.enter_context(mode)
            tensors = [mode.from_tensor(tensor) for tensor in tensors]
        stack.enter_context(counter)
        stack.enter_context(notes)
        pricer.run(*tensors)
    return pricer, notes.names


def _listed(uncounted: dict[str, dict[str, None]], most: int = 3) -> str:
    """Operations with the nodes that run them; the first few, if they are many."""
    texts = []
    for operation, nodes in sorted(uncounted.items()):
        more = f" and {len(nodes) - most} more" if len(nodes) > most else ""
        texts.append(f"{operation} (node {', '.join(list(nodes)[:most])}{more})")
    return ", ".join(texts)


def _cut_nodes(traced: TracedModel) -> dict[str, Node]:
    by_name = {node.name: node for node in traced.primary.module.graph.nodes}
    return {module: by_name[node] for module, node in traced.primary.cut_points.items() if node in by_name}


def _kind(module: GraphModule, node: Node) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return str(node.target) if isinstance(node.target, str) else node.target.__name__


def _bytes(result: Any) -> int:
    return sum(spec.nbytes for spec in pytree.tree_leaves(result) if isinstance(spec, TensorSpec))


def _parameter_bytes(module: GraphModule, nodes: Sequence[Node]) -> tuple[dict[Node, int], dict[Node, int]]:
    """Bytes of parameters and buffers, and of those with gradients; a shared one is its first user's."""
    seen: set[int] = set()
    whole: dict[Node, int] = {}
    trainable: dict[Node, int] = {}
    for node in nodes:
        new = {id(t): t for t in tensors_of(module, node) if id(t) not in seen}
        whole[node] = sum(t.nbytes for t in new.values())
        trainable[node] = sum(t.nbytes for t in new.values() if t.requires_grad)
        seen.update(new)
    return whole, trainable


def _values(module: GraphModule, index: dict[Node, int], results: dict[Node, Any]) -> tuple[Value, ...]:
    end = output_of(module.graph)
    values = []
    for node in module.graph.nodes:
        if node.op in ("get_attr", "output") or not node.users:
            continue
        spec = results[node] if isinstance(results[node], TensorSpec) else None
        consumers = sorted({len(index) if user is end else index[user] for user in node.users})
        values.append(Value(node.name, index.get(node, -1), tuple(consumers), spec, is_activation(node)))
    return tuple(values)


def module_macs(
    model: nn.Module, call: CallLayout, leaves: Sequence[Any], *, count_batch_norm: bool = True
) -> dict[str, int]:
    """Forward MACs of every module of a model, by one run of the model itself.

    On fake tensors, which cost no time; for real where the model looks at its data.
    """
    try:
        counter = _count(model, call, leaves, True, count_batch_norm)
    except Exception:  # fake tensors stop at whatever depends on data, in many ways; the real run is the judge
        counter = _count(model, call, leaves, False, count_batch_norm)
    root = type(model).__name__
    counts = counter.get_flop_counts()
    return {
        name.removeprefix(root).removeprefix("."): sum(flops.values()) // 2
        for name, flops in counts.items()
        if name != "Global"
    }


def _count(
    model: nn.Module, call: CallLayout, leaves: Sequence[Any], fake: bool, batch_norm: bool
) -> FlopCounterMode:
    counter = mac_counter(batch_norm)
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, model.training))
        stack.enter_context(torch.no_grad())
        stack.enter_context(plain_attention())
        if fake:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            leaves = [mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        stack.enter_context(counter)
        run_model(model, call, leaves)
    return counter
