"""What the actions of a run take and give: values that stay on a worker, and packets."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxsplit.compressors import Lossless
from fxsplit.compressors.base import Memory
from fxsplit.runtime.courier import Courier
from fxsplit.runtime.holding import Holding
from fxsplit.runtime.loss import Loss
from fxsplit.runtime.packet import Key, Packet, marked, pack, unpack
from fxsplit.runtime.randomness import state_key
from fxsplit.runtime.report import RunReport
from fxsplit.runtime.run_state import RunState
from fxsplit.runtime.shared_memory import is_shared, own_copy
from fxsplit.runtime.transport import CLIENT_NAME, Endpoint
from fxsplit.schedules import Action
from fxsplit.schedules.replicas import replica_for, replicas_of
from fxsplit.stage import CLIENT, Edge, StageGraph


@dataclass(frozen=True)
class Ways:
    """What a worker takes and gives by.

    Attributes:
        endpoint: its end of the transport.
        courier: what sends and receives beside it.
        holding: the stages.
        memories: what compressors keep from step to step, by end of an edge and micro-batch.
        check: raises if waiting makes no more sense.
    """

    endpoint: Endpoint
    courier: Courier
    holding: Holding
    memories: dict[tuple[Any, ...], dict[str, Tensor]]
    check: Callable[[], None]


class Traffic:
    """The traffic of one run on one worker.

    Args:
        ways: of the worker.
        number: of the run.
        run: what was kept of it so far.
        has_gradients: whether a backward may follow.
        loss: how the loss of a micro-batch is made, if a whole step is run.
        report: what is measured goes here.
    """

    def __init__(
        self,
        ways: Ways,
        number: int,
        run: RunState,
        has_gradients: bool,
        loss: Loss | None,
        report: RunReport,
    ) -> None:
        self._endpoint, self._courier, self._holding = ways.endpoint, ways.courier, ways.holding
        self._memories, self._check_peers = ways.memories, ways.check
        self._number, self._run, self._has_gradients = number, run, has_gradients
        self._loss, self._report = loss, report
        self._here: dict[Key, Packet] = {}
        # Where the model's outputs go: to the caller, or to the worker that makes the loss.
        self._ends = (*self._holding.workers, CLIENT_NAME if loss is None else loss.worker)

    def awaited(self, action: Action) -> list[Future[Any]]:
        """What an action takes and is not there yet."""
        taken = [(edge, action, backward) for edge, backward in self.taken(action)]
        if self._loss is not None and self._loss.is_due(action):
            end = Action(len(self._holding.workers), action.micro_batch)
            taken += [(edge, end, False) for edge in self._loss.edges]
        for edge, by, backward in taken:
            self.expect(edge, by, backward)
        found = [self._courier.expected(self.key(edge, by, backward)) for edge, by, backward in taken]
        randomness = self._run.randomness
        if action.is_forward and action.stage > 0 and randomness is not None and randomness.seed is None:
            found.append(self._endpoint.mailbox.receive(state_key(self._number, action.stage - 1)))
        return [future for future in found if future is not None and not future.done()]

    def taken(self, action: Action) -> list[tuple[Edge, bool]]:
        """The edges whose values or, if so said, gradients an action takes."""
        if action.is_forward:
            return [(edge, False) for edge in self.ports(action).inputs]
        saved = self._run.saved.get((action.stage, action.micro_batch))
        if not action.sends_gradients or saved is None:
            return []
        return [(edge, True) for edge in self.ports(action).edges if edge.value in saved.values]

    def expect(self, edge: Edge, action: Action, backward: bool) -> None:
        """Lets a packet be decoded as soon as it is there."""
        key = self.key(edge, action, backward)
        if self._courier.expected(key) is not None or self._stays(edge):
            return
        device = self.device(action)
        has_memory = backward or self._has_gradients
        memory = self._memory("receive", edge, action.micro_batch, backward) if has_memory else None

        def decode(packet: Packet) -> tuple[Any, bool]:
            return unpack(packet, edge, backward, device, memory), packet.requires_grad

        codec = edge.gradient_compressor if backward else edge.compressor
        self._courier.expect(key, decode, self._report, device, isinstance(codec, Lossless))

    def take(self, edge: Edge, action: Action, backward: bool, by: Action | None = None) -> tuple[Any, bool]:
        """A value and whether its maker waits for a gradient.

        Args:
            edge: that brings it.
            action: that it is for.
            backward: whether it is a gradient.
            by: the action that waits, if it is another.
        """
        if self._stays(edge):
            packet = self._here.pop(self.key(edge, action, backward))
            return unpack(packet, edge, backward, self.device(action)), packet.requires_grad
        self.expect(edge, action, backward)
        with self._report.timing("wait", by or action):
            value: tuple[Any, bool] = self._courier.take(self.key(edge, action, backward), self.check)
        return value

    def give(self, edge: Edge, action: Action, value: Any, backward: bool) -> None:
        """Hands a value to a stage: at once if it is here, else by the courier."""
        to = self.worker_of(edge.source if backward else edge.target, action.micro_batch)
        key = self.key(edge, action, backward)
        if backward and is_shared(value):
            value = own_copy(value)  # the memory may be that of a parameter's gradient, too
        has_memory = backward or self._has_gradients
        memory = self._memory("send", edge, action.micro_batch, backward) if has_memory else None
        if self._stays(edge):
            self._here[key] = marked(pack(value, edge, key))
        elif to == self._endpoint.name:
            with torch.no_grad():
                self._endpoint.mailbox.deliver(key, pack(value, edge, key, memory))
        else:
            codec = edge.gradient_compressor if backward else edge.compressor
            make = partial(pack, edge=edge, key=key, memory=memory)
            self._courier.send(action, to, key, value, make, self._report, isinstance(codec, Lossless))

    def check(self) -> None:
        """Raises if waiting makes no more sense."""
        self._courier.check()
        self._check_peers()

    def key(self, edge: Edge, action: Action, backward: bool) -> Key:
        """The name of the packet of an edge."""
        return Key(self._number, edge.value, edge.source, edge.target, action.micro_batch, backward)

    def _memory(self, end: str, edge: Edge, micro_batch: int, backward: bool) -> Memory:
        """What the compressor of an edge keeps here of a micro-batch from step to step, in training only."""
        key = (end, edge.value, edge.source, edge.target, micro_batch, backward)
        return self._memories.setdefault(key, {})

    def is_here(self, stage: int, micro_batch: int) -> bool:
        """Whether this worker has a stage, or as the client the caller."""
        return self.worker_of(stage, micro_batch) == self._endpoint.name

    def worker_of(self, stage: int, micro_batch: int) -> str:
        """The worker that has a stage of a micro-batch; the client has the caller."""
        return CLIENT_NAME if stage == CLIENT else replica_for(self._ends[stage], micro_batch)

    def _stays(self, edge: Edge) -> bool:
        """Whether a value goes from stage to stage, or to the loss, on this worker: no packet is needed then."""
        to_caller = edge.target == len(self._holding.workers) and self._loss is None
        if CLIENT in (edge.source, edge.target) or to_caller:
            return False
        source, target = self._ends[edge.source], self._ends[edge.target]
        return source == target and self._endpoint.name in replicas_of(source)

    def device(self, action: Action) -> torch.device:
        """Where an action takes its values; for the loss, that of the last stage."""
        return self._holding.devices[min(action.stage, len(self._holding.workers) - 1)]

    def ports(self, action: Action) -> StageGraph:
        """What a stage takes and gives."""
        return self._holding.stages[action.stage].ports(self._run.mode)
