"""Workers of one process whose stages are all on GPUs: one thread queues the work of all of them.

Such work is only queued by the host. Threads that do it side by side take turns at Python's lock, hand it over at
every call of CUDA, and so take longer than one thread that does it for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_all
from typing import Any

from fxsplit.runtime.failure import Failure
from fxsplit.runtime.worker import Worker

_POLL_S = 0.2


def can_be_together(devices: Sequence[str]) -> bool:
    """Whether stages on these devices, one each, do not keep the host: all are on GPUs."""
    return all(is_on_gpu(device) for device in devices)


def is_on_gpu(device: str) -> bool:
    """Whether a device of a plan, "cuda:0" or "server/cuda:0", is a GPU; of replicas, the last one's."""
    return device.rpartition("/")[2].startswith("cuda")


def run_together(
    workers: Mapping[str, Worker], arguments: Mapping[str, tuple[Any, ...]], check: Callable[[], None]
) -> dict[str, Any]:
    """Does a run of several workers in this thread, in turns of an action each.

    An action's turn comes when what it takes is there. Each worker keeps its order. So it is with what replicas do
    together at the end.

    Args:
        workers: by name.
        arguments: of each worker's `run`.
        check: raises if waiting makes no more sense.

    Returns:
        what each worker's `run` returns. If one fails, its failure alone: the others have given up.
    """
    parts = {name: _Part(worker, arguments[name]) for name, worker in workers.items()}
    try:
        while left := [part for part in parts.values() if part.is_under_way]:
            awaited = [(part, part.awaited()) for part in left]
            for part, futures in awaited:
                if not futures:
                    part.go_on()
                    if isinstance(part.result, Failure):
                        return {name: part.result for name in parts if parts[name] is part}
            if all(futures for _, futures in awaited):
                wait_all([f for _, futures in awaited for f in futures], _POLL_S, FIRST_COMPLETED)
                check()
    finally:
        for part in parts.values():
            part.give_up()
    return {name: part.result for name, part in parts.items()}


class _Part:
    """One worker's actions of a run.

    Attributes:
        is_under_way: whether there is more to do.
        result: of the run, when it is over.
    """

    def __init__(self, worker: Worker, arguments: tuple[Any, ...]) -> None:
        self.is_under_way = True
        self.result: Any = None
        self._worker = worker
        self._actions = worker.running(*arguments)
        self.go_on()

    def awaited(self) -> list[Future[Any]]:
        """What the next action takes and is not there."""
        return self._worker.awaited()

    def go_on(self) -> None:
        """Does the next action, or what comes before the first or behind the last one."""
        try:
            next(self._actions)
        except StopIteration as end:
            self.result, self.is_under_way = end.value, False
        except Exception as error:
            self.result, self.is_under_way = self._worker.failure_of("run", error), False

    def give_up(self) -> None:
        """Nothing more is done."""
        self._actions.close()
