"""What is replaced in torch and in the model's libraries while a recording runs, and put back after it."""

from __future__ import annotations

import builtins
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fxsplit.trace import replay
from fxsplit.trace.recorder import Recorder
from fxsplit.trace.sizes import SizeInt

# Modules of transformers whose functions build masks under vmap: each call is kept as one node.
MASK_MODULES = ("transformers.masking_utils", "transformers.modeling_attn_mask_utils")

# Options by which those builders leave a mask out where this batch does not need it. A recorded graph serves
# every batch, so the mask is always made.
_SKIP_OPTIONS = ("allow_is_causal_skip", "allow_is_bidirectional_skip")


@contextmanager
def watch_model(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """While active, module calls, autograd functions, mask builders and `len` are seen by the recorder."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.Module, "__call__", _module_call(recorder)))
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", _function_apply(recorder)))
        for namespace, name, function in _leaf_functions(model):
            stack.enter_context(mock.patch.dict(namespace, {name: _leaf(recorder, function)}))
        for namespace in _namespaces(model):
            watched = {"len": _length(recorder), "range": _range}
            own = {name: function for name, function in watched.items() if name not in namespace}
            stack.enter_context(mock.patch.dict(namespace, own))
        stack.enter_context(recorder)
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[bool]:
    """Switches `config.use_cache` off: a pipelined forward returns no cache. Yields whether it was on."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    with ExitStack() as stack:
        cached = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
        for config in cached:
            stack.enter_context(mock.patch.object(config, "use_cache", False))
        yield bool(cached)


def _module_call(recorder: Recorder) -> Callable[..., Any]:
    original = nn.Module.__call__

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_module(self, original, args, kwargs)

    return __call__


def _function_apply(recorder: Recorder) -> Any:
    original = inspect.getattr_static(torch.autograd.Function, "apply")

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        run = original.__get__(None, cls)
        if not recorder.recording or kwargs:
            return run(*args, **kwargs)
        return recorder.call_leaf(
            "call_function", replay.apply_autograd_function, lambda _, *a: run(*a), (cls, *args), {}
        )

    return classmethod(apply)


def _leaf(recorder: Recorder, function: types.FunctionType) -> Callable[..., Any]:
    signature = inspect.signature(function)
    options = [name for name in _SKIP_OPTIONS if name in signature.parameters]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not recorder.recording:
            return function(*args, **kwargs)
        named = dict(signature.bind(*args, **kwargs).arguments)
        extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        named.update(named.pop(extra, {}) if extra else {})
        if isinstance(named.get("attention_mask"), Tensor):
            named.update(dict.fromkeys(options, False))
        return recorder.call_leaf("call_function", function, function, (), named)

    return call


def _length(recorder: Recorder) -> Callable[[Any], int]:
    def length(value: Any) -> int:
        if recorder.recording and isinstance(value, Tensor):
            return value.size(0)
        return builtins.len(value)

    return length


def _range(*bounds: int) -> range:
    """A loop over a size is unrolled, so the graph holds for that size alone."""
    return range(*(bound.freeze() if isinstance(bound, SizeInt) else bound for bound in bounds))


def _namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """Globals of the Python modules that define the model's classes, torch's own left out."""
    names = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    return [
        vars(sys.modules[n])
        for n in sorted(names)
        if n in sys.modules and not n.startswith(("torch.", "builtins"))
    ]


def _leaf_functions(model: nn.Module) -> list[tuple[dict[str, Any], str, types.FunctionType]]:
    return [
        (namespace, name, value)
        for namespace in _namespaces(model)
        for name, value in list(namespace.items())
        if isinstance(value, types.FunctionType) and value.__module__ in MASK_MODULES
    ]
