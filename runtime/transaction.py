"""Optimizer steps that all workers make, or none: prepared everywhere, then committed; else taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxsplit.runtime.undo import Copies


@dataclass(frozen=True)
class Before:
    """A worker's part of an optimizer as it was before a step.

    Large copies live from the step to its commit, when the activations of the batch are gone already.

    Attributes:
        optimizer: whose.
        tensors: everything that the step may change in place, and copies.
        state: by parameter, entries with the tensors themselves.
        options: of the parameter groups.
    """

    optimizer: Optimizer
    tensors: Sequence[tuple[Tensor, Tensor]]
    state: Mapping[Tensor, Mapping[str, Any]]
    options: Sequence[Mapping[str, Any]]

    @classmethod
    @torch.no_grad()
    def of(cls, optimizer: Optimizer, with_gradients: bool, copies: Copies) -> Before:
        """Notes everything that a step of this optimizer changes.

        Args:
            optimizer: before its step.
            with_gradients: whether gradients are changed, too.
            copies: where it is copied.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        state = {p: dict(optimizer.state[p]) for p in parameters if p in optimizer.state}
        changing: list[Tensor] = [*parameters]
        changing += [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]
        if with_gradients:
            changing += [p.grad for p in parameters if p.grad is not None]
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return cls(optimizer, list(zip(changing, copies.of(changing), strict=True)), state, options)

    @torch.no_grad()
    def put_back(self) -> None:
        """Takes the step back."""
        for tensor, copy in self.tensors:
            tensor.copy_(copy)
        for group, options in zip(self.optimizer.param_groups, self.options, strict=True):
            group.update(options)
            for parameter in group["params"]:
                if parameter in self.state:
                    self.optimizer.state[parameter] = dict(self.state[parameter])
                elif parameter.grad is not None:
                    self.optimizer.state.pop(parameter, None)


class Transaction:
    """The step of this worker that is prepared, if one is. Steps are known by their numbers."""

    def __init__(self) -> None:
        self._step = 0
        self._before: Before | None = None
        self._copies = Copies()

    def begin(self, step: int, optimizer: Optimizer, with_gradients: bool) -> None:
        """Prepares a step. A step that was prepared before is committed: the client would not go on otherwise."""
        self._step, self._before = step, Before.of(optimizer, with_gradients, self._copies)

    def commit(self, step: int) -> None:
        """All workers have prepared this step."""
        if step >= self._step:
            self._before = None

    def roll_back(self, step: int) -> None:
        """Some worker has not prepared this step: this one takes it back, if it has."""
        if step == self._step and self._before is not None:
            self._before.put_back()
            self._before = None
