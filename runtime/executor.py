"""What a worker does with the actions of a step: one executor for every schedule."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxsplit.errors import PipelineError
from fxsplit.runtime.checkpointing import is_checkpointed, run_checkpointed
from fxsplit.runtime.courier import SendError, is_small
from fxsplit.runtime.graphs import Lease
from fxsplit.runtime.loss import Loss
from fxsplit.runtime.packet import GradientTap, Key, Packet, pack
from fxsplit.runtime.randomness import seeded, set_states, state_key, states
from fxsplit.runtime.report import RunReport
from fxsplit.runtime.run_state import RunState, Saved
from fxsplit.runtime.shared_memory import lies_in, memory_of, own_copy
from fxsplit.runtime.traffic import Traffic, Ways
from fxsplit.runtime.transport import CLIENT_NAME, wait
from fxsplit.schedules import Action, Work
from fxsplit.spec import TensorSpec
from fxsplit.split_backward import SplitBackward
from fxsplit.stage import CLIENT, Edge
from fxsplit.trace.replay import Surroundings

_AHEAD = 2  # actions whose packets are decoded beforehand


class Executor:
    """Does the actions of one run, in their order.

    Args:
        ways: of the worker.
        begins: told of each action as it begins.

    Attributes:
        action: the one under way.
        shapes: of the inputs of its stage, for error messages; empty before they are there.
    """

    def __init__(
        self,
        ways: Ways,
        begins: Callable[[Action], None] = lambda action: None,
    ) -> None:
        self.action: Action | None = None
        self.shapes = ""
        self._begins = begins
        self._ways = ways
        self._endpoint, self._courier, self._holding = ways.endpoint, ways.courier, ways.holding

    def execute(
        self,
        number: int,
        run: RunState,
        actions: Sequence[Action],
        surroundings: Surroundings,
        loss: Loss | None,
        report: RunReport,
    ) -> Generator[None]:
        """Does the actions, each when it is asked for the next one.

        Args:
            number: of the run.
            run: what was kept of it so far.
            actions: in their order.
            surroundings: the caller's gradient mode and autocast.
            loss: how the loss of a micro-batch is made, if a whole step is run and this worker makes it.
            report: what is measured goes here.
        """
        self._number, self._run, self._surroundings, self._report = number, run, surroundings, report
        self._loss = loss
        self._outputs: list[tuple[Key, Packet]] = []
        self._last = max((action.micro_batch for action in actions), default=0)
        self._split = {(action.stage, action.micro_batch) for action in actions if action.work is Work.INPUT}
        self._traffic = Traffic(self._ways, number, run, surroundings.grad, loss, report)
        announced: set[int] = set()
        try:
            for index, action in enumerate(actions):
                self.action, self.shapes = action, ""
                yield
                self._begins(action)
                self._announce(actions, index, announced)
                self._courier.check()
                self._do(action)
            self.action = None
            self._courier.send_all(CLIENT_NAME, self._outputs, report)
            self._courier.finish()
        except SendError as error:
            self._courier.drain()
            self.action = error.action
            raise error.cause from error
        except BaseException:
            self._courier.drain()
            raise

    def _announce(self, actions: Sequence[Action], index: int, announced: set[int]) -> None:
        """Has the packets of an action and of the next ones decoded as soon as they are there.

        Args:
            actions: in their order.
            index: of the action.
            announced: those of which it was done; which gradients a backward takes is known after its forward.
        """
        for place in range(index, min(index + 1 + _AHEAD, len(actions))):
            action = actions[place]
            if place in announced or not (
                action.is_forward or (action.stage, action.micro_batch) in self._run.saved
            ):
                continue
            announced.add(place)
            for edge, backward in self._traffic.taken(action):
                self._traffic.expect(edge, action, backward)

    def awaited(self) -> list[Future[Any]]:
        """What the next action takes and is not there yet."""
        return [] if self.action is None else self._traffic.awaited(self.action)

    def _do(self, action: Action) -> None:
        if action.is_forward:
            with self._holding.batch_norms.collecting(action.stage, action.micro_batch):
                self._forward(action)
            return
        # In this thread. Autograd has one for each GPU, which would have to be woken, and in which the client
        # may be waiting for this one.
        with torch.autograd.set_multithreading_enabled(False):
            self._go_back(action)

    def _go_back(self, action: Action) -> None:
        """A backward, or a part of one."""
        if action.work is Work.WEIGHT:
            saved = self._run.saved.pop((action.stage, action.micro_batch))
            with self._report.timing(action.work, action, self._traffic.device(action)):
                if saved.lease is not None:
                    saved.lease.slot.finish()
                    saved.lease.release()
                else:
                    assert saved.weights is not None
                    saved.weights.finish()
            return
        if self._loss is not None and self._loss.is_due(action):
            self._make_loss(action)
        self._backward(action)

    # ------------------------------------------------------------------ actions

    def _forward(self, action: Action) -> None:
        mode, grad = self._run.mode, self._surroundings.grad
        module = self._holding.stages[action.stage]
        if module.training != mode.training:
            module.train(mode.training)
            if self._holding.graphs is not None:
                self._holding.graphs.mode_changed(action.stage)
        ports = module.ports(mode)
        saved = Saved({}, {})
        inputs = []
        for edge in ports.inputs:
            value, requires_grad = self._traffic.take(edge, action, backward=False)
            inputs.append((value, requires_grad and grad))
            del value  # the stage may free what it does not keep
        pairs = zip(ports.inputs, inputs, strict=True)
        local = {e for e in ports.inputs if self._traffic.is_here(e.source, action.micro_batch)}
        came = memory_of(value for edge, (value, _) in pairs if edge in local)
        self.shapes = ", ".join(str(TensorSpec.of(v)) for v, _ in inputs if isinstance(v, Tensor))
        ledger = self._holding.ledger
        before_bytes = ledger.live_bytes if ledger is not None else 0
        with self._drawing(action), self._report.timing(action.work, action, self._traffic.device(action)):
            values = dict(zip(ports.outputs, self._replay_or_run(action, inputs, saved), strict=True))
        # What is sent is read for a while: its user here, or the next micro-batch, may change it in place then.
        here = [e for e in ports.edges if self._traffic.is_here(e.target, action.micro_batch)]
        changing = self._holding.buffer_memory | came | memory_of(values[edge.value] for edge in here)
        for edge in ports.edges:
            value = values[edge.value]
            is_copied = saved.lease is not None if edge in here else lies_in(value, changing)
            self._traffic.give(edge, action, own_copy(value) if is_copied else value, backward=False)
        if grad:
            saved.values = {n: v for n, v in values.items() if isinstance(v, Tensor) and v.requires_grad}
            self._run.saved[action.stage, action.micro_batch] = saved
            if ledger is not None:
                saved.held += ledger.hold(saved.values.values())
                self._report.kept(action.stage, self._run.count(action.stage), ledger.live_bytes - before_bytes)
        elif saved.lease is not None:
            saved.lease.release()

    def _replay_or_run(self, action: Action, inputs: list[tuple[Any, bool]], saved: Saved) -> tuple[Any, ...]:
        """The values that leave a stage; what its backward needs goes to `saved`. The inputs are used up."""
        edges = self._traffic.ports(action).inputs
        if (graphs := self._holding.graphs) is not None:
            is_split = (action.stage, action.micro_batch) in self._split
            found = graphs.find(action.stage, self._run.mode, inputs, self._surroundings, is_split)
            if isinstance(found, Lease):
                saved.lease = found
                saved.waiting = tuple(e if needs else None for e, (_, needs) in zip(edges, inputs, strict=True))
                return found.slot.forward([value for value, _ in inputs])
            saved.inspection = found
        ready: list[Any] = []
        for edge in edges:
            value, needs_gradient = inputs.pop(0)
            if needs_gradient:
                saved.taps[edge] = GradientTap(value)
                value = saved.taps[edge].tensor
            ready.append(value)
            del value
        with saved.inspection.forward() if saved.inspection else nullcontext(), self._surroundings.active():
            if (ledger := self._holding.ledger) is None:
                return self._compute(action, ready)
            with ledger.saving(ready):
                if self._is_checkpointed(action):
                    saved.held = ledger.hold(value for value in ready if isinstance(value, Tensor))
                return self._compute(action, ready)

    def _compute(self, action: Action, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The values that leave a stage."""
        module, mode = self._holding.stages[action.stage], self._run.mode
        if self._surroundings.grad and self._is_checkpointed(action):
            drawing = self._holding.devices[action.stage] if module.ports(mode).draws_random_numbers else None
            return run_checkpointed(module, partial(module.run, mode), inputs, drawing)
        return module.run(mode, *inputs)

    def _is_checkpointed(self, action: Action) -> bool:
        policies = self._holding.checkpoint
        return bool(policies) and is_checkpointed(policies[action.stage], action.micro_batch, self._last)

    @contextmanager
    def _drawing(self, action: Action) -> Iterator[None]:
        """Runs a stage's forward with the random numbers that are its own."""
        stage, device, randomness = action.stage, self._holding.devices[action.stage], self._run.randomness
        if randomness is None:
            yield
        elif randomness.seed is not None and not self._traffic.ports(action).draws_random_numbers:
            yield  # the generators are everybody's: stages of one process wait for each other
        elif randomness.seed is not None:
            with seeded(randomness.stage_seed(stage, action.micro_batch), device):
                yield
        else:
            if stage > 0:
                key = state_key(self._number, stage - 1)
                with self._report.timing("wait", action):
                    packet: Packet = wait(self._endpoint.mailbox.receive(key), self._traffic.check)
                self._endpoint.mailbox.forget(key)
                set_states(packet.payload, device)
            yield
            key, packet = state_key(self._number, stage), Packet(states(device))
            last = stage + 1 == len(self._holding.workers)
            to = CLIENT_NAME if last else self._traffic.worker_of(stage + 1, action.micro_batch)
            if to == self._endpoint.name:
                self._endpoint.mailbox.deliver(key, packet)
            else:
                self._courier.send(action, to, key, None, lambda _: packet, self._report)

    def _backward(self, action: Action) -> None:
        if (action.stage, action.micro_batch) not in self._run.saved:
            raise PipelineError(
                "the backward of this output was run already",
                found="a second backward",
                allowed="one backward for each call of the pipeline",
                hint="call the pipeline again; retain_graph=True does not reach across workers",
            )
        saved = self._run.saved[action.stage, action.micro_batch]
        gradients: dict[str, Tensor] = {}
        for edge in reversed(self._traffic.ports(action).edges):
            if edge.value not in saved.values:
                continue
            gradient, _ = self._traffic.take(edge, action, backward=True)
            if gradient is not None:
                known = gradients.get(edge.value)
                gradients[edge.value] = gradient if known is None else known + gradient
        if saved.lease is not None:
            self._replay_backward(action, saved, saved.lease, gradients)
            return
        given = tuple(i for i, name in enumerate(self._traffic.ports(action).outputs) if name in gradients)
        looking = saved.inspection.backward(given) if saved.inspection else nullcontext()
        with self._report.timing(action.work, action, self._traffic.device(action)), looking:
            outputs = [saved.values[name] for name in gradients]
            if action.work is Work.INPUT:
                # What is computed again would be so for each part; a compiled backward is one operation.
                is_whole = self._is_checkpointed(action) or self._holding.are_compiled
                anchors = [] if is_whole else [tap.anchor for tap in saved.taps.values()]
                saved.weights = SplitBackward(outputs, list(gradients.values()), anchors)
                saved.values, saved.held = {}, []
            elif gradients:
                torch.autograd.backward(outputs, list(gradients.values()))
        if action.work is Work.BACKWARD:
            del self._run.saved[action.stage, action.micro_batch]
        for edge, tap in saved.taps.items():
            self._traffic.give(edge, action, tap.gradient, backward=True)
        saved.taps = {}

    def _replay_backward(
        self, action: Action, saved: Saved, lease: Lease, gradients: Mapping[str, Tensor]
    ) -> None:
        """A recorded backward, or the first part of it."""
        index = {name: i for i, name in enumerate(self._traffic.ports(action).outputs)}
        with self._report.timing(action.work, action, self._traffic.device(action)):
            found = lease.slot.backward({index[name]: gradient for name, gradient in gradients.items()})
        if action.work is Work.BACKWARD:
            del self._run.saved[action.stage, action.micro_batch]
            lease.release()
        saved.values = {}
        for edge, gradient in zip(saved.waiting, found, strict=True):
            if edge is not None:
                self._traffic.give(edge, action, gradient, backward=True)

    def _make_loss(self, action: Action) -> None:
        """The loss of a micro-batch, and the gradients of the outputs, for the stages that made them."""
        loss, m = self._loss, action.micro_batch
        assert loss is not None
        values: dict[Edge, Any] = {}
        waiting: set[Edge] = set()
        end = Action(len(self._holding.workers), m)
        for edge in loss.edges:
            values[edge], requires_grad = self._traffic.take(edge, end, backward=False, by=action)
            if requires_grad and edge.source != CLIENT:
                waiting.add(edge)
            if loss.returns_outputs:
                self._return_output(edge, end, values[edge])
        target = None
        if loss.target is not None:
            target = loss.target.build(
                {e: self._traffic.take(e, end, backward=False, by=action)[0] for e in loss.target.edges}
            )
        with self._report.timing("loss", action, self._traffic.device(action)), self._surroundings.active():
            weighted, gradients = loss.gradients(m, values, waiting, target)
        self._report.losses[m] = weighted
        for edge in loss.edges:
            if edge in waiting:
                self._traffic.give(edge, action, gradients[edge], backward=True)

    def _return_output(self, edge: Edge, end: Action, value: Any) -> None:
        """Sends a model's output on to the client, from where the loss is made."""
        key = self._traffic.key(edge, end, False)
        value = own_copy(value)  # the user's loss may change it in place
        if self._endpoint.name == CLIENT_NAME:
            self._endpoint.mailbox.put_back(key, pack(value, edge, key))
        elif is_small(value):  # the client looks at it when the step is done
            self._outputs.append((key, pack(value, edge, key)))
        else:
            make = partial(pack, edge=edge, key=key)
            self._courier.send(end, CLIENT_NAME, key, value, make, self._report, True)
