"""Streams of CUDA devices beside the one that computes, and how tensors get from one to another.

The host only queues work on a GPU. So a tensor that goes from one stream or device to another takes marks along,
events behind the work that makes it; its user's stream waits for them, and the host does not. Each device has one
stream for copies to other devices: torch lets both streams of such a copy wait for each other, and those that
compute must not. On the CPU all of this is nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Marks: TypeAlias = tuple[tuple[torch.device, torch.cuda.Event], ...]
"""Events behind the work that makes some tensors, each with its device."""

PINNED_FROM_BYTES = 1 << 16
"""Smaller tensors go to a GPU without a detour through pinned memory."""


class Streams:
    """One stream a device, made when it is first needed."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._lock = threading.Lock()

    def of(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of a CUDA device."""
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            return self._streams[device]

    def current(self, devices: Iterable[torch.device]) -> AbstractContextManager[None]:
        """Within, these are the current streams of those devices that are CUDA's."""
        gpus = dict.fromkeys(indexed(device) for device in devices if device.type == "cuda")
        return self._entered(gpus) if gpus else nullcontext()

    @contextmanager
    def _entered(self, gpus: Iterable[torch.device]) -> Iterator[None]:
        with ExitStack() as stack:
            for device in gpus:
                stack.enter_context(torch.cuda.stream(self.of(device)))
            yield

    def join(self) -> None:
        """Lets the current stream of each device wait for all that was queued here."""
        with self._lock:
            streams = list(self._streams.items())
        for device, stream in streams:
            torch.cuda.current_stream(device).wait_stream(stream)


class Pace:
    """Keeps the host from queueing more than a few runs on GPUs: what is queued holds memory.

    Args:
        devices: of a worker.
    """

    RUNS_AHEAD = 3

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = list(dict.fromkeys(indexed(device) for device in devices if device.type == "cuda"))
        self._ends: deque[list[torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """A run begins: waits for the one some runs before."""
        while len(self._ends) >= self.RUNS_AHEAD:
            for event in self._ends.popleft():
                event.synchronize()

    def end(self) -> None:
        """All of a run is queued."""
        if self._devices:
            self._ends.append([torch.cuda.current_stream(device).record_event() for device in self._devices])


_copying = Streams()


def indexed(device: torch.device) -> torch.device:
    """The device with its index: "cuda" is the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _on_gpus(value: Any) -> list[Tensor]:
    """The tensors on GPUs in a value."""
    if isinstance(value, Tensor):
        return [value] if value.is_cuda else []
    if type(value) is tuple or type(value) is list:  # most often: pytree takes longer
        return [tensor for item in value for tensor in _on_gpus(item)]
    if value is None or isinstance(value, bool | int | float | str):
        return []
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_cuda]


def mark(value: Any) -> Marks:
    """Marks behind what is queued now on the current streams of the devices of a value."""
    devices = dict.fromkeys(tensor.device for tensor in _on_gpus(value))
    return tuple((device, torch.cuda.current_stream(device).record_event()) for device in devices)


def wait_on(device: torch.device, marks: Marks) -> None:
    """Lets the current stream of a device wait for marks, be they of other devices."""
    if device.type == "cuda":
        for _, event in marks:
            torch.cuda.current_stream(device).wait_event(event)


def wait_for(marks: Marks, value: Any) -> None:
    """Lets the current streams wait for marks, and keeps the memory of a value until they have used it."""
    if not marks:
        return
    for device, event in marks:
        torch.cuda.current_stream(device).wait_event(event)
    for tensor in _on_gpus(value):
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def brought(payload: Sequence[Tensor], marks: Marks, device: torch.device) -> tuple[Tensor, ...]:
    """Tensors on a device, for its current stream; what is on another is copied.

    A host waits here for what comes to its CPU, and for nothing else.

    Args:
        payload: the tensors.
        marks: behind the work that makes them.
        device: where they are wanted.
    """
    device = indexed(device)
    with _copying.current(t.device for t in payload if t.is_cuda and t.device != device):
        wait_for(marks, tuple(payload))
        return tuple(_copy(tensor, device) for tensor in payload)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    if device.type == "cpu" and tensor.is_cuda:
        return to_host(tensor)
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes >= PINNED_FROM_BYTES:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU, through pinned memory; waits for the tensor's current stream, in this thread alone."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).record_event().synchronize()
    return host
