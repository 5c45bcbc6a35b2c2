"""Ships stages to workers: structure as bytes, tensors apart, so that the transport can send them without a copy.

Classes and functions of the user's script or notebook travel by value (cloudpickle), those of importable
modules by name. This goes over the transport only; nothing of it is ever written to or read from a file.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pickle
from collections.abc import Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn


def _operator(name: str, overload: str | None) -> Any:
    namespace, _, operator = name.partition("::")
    with contextlib.suppress(ImportError):
        importlib.import_module(namespace)  # a library that brings operators of its own, such as torchvision
    packet = getattr(getattr(torch.ops, namespace), operator)
    return packet if overload is None else getattr(packet, overload)


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
