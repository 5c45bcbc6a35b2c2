"""Runs side by side, each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from .configs import Config
from .train import Settings, run

RESULTS = "results.jsonl"
IDENTITY = ("config", "seed", "activation", "gradient", "cuts")
"""Fields that tell the rows of one protocol apart."""


@dataclass(frozen=True)
class Job:
    """A configuration and a seed."""

    config: Config
    seed: int


@dataclass(frozen=True)
class Ended:
    """A run that is over.

    Attributes:
        job: which.
        row: what was found; None if there is nothing.
        reason: then why.
    """

    job: Job
    row: dict[str, Any] | None
    reason: str = ""


@dataclass
class _Child:
    job: Job
    process: BaseProcess
    pipe: Connection
    started: float
    gpu: int | None


def jobs_of(configs: Sequence[Config], seeds: Sequence[int]) -> list[Job]:
    """Seed by seed, so that a time limit leaves whole seeds."""
    return [Job(config, seed) for seed in seeds for config in configs]


def identity(row: dict[str, Any], settings: Settings | None = None) -> str:
    """What makes two rows results of the same run, and with settings also of the same protocol."""
    protocol = {name: row.get(name) for name in settings.protocol()} if settings else {}
    return json.dumps([*(row.get(name) for name in IDENTITY), protocol], sort_keys=True)


def without_done(jobs: Sequence[Job], rows: Sequence[dict[str, Any]], settings: Settings) -> list[Job]:
    """The jobs that have no row yet."""
    done = {identity(row, settings) for row in rows}
    return [job for job in jobs if identity(_promised(job, settings), settings) not in done]


def _promised(job: Job, settings: Settings) -> dict[str, Any]:
    activation, gradient = job.config.codecs()
    named = {"config": job.config.name, "seed": job.seed, "activation": activation, "gradient": gradient}
    return {**named, "cuts": list(job.config.cuts), **settings.protocol()}


def run_all(
    jobs: Sequence[Job], settings: Settings, workers: int, limit_s: float | None = None, gpus: int = 0
) -> Iterator[Ended]:
    """Yields each run as it ends; processes have their own memory of the device and few threads.

    Args:
        jobs: in the order in which they begin.
        settings: of all.
        workers: runs at a time.
        limit_s: seconds after which what is not over is ended. No run begins that would not be over by then, if
            it took as long as the quickest so far.
        gpus: how many there are; a run gets the one that the fewest others use. 0: runs see what there is.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.train"])
    waiting, running, quickest = list(reversed(jobs)), list[_Child](), 0.0
    end = time.monotonic() + limit_s if limit_s is not None else None
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop()
                if end is not None and time.monotonic() + quickest > end:
                    yield Ended(job, None, "not begun: too little time is left")
                else:
                    running.append(_start(context, job, settings, _free_gpu(running, gpus)))
            left = None if end is None else max(end - time.monotonic(), 0.0)
            ready = wait([child.pipe for child in running], left) if running else []
            for child in list(running):
                if child.pipe in ready:
                    running.remove(child)
                    ended = _receive(child)
                    if ended.row is not None:
                        taken = time.monotonic() - child.started
                        quickest = min(quickest, taken) if quickest else taken
                    yield ended
            if end is not None and time.monotonic() >= end:
                while running:
                    child = running.pop()
                    _kill(child)
                    yield Ended(child.job, None, "ended: the time is up")
    finally:
        for child in running:
            _kill(child)


def _free_gpu(running: Sequence[_Child], gpus: int) -> int | None:
    users = Counter(child.gpu for child in running)
    return min(range(gpus), key=lambda gpu: users[gpu], default=None)


def _start(context: Any, job: Job, settings: Settings, gpu: int | None) -> _Child:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, settings, sender, gpu), daemon=True)
    process.start()
    sender.close()
    return _Child(job, process, receiver, time.monotonic(), gpu)


def _work(job: Job, settings: Settings, sender: Connection, gpu: int | None) -> None:
    """In the child."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # before this process looks for devices
    try:
        sender.send(Ended(job, run(job.config, job.seed, settings)))
    except Exception:
        sender.send(Ended(job, None, traceback.format_exc()))
    sender.close()


def _receive(child: _Child) -> Ended:
    try:
        ended: Ended = child.pipe.recv()
    except EOFError:
        ended = Ended(child.job, None, "the process died")
    child.process.join()
    child.pipe.close()
    return ended


def _kill(child: _Child) -> None:
    child.process.kill()
    child.process.join()
    child.pipe.close()


# ---------------------------------------------------------------------- results


def append(folder: Path, row: dict[str, Any]) -> None:
    """Writes a row behind the others, as one line of JSON."""
    path = folder / RESULTS
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows; a line that was torn off is left out."""
    path, rows = folder / RESULTS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
