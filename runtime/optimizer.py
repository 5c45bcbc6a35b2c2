"""Optimizers of a pipeline: one to the user, a part on every worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsplit.errors import PipelineError

if TYPE_CHECKING:
    from fxsplit.runtime.gradients import Gradients


class ParameterHandle(nn.Parameter):
    """Stands in the client for a parameter, wherever it is: in parameter groups, and for gradient clipping.

    It has one element. Its gradient has one, too: the L2 norm of the parameter's gradient, fetched when it is
    looked at. So the global L2 norm over handles is the model's, and scaling the handles' gradients (as
    `torch.nn.utils.clip_grad_norm_` does) scales the parameters' at the next optimizer step. Anything but one
    common factor is refused there; `pipe.gradients()` gives the gradients themselves.

    Attributes:
        parameter_name: the parameter's name in the model.
        full_shape: the parameter's shape.
    """

    parameter_name: str
    full_shape: torch.Size
    _gradients: Gradients

    def __new__(cls, name: str, parameter: Tensor, gradients: Gradients) -> ParameterHandle:
        """A handle for the parameter of this name."""
        self = super().__new__(cls, torch.zeros(1), parameter.requires_grad)
        self.parameter_name = name
        self.full_shape = parameter.shape
        self._gradients = gradients
        return self

    @property
    def grad(self) -> Tensor | None:
        """The L2 norm of the parameter's gradient, `[1]`, or None if it has none."""
        return self._gradients.norm_of(self.parameter_name)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise PipelineError(
                f"the gradient of '{self.parameter_name}' cannot be set in the client",
                allowed="None",
                hint="the parameter is on a worker; a backward of the pipeline's output sets its gradient",
            )
        self._gradients.clear([self.parameter_name])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ParameterHandle('{self.parameter_name}', shape={list(self.full_shape)})"


class PipelineOptimizer(Optimizer):
    """An optimizer whose parameters are on several workers.

    Every worker runs the same torch optimizer on its own parameters; options (learning rates that a scheduler
    changed, say) go from the client's parameter groups to the workers with each step. Optimizers that look at
    all parameters together (LBFGS) do not work this way and are refused.
    """

    def __init__(
        self,
        kind: type[Optimizer],
        parameters: Iterable[Any],
        gradients: Gradients,
        options: Mapping[str, Any],
    ) -> None:
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise PipelineError(
                "not an optimizer class", found=repr(kind), allowed="a class such as torch.optim.AdamW"
            )
        if issubclass(kind, torch.optim.LBFGS):
            raise PipelineError(
                "LBFGS cannot be split over workers",
                hint="use an optimizer that updates each parameter by itself",
            )
        groups = list(parameters)
        template = kind(groups, **options)  # checks options and groups as torch does
        for handle in (p for group in template.param_groups for p in group["params"]):
            if not isinstance(handle, ParameterHandle):
                raise PipelineError(
                    "an optimizer of a pipeline takes the pipeline's own parameters",
                    found=type(handle).__name__,
                    allowed="pipe.parameters() or pipe.named_parameters()",
                )
        super().__init__([dict(group) for group in template.param_groups], template.defaults)
        self.kind = kind
        self._gradients = gradients
        self.number = gradients.new_optimizer_number()
        self.is_created = False
        self._entries: Mapping[str, Mapping[str, Any]] = {}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every worker; returns when all have made it. If one fails, none has.

        Raises:
            PipelineError: the gradients of the handles were changed by anything but one common factor.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.ensure_created()
        factor = self._gradients.common_factor()
        self._gradients.share_tied()
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        self._gradients.engine.optimizer_step(self.number, options, factor)
        self._gradients.unshare_tied()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of this optimizer's parameters, on all workers."""
        self._gradients.clear([name for group in self._names() for name in group])

    def ensure_created(self) -> None:
        """Makes the workers' parts, once the workers have their stages."""
        if self.is_created:
            return
        groups = self.described_groups()
        self._gradients.engine.broadcast("create_optimizer", self.number, self.kind, groups)
        self.is_created = True
        if self._entries:
            entries, self._entries = self._entries, {}
            self.take_entries(entries)

    def take_entries(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes over state by parameter name: now, or as soon as the workers' parts are there."""
        if self.is_created:
            self._gradients.engine.broadcast("load_optimizer_state", self.number, entries)
        else:
            self._entries = entries

    def described_groups(self) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
        """Options and parameter names of each group."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return list(zip(options, self._names(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """State and groups in the layout of the same torch optimizer over the unsplit model's parameters."""
        self.ensure_created()
        merged: dict[str, Any] = {}
        for state in self._gradients.engine.broadcast("optimizer_state", self.number).values():
            for name, entry in state.items():
                merged.setdefault(name, entry)
        count, groups, entries = 0, [], {}
        for group, names in zip(self.param_groups, self._names(), strict=True):
            indices = list(range(count, count + len(names)))
            entries.update({i: merged[name] for i, name in zip(indices, names, strict=True) if name in merged})
            groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": indices})
            count += len(names)
        return {"state": entries, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave, here or from the same torch optimizer over the unsplit model."""
        self.ensure_created()
        names = [name for group in self._names() for name in group]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        if len(saved) != len(names):
            raise PipelineError(
                "the saved optimizer has another number of parameters", found=len(saved), allowed=len(names)
            )
        state = {
            name: state_dict["state"][i] for i, name in zip(saved, names, strict=True) if i in state_dict["state"]
        }
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in loaded.items() if k != "params"})
        self._gradients.engine.broadcast("load_optimizer_state", self.number, state)

    def _names(self) -> Sequence[tuple[str, ...]]:
        return [tuple(handle.parameter_name for handle in group["params"]) for group in self.param_groups]
