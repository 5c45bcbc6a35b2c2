"""What a recorded call did besides computing, and how much of its inputs it looked at.

A node that draws no random numbers and changes nothing in place may be run again in another place, with the
same result. A node that reads no more of a tensor than its shape, dtype and device needs no more than these
there. Both are found out while the model is recorded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from fxsplit.trace.replay import generator_states

# What these tell, or return, depends on shape, dtype and device of their first argument alone.
_LAYOUT_PROPERTIES = frozenset({"shape", "dtype", "device", "layout", "ndim", "is_cuda"})
_LAYOUT_FUNCTIONS = frozenset({"size", "numel", "nelement", "dim", "__len__"})
_LAYOUT_FUNCTIONS |= {"is_floating_point", "get_device", "new_zeros", "new_ones", "new_full", "new_tensor"}
_LAYOUT_FUNCTIONS |= {"zeros_like", "ones_like", "full_like"}

Result = TypeVar("Result")


def is_repeatable(node: Node) -> bool:
    """Whether running the node again, with the same inputs, gives the same value and changes nothing."""
    return bool(node.meta.get("is_repeatable", False))


def draws_random_numbers(node: Node, training: bool) -> bool:
    """Whether the node moved a random number generator while it was recorded in this mode."""
    return training in node.meta.get("draws_random_numbers", ())


def operations(node: Node) -> int:
    """How many torch functions the node calls: one, or those inside a module or function that is kept whole."""
    return int(node.meta.get("operations", 1))


def layout_inputs(node: Node) -> tuple[Node, ...]:
    """The inputs of which the node reads no more than shape, dtype and device."""
    if node.op in ("call_function", "call_method") and node.args and isinstance(node.args[0], Node):
        name = node.target if isinstance(node.target, str) else node.target.__name__
        is_layout = node.args[1] in _LAYOUT_PROPERTIES if node.target is getattr else name in _LAYOUT_FUNCTIONS
        others = {n for n in node.all_input_nodes if n is not node.args[0]}
        if is_layout and node.args[0] not in others:
            return (node.args[0],)
    names = node.meta.get("layout_inputs", ())
    return tuple(used for used in node.all_input_nodes if used.name in names)


def changed_buffers(node: Node) -> tuple[str, ...]:
    """The buffers that the node reads or writes and that the recorded forward changed."""
    return tuple(node.meta.get("changed_buffers", ()))


def changed_values(node: Node) -> tuple[str, ...]:
    """The nodes whose values' memory the node changed in place while it was recorded."""
    return tuple(node.meta.get("changed_values", ()))


def layout_name(name: str) -> str:
    """The name of the value that stands for the layout of another one."""
    return f"{name}_layout"


def merge_effects(graph: Graph, other: Graph) -> None:
    """Adds to the marks of a graph those of the same graph as it was recorded in the other mode."""
    for node, twin in zip(graph.nodes, other.nodes, strict=True):
        node.meta["is_repeatable"] = is_repeatable(node) and is_repeatable(twin)
        draws = [*node.meta.get("draws_random_numbers", ()), *twin.meta.get("draws_random_numbers", ())]
        node.meta["draws_random_numbers"] = tuple(draws)
        node.meta["changed_buffers"] = tuple(dict.fromkeys((*changed_buffers(node), *changed_buffers(twin))))
        node.meta["changed_values"] = tuple(dict.fromkeys((*changed_values(node), *changed_values(twin))))


class Effects:
    """Watches the calls of one recording.

    Args:
        model: the model that is recorded; its buffers are compared with what they were.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._devices = tuple({p.device for p in model.parameters() if p.device.type == "cuda"})
        self._nodes_by_memory: dict[int, set[Node]] = defaultdict(set)
        self._buffer_versions = {id(buffer): _version(buffer) for buffer in model.buffers()}
        self._untouched: set[int] = set()
        self._operations = 0
        self._last: dict[str, Any] = {}

    def run(self, function: Callable[..., Result], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Result:
        """Calls a function; `mark` then writes on its node what it did."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        versions = [_version(tensor) for tensor in tensors]
        states = generator_states(self._devices)
        self._untouched, self._operations = {id(tensor) for tensor in tensors}, 0
        result = function(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):  # what is handed through is looked at by whoever gets it
            self._untouched.discard(id(leaf))
        with torch._C.DisableTorchFunction():  # what is looked at below is not seen as the call's
            self._note(tensors, versions, states)
        return result

    def _note(self, tensors: list[Tensor], versions: list[int | None], states: list[Tensor]) -> None:
        changed = [
            t for t, before in zip(tensors, versions, strict=True) if before is None or _version(t) != before
        ]
        owners: dict[str, None] = {}
        for tensor in changed:
            for node in self._nodes_by_memory[_memory(tensor)]:
                node.meta["is_repeatable"] = False
                owners[node.name] = None
        draws = any(not torch.equal(a, b) for a, b in zip(states, generator_states(self._devices), strict=True))
        self._last = {"is_repeatable": not (changed or draws)}
        self._last["changed_values"] = tuple(owners)
        self._last["draws_random_numbers"] = (self._model.training,) if draws else ()
        self._last["operations"] = max(self._operations, 1)

    def see(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Notes a torch function that is called inside of what `run` runs."""
        self._operations += 1
        if not self._untouched:
            return
        name = getattr(function, "__name__", "")
        if name == "__get__":
            descriptor = function.__self__
            name = getattr(descriptor, "__name__", None) or descriptor.fget.__name__
        is_layout = name in _LAYOUT_FUNCTIONS or name in _LAYOUT_PROPERTIES
        for leaf in pytree.tree_leaves((args[1:] if is_layout else args, dict(kwargs))):
            self._untouched.discard(id(leaf))

    def untouched(self, tensor: Any) -> bool:
        """Whether the last call, of a module or function kept whole, did not look at this tensor's numbers."""
        return id(tensor) in self._untouched

    def mark(self, node: Node) -> Node:
        """Notes on a node what the last call did; returns the node."""
        node.meta.update(self._last)
        return node

    def remember(self, tensor: Tensor, node: Node) -> int:
        """From here on, a change of this tensor's memory is a change of the node's value. Returns the memory."""
        memory = _memory(tensor)
        self._nodes_by_memory[memory].add(node)
        return memory

    def forget(self, memory: int, node: Node) -> None:
        """The tensor is gone; the memory may be another's soon."""
        self._nodes_by_memory[memory].discard(node)

    def finish(self, graph: Graph) -> None:
        """Takes the mark from every node that reads a parameter, or a buffer which the model changed."""
        tensors: dict[str, Tensor] = dict(self._model.named_parameters(remove_duplicate=False))
        fixed = {id(parameter) for parameter in tensors.values()}
        for name, buffer in self._model.named_buffers(remove_duplicate=False):
            tensors[name] = buffer
            if _version(buffer) is None or _version(buffer) != self._buffer_versions.get(id(buffer)):
                fixed.add(id(buffer))
        names = {id(tensor): name for name, tensor in tensors.items()}
        for node in graph.nodes:
            read = self._read_by(node, tensors)
            if any(id(tensor) in fixed for tensor in read):
                node.meta["is_repeatable"] = False
            found = [names[id(t)] for t in read if id(t) in fixed and not isinstance(t, nn.Parameter)]
            node.meta["changed_buffers"] = tuple(found)

    def _read_by(self, node: Node, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        names = [str(used.target) for used in node.all_input_nodes if used.op == "get_attr"]
        if node.op == "call_module":
            called = self._model.get_submodule(str(node.target))
            return [*called.parameters(), *called.buffers()]
        return [tensors[name] for name in names if name in tensors]


def _version(tensor: Tensor) -> int | None:
    """How often the tensor's memory has been written; unknown for one that was made in inference mode."""
    return None if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and the like
        return id(tensor)
