"""Prices of a graph's nodes: MACs forward and backward by torch's formulas, and the bytes that autograd keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry, sdpa_flop_count

from fxsplit.module_tree import get_attribute
from fxsplit.spec import TensorSpec
from fxsplit.trace.activations import is_activation
from fxsplit.trace.replay import check


def _batch_norm_flop(input_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    # The reference documents count batch norm as two multiply-accumulates an element; a MAC is two FLOPs.
    return 4 * math.prod(input_shape)


def _attention_flop(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flop(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    # Five products where the forward has two: the scores again, and the gradients of both products' factors.
    return 5 * int(sdpa_flop_count(query, key, value)) // 2


def _convolution_backward_flop(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    # torch's formula for the weights' gradients leaves out groups: a depthwise one would cost too much by far.
    transposed, wanted = args[4], args[7]
    forward = conv_flop_count(list(x), list(weight), list(gradient), transposed)
    return forward * sum(map(bool, wanted[:2]))


_BATCH_NORMS = (
    torch.ops.aten.native_batch_norm,
    torch.ops.aten._native_batch_norm_legit,
    torch.ops.aten._native_batch_norm_legit_no_training,
    torch.ops.aten._batch_norm_with_update,
    torch.ops.aten._batch_norm_no_update,
    torch.ops.aten.cudnn_batch_norm,
    torch.ops.aten.miopen_batch_norm,
)
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.convolution_backward: _convolution_backward_flop,
    # Not among the formulas of torch 2.11, and then attention on a CPU would be free.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}

# Operations of aten that do real arithmetic and for which torch has no formula. Others without one move or
# transform elements, which by convention costs no MACs.
_HEAVY_WITHOUT_FORMULA = {
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "_thnn_fused_lstm_cell", "mkldnn_rnn_layer", "_cudnn_rnn"),
    *("_cdist_forward", "cdist", "grid_sampler_2d", "grid_sampler_3d", "_trilinear"),
    *("_fft_r2c", "_fft_c2r", "_fft_c2c", "linalg_svd", "_linalg_svd", "linalg_qr", "linalg_inv_ex"),
    *("linalg_solve_ex", "linalg_matrix_exp", "linalg_eigh", "_linalg_eigh", "_foreach_addmm"),
}


class _NoModules:
    """Stands in for the counter's tracker of modules, whose hooks `torch.autograd.grad` does not go with."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def mac_counter(count_batch_norm: bool = True, by_module: bool = True) -> FlopCounterMode:
    """A counter of FLOPs by torch's formulas, and of batch norm as two MACs an element if wanted."""
    formulas = dict(_FORMULAS)
    if count_batch_norm:
        formulas |= dict.fromkeys(_BATCH_NORMS, _batch_norm_flop)
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    if not by_module:
        counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


@contextmanager
def plain_attention() -> Iterator[None]:
    """Without the fused kernel that torch's attention modules run in evaluation, which has no formula."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Uncounted(TorchDispatchMode):
    """Notes the operations that have no formula though they cost MACs.

    Attributes:
        node: name of the graph node at work.
        names: operation -> the nodes that ran it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.node = ""
        self.names: dict[str, dict[str, None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        namespace, _, name = str(packet).partition(".")
        if packet not in flop_registry and (
            namespace not in ("aten", "prim", "prims", "profiler") or name in _HEAVY_WITHOUT_FORMULA
        ):
            self.names.setdefault(str(packet), {})[self.node] = None
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Price:
    """What a node costs; -1 where it could not be found out.

    Attributes:
        forward_macs: of its forward.
        backward_macs: of its backward.
        saved_bytes: what it is the first to keep for it.
        result: the specs of what it returns.
    """

    forward_macs: int
    backward_macs: int
    saved_bytes: int
    result: Any


class Pricer(Interpreter):
    """Runs a graph and notes the price of each node.

    On fake tensors every node is run for itself, with a graph of autograd's from its inputs to its outputs, and
    its backward is run at once: so its MACs and what it keeps are known apart from the other nodes'. Real ones
    are run forward alone.

    Args:
        module: the graph.
        counter: is active while it runs.
        uncounted: the same.
        fake: the mode of the tensors, if they are fake.
    """

    def __init__(
        self, module: GraphModule, counter: FlopCounterMode, uncounted: Uncounted, fake: FakeTensorMode | None
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._module = module
        self._counter, self._uncounted, self._fake = counter, uncounted, fake
        self._saved: dict[int, Any] = {}  # storages by address; kept, so that no address is used twice
        self.prices: dict[Node, Price] = {}
        self.results: dict[Node, Any] = {}

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node, with lists that the model may change, as the compiled graph has them."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _mutable(args), _mutable(kwargs)

    def run_node(self, n: Node) -> Any:
        """Runs and prices a node; guards are left out, since the values that they look at are fake."""
        if n.target is check or (n.users and all(user.target is check for user in n.users)):
            self.prices[n], self.results[n] = Price(0, 0, 0, None), None
            return None
        self._uncounted.node = n.name
        if n.op in ("call_module", "call_function", "call_method") and self._fake and is_activation(n):
            result, forward, backward, saved = self._run_both_ways(n)
        else:
            before = self._macs()
            result, backward, saved = super().run_node(n), -1 if is_activation(n) else 0, 0
            forward = self._macs() - before
        self.results[n] = pytree.tree_map(_spec_of, result)
        self.prices[n] = Price(forward, backward, saved if self._fake else -1, self.results[n])
        return result

    def _macs(self) -> int:
        return self._counter.get_total_flops() // 2

    def _run_both_ways(self, n: Node) -> tuple[Any, int, int, int]:
        """Result, forward MACs, backward MACs and bytes kept of a node."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        wanted = {id(self.env[used]) for used in n.all_input_nodes if is_activation(used) and used in self.env}
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = {id(x): x.detach().requires_grad_() for x in leaves if id(x) in wanted and x.is_floating_point()}
        held = list(tensors_of(self._module, n))
        parameters = [p for p in held if p.requires_grad]
        assert self._fake is not None
        # Autograd keeps a parameter as it is, or the fake tensor that stands for it.
        both = [t for p in held for t in (p, self._fake.from_tensor(p))]
        own = {t.untyped_storage()._cdata for t in both}
        is_changing = False
        for _ in range(2):
            # A leaf that needs a gradient cannot be changed in place; a copy of it can.
            pick = lambda x, copied=is_changing: _input(x, inputs, copied)  # noqa: E731
            before, kept = self._macs(), dict[int, Any]()
            try:
                with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_keeper(kept), _unchanged):
                    result = getattr(self, n.op)(
                        n.target, pytree.tree_map(pick, args), pytree.tree_map(pick, kwargs)
                    )
                break
            except RuntimeError:
                if is_changing:
                    raise
                is_changing = True
        forward, made = self._macs() - before, _differentiable(result)
        if made:
            with torch.enable_grad():
                sources = [*inputs.values(), *parameters]
                torch.autograd.grad(made, sources, [torch.ones_like(y) for y in made], allow_unused=True)
        saved = sum(s.nbytes() for key, s in kept.items() if key not in own and key not in self._saved)
        self._saved.update(kept)
        backward = self._macs() - before - forward
        return pytree.tree_map(_detached, result), forward, backward, saved


def _input(x: Any, inputs: dict[int, Tensor], copied: bool) -> Any:
    found = inputs.get(id(x), x) if isinstance(x, Tensor) else x
    return found.clone() if copied and found is not x else found


def _keeper(kept: dict[int, Any]) -> Callable[[Tensor], Tensor]:
    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    return keep


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _differentiable(result: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def _mutable(value: Any) -> Any:
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    if type(value) is tuple:
        return tuple(_mutable(item) for item in value)
    if isinstance(value, dict) and type(value).__name__ in ("dict", "immutable_dict"):
        return {key: _mutable(item) for key, item in value.items()}
    return value


def _spec_of(value: Any) -> TensorSpec | None:
    return TensorSpec.of(value) if isinstance(value, Tensor) else None


def tensors_of(module: GraphModule, node: Node) -> Iterable[Tensor]:
    """The parameters and buffers that a node uses."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        yield from (*called.parameters(), *called.buffers())
    for used in node.all_input_nodes:
        if used.op == "get_attr":
            value = get_attribute(module, str(used.target))
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, nn.Module):
                yield from (*value.parameters(), *value.buffers())
