"""An engine that goes on when a worker is lost: from the last snapshot, doing again what was done since."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fxsplit.errors import FxsplitError, WorkerLost
from fxsplit.planning import Plan
from fxsplit.runtime.engine import Engine
from fxsplit.runtime.group import TIMEOUT_S
from fxsplit.runtime.host_random import HostRandom
from fxsplit.runtime.journal import Journal, Operation, Random, without_effect
from fxsplit.runtime.loss import Loss
from fxsplit.runtime.metrics import Metrics
from fxsplit.runtime.randomness import set_states, states
from fxsplit.runtime.run import Run
from fxsplit.runtime.snapshotter import Saver, Snapshotter, Training
from fxsplit.runtime.stage_options import StageOptions
from fxsplit.runtime.transport import Transport
from fxsplit.snapshots import Snapshots
from fxsplit.snapshots.checkpoint import Checkpoint
from fxsplit.snapshots.files import Lock
from fxsplit.snapshots.manifest import step_folder
from fxsplit.split import SplitModel
from fxsplit.stage import Edge, Mode

_MOST_LOSSES = 3  # in a row, of one operation: then it is the operation that kills
_SHARE = 0.01  # of the time that early snapshots may take
_CLOSE_WAIT_S = 30.0


class DurableEngine(Engine):
    """An `Engine` with snapshots and a journal. Every public call is done in full, whatever workers are lost.

    Args:
        snapshots: what is asked of them.
        recovers: whether lost workers are started again; else the error says from where the next run goes on.

    Attributes:
        training: describes the training for a manifest; the pipeline sets it.
        is_between_batches: whether snapshots are taken between batches of the pipeline's loop alone.
        recoveries: how many there were.
    """

    def __init__(
        self,
        transport: Transport,
        snapshots: Snapshots,
        stage_options: StageOptions,
        timeout_s: float = TIMEOUT_S,
        recovers: bool = True,
    ) -> None:
        super().__init__(transport, stage_options, timeout_s)
        self.training: Callable[[], Training]
        self.is_between_batches: Callable[[], bool] = lambda: False
        self.recoveries = 0
        self._settings = snapshots
        self._directory = Path(snapshots.directory)
        self._lock = Lock(self._directory)
        self._saver = Saver(self, self._directory)
        self._snapshotter = Snapshotter(self._saver, self._directory, snapshots.keep)
        self._recovers = recovers
        self._journal = Journal()
        self._is_inside = self._is_replaying = False
        self._taken_step = 0
        self._taken_at_s = time.monotonic()
        self._taken_bytes = 0
        self._cost_s = 0.0
        self._due: Training | None = None
        self._open_runs: set[int] = set()
        self.advice = "run the script again: it goes on from the newest snapshot"

    # ------------------------------------------------------------------ calls

    def load(self, split: SplitModel, plan: Plan, canonical: dict[str, str]) -> None:
        """See `Engine`."""
        self._durably("load", split, plan, canonical)

    def broadcast(self, command: str, *arguments: Any) -> dict[str, Any]:
        """See `Group`."""
        result: dict[str, Any] = self._durably("broadcast", command, *arguments)
        if command == "clear_gradients" and not self.is_between_batches():
            self._durably("take")
        return result

    def call(self, worker: str, command: str, *arguments: Any) -> Any:
        """See `Group`."""
        return self._durably("call", worker, command, *arguments)

    def forward(self, chunks: Sequence[Sequence[Tensor]], mode: Mode, grad: bool) -> tuple[Run, list[list[Any]]]:
        """See `Engine`."""
        result: tuple[Run, list[list[Any]]] = self._durably("forward", chunks, mode, grad)
        if grad and not self._is_inside:
            self._open_runs.add(result[0].number)
        return result

    def backward(self, run: Run, gradients: Sequence[Sequence[Tensor | None]]) -> dict[tuple[int, int], Tensor]:
        """See `Engine`."""
        result: dict[tuple[int, int], Tensor] = self._durably("backward", run, gradients)
        self._open_runs.discard(run.number)
        return result

    def step(
        self,
        chunks: Sequence[Sequence[Tensor]],
        mode: Mode,
        loss: Loss,
        targets: Mapping[Edge, Sequence[Tensor]],
    ) -> tuple[Tensor, list[list[Any]]]:
        """See `Engine`."""
        result: tuple[Tensor, list[list[Any]]] = self._durably("step", chunks, mode, loss, targets)
        return result

    def optimizer_step(self, optimizer: int, options: Sequence[Mapping[str, Any]], factor: float) -> None:
        """See `Engine`."""
        self._durably("optimizer_step", optimizer, options, factor)
        if not self._is_inside and self._is_time():
            self._due = self.training()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Gives the workers the state of a snapshot."""
        self._durably("restore", checkpoint)
        self._taken_step = checkpoint.step

    def send_discards(self, discards: Sequence[tuple[int, bool]]) -> None:
        """See `Engine`; these are noted, too."""
        super().send_discards(discards)
        self._open_runs.difference_update(number for number, _ in discards)
        if not self._is_replaying:
            self._journal.append(Operation("send_discards", (tuple(discards),)))

    def flush_discards(self) -> None:
        """See `Engine`; what is pending belongs to the present, not to what is done again."""
        if not self._is_replaying:
            super().flush_discards()

    def take_now(self) -> None:
        """Takes the snapshot that is due, if one is and nothing was done since; the loop calls it."""
        if self._due is not None:
            self._due = self.training()
            self._durably("take")

    def close(self) -> None:
        """Ends all workers, after the files that are being written."""
        if self._endpoint is not None and self._transport.lost(self._timeout_s) is None:
            if self._due is not None:
                with suppress(FxsplitError), self._inside():
                    self._take_due()
            self._snapshotter.wait(_CLOSE_WAIT_S)
            self._snapshotter.finished()  # or nobody would hear that it could not be written
        self._saver.abandon()
        self._snapshotter.close()
        super().close()
        self._lock.release()

    # ------------------------------------------------------------------ operations

    def _durably(self, method: str, *arguments: Any) -> Any:
        """Does something, until it is done."""
        if self._is_inside:
            return self._do(method, arguments)
        operation = Operation(method, arguments, self._random())
        is_clearing = operation.command == "clear_gradients"
        has_effect = not without_effect(method, arguments)
        for losses in range(1, _MOST_LOSSES + 1):
            try:
                with self._inside():
                    self._rebase()
                    if has_effect and not is_clearing and not self.is_between_batches():
                        self._take_due()
                        self._due = None  # what comes now is no state of a step any more
                    number, start_s = self._next_run, time.monotonic()
                    result = self._do(method, arguments)
                break
            except WorkerLost as lost:
                if not self._recovers or losses == _MOST_LOSSES:
                    raise
                with self._inside():
                    self._recover(lost)
                self._set_random(operation.random)
        if has_effect:
            self._journal.append(operation.kept(number, time.monotonic() - start_s))
        return result

    def _do(self, method: str, arguments: Sequence[Any]) -> Any:
        """Does it once."""
        own: dict[str, Callable[..., Any]] = {
            "restore": self._restore,
            "restore_step": self._restore_step,
            "take": self._take_due,
        }
        return own[method](*arguments) if method in own else getattr(Engine, method)(self, *arguments)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False

    def _random(self) -> Random:
        return HostRandom(), states(self._device()) if self._split is not None else ()

    def _set_random(self, given: Random | None) -> None:
        if given is not None:
            host, torch_states = given
            host.put_back()
            if torch_states:  # there are none before a stage was loaded
                set_states(torch_states, self._device())

    # ------------------------------------------------------------------ snapshots

    def begin(self) -> None:
        """Looks for the directory, once the workers are there."""
        with self._inside():
            self._saver.look()

    def _is_time(self) -> bool:
        if self.committed - self._taken_step >= self._settings.every:
            return True
        is_long = self._journal.seconds > self._settings.replay_s
        is_large = self._journal.nbytes - self._taken_bytes > self._settings.replay_bytes
        return is_large or (is_long and self._cost_s < _SHARE * (time.monotonic() - self._taken_at_s))

    def _take_due(self) -> None:
        """Takes the snapshot that is due."""
        if self._due is None or self._open_runs or self._snapshotter.is_busy:
            return
        training, self._due = self._due, None
        start_s = time.monotonic()
        try:
            self._snapshotter.begin(training, len(self._journal.log))
        except WorkerLost:
            self._due = training
            raise
        self._taken_step, self._taken_at_s = training.step, time.monotonic()
        self._taken_bytes = self._journal.nbytes
        self._cost_s = self._taken_at_s - start_s

    def _rebase(self) -> None:
        if (finished := self._snapshotter.finished()) is not None:
            step, mark = finished
            folder = step_folder(self._directory, step)
            self._taken_bytes = 0
            self._journal.rebase(mark, Operation("restore_step", (folder,)))

    def _restore_step(self, folder: Path) -> None:
        self._restore(Checkpoint.read(folder))

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._saver.restore(checkpoint, self.split_name())
        self.committed = checkpoint.step

    # ------------------------------------------------------------------ recovery

    def _recover(self, lost: WorkerLost) -> None:
        """Starts all workers again, and brings them to where they were.

        Raises:
            WorkerLost: workers are lost again and again.
            SnapshotError: the snapshot is not what was written.
        """
        for attempt in range(1, _MOST_LOSSES + 1):
            log = self._journal.log
            done = sum(operation.method == "optimizer_step" for operation in log)
            warnings.warn(
                f"{lost.what}; all workers are started again, from step {self.committed - done}, and {done} steps "
                "are done again",
                stacklevel=6,
            )
            self._rebase()
            self._snapshotter.abandon()
            try:
                self._start_again()
                self._replay()
            except WorkerLost as again:
                if attempt == _MOST_LOSSES:
                    raise
                lost = again
                continue
            self.recoveries += 1
            return

    def _start_again(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._endpoint = self._worker = None
        self._transport = self._transport.restarted()
        self.start(self._workers)
        self._saver.look()

    def _replay(self) -> None:
        kept = self._next_run, self.metrics, self.backwards
        self.metrics, self._is_replaying, self.committed = Metrics(), True, 0
        try:
            for operation in self._journal:
                self._set_random(operation.random)
                self._next_run = operation.run_number or self._next_run
                with operation.surroundings.active():
                    self._do(operation.method, operation.arguments)
        finally:
            self._next_run, self.metrics, self.backwards = kept
            self._is_replaying = False


@dataclass(frozen=True)
class EngineOptions:
    """What a pipeline asks of its engine; see `fxsplit.compile`.

    Attributes:
        stages: how stages are run.
        timeout_s: how long a worker may be silent.
        snapshots: what is asked of them, if anything is.
        recovers: whether lost workers are started again.
    """

    stages: StageOptions = field(default_factory=StageOptions)
    timeout_s: float = TIMEOUT_S
    snapshots: Snapshots | None = None
    recovers: bool = True

    def engine(self, transport: Transport) -> Engine:
        """An engine over a transport."""
        if self.snapshots is None:
            return Engine(transport, self.stages, self.timeout_s)
        return DurableEngine(transport, self.snapshots, self.stages, self.timeout_s, self.recovers)
