"""Stages replayed as CUDA graphs: forward and backward of a micro-batch as one launch each.

The micro-batches of a pipeline are small, and a GPU does the work of one faster than Python can launch it. So a
stage runs as it is until it has done one micro-batch of a kind (shapes, mode, autocast) and is known not to need
Python in between; then its forward and its backward are recorded, once for each micro-batch that is kept at a time
(a slot), and replayed from then on. Recording does nothing to buffers or generators, and a replay does what the
recorded operations did, in their order: the numbers are those of the stage as it is, bit for bit.

Gradients of parameters are added to buffers that stay; a parameter's `grad` is its buffer as soon as a replay has
added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from fxsplit.errors import PipelineError
from fxsplit.runtime.deferred_batch_norm import Call, DeferredBatchNorm
from fxsplit.runtime.out_of_place import out_of_place
from fxsplit.runtime.packet import GradientTap
from fxsplit.runtime.recording import Recorder
from fxsplit.runtime.shared_memory import own_copy
from fxsplit.split_backward import SplitBackward
from fxsplit.stage import Mode, StageModule
from fxsplit.trace.replay import Surroundings


class GradientBuffers:
    """Where recordings add the gradients of parameters."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def of(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """One buffer a parameter; they are made at the first call, which must not be recorded."""
        found = []
        for parameter in parameters:
            if (buffer := self._buffers.get(id(parameter))) is None:
                buffer = self._buffers[id(parameter)] = torch.zeros_like(parameter, requires_grad=False)
            found.append(buffer)
        return found

    def take_over(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes the buffers the parameters' gradients, with the gradients' present numbers."""
        fresh = []
        for parameter, buffer in zip(parameters, self.of(parameters), strict=True):
            if parameter.grad is buffer:
                continue
            if parameter.grad is None:
                fresh.append(buffer)
            else:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if fresh:
            torch._foreach_zero_(fresh)

    @contextmanager
    def standing_in(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within, the buffers are the parameters' gradients; nothing is done to either."""
        before = [parameter.grad for parameter in parameters]
        try:
            for parameter, buffer in zip(parameters, self.of(parameters), strict=True):
                parameter.grad = buffer
            yield
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient


@dataclass
class _Arrived:
    """The gradient of an input, without the tap that it came out of."""

    gradient: Tensor | None


@dataclass(frozen=True)
class Kind:
    """What micro-batches of one kind share: of what a recording is made.

    Attributes:
        stage: the stage's number.
        mode: which of its graphs.
        surroundings: gradient mode and autocast.
        is_split: whether its backward is in two parts.
        inputs: of each, whether it needs a gradient; and shape, strides and dtype, or its value.
        state: of the stage: which parameters are trained, and which modules are in training mode.
    """

    stage: int
    mode: Mode
    surroundings: Surroundings
    is_split: bool
    inputs: tuple[Any, ...]
    state: tuple[Any, ...]


class Slot:
    """One recorded forward and backward, and the tensors that they read and write.

    Args:
        module: the stage.
        kind: what is recorded.
        inputs: of a micro-batch of this kind.
        given: the indices of the outputs whose gradients will come.
        recorder: of the device.
        buffers: of the parameters' gradients.
        batch_norms: the layers whose statistics are deferred.
    """

    def __init__(
        self,
        module: StageModule,
        kind: Kind,
        inputs: Sequence[Any],
        given: Sequence[int],
        recorder: Recorder,
        buffers: GradientBuffers,
        batch_norms: DeferredBatchNorm,
    ) -> None:
        self._module, self._kind, self._given, self._buffers = module, kind, tuple(given), buffers
        self._batch_norms = batch_norms
        self._seen: tuple[list[Call], Tensor] | None = None
        self._inputs = [torch.empty_like(v) if isinstance(v, Tensor) else v for v in inputs]
        self._trained = [p for p in dict.fromkeys(module.parameters()) if p.requires_grad]
        buffers.of(self._trained)
        self._used: list[nn.Parameter] = []
        self._taps: list[GradientTap | _Arrived | None] = []
        self._outputs: tuple[Any, ...] = ()
        self._gradients: list[Tensor] = []
        self._parts: list[Callable[[], None]] = []
        self._split: SplitBackward | None = None
        self._pool = recorder.new_pool()
        with kind.surroundings.active(), out_of_place(module):
            self._forward = recorder.record(self._run_forward, self._pool)
        if kind.surroundings.grad and self._given:
            self._record_backward(recorder)
        if not recorder.reruns:
            self._let_go()

    def forward(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The values that leave the stage.

        Those whose gradients will come are the slot's own, and stay as they are until then, when nobody reads them
        any more; the others are in tensors of their own.
        """
        for own, value in zip(self._inputs, inputs, strict=True):
            if isinstance(own, Tensor):
                own.copy_(value)
        with self._kind.surroundings.active():
            self._forward()
        if self._seen is not None:
            self._batch_norms.replayed(*self._seen)
        given = self._given if self._kind.surroundings.grad else ()
        return tuple(v if i in given else own_copy(v) for i, v in enumerate(self._outputs))

    def backward(self, gradients: Mapping[int, Tensor]) -> list[Tensor | None]:
        """Adds to the gradients of the parameters, or leaves that to `finish` if it is in two parts.

        Args:
            gradients: of the outputs, by index.

        Returns:
            the gradients of the inputs, in tensors of their own; None where none is needed.

        Raises:
            PipelineError: they are of other outputs than those recorded.
        """
        if tuple(sorted(gradients)) != tuple(sorted(self._given)):
            raise PipelineError(
                "gradients come to other outputs of a stage than when it was recorded as a CUDA graph",
                where=f"stage {self._kind.stage}",
                found=f"outputs {sorted(gradients)}",
                allowed=f"outputs {sorted(self._given)}",
                hint="a loss that uses other outputs from step to step needs cuda_graphs=False",
            )
        if not self._given:
            return [None] * len(self._inputs)
        self._make_gradients()
        for own, index in zip(self._gradients, self._given, strict=True):
            own.copy_(gradients[index])
        self._buffers.take_over(self._used)
        self._parts[0]()
        found = [None if tap is None else tap.gradient for tap in self._taps]
        return [None if gradient is None else gradient.clone() for gradient in found]

    def finish(self) -> None:
        """The second part of a backward in two."""
        for part in self._parts[1:]:
            part()

    # ------------------------------------------------------------------ what is recorded

    def _record_backward(self, recorder: Recorder) -> None:
        if not recorder.reruns:
            self._make_gradients()
        if not self._kind.is_split:
            self._parts = [recorder.record(self._run_backward, self._pool)]
            return
        with self._buffers.standing_in(self._trained):
            self._parts = [recorder.record(work, self._pool) for work in (self._run_first, self._run_second)]

    def _run_forward(self) -> None:
        taps: list[GradientTap | _Arrived | None] = []
        inputs = list(self._inputs)
        for index, (value, described) in enumerate(zip(self._inputs, self._kind.inputs, strict=True)):
            tap = GradientTap(value) if self._kind.surroundings.grad and described[0] else None
            if tap is not None:
                inputs[index] = tap.tensor
            taps.append(tap)
        self._taps = taps
        with self._batch_norms.catching() as caught:
            self._outputs = self._module.run(self._kind.mode, *inputs)
        numbers = caught.together()
        self._seen = None if numbers is None else (caught.calls, numbers)
        ends = [self._outputs[index].grad_fn for index in self._given]
        behind = _variables_behind([end for end in ends if end is not None])
        self._used = [parameter for parameter in self._trained if id(parameter) in behind]

    def _run_backward(self) -> None:
        taps = [tap for tap in self._taps if isinstance(tap, GradientTap)]
        outputs = [self._outputs[index] for index in self._given]
        ends = [*(tap.anchor for tap in taps), *self._used]
        found = torch.autograd.grad(outputs, ends, self._gradients, allow_unused=True)[len(taps) :]
        pairs = [(b, g) for b, g in zip(self._buffers.of(self._used), found, strict=True) if g is not None]
        if pairs:
            torch._foreach_add_([buffer for buffer, _ in pairs], [gradient for _, gradient in pairs])

    def _run_first(self) -> None:
        anchors = [tap.anchor for tap in self._taps if isinstance(tap, GradientTap)]
        outputs = [self._outputs[index] for index in self._given]
        self._split = SplitBackward(outputs, self._gradients, anchors)

    def _run_second(self) -> None:
        assert self._split is not None
        self._split.finish()

    def _make_gradients(self) -> None:
        if not self._gradients:
            self._gradients = [torch.empty_like(self._outputs[index].detach()) for index in self._given]

    def _let_go(self) -> None:
        """Keeps the tensors, and drops autograd's graph of them."""
        self._outputs = tuple(
            value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
            for value in self._outputs
        )
        self._taps = [_Arrived(tap.gradient) if tap is not None else None for tap in self._taps]
        self._split = None


def _variables_behind(ends: Sequence[Node]) -> set[int]:
    """The ids of the leaves of autograd's graph behind some nodes."""
    found: set[int] = set()
    seen: set[Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable: Any = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        stack.extend(after for after, _ in node.next_functions if after is not None)
    return found
