"""The loss of a step, made of its micro-batches where the last stage is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxsplit.compressors import Lossless
from fxsplit.errors import InputError
from fxsplit.runtime.packet import GradientTap
from fxsplit.schedules import Action
from fxsplit.schedules.replicas import replicas_of
from fxsplit.stage import CLIENT, Edge
from fxsplit.trace.traced import OutputLayout


@dataclass(frozen=True)
class TargetLayout:
    """How the target of a micro-batch is put together where the loss is made.

    Attributes:
        leaves: the edge that brings each tensor; what is no tensor, itself.
        structure: of the leaves.
    """

    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The edges that bring the tensors."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Edge))

    def build(self, values: Mapping[Edge, Any]) -> Any:
        """The target, from what the edges brought."""
        leaves = [values[leaf] if isinstance(leaf, Edge) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.structure)


@dataclass(frozen=True)
class Loss:
    """How the loss of a micro-batch is made. It is shipped to the worker that makes it.

    Attributes:
        function: of the model's output and the target, or of the output alone if there are no targets.
        target: how that of a micro-batch is put together; None if there is none.
        weights: by which the micro-batches' losses are summed.
        leaves: the leaves of the model's output: the edge that brings it, or the value itself.
        layout: how they are put together.
        worker: the worker that makes it; of a replicated stage, each replica makes those of its micro-batches.
        last_stage: the stage whose backward begins with it.
        returns_outputs: whether the outputs go to the client, too.
        scale: factor of the gradients.
    """

    function: Callable[..., Any]
    target: TargetLayout | None
    weights: tuple[float, ...]
    leaves: tuple[Any, ...]
    layout: OutputLayout
    worker: str
    last_stage: int
    returns_outputs: bool = True
    scale: float = 1.0

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The edges that bring the model's outputs."""
        return tuple(dict.fromkeys(leaf for leaf in self.leaves if isinstance(leaf, Edge)))

    def as_seen_by(self, worker: str) -> Loss:
        """What is sent to a worker: the function goes to the one that makes the loss, and to no other."""
        return self if worker in replicas_of(self.worker) else replace(self, function=_elsewhere, target=None)

    def is_due(self, action: Action) -> bool:
        """Whether it is made before this action."""
        return action.stage == self.last_stage and action.sends_gradients

    def gradients(
        self, micro_batch: int, values: Mapping[Edge, Any], waiting: Collection[Edge], target: Any
    ) -> tuple[Tensor, dict[Edge, Tensor | None]]:
        """The loss of a micro-batch with its weight, and the gradients of the outputs.

        Args:
            micro_batch: which one.
            values: of the output edges.
            waiting: the edges whose makers wait for a gradient.
            target: of the micro-batch.

        Raises:
            InputError: the loss is not a scalar, or does not depend on what was computed.
        """
        # Taps, not leaves: the user's function may work in place.
        taps = {edge: GradientTap(values[edge]) for edge in waiting}
        leaves = [
            (taps[leaf].tensor if leaf in taps else values[leaf]) if isinstance(leaf, Edge) else leaf
            for leaf in self.leaves
        ]
        output = self.layout.build(leaves)
        loss = self.function(output) if self.target is None else self.function(output, target)
        check_loss(loss)
        weighted = loss * self.weights[micro_batch]
        with torch.autograd.set_multithreading_enabled(False):  # on a GPU another thread would have to be woken
            (weighted if self.scale == 1.0 else weighted * self.scale).backward()
        return weighted.detach(), {edge: tap.gradient for edge, tap in taps.items()}


def _elsewhere(*_: Any) -> None:
    """Stands for the loss on the workers that do not make it."""


def check_loss(loss: Any) -> None:
    """Refuses what no backward can begin at.

    Raises:
        InputError: always then.
    """
    found = None
    if not isinstance(loss, Tensor):
        found = f"a {type(loss).__name__}"
    elif loss.dim() != 0:
        found = f"a tensor of shape {list(loss.shape)}"
    elif not loss.requires_grad:
        found = "a value that does not depend on the model's output"
    if found is not None:
        raise InputError(
            "the loss is not a scalar with a gradient",
            where="loss_fn of pipe.step",
            found=found,
            allowed="a tensor of no dimensions, made from the output with torch's operations",
            hint="take the mean over the micro-batch: reduction='mean', or loss.mean()",
        )


def weights_of(function: Callable[..., Any], sizes: Sequence[int], reduction: str | None) -> tuple[float, ...]:
    """The weights with which the losses of micro-batches make that of the batch.

    Args:
        function: the loss; its own attribute `reduction` counts if the argument says nothing.
        sizes: samples of each micro-batch.
        reduction: "mean" or "sum": what the loss does over samples.

    Raises:
        InputError: another reduction.
    """
    wanted = reduction if reduction is not None else getattr(function, "reduction", "mean")
    if wanted not in ("mean", "sum"):
        raise InputError(
            "the loss of a step is made of those of its micro-batches",
            where="loss_fn of pipe.step",
            found=f"reduction={wanted!r}",
            allowed="'mean' or 'sum'",
        )
    total = sum(sizes)
    return tuple(size / total if wanted == "mean" else 1.0 for size in sizes)


def cut_target(
    target: Any, samples: int, chunks: int, stage_count: int
) -> tuple[TargetLayout | None, dict[Edge, list[Tensor]]]:
    """The target, cut as the inputs are: its layout, None if there is none, and each tensor by micro-batch.

    Args:
        target: a tensor, or a tuple, list or dict of them; what is no tensor goes to every micro-batch.
        samples: of the batch.
        chunks: micro-batches.
        stage_count: the number of stages: behind the last one the loss is made.

    Raises:
        InputError: a tensor has another length than the batch.
    """
    if target is None:
        return None, {}
    leaves, structure = pytree.tree_flatten(target)
    columns: dict[Edge, list[Tensor]] = {}
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        edge = leaves[index] = Edge(f"the target's leaf {index}", CLIENT, stage_count, Lossless(), Lossless())
        if leaf.dim() > 0:
            if leaf.shape[0] != samples:
                raise InputError(
                    "the target has another length than the batch",
                    where="target of pipe.step",
                    found=f"{leaf.shape[0]}",
                    allowed=f"{samples}, as the inputs have",
                )
            columns[edge] = [chunk.detach() for chunk in torch.tensor_split(leaf, chunks)]
        else:
            columns[edge] = [leaf.detach()] * chunks
    return TargetLayout(tuple(leaves), structure), columns
