"""What a run changes of a worker's stages, so that a run that failed can be taken back."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxsplit.runtime.host_random import HostRandom


class Copies:
    """Copies of tensors, time after time into the same memory if they are small and the tensors the same.

    On a GPU making and freeing hundreds of tensors takes the host longer than copying takes the GPU.
    """

    KEPT_BYTES = 64 << 20

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._shapes: list[torch.Size] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A copy of each; the copies that were made before may change."""
        if any(tensor.layout != torch.strided for tensor in tensors):  # gradients of sparse embeddings
            return [tensor.clone() for tensor in tensors]
        shapes = [tensor.shape for tensor in tensors]
        if shapes != self._shapes or not all(map(operator.is_, tensors, self._tensors)):
            is_kept = sum(tensor.nbytes for tensor in tensors) <= self.KEPT_BYTES
            copies = [torch.empty_like(tensor) for tensor in tensors]
            kept = (list(tensors), shapes, copies) if is_kept else ([], [], [])
            self._tensors, self._shapes, self._copies = kept
        else:
            copies = self._copies
        for copy, tensor in _by_kind(copies, tensors).values():  # what is mixed is copied one by one
            torch._foreach_copy_(copy, tensor)
        return copies


def _by_kind(copies: Sequence[Tensor], tensors: Sequence[Tensor]) -> dict[Any, tuple[list[Tensor], list[Tensor]]]:
    found: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for copy, tensor in zip(copies, tensors, strict=True):
        pair = found.setdefault((tensor.dtype, tensor.device), ([], []))
        pair[0].append(copy)
        pair[1].append(tensor)
    return found


@dataclass(frozen=True)
class Undo:
    """The state before a run.

    Attributes:
        number: of the run.
        buffers: each with a copy.
        host: the states of Python's and numpy's random numbers, if the process is the worker's own.
        gradients: each parameter with a copy of its gradient, if it had one; only a whole step changes gradients
            before it is known to succeed, and a replica, whose gradients must stay those of the others.
    """

    number: int
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gradients: list[tuple[nn.Parameter, Tensor | None]] = field(default_factory=list)
    host: HostRandom | None = None

    @classmethod
    def of(
        cls,
        number: int,
        buffers: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        with_host: bool,
        copied: Copies | None = None,
    ) -> Undo:
        """Copies what a run may change. Gradients that are not there, as after `zero_grad`, cost nothing.

        Args:
            number: of the run.
            buffers: that it may change.
            parameters: whose gradients it may change, too.
            with_host: whether it may draw random numbers of Python and numpy.
            copied: where buffers are copied; None: they are not.
        """
        copies = iter(Copies().of([p.grad for p in parameters if p.grad is not None]))
        return cls(
            number,
            list(zip(buffers, copied.of(buffers), strict=True)) if copied is not None else [],
            [(p, None if p.grad is None else next(copies)) for p in parameters],
            HostRandom() if with_host else None,
        )

    @classmethod
    def of_backward(cls, number: int, parameters: Sequence[nn.Parameter], before: Undo) -> Undo:
        """What `before`, of the same run's forward, has copied, and the gradients."""
        gradients = cls.of(number, (), parameters, False).gradients
        known = before if before.number == number else cls(number)
        return cls(number, known.buffers, gradients, known.host)

    @torch.no_grad()
    def apply(self) -> None:
        """Puts everything back."""
        for buffer, before in self.buffers:
            buffer.copy_(before)
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        if self.host is not None:
            self.host.put_back()
