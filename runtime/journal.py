"""What a pipeline was told since its last snapshot, kept so that it can be done again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxsplit.runtime.host_random import HostRandom
from fxsplit.trace.replay import Surroundings

SETTING_UP = ("create_optimizer", "require_gradients")
"""Commands whose effect is in no snapshot."""


Random = tuple[HostRandom, tuple[Tensor, ...]]
"""The states of the client's generators: of Python and numpy; and of torch, once its device is known."""


@dataclass(frozen=True)
class Operation:
    """One call of the engine's, with all that it depended on.

    Attributes:
        method: of the engine.
        arguments: of the call; tensors are copies on the CPU once it is kept.
        random: the states of the client's generators before.
        surroundings: gradient mode and autocast.
        run_number: the number that the next run had.
        seconds: how long it took.
    """

    method: str
    arguments: tuple[Any, ...]
    random: Random | None = None
    surroundings: Surroundings = field(default_factory=Surroundings.current)
    run_number: int = 0
    seconds: float = 0.0

    def kept(self, run_number: int, seconds: float) -> Operation:
        """As it is kept: whatever the caller does with its tensors afterwards."""
        arguments = pytree.tree_map_only(Tensor, _copy, self.arguments)
        return replace(self, arguments=arguments, run_number=run_number, seconds=seconds)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in its arguments."""
        return sum(leaf.nbytes for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, Tensor))

    @property
    def command(self) -> str | None:
        """The command, if it is one to the workers."""
        if self.method == "broadcast":
            return str(self.arguments[0])
        return str(self.arguments[1]) if self.method == "call" else None


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu", copy=True, memory_format=torch.preserve_format)
    return copy.requires_grad_(tensor.requires_grad)


class Journal:
    """What leads from nothing to the present state: a base, and what was done since.

    Attributes:
        base: loads the stages, makes the optimizers, and restores the snapshot if there is one.
        log: everything since.
    """

    def __init__(self) -> None:
        self.base: list[Operation] = []
        self.log: list[Operation] = []
        self.nbytes = 0
        self.seconds = 0.0

    def append(self, operation: Operation) -> None:
        """Notes what was done."""
        self.log.append(operation)
        self.nbytes += operation.nbytes
        self.seconds += operation.seconds

    def rebase(self, mark: int, restore: Operation) -> None:
        """Begins with a snapshot.

        Args:
            mark: how long the log was when the snapshot was taken.
            restore: restores it.
        """
        past = [*self.base, *self.log[:mark]]
        loads = [operation for operation in past if operation.method == "load"][-1:]
        made = [operation for operation in past if operation.command in SETTING_UP]
        self.base, self.log = [*loads, *made, restore], self.log[mark:]
        self.nbytes = sum(operation.nbytes for operation in self.log)
        self.seconds = sum(operation.seconds for operation in self.log)

    def __iter__(self) -> Iterator[Operation]:
        yield from (*self.base, *self.log)


def without_effect(method: str, arguments: Sequence[Any]) -> bool:
    """Whether a call leaves the workers as they are, so that it need not be done again."""
    reading = ("state", "gradient_norms", "get_gradients", "optimizer_state", "clock", "sees_file")
    if method == "take":
        return True
    if method == "broadcast":
        return arguments[0] in reading
    if method == "call":
        return arguments[1] in reading
    return method == "forward" and not arguments[2] and not arguments[1].training
