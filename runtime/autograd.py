"""The pipeline as one differentiable operation of the client's autograd graph."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxsplit.errors import PipelineError
from fxsplit.runtime.engine import Engine
from fxsplit.runtime.run import Run
from fxsplit.stage import Mode


class _Backward:
    """Lives as long as somebody may call the backward of a run; then the workers may forget it."""

    def __init__(self, engine: Engine, run: Run) -> None:
        self.engine = engine
        self.run = run
        self.is_done = False
        self._finalizer = weakref.finalize(self, engine.discard, run.number)

    def finish(self) -> None:
        """The backward has run: nothing is left to forget."""
        self.is_done = True
        self._finalizer.detach()


class _Call:
    """What goes beside the tensors into and out of the operation."""

    def __init__(self, engine: Engine, leaves: int, mode: Mode) -> None:
        self.engine = engine
        self.leaves = leaves
        self.mode = mode
        self.run: Run | None = None
        self.values: list[list[Any]] = []


class _Pipeline(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        chunks = [tensors[i : i + call.leaves] for i in range(0, len(tensors), call.leaves)]
        call.run, call.values = call.engine.forward(chunks, call.mode, grad=True)
        ctx.set_materialize_grads(False)
        ctx.backward_of = _Backward(call.engine, call.run)
        ctx.leaves = call.leaves
        flat, fixed = [], []
        for m, values in enumerate(call.values):
            for i, value in enumerate(values):
                if isinstance(value, Tensor):
                    value = value.detach() if any(value is t for t in tensors) else value
                    flat.append(value)
                    if (m, i) not in call.run.needs_gradient:
                        fixed.append(value)
        ctx.is_tensor = [[isinstance(v, Tensor) for v in values] for values in call.values]
        ctx.mark_non_differentiable(*fixed)
        return tuple(flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        state: _Backward = ctx.backward_of
        if state.is_done:
            raise PipelineError(
                "the backward of this output was run already",
                found="a second backward",
                allowed="one backward for each call of the pipeline",
                hint="call the pipeline again; retain_graph=True does not reach across workers",
            )
        state.finish()
        flat = iter(gradients)
        by_chunk = [[next(flat) if is_tensor else None for is_tensor in row] for row in ctx.is_tensor]
        found = state.engine.backward(state.run, by_chunk)
        count = state.run.chunks * ctx.leaves
        return None, None, *(found.get(divmod(i, ctx.leaves)) for i in range(count))


def differentiable_forward(engine: Engine, chunks: Sequence[Sequence[Tensor]], mode: Mode) -> list[list[Any]]:
    """The forward pipeline, recorded in autograd's graph: values of the output edges by micro-batch."""
    anchor = torch.empty(0, requires_grad=True)
    call = _Call(engine, len(chunks[0]), mode)
    tensors = [tensor for chunk in chunks for tensor in chunk]
    outputs = iter(_Pipeline.apply(anchor, call, *tensors))
    return [[next(outputs) if isinstance(v, Tensor) else v for v in values] for values in call.values]
