"""One training step of a pipeline, the client's side: inputs and targets cut, the loss placed, results joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxsplit.errors import InputError, PipelineError
from fxsplit.runtime.batches import cut_batch
from fxsplit.runtime.engine import Engine
from fxsplit.runtime.loss import Loss, cut_target, weights_of
from fxsplit.runtime.metrics import Metrics
from fxsplit.runtime.transport import CLIENT_NAME
from fxsplit.stage import Mode
from fxsplit.trace.call import batch_size
from fxsplit.trace.traced import OutputLayout


class StepResult(NamedTuple):
    """What a training step gives.

    Attributes:
        loss: of the batch, a scalar without a graph.
        output: the model's output for the batch, without a graph; None if it was not asked for.
    """

    loss: Tensor
    output: Any


class StepReport(NamedTuple):
    """What a callback of `Pipeline.on_step` is told.

    Attributes:
        number: of the steps and calls so far.
        loss: of the batch.
        step_s: seconds of this step, without the optimizer's.
        metrics: the pipeline's, which go on.
    """

    number: int
    loss: Tensor
    step_s: float
    metrics: Metrics


@dataclass(frozen=True)
class StepRequest:
    """What a step is asked for, beside the model's inputs.

    Attributes:
        target: what the loss compares with; see `cut_target`.
        loss_fn: the loss of output and target.
        reduction: what it does over samples; see `weights_of`.
        loss_scale: factor of the gradients.
        returns_output: whether the outputs come to the client.
        workers: the worker of each stage.
    """

    target: Any
    loss_fn: Callable[..., Any]
    reduction: str | None
    loss_scale: float
    returns_output: bool
    workers: tuple[str, ...]

    def check(self, leaves: Sequence[Any]) -> None:
        """Refuses what cannot be a step.

        Args:
            leaves: the inputs of the model.

        Raises:
            InputError: an input that needs a gradient; or the loss is no function, or has parameters of its own
                on a worker, where nobody would train them.
            PipelineError: gradients are switched off.
        """
        if not torch.is_grad_enabled():
            raise PipelineError(
                "pipe.step trains, and gradients are switched off",
                found="torch.no_grad()",
                hint="call the pipeline itself for outputs alone: pipe(x)",
            )
        if not callable(self.loss_fn):
            raise InputError("loss_fn is no function", found=repr(self.loss_fn), allowed="loss_fn(output, target)")
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise InputError(
                "an input of pipe.step needs a gradient, which a step does not bring back",
                allowed="inputs without requires_grad",
                hint="pipe(x) and loss.backward() give gradients of inputs",
            )
        learned = isinstance(self.loss_fn, nn.Module) and any(p.requires_grad for p in self.loss_fn.parameters())
        if learned and self.workers[-1] != CLIENT_NAME:
            raise InputError(
                "the loss has parameters, and is made on a worker that would not train them",
                where=f"worker {self.workers[-1]}, which has the last stage",
                found=type(self.loss_fn).__name__,
                hint="put the last stage on the client (a sandwich), or make the layer part of the model",
            )

    def run(
        self,
        engine: Engine,
        layout: OutputLayout,
        leaves: Sequence[Any],
        mode: Mode,
        chunks: int,
    ) -> StepResult:
        """Runs the step.

        Args:
            engine: of the pipeline.
            layout: how the model's output is put together.
            leaves: the inputs of the model.
            mode: which graphs run.
            chunks: micro-batches.
        """
        samples = batch_size(leaves)
        sizes = [samples // chunks + (i < samples % chunks) for i in range(chunks)]
        layout_of_target, targets = cut_target(self.target, samples, chunks, len(self.workers))
        loss = Loss(
            function=self.loss_fn,
            target=layout_of_target,
            weights=weights_of(self.loss_fn, sizes, self.reduction),
            leaves=engine.output_edges(mode),
            layout=layout,
            worker=self.workers[-1],
            last_stage=len(self.workers) - 1,
            scale=self.loss_scale,
            returns_outputs=self.returns_output,
        )
        rows = [[leaf for leaf in row if isinstance(leaf, Tensor)] for row in cut_batch(leaves, samples, chunks)]
        total, values = engine.step(rows, mode, loss, targets)
        engine.metrics.samples += samples
        if not self.returns_output:
            return StepResult(total, None)
        return StepResult(total, layout.merge([engine.output_leaves(mode, v) for v in values], sizes))
