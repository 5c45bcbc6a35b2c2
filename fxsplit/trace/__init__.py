"""Tracing: an unmodified model becomes `torch.fx` graphs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxsplit.errors import FxsplitError, InputError, PlanError, TraceError, nearest
from fxsplit.trace.activations import all_parameters_differentiable
from fxsplit.trace.call import Arguments, CallLayout, ExampleInputs, batch_size, is_batched, resample
from fxsplit.trace.patches import watch_model, without_cache
from fxsplit.trace.recorder import CONSTANT_PREFIX, Recorder
from fxsplit.trace.replay import Surroundings
from fxsplit.trace.traced import (
    OutputLayout,
    TracedGraph,
    TracedModel,
    constants_of,
    make_graph_module,
    mode_name,
)
from fxsplit.trace.verify import compare, observe_model, other_masks, other_numbers, other_samples, undisturbed

__all__ = [
    "Arguments",
    "CallLayout",
    "ExampleInputs",
    "OutputLayout",
    "TracedGraph",
    "TracedModel",
    "ancestors",
    "check_module",
    "check_names",
    "checked_call",
    "run_model",
    "trace",
    "two_samples",
]


def ancestors(names: Iterable[str]) -> frozenset[str]:
    """The modules that contain the named ones, the model itself ('') included.

    >>> sorted(ancestors(["features.0.2"]))
    ['', 'features', 'features.0']
    """
    parts = [name.split(".") for name in names]
    return frozenset({""} | {".".join(p[:i]) for p in parts for i in range(1, len(p))})


def trace(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    cuts: Iterable[str] = (),
    opened: Iterable[str] = (),
    verify: bool = True,
    exact: bool = False,
) -> TracedModel:
    """Traces a model by running it, and checks the result against the model.

    The model's own Python runs on two samples of the example, in its present mode and in the other one, and a
    graph is written beside it. Modules stay whole nodes of the graph, but for those that contain a cut or are
    named in `opened`. The model is left as it was: mode, buffers and random number generators.

    Args:
        model: any module; it is not changed.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. Dimension 0 of the
            tensors is the batch.
        cuts: module names at which a stage is to begin: what contains them is recorded operation by operation.
        opened: further modules to record operation by operation.
        verify: compare graph and model bit for bit on other samples, another batch size and turned padding
            masks, in both modes.
        exact: record the example's batch itself, not two samples of it, and in the model's present mode alone.

    Returns:
        the traced model: callable as the model is.

    Raises:
        TraceError: the model cannot be traced, or the graph does not reproduce it.
        InputError: the inputs do not fit the model.
        PlanError: a cut or opened module is not in the model.
    """
    check_module(model)
    check_names(model, [*cuts, *opened])
    call, samples = checked_call(model, Arguments.of(example_inputs))
    if not exact:
        samples = two_samples(model, call, samples)
    open_names = ancestors(cuts) | ancestors(opened) | frozenset(opened)
    graphs: dict[bool, TracedGraph] = {}
    notes: list[str] = []
    with without_cache(model) as cached:
        if cached:
            notes.append("use_cache is off: a pipelined forward returns no key-value cache")
        for training in (model.training,) if exact else (model.training, not model.training):
            try:
                graphs[training] = _trace_mode(model, call, samples, training, open_names, verify)
            except Exception as error:
                if training is model.training:
                    raise
                notes.append(f"not traced in {mode_name(training)} mode: {error}")
    return TracedModel(model, call, _shared(graphs), tuple(notes))


_recordings = itertools.count()


def _trace_mode(
    model: nn.Module,
    call: CallLayout,
    leaves: Sequence[Any],
    training: bool,
    opened: frozenset[str],
    verify: bool,
) -> TracedGraph:
    recorder = Recorder(model, opened, str(next(_recordings)))
    for name, leaf in zip(call.names, leaves, strict=True):
        if isinstance(leaf, Tensor):
            recorder.placeholder(name, leaf)
    with (
        undisturbed(model, training),
        all_parameters_differentiable(model),
        torch.enable_grad(),
        watch_model(recorder, model),
    ):
        recorder.start()
        output = run_model(model, call, leaves)
        output_leaves, structure = pytree.tree_flatten(output)
        recorder.output(output_leaves)
        recorder.recording = False
    _drop_unused(recorder)
    module = make_graph_module(model, recorder.graph, recorder.constants, type(model).__name__)
    points = {name: node.name for name, node in recorder.first_calls.items() if name and not node._erased}
    traced = TracedGraph(module, points, OutputLayout(structure, (None,) * len(output_leaves)))
    others = other_samples(leaves)
    grown = observe_model(model, call, training, others, seed=1)
    if verify:
        batches = [
            ("the example's batch", leaves),
            ("another batch", others),
            ("other numbers", other_numbers(leaves)),
        ]
        if (masks := other_masks(call, others)) is not None:
            batches.append(("another padding mask", masks))
        # Other seeds, so that a way that random numbers have chosen is not taken for the only one.
        for seed, (what, inputs) in enumerate(batches):
            expected = grown if inputs is others else observe_model(model, call, training, inputs, seed)
            compare(model, traced, training, inputs, expected, what, recorder.reads, seed)
    dims = _batch_dims(output_leaves, batch_size(leaves), grown.outputs if grown else None)
    return TracedGraph(module, points, OutputLayout(structure, dims))


def run_model(model: nn.Module, call: CallLayout, leaves: Sequence[Any]) -> Any:
    """Runs the model itself on these leaves.

    Raises:
        TraceError: names the line of the model's own source at which it failed.
    """
    try:
        return call.call(model, leaves)
    except FxsplitError:
        raise
    except Exception as error:
        raise TraceError(
            f"the model raised {type(error).__name__} on the example inputs",
            where=_own_line(error),
            found=str(error),
            hint="check that model(*example_inputs) runs",
        ) from error


def _own_line(error: BaseException) -> str:
    traceback, line = error.__traceback__, "unknown source"
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not traceback.tb_frame.f_globals.get("__name__", "").startswith(("torch.", "fxsplit.")):
            line = f'File "{code.co_filename}", line {traceback.tb_lineno}, in {code.co_name}'
        traceback = traceback.tb_next
    return line


def _batch_dims(leaves: Sequence[Any], samples: int, grown: Sequence[Any] | None) -> tuple[int | None, ...]:
    """Which dimension of each output grows with the batch; where no other batch ran, the first of its size."""
    if grown is None or len(grown) != len(leaves):
        return tuple(0 if isinstance(leaf, Tensor) and is_batched(leaf, samples) else None for leaf in leaves)
    return tuple(
        next((d for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim()
        else None
        for a, b in zip(leaves, grown, strict=True)
    )


_PURE = frozenset({"getattr", "getitem", "add", "sub", "mul", "floordiv", "mod", "pow", "neg"})


def _drop_unused(recorder: Recorder) -> None:
    """Takes out sizes and items that nothing uses; operations stay, since any may write in place."""
    for node in reversed(recorder.graph.nodes):
        pure = node.op == "get_attr" or (node.op == "call_function" and _is_pure(node.target))
        pure = pure or (node.op == "call_method" and node.target in ("size", "numel", "nelement", "__len__"))
        if pure and not node.users:
            recorder.graph.erase_node(node)
    # A module whose first node went away begins at the next node that is left.
    erased = [name for name, node in recorder.first_calls.items() if node._erased]
    for name in erased:
        del recorder.first_calls[name]


def _is_pure(target: Any) -> bool:
    return getattr(target, "__module__", "") in ("builtins", "_operator") and target.__name__ in _PURE


def _shared(graphs: dict[bool, TracedGraph]) -> dict[bool, TracedGraph]:
    """One graph for both modes where they are the same."""
    if len(graphs) == 2:
        (first, one), (second, two) = graphs.items()
        if one.output == two.output and _same_graph(one.module, two.module):
            return {first: one, second: one}
    return graphs


def _same_graph(one: GraphModule, two: GraphModule) -> bool:
    codes = [re.sub(rf"{CONSTANT_PREFIX}\d+_", CONSTANT_PREFIX, module.code) for module in (one, two)]
    if codes[0] != codes[1]:
        return False
    constants = [list(constants_of(m, m.graph).values()) for m in (one, two)]
    return all(a is b or _equal(a, b) for a, b in zip(*constants, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Surroundings):
        return bool(a == b)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)


def check_module(model: object) -> None:
    """Refuses what is no module.

    Raises:
        TraceError: always then.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(
            "only a torch.nn.Module can be compiled",
            found=f"{model!r:.80} ({type(model).__name__})",
            allowed="an instance of torch.nn.Module",
            hint="pass the model itself, not its class, its state_dict or its forward",
        )


def check_names(model: nn.Module, names: Iterable[str]) -> None:
    """Refuses names that no module of the model has.

    Raises:
        PlanError: names the nearest ones.
    """
    known = [name for name, _ in model.named_modules()]
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise PlanError(
                f"the model has no module of that name: {name!r}",
                where=type(model).__name__,
                found=name,
                allowed="a module's qualified name, as in model.named_modules()",
                hint=f"nearest: {nearest(str(name), known)}",
            )


def two_samples(model: nn.Module, call: CallLayout, leaves: Sequence[Any]) -> list[Any]:
    """Inputs for a batch of two samples of this one.

    A model whose inputs are not cut along dimension 0, such as a list of images, gets them as they are.
    """
    fewer = resample(leaves, [i % batch_size(leaves) for i in range(2)])
    return fewer if observe_model(model, call, model.training, fewer) is not None else list(leaves)


def checked_call(model: nn.Module, example: Arguments) -> tuple[CallLayout, list[Any]]:
    """The way of calling the model, and its inputs.

    Raises:
        InputError: the example does not fit the model, is empty, or is on another device than the model.
    """
    call, leaves = CallLayout.of(model, example)
    _check_devices(model, call, leaves)
    if batch_size(leaves) == 0:
        raise InputError("the batch is empty", found="0 samples", allowed="at least one sample")
    return call, leaves


def _check_devices(model: nn.Module, call: CallLayout, leaves: Sequence[Any]) -> None:
    home = next((p.device for p in model.parameters()), None)
    for name, leaf in zip(call.names, leaves, strict=True):
        if isinstance(leaf, Tensor) and home is not None and leaf.device != home:
            raise InputError(
                f"input '{name}' is on another device than the model",
                found=str(leaf.device),
                allowed=str(home),
                hint=f"move it with {name}.to('{home}')",
            )
