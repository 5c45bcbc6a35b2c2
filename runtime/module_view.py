"""The part of a pipeline that is as in a `torch.nn.Module`: mode, parameters and their gradients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Self

from torch import Tensor

from fxsplit.runtime.gradients import Gradients
from fxsplit.runtime.optimizer import ParameterHandle


class ModuleView:
    """Mode and parameters of a pipeline. The parameters are on the workers; the client has handles of them."""

    training: bool
    _handles: OrderedDict[str, ParameterHandle]
    _gradients: Gradients

    def _require_built(self, what: str) -> Any:
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Sets training mode, as `torch.nn.Module.train` does."""
        self.training = mode
        return self

    def eval(self) -> Self:
        """Sets evaluation mode."""
        return self.train(False)

    def named_parameters(self) -> Iterator[tuple[str, ParameterHandle]]:
        """The model's parameters by name, as handles."""
        yield from self._handles.items()

    def parameters(self) -> Iterator[ParameterHandle]:
        """The model's parameters, as handles."""
        yield from self._handles.values()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezes all parameters, or lets all be trained; a handle's own `requires_grad_` does it for one."""
        for handle in self.parameters():
            handle.requires_grad_(requires_grad)
        return self

    def zero_grad(self) -> None:
        """Clears all gradients."""
        self._require_built("zero_grad")
        self._gradients.clear(list(self._handles))

    def gradients(self) -> dict[str, Tensor]:
        """Every gradient by parameter name, on the CPU: a transfer of all of them, for looking, not for steps."""
        self._require_built("gradients")
        return self._gradients.get()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips the gradients of all stages by their norm together; returns the norm before, as torch does."""
        self._require_built("clip_grad_norm_")
        return self._gradients.clip_norm(max_norm, norm_type)
