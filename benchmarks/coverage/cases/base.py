"""What a case is: a model, the inputs it is called with, and where it is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Batch:
    """Which inputs are wanted; the same batch always gives the same numbers.

    Attributes:
        samples: the batch size.
        training: whether they are for a model in training mode; some models take other arguments there.
        length: sequence length; the case's own if not given.
    """

    samples: int
    training: bool = False
    length: int | None = None

    def generator(self) -> torch.Generator:
        """The source of this batch's numbers."""
        return torch.Generator().manual_seed(100 + self.samples)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


Inputs = Callable[[Batch], Call]


@dataclass(frozen=True)
class Case:
    """One model and its cut.

    Attributes:
        name: the name of the model.
        family: what kind of model it is.
        build: makes the model with random weights.
        inputs: makes its inputs.
        cut: the module at which the second of two stages begins.
        other_length: another sequence length to try, for models of sequences.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    cut: str
    other_length: int | None = None
