"""Integers that remember the node they came from, so that no batch size is frozen into a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

if TYPE_CHECKING:
    from collections.abc import Sequence


class SizeInt(int):
    """An int with the example's value, so that control flow runs, which records the arithmetic done on it.

    `emit` writes a call into the graph being recorded and returns its node, or None once recording is over.
    """

    node: Node
    emit: Callable[[Callable[..., Any], tuple[Any, ...]], Node | None]

    def __new__(
        cls, value: int, node: Node, emit: Callable[[Callable[..., Any], tuple[Any, ...]], Node | None]
    ) -> SizeInt:
        """A number, the node that computes it, and the way to record more."""
        self = super().__new__(cls, value)
        self.node = node
        self.emit = emit
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __copy__(self) -> int:
        return int(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)


def _recorded(function: Callable[..., Any], reflected: bool) -> Callable[[SizeInt, Any], Any]:
    def method(self: SizeInt, other: Any) -> Any:
        if not isinstance(other, int | float) or isinstance(other, bool):
            return NotImplemented
        operands = (other, self) if reflected else (self, other)
        value = function(*(int(o) if isinstance(o, SizeInt) else o for o in operands))
        if not isinstance(value, int):
            return value  # a float, such as an attention scale: frozen, and caught by verification if it matters
        node = self.emit(function, tuple(o.node if isinstance(o, SizeInt) else o for o in operands))
        return value if node is None else SizeInt(value, node, self.emit)

    return method


def _negated(self: SizeInt) -> int:
    node = self.emit(operator.neg, (self.node,))
    return -int(self) if node is None else SizeInt(-int(self), node, self.emit)


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow"):
    setattr(SizeInt, f"__{_name}__", _recorded(getattr(operator, _name), reflected=False))
    setattr(SizeInt, f"__r{_name}__", _recorded(getattr(operator, _name), reflected=True))
SizeInt.__neg__ = _negated  # type: ignore[method-assign,assignment]


def plain(value: Any) -> Any:
    """`value` with every SizeInt in it replaced by an ordinary int; containers are rebuilt only where needed."""
    if isinstance(value, SizeInt):
        return int(value)
    if isinstance(value, torch.Size):
        return torch.Size([int(v) for v in value])
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
