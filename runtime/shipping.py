"""Ships stages to workers: structure as bytes, tensors apart, so that the transport can send them without a copy.

Classes and functions of the user's script or notebook travel by value (cloudpickle), those of importable
modules by name. This goes over the transport only; nothing of it is ever written to or read from a file.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import io
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def _operator(name: str, overload: str | None) -> Any:
    namespace, _, operator = name.partition("::")
    with contextlib.suppress(ImportError):
        importlib.import_module(namespace)  # a library that brings operators of its own, such as torchvision
    packet = getattr(getattr(torch.ops, namespace), operator)
    return packet if overload is None else getattr(packet, overload)


def _parametrized(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """A module with `torch.nn.utils.parametrize` on it: its class, made at run time, refuses to be pickled."""
    module = kind.__new__(kind)
    module.__dict__.update(state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]
        parametrize._inject_property(module, name)
    return module


def _global_with_context(obj: Any) -> tuple[str, str] | None:
    """Module and name of an object that holds a context variable, which belongs to a process and stays there."""
    held = vars(obj).values() if hasattr(obj, "__dict__") and not isinstance(obj, type | nn.Module) else ()
    if isinstance(obj, contextvars.ContextVar) or any(isinstance(v, contextvars.ContextVar) for v in held):
        module = type(obj).__module__
        names = [name for name, value in vars(sys.modules[module]).items() if value is obj]
        return (module, names[0]) if names else None
    return None


def _global(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._indices: dict[int, int] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Operators go by name: they cannot be pickled themselves."""
        if isinstance(obj, torch._ops.OpOverloadPacket):
            return _operator, (obj._qualified_op_name, None)
        if isinstance(obj, torch._ops.OpOverload):
            return _operator, (obj.overloadpacket._qualified_op_name, obj._overloadname)
        if isinstance(obj, nn.Module) and parametrize.is_parametrized(obj):
            return _parametrized, (type(obj).__bases__[0], dict(obj.__dict__))
        if (found := _global_with_context(obj)) is not None:
            return _global, found
        return super().reducer_override(obj)

    def persistent_id(self, obj: Any) -> tuple[int, bool, bool] | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._indices:
            self._indices[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._indices[id(obj)], isinstance(obj, nn.Parameter), obj.requires_grad


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._built: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        index, is_parameter, requires_grad = pid
        if index not in self._built:
            tensor = self._tensors[index]
            built = nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)
            self._built[index] = built
        return self._built[index]


def dump(value: Any) -> tuple[bytes, list[Tensor]]:
    """A value as bytes, and the tensors in it: each once, detached, copied to the CPU, strides kept."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    copies = [t.detach().to("cpu", copy=True, memory_format=torch.preserve_format) for t in pickler.tensors]
    return file.getvalue(), copies


def load(data: bytes, tensors: Sequence[Tensor]) -> Any:
    """The value that was dumped; it takes the tensors over."""
    return _Unpickler(io.BytesIO(data), tensors).load()
