"""The client's engine: sets workers to work, feeds inputs and collects outputs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_all
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor

from fxsplit.errors import FxsplitError, WorkerLost
from fxsplit.planning import Plan
from fxsplit.runtime import shipping
from fxsplit.runtime.failure import raise_failure
from fxsplit.runtime.feeding import Feeding
from fxsplit.runtime.fingerprint import fingerprints
from fxsplit.runtime.group import TIMEOUT_S
from fxsplit.runtime.homes import stages_of
from fxsplit.runtime.host_random import host_seed
from fxsplit.runtime.loss import Loss
from fxsplit.runtime.metrics import Metrics
from fxsplit.runtime.packet import Key, unpack
from fxsplit.runtime.randomness import Randomness
from fxsplit.runtime.report import RunReport
from fxsplit.runtime.run import Run
from fxsplit.runtime.scheduler import Scheduler
from fxsplit.runtime.settings import TorchSettings
from fxsplit.runtime.stage_options import StageOptions
from fxsplit.runtime.together import can_be_together, is_on_gpu, run_together
from fxsplit.runtime.transport import CLIENT_NAME, Transport
from fxsplit.runtime.worker import Worker
from fxsplit.schedules import GPipe, Orders
from fxsplit.split import Boundary, SplitModel
from fxsplit.stage import Edge, Mode
from fxsplit.trace.replay import Surroundings

_ABORT_WAIT_S = 5.0
_LOSS_WAIT_S = 1.0


class Engine(Feeding):
    """Runs split models over a transport. Not safe to call from several threads at once."""

    def __init__(
        self,
        transport: Transport,
        stage_options: StageOptions = StageOptions(),  # noqa: B008  # frozen
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        super().__init__(transport, timeout_s)
        self._stage_options = stage_options
        self._noted: set[str] = set()
        self.committed = 0  # steps of optimizers
        self._next_run = 1
        self._discards: list[tuple[int, bool]] = []
        self._here: Mapping[str, Worker] = {}  # workers beside the client whose work this thread queues
        self._split: SplitModel | None = None
        self.backwards = 0  # how many have run: whatever was fetched of the gradients before is out of date

    def load(self, split: SplitModel, plan: Plan, canonical: dict[str, str]) -> None:
        """Gives every worker its stages."""
        self._split, self._plan = split, plan
        self.metrics.stage_count = len(plan.workers)
        self.metrics.predicted_step_s = plan.predicted_step_s
        self.scheduler = Scheduler(plan)
        modes = split.boundaries.keys()
        guarded = {m for m in modes if any(stage.ports(m).graph.is_guarded for stage in split.stages)}
        futures = {}
        for worker in (CLIENT_NAME, *self.remote):
            devices = stages_of(plan, worker)
            held = {stage: split.stages[stage] for stage in devices}
            arguments = (*shipping.dump(held), devices, plan.workers, canonical, guarded, TorchSettings.current())
            options = self._stage_options, fingerprints(held)
            futures[worker] = self.start_command(worker, "load", *arguments, *options)
        self.gather(futures)
        self.check_replicas()
        self.broadcast("seed_host", host_seed())
        self._here = self._transport.in_this_thread() if can_be_together(plan.devices) else {}

    # ------------------------------------------------------------------ steps

    def forward(self, chunks: Sequence[Sequence[Tensor]], mode: Mode, grad: bool) -> tuple[Run, list[list[Any]]]:
        """Runs the forward pipeline.

        Args:
            chunks: the tensor inputs of the model, by micro-batch.
            mode: what runs.
            grad: whether a backward may follow.

        Returns:
            the run, and the values of its output edges by micro-batch.
        """
        start = time.perf_counter()
        boundary = self._boundary(mode)
        edges = tuple(dict.fromkeys(leaf for leaf in boundary.outputs if isinstance(leaf, Edge)))
        run = Run(self._new_run_number(), mode, len(chunks), edges)
        self.flush_discards()
        randomness = Randomness.of_run(self._draws(mode), len(chunks))
        with _Phase(self, run, self._halves(forward=True), grad, randomness) as phase:
            for index, edge in boundary.inputs:
                for m, leaves in enumerate(chunks):
                    self._feed(run, edge, m, leaves[index], backward=False)
                    if grad and leaves[index].requires_grad:
                        run.inputs.append((m, index, edge))
            phase.run_locally()
            outputs = self._collect_all(run, phase.check, randomness)
        if not grad:
            self._open().mailbox.finish(run.number)
        self.metrics.calls += 1
        self.metrics.total_s += time.perf_counter() - start
        return run, outputs

    def backward(self, run: Run, gradients: Sequence[Sequence[Tensor | None]]) -> dict[tuple[int, int], Tensor]:
        """Runs the backward pipeline.

        Args:
            run: the forward that it belongs to.
            gradients: of the output edges, by micro-batch.

        Returns:
            the gradients of the inputs that need one, by micro-batch and index of the input.
        """
        start = time.perf_counter()
        self.backwards += 1
        with _Phase(self, run, self._halves(forward=False), grad=True) as phase:
            for m, of_edges in enumerate(gradients):
                for i, (edge, gradient) in enumerate(zip(run.edges, of_edges, strict=True)):
                    if (m, i) in run.needs_gradient:
                        self._feed(run, edge, m, gradient, backward=True)
            phase.run_locally()
            found: dict[tuple[int, int], Tensor] = {}
            for m, index, edge in run.inputs:
                packet = self._take(Key(run.number, edge.value, edge.source, edge.target, m, True), phase.check)
                gradient = unpack(packet, edge, True, self._device()) if packet.spec else None
                if gradient is not None:
                    known = found.get((m, index))
                    found[m, index] = gradient if known is None else known + gradient
        self._open().mailbox.finish(run.number)
        self.metrics.total_s += time.perf_counter() - start
        return found

    def step(
        self,
        chunks: Sequence[Sequence[Tensor]],
        mode: Mode,
        loss: Loss,
        targets: Mapping[Edge, Sequence[Tensor]],
    ) -> tuple[Tensor, list[list[Any]]]:
        """Runs a whole training step in the order of the plan's schedule.

        Args:
            chunks: the tensor inputs of the model, by micro-batch.
            mode: what runs.
            loss: what is made of the outputs.
            targets: what it compares with, by edge and micro-batch.

        Returns:
            the loss of the batch, and the values of the output edges by micro-batch.
        """
        start = time.perf_counter()
        boundary = self._boundary(mode)
        run = Run(self._new_run_number(), mode, len(chunks), loss.edges, outputs_at=loss.worker)
        self.flush_discards()
        self.backwards += 1
        randomness = Randomness.of_run(self._draws(mode), len(chunks))
        outputs: list[list[Any]] = []
        with _Phase(self, run, self.scheduler.orders(), True, randomness, loss) as phase:
            for index, edge in boundary.inputs:
                for m, leaves in enumerate(chunks):
                    self._feed(run, edge, m, leaves[index].detach(), backward=False)
            for edge, column in targets.items():
                for m, target in enumerate(column):
                    self._feed(run, edge, m, target, backward=False)
            phase.run_locally()
            if loss.returns_outputs:
                outputs = self._collect_all(run, phase.check, randomness)
        self._open().mailbox.finish(run.number)
        self.scheduler.observe(span for report in phase.reports for span in report.spans)
        self.metrics.calls += 1
        self.metrics.total_s += time.perf_counter() - start
        losses = {m: loss for report in phase.reports for m, loss in self._brought(report)}
        total = losses[0]
        for m in range(1, len(chunks)):  # in the order of the micro-batches, as a loop would
            total = total + losses[m]
        return total, outputs

    def settled_metrics(self) -> Metrics:
        """What was measured, what GPUs did in the latest steps included; without that if a worker is lost."""
        is_on_gpus = self._split is not None and any(map(is_on_gpu, self._plan.devices))
        if is_on_gpus and self._endpoint is not None:
            with suppress(FxsplitError):
                for report in self.broadcast("settle").values():
                    self.metrics.add(report)
        return self.metrics

    def optimizer_step(self, optimizer: int, options: Sequence[Mapping[str, Any]], factor: float) -> None:
        """One step of an optimizer: by all workers, or by none.

        Every worker prepares it. When all have, they are told to commit, which cannot fail: it forgets how to take
        the step back. If one has not, the others are told to take it back.

        Args:
            optimizer: its number.
            options: of its parameter groups.
            factor: by which gradients are scaled before.
        """
        step = self.committed + 1
        arguments = "prepare_step", step, optimizer, options, factor
        futures = {worker: self.start_command(worker, *arguments) for worker in (*self.remote, CLIENT_NAME)}
        try:
            self.gather(futures)
        except BaseException:
            if self._endpoint is not None:
                lost = self._transport.lost(self._timeout_s)
                others = [w for w in (*self.remote, CLIENT_NAME) if lost is None or w != lost.name]
                wait_all([futures[w] for w in others], timeout=_ABORT_WAIT_S)
                told = [self.start_command(w, "roll_back_step", step) for w in others]
                wait_all(told, timeout=_ABORT_WAIT_S)
            raise
        self.committed = step
        for worker in (*self.remote, CLIENT_NAME):
            self.start_command(worker, "commit_step", step)

    def discard(self, number: int, undo: bool = False) -> None:
        """Notes that a run's backward will not come; the workers are told with the next run."""
        self._discards.append((number, undo))

    def flush_discards(self) -> None:
        """Tells the workers which runs they may forget."""
        pending, self._discards = self._discards, []
        if pending:
            self.send_discards(pending)

    def send_discards(self, discards: Sequence[tuple[int, bool]]) -> None:
        """Tells the workers to forget runs.

        Args:
            discards: the number of each, and whether what it did is undone.
        """
        for discard in discards:
            told = [self.start_command(worker, "discard", *discard) for worker in (*self.remote, CLIENT_NAME)]
            if discard[1]:  # before anyone reads or loads the buffers that are put back
                wait_all(told, timeout=_ABORT_WAIT_S)

    def output_edges(self, mode: Mode) -> tuple[Any, ...]:
        """The leaves of the model's output: the edge that brings each, or the value itself."""
        return self._boundary(mode).outputs

    def output_leaves(self, mode: Mode, values: Sequence[Any]) -> list[Any]:
        """The leaves of the model's output from the values of the output edges."""
        boundary = self._boundary(mode)
        edges = dict.fromkeys(leaf for leaf in boundary.outputs if isinstance(leaf, Edge))
        by_edge = dict(zip(edges, values, strict=True))
        return [by_edge[leaf] if isinstance(leaf, Edge) else leaf for leaf in boundary.outputs]

    def _new_run_number(self) -> int:
        number = self._next_run
        self._next_run += 1
        return number

    def split_name(self) -> str:
        """What the memories of compressors depend on."""
        plan = self._plan
        codecs = [(e.value, e.target, e.compressor, e.gradient_compressor) for e in plan.edges if e.is_compressed]
        return f"{plan.devices} {plan.cut_names} {plan.chunks} {codecs}"

    def _boundary(self, mode: Mode) -> Boundary:
        assert self._split is not None
        return self._split.boundaries[mode]

    def _draws(self, mode: Mode) -> bool:
        """Whether a stage draws random numbers."""
        assert self._split is not None
        return any(stage.ports(mode).draws_random_numbers for stage in self._split.stages)

    def _halves(self, forward: bool) -> Orders:
        """GPipe's forwards, or its backwards: what is run when the loss is the caller's."""
        orders = GPipe().orders(self._plan.workers, self._plan.chunks, self.scheduler.times)
        return {worker: [a for a in actions if a.is_forward == forward] for worker, actions in orders.items()}


class _Phase:
    """All workers do their part of a run's orders; if one fails, the others give up."""

    def __init__(
        self,
        engine: Engine,
        run: Run,
        orders: Orders,
        grad: bool,
        randomness: Randomness | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.reports: list[RunReport] = []
        self._engine = engine
        self._run = run
        self._orders = orders
        self._arguments = (run.mode, replace(Surroundings.current(), grad=grad), randomness)
        self._loss = loss
        self._futures: dict[str, Future[Any]] = {}

    def __enter__(self) -> _Phase:
        engine = self._engine
        engine._open()
        engine._forget_fed()
        for worker in engine.remote if not engine._here else ():
            loss = None if self._loss is None else shipping.dump(self._loss.as_seen_by(worker))
            self._futures[worker] = engine.start_command(worker, "run", *self._share(worker), loss)
        return self

    def _share(self, worker: str) -> tuple[Any, ...]:
        """What a worker is told of the run, but for the loss."""
        return self._run.number, list(self._orders.get(worker, ())), *self._arguments

    def run_locally(self) -> None:
        """The client's own stages, in this thread, and those whose work it queues for other workers."""
        engine = self._engine
        engine._send_fed(*engine.remote)
        worker = engine._worker
        assert worker is not None
        worker.check = self.check
        if engine._here:
            workers = {CLIENT_NAME: worker, **engine._here}
            found = run_together(workers, {name: (*self._share(name), self._loss) for name in workers}, self.check)
            for name in engine.remote:
                self._futures[name] = Future()
                self._futures[name].set_result(found.get(name))
            result: Any = found.get(CLIENT_NAME)
        else:
            result = worker.execute("run", (*self._share(CLIENT_NAME), self._loss))
        self.check()  # what failed elsewhere is the cause of what fails here
        raise_failure(result)
        self._add(result)

    def _add(self, report: RunReport) -> None:
        self.reports.append(report)
        for note in report.notes:
            if note not in self._engine._noted:
                self._engine._noted.add(note)
                warnings.warn(note, stacklevel=2)
        self._engine.metrics.add(report)

    def check(self) -> None:
        """Raises if a worker has failed or is lost."""
        self._engine._check_all(self._futures.values())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        engine, number = self._engine, self._run.number
        if error is None:
            for report in engine.gather(self._futures).values():
                if isinstance(report, RunReport):
                    self._add(report)
            return
        if engine._endpoint is None:
            return
        reason = f"given up, since another worker failed: {error}"
        engine._endpoint.mailbox.abort(number, reason)
        lost = engine._transport.lost(engine._timeout_s)
        others = [worker for worker in engine.remote if lost is None or worker != lost.name]
        for worker in others:
            engine.start_command(worker, "abort", number, reason)
        begun = [self._futures[worker] for worker in others if worker in self._futures]
        wait_all(begun, timeout=_ABORT_WAIT_S)
        if lost is not None or isinstance(error, WorkerLost):
            return  # the others are idle now
        engine.discard(number, undo=True)
        engine.flush_discards()
