"""Integers that remember the node they came from, so that no batch size is frozen into a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.fx import Node


class SizeRecorder(Protocol):
    """What a size needs of the recorder."""

    def record_size(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node | None:
        """Writes a calculation with sizes into the graph; None once recording is over."""

    def guard(self, node: Node, value: Any) -> None:
        """Lets the graph refuse a batch for which the node's value is another one."""


class SizeInt(int):
    """An int with the example's value, so that control flow runs.

    Arithmetic on it is recorded. What turns it into something that the graph cannot follow (a comparison, a
    float, a loop) is recorded as a guard: the graph then serves only batches for which it comes out the same.
    """

    node: Node
    recorder: SizeRecorder

    def __new__(cls, value: int, node: Node, recorder: SizeRecorder) -> SizeInt:
        """A number, the node that computes it, and the way to record more."""
        self = super().__new__(cls, value)
        self.node = node
        self.recorder = recorder
        return self

    def freeze(self) -> int:
        """The plain value; from here on the graph holds for this value alone."""
        self.recorder.guard(self.node, plain_int(self))
        return plain_int(self)

    def __bool__(self) -> bool:
        return bool(self != 0)

    def __int__(self) -> int:
        return self.freeze()

    def __float__(self) -> float:
        return float(self.freeze())

    def __truediv__(self, other: Any) -> Any:
        return self.freeze() / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.freeze()

    __hash__ = int.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (plain_int(self),)

    def __copy__(self) -> int:
        return plain_int(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return plain_int(self)


def plain_int(value: int) -> int:
    """The value as an ordinary int, with no guard: `int(value)` would be one."""
    return int.__add__(value, 0)


def _recorded(function: Callable[..., Any], reflected: bool) -> Callable[[SizeInt, Any], Any]:
    def method(self: SizeInt, other: Any) -> Any:
        if not isinstance(other, int | float) or isinstance(other, bool):
            return NotImplemented
        operands = (other, self) if reflected else (self, other)
        value = function(*(plain_int(o) if isinstance(o, SizeInt) else o for o in operands))
        if not isinstance(value, int):
            self.freeze()
            return value
        node = self.recorder.record_size(
            function, tuple(o.node if isinstance(o, SizeInt) else o for o in operands)
        )
        return value if node is None else SizeInt(value, node, self.recorder)

    return method


def _compared(function: Callable[..., Any]) -> Callable[[SizeInt, Any], Any]:
    def method(self: SizeInt, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        value = function(plain_int(self), plain_int(other) if isinstance(other, SizeInt) else other)
        right = other.node if isinstance(other, SizeInt) else other
        node = None if right is self.node else self.recorder.record_size(function, (self.node, right))
        if node is not None:
            self.recorder.guard(node, value)
        return value

    return method


def _unary(function: Callable[..., Any]) -> Callable[[SizeInt], int]:
    def method(self: SizeInt) -> int:
        value: int = function(plain_int(self))
        node = self.recorder.record_size(function, (self.node,))
        return value if node is None else SizeInt(value, node, self.recorder)

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow"):
    setattr(SizeInt, f"__{_name}__", _recorded(getattr(operator, _name), reflected=False))
    setattr(SizeInt, f"__r{_name}__", _recorded(getattr(operator, _name), reflected=True))
for _name in ("neg", "abs"):
    setattr(SizeInt, f"__{_name}__", _unary(getattr(operator, _name)))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(SizeInt, f"__{_name}__", _compared(getattr(operator, _name)))


def plain(value: Any) -> Any:
    """`value` with every SizeInt in it replaced by an ordinary int; containers are rebuilt only where needed."""
    if isinstance(value, SizeInt):
        return plain_int(value)
    if isinstance(value, torch.Size):
        return torch.Size([plain(v) for v in value])
    if type(value) in (tuple, list):
        return _plain_sequence(value)
    if type(value) is dict:
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value


def _plain_sequence(value: Sequence[Any]) -> Sequence[Any]:
    items = [plain(v) for v in value]
    if all(a is b for a, b in zip(items, value, strict=True)):
        return value  # the same list object: user code may hold on to it
    return type(value)(items)  # type: ignore[call-arg]
