"""The client's workers: starts them, gives them commands, and notices when one fails or is lost."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

from fxsplit.errors import PipelineError, WorkerError
from fxsplit.runtime.failure import loss_of, raise_failure
from fxsplit.runtime.replication import check_digests
from fxsplit.runtime.transport import CLIENT_NAME, Endpoint, LostWorker, Transport, hand_over, wait_done
from fxsplit.runtime.worker import Worker
from fxsplit.schedules.replicas import replicas_of, single_workers

TIMEOUT_S = 30.0
"""How long a worker may be silent before it is given up, if nothing else is asked for."""

_SAME_OF_REPLICAS = ("state", "gradient_norms", "get_gradients", "optimizer_state", "imitation_begin")

_LOSS_WAIT_S = 1.0


class Group:
    """The workers of a pipeline, the client among them. Not safe to use from several threads at once.

    Args:
        transport: connects them.
        timeout_s: how long a worker may be silent before it is given up.

    Attributes:
        remote: the workers but the client.
        advice: what to do when a worker is lost.
    """

    advice = (
        "the steps of this pipeline are lost: compile the model again, from your own copy of the weights; with "
        "snapshots=fxsplit.Snapshots(directory) training goes on by itself"
    )

    def __init__(self, transport: Transport, timeout_s: float = TIMEOUT_S) -> None:
        self.remote: tuple[str, ...] = ()
        self._workers: tuple[str, ...] = ()
        self._followers: set[str] = set()
        self._transport = transport
        self._timeout_s = timeout_s
        self._endpoint: Endpoint | None = None
        self._worker: Worker | None = None

    # ------------------------------------------------------------------ life

    def start(self, workers: Iterable[str]) -> None:
        """Starts the workers beside the client.

        Args:
            workers: of the stages, or their replicas.

        Raises:
            WorkerError: one of them did not start.
        """
        self._workers = tuple(worker for worker in workers if worker != CLIENT_NAME)
        self.remote = single_workers(self._workers)
        self._followers = {name for worker in self._workers for name in replicas_of(worker)[1:]}
        self._endpoint = self._transport.start(self.remote, self._handle)
        self._worker = Worker(self._endpoint, self._check)

    def describe(self) -> dict[str, tuple[str, int]]:
        """Host and process id by worker."""
        return self._transport.describe()

    def close(self) -> None:
        """Ends all workers. Never hangs; may be called twice."""
        if self._worker is not None:
            self._worker.close()
        self._endpoint = self._worker = None
        self._transport.close()

    # ------------------------------------------------------------------ commands

    def broadcast(self, command: str, *arguments: Any) -> dict[str, Any]:
        """Runs a command on every worker, the client included, and returns the results by worker.

        What all replicas of a stage would say alike the first one is asked for.
        """
        silent = self._followers if command in _SAME_OF_REPLICAS else ()
        asked = [worker for worker in (*self.remote, CLIENT_NAME) if worker not in silent]
        return self.gather({w: self.start_command(w, command, *arguments) for w in asked})

    def call(self, worker: str, command: str, *arguments: Any) -> Any:
        """Runs a command on one worker."""
        return self.gather({worker: self.start_command(worker, command, *arguments)})[worker]

    def check_replicas(self) -> None:
        """Compares the parameters and buffers of replicas.

        Raises:
            WorkerError: they are not the same on all replicas of a stage, bit for bit.
        """
        for names in dict.fromkeys(replicas_of(worker) for worker in self._workers):
            if len(names) > 1:
                check_digests(self.gather({name: self.start_command(name, "digest") for name in names}))

    def start_command(self, worker: str, command: str, *arguments: Any) -> Future[Any]:
        """Has a worker run a command; `gather` waits for the result."""
        if worker == CLIENT_NAME:
            return self._handle(command, arguments)
        return self._open().call(worker, command, *arguments)

    def _handle(self, command: str, arguments: tuple[Any, ...]) -> Future[Any]:
        """The client's own commands run in the calling thread, where its autocast and seeds are."""
        result: Future[Any] = Future()
        self._open()
        assert self._worker is not None
        hand_over(self._worker.execute(command, arguments), result)
        return result

    def gather(self, futures: dict[str, Future[Any]]) -> dict[str, Any]:
        """The results of commands by worker, waited for.

        Raises:
            FxsplitError: one has failed, or a worker is lost.
        """
        pending = list(futures.values())
        for future in pending:
            wait_done(future, lambda: self._check_all(pending))
        results = {worker: self._result(future) for worker, future in futures.items()}
        for result in results.values():
            raise_failure(result)
        return results

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except WorkerError as error:
            # The connection ends a little before the process is gone; how it went says more.
            end = time.monotonic() + _LOSS_WAIT_S
            while time.monotonic() < end:
                self._check()
                time.sleep(0.02)
            name, cause = str(error.where), f"which did not answer: {error.found}"
            raise loss_of(LostWorker(name, cause), self.advice) from error

    def _open(self) -> Endpoint:
        if self._endpoint is None:
            raise PipelineError("the pipeline is closed", hint="compile the model again")
        return self._endpoint

    def _check(self) -> None:
        if lost := self._transport.lost(self._timeout_s):
            raise loss_of(lost, self.advice)

    def _check_all(self, futures: Iterable[Future[Any]]) -> None:
        for future in futures:
            if future.done() and future.exception() is None:
                raise_failure(future.result())
        self._check()
        for future in futures:
            if future.done():
                self._result(future)
