"""Which micro-batches are replayed as CUDA graphs; what one is, `fxsplit.runtime.slots` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxsplit.compressors.decaying_linear import Shrink
from fxsplit.runtime.deferred_batch_norm import DeferredBatchNorm
from fxsplit.runtime.recording import RECORDERS, Inspector, Recorder
from fxsplit.runtime.slots import GradientBuffers, Kind, Slot
from fxsplit.stage import Mode, StageModule
from fxsplit.trace.replay import Surroundings

_PLAIN = (bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Recordings:
    """The slots of one kind of micro-batch.

    Attributes:
        given: the outputs whose gradients come, as seen with a micro-batch that was run as it is.
        reason: why there are none, if they cannot be.
        is_known: whether a whole micro-batch was looked at.
        free: slots that no micro-batch is in.
    """

    given: tuple[int, ...] = ()
    reason: str | None = None
    is_known: bool = False
    free: list[Slot] = field(default_factory=list)


class Lease:
    """A slot while a micro-batch is in it."""

    def __init__(self, slot: Slot, recordings: Recordings) -> None:
        self.slot = slot
        self._recordings: Recordings | None = recordings

    def release(self) -> None:
        """The micro-batch is done, or given up; may be called twice."""
        if self._recordings is not None:
            self._recordings.free.append(self.slot)
            self._recordings = None


class Inspection:
    """A micro-batch that is run as it is, and looked at if none of its kind was before.

    Args:
        recordings: of its kind; None if it cannot be recorded.
        device: of the stage.
        has_backward: whether it is known only after that.
    """

    def __init__(self, recordings: Recordings | None, device: torch.device, has_backward: bool) -> None:
        self._recordings = recordings
        self._inspector = None
        if recordings is not None and not recordings.is_known and recordings.reason is None:
            self._inspector = Inspector(device)
        self._has_backward = has_backward
        self._device = device

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The forward is within."""
        with ExitStack() as stack:
            if self._inspector is not None:
                stack.enter_context(self._inspector)
            yield
        if not self._has_backward:
            self._end(())

    @contextmanager
    def backward(self, given: tuple[int, ...]) -> Iterator[None]:
        """The backward is within, with gradients of these outputs."""
        with ExitStack() as stack:
            if self._inspector is not None:
                # In this thread, as when it is recorded: libraries make their handles and plans once a thread.
                stack.enter_context(torch.autograd.set_multithreading_enabled(False))
                stack.enter_context(self._inspector)
            yield
        self._end(given)

    def _end(self, given: tuple[int, ...]) -> None:
        recordings, inspector, self._inspector = self._recordings, self._inspector, None
        if recordings is not None and inspector is not None and not recordings.is_known:
            recordings.given, recordings.reason, recordings.is_known = given, inspector.reason, True


class StageGraphs:
    """The recordings of a worker's stages.

    Args:
        stages: by number.
        devices: of each.
        refused: stages that cannot be recorded, and why.
        batch_norms: the layers whose statistics are deferred.
        may_record: whether this is a time at which autograd's graphs of nothing else are alive: their nodes
            belong to other streams.
    """

    def __init__(
        self,
        stages: Mapping[int, StageModule],
        devices: Mapping[int, torch.device],
        refused: Mapping[int, str],
        batch_norms: DeferredBatchNorm,
        may_record: Callable[[], bool],
    ) -> None:
        self._stages, self._devices, self._may_record = stages, devices, may_record
        self._batch_norms = batch_norms
        self._recorders: dict[torch.device, Recorder] = {
            device: RECORDERS[device.type](device)
            for device in dict.fromkeys(devices.values())
            if device.type in RECORDERS
        }
        self._recordings: dict[Kind, Recordings] = {}
        self._parameters = {number: tuple(stage.parameters()) for number, stage in stages.items()}
        self._modes: dict[int, tuple[bool, ...]] = {}
        self._buffers = GradientBuffers()
        self._refused = {n: r for n, r in refused.items() if n in devices and devices[n] in self._recorders}
        self._notes = [_note(stage, reason) for stage, reason in self._refused.items()]

    def notes(self) -> list[str]:
        """What is to be said of stages that are not recorded, since the last time."""
        notes, self._notes = self._notes, []
        return notes

    def mode_changed(self, stage: int) -> None:
        """A stage was switched between training and evaluation."""
        self._modes.pop(stage, None)

    def find(
        self,
        stage: int,
        mode: Mode,
        inputs: Sequence[tuple[Any, bool]],
        surroundings: Surroundings,
        is_split: bool = False,
    ) -> Lease | Inspection:
        """A slot for a micro-batch; or, if there is none, what looks at it while it is run as it is.

        Args:
            stage: the stage's number.
            mode: which of its graphs.
            inputs: values, and whether each needs a gradient.
            surroundings: gradient mode and autocast.
            is_split: whether its backward is in two parts.
        """
        device = self._devices[stage]
        described = _described(inputs)
        is_empty = not self._stages[stage].ports(mode).outputs  # a client's that computes nothing
        if device not in self._recorders or stage in self._refused or described is None or is_empty:
            return Inspection(None, device, surroundings.grad)
        kind = Kind(stage, mode, surroundings, is_split, described, self._state(stage))
        recordings = self._recordings.setdefault(kind, Recordings())
        if recordings.reason is None and recordings.is_known:
            if recordings.free:
                return Lease(recordings.free.pop(), recordings)
            if self._may_record() and (slot := self._record(kind, [v for v, _ in inputs], recordings)):
                return Lease(slot, recordings)
        if recordings.reason is not None:
            note = _note(stage, recordings.reason)
            self._refused[stage] = recordings.reason
            self._notes.append(note)
        return Inspection(recordings, device, surroundings.grad)

    def _record(self, kind: Kind, inputs: Sequence[Any], recordings: Recordings) -> Slot | None:
        recorder = self._recorders[self._devices[kind.stage]]
        torch.clear_autocast_cache()  # what it keeps belongs to other streams, too
        self._drop(replace(kind, is_split=not kind.is_split))
        try:
            module, given = self._stages[kind.stage], recordings.given
            return Slot(module, kind, inputs, given, recorder, self._buffers, self._batch_norms)
        except Exception as error:  # whatever a library does that cannot be recorded
            first_line = str(error).partition("\n")[0]
            recordings.reason = f"recording failed: {type(error).__name__}: {first_line}"
            return None

    def _drop(self, kind: Kind) -> None:
        """Frees the slots of a kind: a schedule whose backwards are in two parts took the place of another."""
        if (recordings := self._recordings.get(kind)) is not None and recordings.free:
            if (device := self._devices[kind.stage]).type == "cuda":
                torch.cuda.synchronize(device)  # they may be at work
            recordings.free.clear()

    def _state(self, stage: int) -> tuple[Any, ...]:
        if stage not in self._modes:
            self._modes[stage] = tuple(module.training for module in self._stages[stage].modules())
        return self._modes[stage], tuple(p.requires_grad for p in self._parameters[stage])


def refusal(stage: nn.Module, checkpoint: str) -> str | None:
    """Why a stage cannot be recorded, as far as it can be said beforehand.

    Args:
        stage: the stage.
        checkpoint: its policy.
    """
    if checkpoint != "never":
        return f"its activations are computed again (checkpoint={checkpoint!r})"
    for name, module in stage.named_modules():
        if isinstance(module, Shrink):
            return f"{name} changes its shape as it learns"
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            return f"{name} has hooks, which a graph would not call"
        if isinstance(module, nn.RNNBase) and module.dropout:
            return f"{name} keeps the state of its dropout"
    return None


def _note(stage: int, reason: str) -> str:
    return f"stage {stage} is not replayed as a CUDA graph: {reason}"


def _described(inputs: Sequence[tuple[Any, bool]]) -> tuple[Any, ...] | None:
    """What a recording depends on of its inputs; None if that cannot be said."""
    found: list[Any] = []
    for value, needs_gradient in inputs:
        if isinstance(value, Tensor):
            found.append((needs_gradient, value.device, tuple(value.shape), value.stride(), value.dtype))
        elif isinstance(value, _PLAIN) or (
            type(value) is tuple and all(isinstance(item, _PLAIN) for item in value)
        ):
            found.append((False, type(value), value))
        else:
            return None
    return tuple(found)
