"""A worker: holds stages on its devices and does what its schedule says. The client is one, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxsplit.compressors.decaying_linear import Shrink
from fxsplit.planning.links import Link
from fxsplit.runtime import fingerprint, shipping
from fxsplit.runtime.compiled import check_compilers, compile_stages
from fxsplit.runtime.courier import Courier
from fxsplit.runtime.deferred_batch_norm import Call, DeferredBatchNorm
from fxsplit.runtime.executor import Executor
from fxsplit.runtime.failure import Failure
from fxsplit.runtime.graphs import StageGraphs, refusal
from fxsplit.runtime.holding import Holding
from fxsplit.runtime.imitation import Imitation
from fxsplit.runtime.keeping import Keeper
from fxsplit.runtime.link_speed import measured
from fxsplit.runtime.live_memory import Ledger
from fxsplit.runtime.loss import Loss
from fxsplit.runtime.memory import peak_memory_bytes
from fxsplit.runtime.parameters import ParameterStore
from fxsplit.runtime.place import IDLE, Place
from fxsplit.runtime.precision import check_autocast
from fxsplit.runtime.pulse import Pulse
from fxsplit.runtime.randomness import Randomness
from fxsplit.runtime.replication import Replication, Waiting, digest_of
from fxsplit.runtime.report import RunReport, Span
from fxsplit.runtime.run_state import RunState
from fxsplit.runtime.settings import TorchSettings
from fxsplit.runtime.stage_options import StageOptions
from fxsplit.runtime.stopwatch import Stopwatch
from fxsplit.runtime.streams import Pace, mark
from fxsplit.runtime.traffic import Ways
from fxsplit.runtime.transport import CLIENT_NAME, Endpoint, wait
from fxsplit.runtime.undo import Copies, Undo
from fxsplit.schedules import Action
from fxsplit.stage import Mode
from fxsplit.trace.replay import Surroundings


class Worker:
    """Executes commands of the client, one at a time.

    Args:
        endpoint: this worker's end of the transport.
        check: raises if waiting makes no more sense (a worker died, the run failed elsewhere).
        pulse: told what this worker is at.
    """

    def __init__(
        self, endpoint: Endpoint, check: Callable[[], None] = lambda: None, pulse: Pulse | None = None
    ) -> None:
        self._endpoint = endpoint
        self._pulse = pulse or Pulse()
        self.check = check
        self._holding = Holding()
        self._runs: dict[int, RunState] = {}
        self._guarded: Set[Mode] = frozenset()
        self._undo, self._copies = Undo(0), Copies()
        self._pace = Pace(())
        self._stopwatch: Stopwatch[Span] = Stopwatch()
        self._parameters = ParameterStore()
        self._replication: Replication | None = None
        self._awaited: list[Future[Any]] = []
        self._imitation = Imitation()
        self._shrinking: list[Shrink] = []
        self._memories: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._is_process = not endpoint.is_immediate
        name = endpoint.name if self._is_process and endpoint.name != CLIENT_NAME else None
        self._keeper = Keeper(self._parameters, self._memories, name)
        self._courier = Courier(endpoint, torch.get_num_threads())
        self._executor = self._new_executor()
        self.commands: Mapping[str, Callable[..., Any]] = {
            "load": self.load,
            "run": self.run,
            "discard": self.discard,
            "state": self.state,
            "clock": time.perf_counter,
            "settle": self.settle,
            "count_memory": self.count_memory,
            "digest": lambda: digest_of(self._holding.stages),
            "echo": lambda _, reply_bytes: torch.zeros(reply_bytes, dtype=torch.uint8),  # of `probe`
            "probe_link": self.probe_link,
            **self._parameters.commands,
            **self._imitation.commands,
            **self._keeper.commands,
        }

    def execute(self, command: str, arguments: tuple[Any, ...]) -> Any:
        """The result of a command, or a `Failure`."""
        self._executor.action = None
        self._pulse.at(Place(command))
        try:
            return self.commands[command](*arguments)
        except Exception as error:
            return self.failure_of(command, error)
        finally:
            self._pulse.at(IDLE)

    def failure_of(self, command: str, error: Exception) -> Failure:
        """What the client is told of an error."""
        action = self._executor.action
        place = str(_place_of(action)) if action else command
        shapes = self._executor.shapes if action else None
        return Failure.of(self._endpoint.name, place, action.micro_batch if action else None, error, shapes)

    # ------------------------------------------------------------------ commands

    def probe_link(self, peer: str) -> tuple[Link, Link]:
        """Measures the link to another worker, and the one from there, which has nothing else to do meanwhile."""

        def exchange(payload: Tensor, reply_bytes: int) -> None:
            wait(self._endpoint.call(peer, "echo", payload, reply_bytes), self.check)

        return measured(exchange)

    def load(
        self,
        data: bytes,
        tensors: Sequence[Tensor],
        devices: Mapping[int, str],
        workers: Sequence[str],
        canonical: Mapping[str, str],
        guarded: Set[Mode],
        settings: TorchSettings,
        options: StageOptions,
        prints: Mapping[str, str],
    ) -> None:
        """Takes the stages over.

        Args:
            data: the stages by number, as `shipping.dump` made them.
            tensors: their tensors.
            devices: the device of each stage held here.
            workers: the worker of every stage, or its replicas.
            canonical: name of a tied parameter -> its first name in the model.
            guarded: the modes in which some stage may refuse a batch.
            settings: the client's precision and determinism.
            options: how they are run.
            prints: the client's fingerprints of the stages.
        """
        settings.apply()
        stages = shipping.load(data, tensors)
        fingerprint.check(prints, stages)
        placed = {stage: torch.device(device) for stage, device in devices.items()}
        for number, module in stages.items():
            module.to(placed[number])
        self._give_up_replication()
        self._replication = Replication.of(self._endpoint, workers, stages)
        deferred = options.deferred_batch_norm
        collects = deferred or self._replication is not None
        batch_norms = DeferredBatchNorm(stages.values() if collects else (), by_batch=deferred)
        if options.compile_stages:
            check_compilers(placed.values(), f"worker {self._endpoint.name}")
            compile_stages(stages, batch_norms.layers)
        checkpoint = tuple(options.checkpoint)
        graphs = None
        if options.cuda_graphs:
            policies = {stage: checkpoint[stage] if checkpoint else "never" for stage in stages}
            reasons = {n: refusal(module, policies[n]) for n, module in stages.items()}
            refused = {stage: reason for stage, reason in reasons.items() if reason is not None}
            graphs = StageGraphs(stages, placed, refused, batch_norms, self._may_record)
        self._holding = Holding(
            stages, placed, tuple(workers), batch_norms, checkpoint, graphs, are_compiled=options.compile_stages
        )
        self._guarded = guarded
        self._pace = Pace(placed.values())
        self._memories.clear()
        self._shrinking = [m for stage in stages.values() for m in stage.modules() if isinstance(m, Shrink)]
        self._parameters.hold(stages, canonical)
        self._imitation.hold(stages)
        self._keeper.hold(self._holding)
        self._executor = self._new_executor()

    def count_memory(self, is_counted: bool) -> None:
        """Counts the bytes of activations from now on, or no longer."""
        ledger = Ledger(self._holding.stages.values()) if is_counted else None
        self._holding = replace(self._holding, ledger=ledger)
        self._executor = self._new_executor()

    def _may_record(self) -> bool:
        return not self._imitation.is_watching and not any(run.has_graph for run in self._runs.values())

    def _new_executor(self) -> Executor:
        check = lambda: self.check()  # noqa: E731  # the client's changes with each run
        begins = lambda action: self._pulse.at(_place_of(action))  # noqa: E731
        return Executor(Ways(self._endpoint, self._courier, self._holding, self._memories, check), begins)

    def run(self, *arguments: Any) -> RunReport:
        """Does all that `running` does."""
        actions = self.running(*arguments)
        while True:
            try:
                next(actions)
            except StopIteration as end:
                report: RunReport = end.value
                return report

    def awaited(self) -> list[Future[Any]]:
        """What the next action of a run takes and is not there yet."""
        return self._executor.awaited() or [future for future in self._awaited if not future.done()]

    def running(
        self,
        number: int,
        actions: Sequence[Action],
        mode: Mode,
        surroundings: Surroundings,
        randomness: Randomness | None,
        loss: Loss | tuple[bytes, Sequence[Tensor]] | None = None,
    ) -> Generator[None, None, RunReport]:
        """Does forwards, backwards, or all of a step, in the caller's gradient mode and autocast.

        It stops before each action until it is asked for the next one.

        Args:
            number: of the run.
            actions: in their order.
            mode: which graphs.
            surroundings: the caller's gradient mode and autocast.
            randomness: how stages draw random numbers.
            loss: if a whole step is run; as `shipping.dump` made it, if it comes from another process.
        """
        report = RunReport(self._endpoint.name)
        check_autocast(surroundings, self._holding.devices.values())
        torch.clear_autocast_cache()  # weights that the caller's own autocast has cast may have been updated since
        self._pace.begin()
        run = self._begin(number, mode, is_step=loss is not None)
        run.randomness = randomness
        for layer in self._shrinking:
            layer.micro_batches = 1 + max((action.micro_batch for action in actions), default=0)
        made = shipping.load(*loss) if isinstance(loss, tuple) else loss
        if (ledger := self._holding.ledger) is not None:
            ledger.reset()
        self._begin_replication(number, actions, is_step=loss is not None)
        yield from self._executor.execute(number, run, actions, surroundings, made, report)
        report.live_bytes = ledger.peak_bytes if ledger is not None else 0
        for awaited in self._finish_replication(number, actions, mode, report):
            self._awaited = awaited
            yield
        self._awaited = []
        if not run.saved:
            del self._runs[number]
            if self._endpoint.name != CLIENT_NAME:  # which still collects what comes out
                self._endpoint.mailbox.finish(number)
        self._pace.end()
        report.spans += self._courier.links()
        untimed, report.untimed = report.untimed, []
        for timed in self._stopwatch.settle(untimed):
            report.add(*timed)
        if self._holding.graphs is not None:
            report.notes = self._holding.graphs.notes()
        if self._endpoint.is_immediate or self._endpoint.name == CLIENT_NAME:
            report.marks = mark(list(report.losses.values()))
        else:
            report.losses = {m: loss.cpu() for m, loss in report.losses.items()}
        report.peak_memory_bytes = peak_memory_bytes(self._holding.devices.values())
        return report

    def settle(self) -> RunReport:
        """What GPUs did in the latest runs; waits for them."""
        report = RunReport(self._endpoint.name)
        for timed in self._stopwatch.finish():
            report.add(*timed)
        return report

    def _begin_replication(self, number: int, actions: Sequence[Action], is_step: bool) -> None:
        """A replica begins a backward."""
        if self._replication is None or not any(action.sends_gradients for action in actions):
            return
        if not is_step:
            self._undo = Undo.of_backward(number, self._holding.parameters, self._undo)
        self._replication.begin_backward()

    def _finish_replication(
        self, number: int, actions: Sequence[Action], mode: Mode, report: RunReport
    ) -> Waiting[None]:
        """The work is done: statistics are updated, with what the other replicas saw, and gradients summed."""
        batch_norms, replication = self._holding.batch_norms, self._replication
        if replication is None:
            batch_norms.commit()
            return
        check = lambda: self.check()  # noqa: E731  # as above
        is_forward = any(action.is_forward for action in actions)
        if mode.training and is_forward and (own := batch_norms.collected()) is not None:
            rows = torch.tensor(own[0], dtype=torch.int64).view(-1, len(Call._fields))
            rows, numbers = yield from replication.share(rows, own[1], number, check)
            batch_norms.update([Call(*row) for row in rows.tolist()], numbers)
        if any(action.sends_gradients for action in actions):
            yield from replication.sum_gradients(number, check, report)
        yield from replication.finish(number, check)

    def _give_up_replication(self) -> None:
        if self._replication is not None:
            self._replication.give_up()

    def _begin(self, number: int, mode: Mode, is_step: bool) -> RunState:
        if number not in self._runs:
            self._runs[number] = RunState(mode)
            self._holding.batch_norms.clear()
            undoable = is_step or mode in self._guarded or self._holding.batch_norms.layers
            changed = self._holding.parameters if is_step else ()
            what = changed, self._is_process, self._copies
            self._undo = Undo.of(number, self._holding.buffers(), *what) if undoable else Undo(number)
        return self._runs[number]

    def discard(self, run: int, undo: bool) -> None:
        """Forgets a run whose backward will not come.

        Args:
            run: its number.
            undo: put back what its forward did to buffers: it was refused by a guard and will be run again, or
                another worker failed.
        """
        if (forgotten := self._runs.pop(run, None)) is not None:
            forgotten.forget()
        if undo:
            self._give_up_replication()
            self._memories.clear()  # one end of an edge may have seen a packet that the other has not
        if undo and self._undo.number == run:
            self._undo.apply()
        self._endpoint.mailbox.abort(run, "the run was given up")

    def state(self) -> dict[str, Tensor]:
        """The state_dicts of all stages held here, together, on the CPU."""
        return {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            for module in self._holding.stages.values()
            for name, value in module.state_dict().items()
        }

    def close(self) -> None:
        """Ends the threads beside this one."""
        self._give_up_replication()
        self._courier.close()
        self._keeper.close()


def _place_of(action: Action) -> Place:
    return Place(action.kind, action.stage, action.micro_batch)
