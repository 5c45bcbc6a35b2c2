"""A worker: holds stages on its devices and does what its schedule says. The client is one, too."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxsplit.errors import FxsplitError, PipelineError
from fxsplit.runtime import shipping
from fxsplit.runtime.metrics import LinkTraffic, RunReport
from fxsplit.runtime.packet import GradientTap, Key, Packet, pack, unpack
from fxsplit.runtime.parameters import ParameterStore
from fxsplit.runtime.settings import TorchSettings
from fxsplit.runtime.transport import CLIENT_NAME, Endpoint, wait
from fxsplit.schedules import Action
from fxsplit.stage import CLIENT, Edge, StageModule
from fxsplit.trace.replay import Surroundings


@dataclass(frozen=True)
class Failure:
    """An exception on a worker, as the client gets to know it."""

    worker: str
    place: str
    kind: str
    message: str
    details: Mapping[str, Any] | None
    traceback: str

    @classmethod
    def of(cls, worker: str, place: str, error: BaseException) -> Failure:
        """Describes an exception that is being handled."""
        details = None
        if isinstance(error, FxsplitError):
            details = {k: _text(getattr(error, k)) for k in ("what", "where", "found", "allowed", "hint")}
        return cls(worker, place, type(error).__name__, str(error), details, traceback.format_exc())


def _text(value: object) -> str | None:
    return None if value is None else str(value)


@dataclass
class _Saved:
    """What a stage's backward of one micro-batch needs."""

    taps: dict[Edge, GradientTap]
    values: dict[str, Tensor]


@dataclass
class _Run:
    """One forward of the pipeline that may still be followed by its backward."""

    training: bool
    saved: dict[tuple[int, int], _Saved] = field(default_factory=dict)


class Worker:
    """Executes commands of the client, one at a time.

    Args:
        endpoint: this worker's end of the transport.
        check: raises if waiting makes no more sense (a worker died, the run failed elsewhere).
    """

    def __init__(self, endpoint: Endpoint, check: Callable[[], None] = lambda: None) -> None:
        self._endpoint = endpoint
        self.check = check
        self._stages: dict[int, StageModule] = {}
        self._devices: dict[int, torch.device] = {}
        self._workers: tuple[str, ...] = ()
        self._runs: dict[int, _Run] = {}
        self._place = ""
        self._parameters = ParameterStore()
        self.commands: Mapping[str, Callable[..., Any]] = {
            "load": self.load,
            "run": self.run,
            "discard": self.discard,
            "state": self.state,
            **self._parameters.commands,
        }

    def execute(self, command: str, arguments: tuple[Any, ...]) -> Any:
        """The result of a command, or a `Failure`."""
        self._place = ""
        try:
            return self.commands[command](*arguments)
        except Exception as error:
            return Failure.of(self._endpoint.name, self._place or f"command {command}", error)

    # ------------------------------------------------------------------ commands

    def load(
        self,
        data: bytes,
        tensors: Sequence[Tensor],
        devices: Mapping[int, str],
        workers: Sequence[str],
        canonical: Mapping[str, str],
        settings: TorchSettings,
    ) -> None:
        """Takes the stages over.

        Args:
            data: the stages by number, as `shipping.dump` made them.
            tensors: their tensors.
            devices: the device of each stage held here.
            workers: the worker of every stage.
            canonical: name of a tied parameter -> its first name in the model.
            settings: the client's precision and determinism.
        """
        settings.apply()
        self._stages = shipping.load(data, tensors)
        self._devices = {stage: torch.device(device) for stage, device in devices.items()}
        self._workers = tuple(workers)
        for number, module in self._stages.items():
            module.to(self._devices[number])
        self._parameters.hold(self._stages, canonical)

    def run(self, run: int, actions: Sequence[Action], training: bool, surroundings: Surroundings) -> RunReport:
        """Does the forwards, or the backwards, of one step, in the caller's gradient mode and autocast."""
        report = RunReport(self._endpoint.name)
        context = self._runs.setdefault(run, _Run(training))
        for action in actions:
            self._place = f"{action.kind} of stage {action.stage}, micro-batch {action.micro_batch}"
            if action.backward:
                self._backward(run, action, context, report)
            else:
                self._forward(run, action, context, surroundings, report)
        if not context.saved:
            del self._runs[run]
        self._place = ""
        return report

    def discard(self, run: int) -> None:
        """Forgets a run whose backward will not come."""
        self._runs.pop(run, None)
        self._endpoint.mailbox.abort(run, "the run was given up")

    def state(self) -> dict[str, Tensor]:
        """The state_dicts of all stages held here, together, on the CPU."""
        return {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            for module in self._stages.values()
            for name, value in module.state_dict().items()
        }

    # ------------------------------------------------------------------ actions

    def _forward(
        self, run: int, action: Action, context: _Run, surroundings: Surroundings, report: RunReport
    ) -> None:
        grad = surroundings.grad
        module, device = self._stages[action.stage], self._devices[action.stage]
        if module.training != context.training:
            module.train(context.training)
        ports = module.ports(context.training)
        taps: dict[Edge, GradientTap] = {}
        inputs: list[Any] = []
        for edge in ports.inputs:
            packet = self._receive(Key(run, *_ends(edge), action.micro_batch, False), report)
            with report.timing("decode_s"):
                value = unpack(packet, edge, False, device)
            if packet.requires_grad and grad:
                taps[edge] = GradientTap(value)
                value = taps[edge].tensor
            inputs.append(value)
        with report.timing("compute_s"), surroundings.active():
            values = dict(zip(ports.outputs, module(*inputs), strict=True))
        del inputs
        for edge in ports.edges:
            key = Key(run, *_ends(edge), action.micro_batch, False)
            self._send(self._worker_of(edge.target), edge, key, values[edge.value], report)
        if grad:
            kept = {n: v for n, v in values.items() if isinstance(v, Tensor) and v.requires_grad}
            context.saved[action.stage, action.micro_batch] = _Saved(taps, kept)

    def _backward(self, run: int, action: Action, context: _Run, report: RunReport) -> None:
        if (action.stage, action.micro_batch) not in context.saved:
            raise PipelineError(
                "the backward of this output was run already",
                found="a second backward",
                allowed="one backward for each call of the pipeline",
                hint="call the pipeline again; retain_graph=True does not reach across workers",
            )
        module, device = self._stages[action.stage], self._devices[action.stage]
        saved = context.saved.pop((action.stage, action.micro_batch))
        gradients: dict[str, Tensor] = {}
        for edge in reversed(module.ports(context.training).edges):
            if edge.value not in saved.values:
                continue
            packet = self._receive(Key(run, *_ends(edge), action.micro_batch, True), report)
            with report.timing("decode_s"):
                gradient = unpack(packet, edge, True, device)
            if gradient is not None:
                known = gradients.get(edge.value)
                gradients[edge.value] = gradient if known is None else known + gradient
        if gradients:
            with report.timing("compute_s"):
                torch.autograd.backward([saved.values[n] for n in gradients], list(gradients.values()))
        for edge, tap in saved.taps.items():
            key = Key(run, *_ends(edge), action.micro_batch, True)
            self._send(self._worker_of(edge.source), edge, key, tap.gradient, report)

    def _receive(self, key: Key, report: RunReport) -> Packet:
        with report.timing("wait_s"):
            packet: Packet = wait(self._endpoint.mailbox.receive(key), self.check)
        self._endpoint.mailbox.forget(key)
        return packet

    def _send(self, to: str, edge: Edge, key: Key, value: Any, report: RunReport) -> None:
        with report.timing("encode_s"):
            packet = pack(value, edge, key)
        if to == self._endpoint.name:
            self._endpoint.mailbox.deliver(key, packet)
            return
        report.add_traffic(
            LinkTraffic(self._endpoint.name, to, key.backward, packet.raw_bytes, packet.wire_bytes, 1)
        )
        self._endpoint.send(to, key, packet)

    def _worker_of(self, stage: int) -> str:
        return CLIENT_NAME if stage in (CLIENT, len(self._workers)) else self._workers[stage]


def _ends(edge: Edge) -> tuple[str, int, int]:
    return edge.value, edge.source, edge.target
