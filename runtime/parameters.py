"""The parameters that a worker holds: their gradients and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsplit.errors import PipelineError
from fxsplit.runtime.transaction import Transaction
from fxsplit.stage import StageModule

Group = tuple[dict[str, Any], tuple[str, ...]]
"""Options of a parameter group, and the names of the parameters in it that a worker may hold."""


class ParameterStore:
    """Parameters by their names in the model. A tied parameter goes by its first name."""

    def __init__(self) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self._stages: Mapping[int, StageModule] = {}
        self._optimizers: dict[int, Optimizer] = {}
        self._group_indices: dict[int, list[int]] = {}
        self._transaction = Transaction()
        self.commands: Mapping[str, Callable[..., Any]] = {
            "clear_gradients": self.clear_gradients,
            "gradient_norms": self.gradient_norms,
            "get_gradients": self.get_gradients,
            "set_gradients": self.set_gradients,
            "scale_gradients": self.scale_gradients,
            "create_optimizer": self.create_optimizer,
            "prepare_step": self.prepare_step,
            "commit_step": self._transaction.commit,
            "roll_back_step": self._transaction.roll_back,
            "optimizer_state": self.optimizer_state,
            "load_optimizer_state": self.load_optimizer_state,
            "load_state": self.load_state,
            "require_gradients": self.require_gradients,
        }

    def hold(self, stages: Mapping[int, StageModule], canonical: Mapping[str, str]) -> None:
        """Takes the stages' parameters."""
        self._stages = stages
        self._parameters = {}
        for module in stages.values():
            for name, parameter in module.named_parameters(remove_duplicate=False):
                self._parameters.setdefault(canonical.get(name, name), parameter)

    def require_gradients(self, changes: Mapping[str, bool]) -> None:
        """Freezes parameters, or lets them be trained."""
        for name, wanted in changes.items():
            if name in self._parameters:
                self._parameters[name].requires_grad_(wanted)

    def clear_gradients(self, names: Sequence[str]) -> None:
        """Sets the gradients of those parameters that are here to None."""
        for name in names:
            if name in self._parameters:
                self._parameters[name].grad = None

    def gradient_norms(self, norm_type: float) -> dict[str, float]:
        """The norm of each gradient that is there."""
        held = [(n, p.grad) for n, p in self._parameters.items() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, norm_type) for _, gradient in held]
        return {name: float(norm) for (name, _), norm in zip(held, norms, strict=True)}

    def get_gradients(self, names: Sequence[str] | None) -> dict[str, Tensor]:
        """Gradients by name, on the CPU; all of them if no names are given."""
        wanted = self._parameters if names is None else {n: self._parameters[n] for n in names}
        return {n: p.grad.detach().to("cpu", copy=True) for n, p in wanted.items() if p.grad is not None}

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Replaces gradients."""
        for name, gradient in gradients.items():
            self._parameters[name].grad = gradient.to(self._parameters[name].device)

    def scale_gradients(self, factor: float) -> None:
        """Multiplies every gradient."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def create_optimizer(self, number: int, kind: type[Optimizer], groups: Sequence[Group]) -> None:
        """Makes this worker's part of an optimizer; groups without parameters here are left out."""
        indices, own = [], []
        for index, (options, names) in enumerate(groups):
            parameters = [self._parameters[name] for name in names if name in self._parameters]
            if parameters:
                indices.append(index)
                own.append({**options, "params": parameters})
        if own:
            self._optimizers[number] = kind(own)  # type: ignore[call-arg]
            self._group_indices[number] = indices

    def prepare_step(self, step: int, number: int, options: Sequence[Mapping[str, Any]], factor: float) -> None:
        """One step, that can be taken back until it is committed.

        Args:
            step: its number among all steps of the pipeline.
            number: of the optimizer.
            options: the client's present ones (learning rates that a scheduler changed, say).
            factor: by which gradients are scaled before.
        """
        if number not in self._optimizers:
            return
        optimizer = self._optimizers[number]
        self._transaction.begin(step, optimizer, with_gradients=factor != 1.0)
        for group, index in zip(optimizer.param_groups, self._group_indices[number], strict=True):
            group.update(options[index])
        if factor != 1.0:
            gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, factor)
        optimizer.step()

    def optimizer_state(self, number: int) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter name, tensors on the CPU."""
        if number not in self._optimizers:
            return {}
        state = self._optimizers[number].state
        return {
            name: {k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in state[p].items()}
            for name, p in self._parameters.items()
            if p in state
        }

    def load_optimizer_state(self, number: int, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Replaces the optimizer's state for the parameters held here."""
        if number not in self._optimizers:
            return
        optimizer = self._optimizers[number]
        order = [p for group in optimizer.param_groups for p in group["params"]]
        names = {id(p): name for name, p in self._parameters.items()}
        entries = {i: dict(state[names[id(p)]]) for i, p in enumerate(order) if names[id(p)] in state}
        # torch's own loader puts each tensor on the device and dtype that its optimizer wants.
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})

    def held_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Every gradient that is there, by name."""
        return ((name, p.grad) for name, p in self._parameters.items() if p.grad is not None)

    def replace_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Sets these gradients, and no others."""
        self.clear_gradients(list(self._parameters))
        self.set_gradients({name: g for name, g in gradients.items() if name in self._parameters})

    @property
    def optimizer_numbers(self) -> tuple[int, ...]:
        """The optimizers that have parameters here."""
        return tuple(self._optimizers)

    def optimizer_entries(self) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        """The state of all optimizers: number, name of the parameter, entries."""
        for number, optimizer in self._optimizers.items():
            for name, parameter in self._parameters.items():
                if parameter in optimizer.state:
                    yield number, name, optimizer.state[parameter]

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads entries of the model's state_dict into the stages that have them."""
        for module in self._stages.values():
            own = {name: state[name] for name in module.state_dict() if name in state}
            problem = module.load_state_dict(own, strict=False)
            if problem.unexpected_keys:
                raise PipelineError(
                    "entries of the state_dict have no place", found=", ".join(problem.unexpected_keys)
                )
