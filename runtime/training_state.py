"""All that training has made of a pipeline, taken out and put back when the workers get new graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxsplit.errors import PipelineError, nearest
from fxsplit.runtime.engine import Engine
from fxsplit.runtime.gradients import Gradients
from fxsplit.runtime.optimizer import PipelineOptimizer


@dataclass(frozen=True)
class TrainingState:
    """Weights, gradients and the state of every optimizer, on the CPU.

    Attributes:
        weights: the model's state_dict.
        gradients: by parameter name.
        optimizers: each with its state_dict, if its workers' parts exist.
    """

    weights: Mapping[str, Any]
    gradients: Mapping[str, Tensor]
    optimizers: tuple[tuple[PipelineOptimizer, dict[str, Any]], ...]

    @classmethod
    def of(cls, weights: Mapping[str, Any], gradients: Gradients) -> TrainingState:
        """The present state of a pipeline with these weights."""
        optimizers = tuple((o, o.state_dict()) for o in gradients.optimizers if o.is_created)
        return cls(weights, gradients.get(), optimizers)

    def restore(self, engine: Engine, gradients: Gradients) -> None:
        """Puts it into workers that have just been given their stages."""
        engine.broadcast("load_state", dict(self.weights))
        gradients.put(self.gradients)
        for optimizer, state in self.optimizers:
            optimizer.is_created = False
            optimizer.load_state_dict(state)


def check_keys(state_dict: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Refuses a state_dict with other keys.

    Raises:
        PipelineError: names what is missing and what is unknown.
    """
    missing = [key for key in keys if key not in state_dict]
    unknown = [key for key in state_dict if key not in keys]
    if missing or unknown:
        raise PipelineError(
            "the state_dict is not this model's",
            found=f"missing: {', '.join(missing[:5]) or 'none'}; unknown: {', '.join(unknown[:5]) or 'none'}",
            hint=f"nearest to the first: {nearest((unknown or missing)[0], keys)}",
        )


def on_cpu(value: Any) -> Any:
    """A copy of a tensor on the CPU; anything else as it is."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
