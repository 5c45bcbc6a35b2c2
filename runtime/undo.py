"""What a run changes of a worker's stages, so that a run that failed can be taken back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxsplit.runtime.host_random import HostRandom


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
        stages: Iterable[nn.Module],
        with_gradients: bool,
        with_host: bool,
        with_buffers: bool = True,
    ) -> Undo:
        """Copies what a run may change. Gradients that are not there, as after `zero_grad`, cost nothing."""
        stages = list(stages)
        parameters = [p for stage in stages for p in stage.parameters()] if with_gradients else []
        buffers = [buffer for stage in stages for buffer in stage.buffers()] if with_buffers else []
        with_gradient = [p for p in parameters if p.grad is not None]
        copies = iter(_copies([p.grad for p in with_gradient if p.grad is not None]))
        return cls(
            number,
            list(zip(buffers, _copies(buffers), strict=True)),
            [(p, None if p.grad is None else next(copies)) for p in parameters],
            HostRandom() if with_host else None,
        )

    @classmethod
    def of_backward(cls, number: int, stages: Iterable[nn.Module], before: Undo) -> Undo:
        """What `before`, of the same run's forward, has copied, and the gradients."""
        gradients = cls.of(number, stages, True, False, with_buffers=False).gradients
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


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each tensor; on a GPU by one launch for many of them."""
    copies: list[Tensor | None] = [None] * len(tensors)
    together: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if tensor.is_cuda and tensor.dtype != torch.bool and not tensor.is_complex():
            together[tensor.device, tensor.dtype].append(index)
        else:
            copies[index] = tensor.clone()
    for indices in together.values():
        with torch.no_grad():
            made = torch._foreach_mul([tensors[index] for index in indices], 1)
        for index, copy in zip(indices, made, strict=True):
            copies[index] = copy
    return [copy for copy in copies if copy is not None]
