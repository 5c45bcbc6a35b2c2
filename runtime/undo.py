"""What a run changes of a worker's stages, so that a run that failed can be taken back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Undo:
    """The state before a run.

    Attributes:
        number: of the run.
        buffers: each with a copy.
        gradients: each parameter with a copy of its gradient, if it had one; only a whole step changes gradients
            before it is known to succeed.
    """

    number: int
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gradients: list[tuple[nn.Parameter, Tensor | None]] = field(default_factory=list)

    @classmethod
    def of(cls, number: int, stages: Iterable[nn.Module], with_gradients: bool) -> Undo:
        """Copies what a run may change. Gradients that are not there, as after `zero_grad`, cost nothing."""
        stages = list(stages)
        parameters = [p for stage in stages for p in stage.parameters()] if with_gradients else []
        return cls(
            number,
            [(buffer, buffer.clone()) for stage in stages for buffer in stage.buffers()],
            [(p, None if p.grad is None else p.grad.clone()) for p in parameters],
        )

    @torch.no_grad()
    def apply(self) -> None:
        """Puts everything back."""
        for buffer, before in self.buffers:
            buffer.copy_(before)
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
