"""The gradients of all workers, as the client sees them."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsplit.errors import PipelineError
from fxsplit.runtime.engine import Engine
from fxsplit.schedules.replicas import replicas_of

_RATIO_TOLERANCE = 1e-4


class Gradients:
    """Norms, clipping and the sums of tied parameters' gradients.

    A parameter that several workers use has a copy on each. Its gradients are summed on the first of them (its
    home); before a step all copies get that sum, and since all make the same update, they stay equal.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._optimizer_numbers = itertools.count()
        self._homes: dict[str, tuple[str, ...]] = {}
        self._tied: dict[str, tuple[str, ...]] = {}
        self._trained: dict[str, bool] = {}
        self._norms: dict[str, Tensor] | None = None
        self._fetched: dict[str, float] = {}
        self._fetched_at = 0

    def new_optimizer_number(self) -> int:
        """The number of the pipeline's next optimizer."""
        return next(self._optimizer_numbers)

    def set_homes(self, homes: Mapping[str, tuple[str, ...]], trained: Mapping[str, bool]) -> None:
        """The workers that hold each parameter, home first, and whether they train it."""
        self._trained = dict(trained)
        self._homes = dict(homes)
        self._tied = {name: workers for name, workers in homes.items() if len(workers) > 1}

    def share_frozen(self, handles: Iterable[Tensor]) -> None:
        """Tells the workers which parameters the client has frozen, or let be trained, since the last time."""
        now = {str(getattr(handle, "parameter_name")): handle.requires_grad for handle in handles}  # noqa: B009
        if changes := {name: wanted for name, wanted in now.items() if self._trained.get(name) != wanted}:
            self.engine.broadcast("require_gradients", changes)
            self._trained.update(changes)

    def changed(self) -> None:
        """What was fetched is out of date."""
        self._norms = None

    def norm_of(self, name: str) -> Tensor | None:
        """A gradient's L2 norm, `[1]`; scaling it in place scales the gradient at the next step."""
        if self._norms is not None and self._fetched_at != self.engine.backwards:
            self.common_factor()  # refuses a scaling that a later backward has added to
        if self._norms is None:
            self._fetched_at = self.engine.backwards
            self._fetched = self.norms(2.0)
            self._norms = {n: torch.tensor([norm]) for n, norm in self._fetched.items()}
        return self._norms.get(name)

    def norms(self, norm_type: float) -> dict[str, float]:
        """The norm of every gradient that is there, by parameter."""
        self._sum_tied()
        results = self.engine.broadcast("gradient_norms", norm_type)
        return {name: norm for norms in results.values() for name, norm in norms.items()}

    def get(self) -> dict[str, Tensor]:
        """Every gradient that is there, on the CPU."""
        self._sum_tied()
        results = self.engine.broadcast("get_gradients", None)
        return {name: gradient for gradients in results.values() for name, gradient in gradients.items()}

    def put(self, gradients: Mapping[str, Tensor]) -> None:
        """Sets gradients, each at its parameter's home."""
        for worker in dict.fromkeys(workers[0] for workers in self._homes.values()):
            own = {name: g for name, g in gradients.items() if self._homes[name][0] == worker}
            self._tell(worker, "set_gradients", own)

    def clear(self, names: Sequence[str]) -> None:
        """Sets gradients to None."""
        self.changed()
        self.engine.broadcast("clear_gradients", list(names))

    def clip_norm(self, max_norm: float, norm_type: float) -> Tensor:
        """Scales all gradients so that their norm together is at most `max_norm`; returns the norm before."""
        norms = list(self.norms(norm_type).values())
        total = torch.linalg.vector_norm(torch.tensor(norms), norm_type) if norms else torch.tensor(0.0)
        factor = min(1.0, max_norm / (float(total) + 1e-6))  # as torch.nn.utils.clip_grad_norm_ has it
        if factor < 1.0:
            self.engine.broadcast("scale_gradients", factor)
        self.changed()
        return total

    def common_factor(self) -> float:
        """By what the handles' gradients were scaled since they were fetched.

        Raises:
            PipelineError: by different factors, or before another backward: neither can be carried over to the
                parameters.
        """
        norms, self._norms = self._norms, None
        if norms is None:
            return 1.0
        factors = [float(norms[n]) / norm for n, norm in self._fetched.items() if norm > 0 and math.isfinite(norm)]
        if not factors or max(abs(f - 1.0) for f in factors) < 1e-6:
            return 1.0
        if self._fetched_at != self.engine.backwards:
            raise PipelineError(
                "the handles' gradients were scaled, and then another backward added to the parameters' gradients",
                hint="clip after the last backward before the step, or use pipe.clip_grad_norm_",
            )
        factor = sorted(factors)[len(factors) // 2]
        if max(abs(f - factor) for f in factors) > _RATIO_TOLERANCE * abs(factor):
            raise PipelineError(
                "the handles' gradients were changed by more than one common factor",
                found=f"factors from {min(factors):.4g} to {max(factors):.4g}",
                allowed="scaling all by one factor, as torch.nn.utils.clip_grad_norm_ does",
                hint="use pipe.clip_grad_norm_",
            )
        return factor

    def _sum_tied(self) -> None:
        """Adds the copies' gradients to the home's; may be called at any time, any number of times."""
        for name, (home, *others) in self._tied.items():
            parts = [self._ask(w, "get_gradients", [name]).get(name) for w in (home, *others)]
            present = [part for part in parts if part is not None]
            if len(present) > (parts[0] is not None):
                total = present[0]
                for part in present[1:]:
                    total = total + part
                self._tell(home, "set_gradients", {name: total})
                for worker in others:
                    self._tell(worker, "clear_gradients", [name])

    def share_tied(self) -> None:
        """Gives every copy the whole gradient, for the step."""
        self._sum_tied()
        for name, (home, *others) in self._tied.items():
            gradient = self._ask(home, "get_gradients", [name])
            for worker in others:
                self._tell(worker, "set_gradients", gradient)

    def unshare_tied(self) -> None:
        """After the step the home alone keeps the gradient."""
        for name, (_, *others) in self._tied.items():
            for worker in others:
                self._tell(worker, "clear_gradients", [name])

    def _ask(self, worker: str, command: str, *arguments: Any) -> Any:
        """What a worker says; replicas say the same."""
        return self.engine.call(replicas_of(worker)[0], command, *arguments)

    def _tell(self, worker: str, command: str, *arguments: Any) -> None:
        """Has a worker do something, or each of its replicas."""
        for name in replicas_of(worker):
            self.engine.call(name, command, *arguments)
