"""The command line: `python -m benchmarks.overhead`."""

from __future__ import annotations

import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.machine import machine
from benchmarks.overhead.contender import Case, stage_seconds
from benchmarks.overhead.on_gpus import stage_seconds as gpu_stage_seconds
from benchmarks.readme import fill

README = Path(__file__).parent / "README.md"
KINDS = {"rpc": "rpc", "in_process": "in process", "peer": "torch.distributed.pipelining"}
GPU_KINDS = {"graphs": "CUDA graphs", "in_process": "no graphs", "peer": "torch.distributed.pipelining"}
WIDTHS = {"next to none": (16, 2), "real": (512, 2)}
"""Of the linear layers, and samples of a micro-batch."""
GPU_WIDTHS = {"next to none": (16, 2), "real": (8192, 512)}
WARM_UP = 5


def main(
    chunks: Annotated[int, typer.Option(min=2, help="Micro-batches of a step.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a turn.")] = 10,
    on_gpus: Annotated[bool, typer.Option("--cuda", help="A stage a GPU, all of fxsplit in one process.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Put the table into the README here.")] = False,
    readme: Annotated[Path, typer.Option(help="Another one, which has the same marks.")] = README,
) -> None:
    """Measure what a micro-batch costs beside its computation, fxsplit and its peer in turns."""
    torch.set_num_threads(1)
    kinds = GPU_KINDS if on_gpus else KINDS
    lines = [
        f"| stages | computation | | {' | '.join(kinds.values())} | of it computation |",
        f"|---:|---|---|{'---:|' * (len(kinds) + 1)}",
    ]
    for stages in (2,) if on_gpus else (2, 3):
        for name, (width, samples) in (GPU_WIDTHS if on_gpus else WIDTHS).items():
            for trains in (False, True):
                case = Case(stages, chunks, width, trains, samples, on_gpus)
                computed_s = bound_s(gpu_stage_seconds(case) if on_gpus else stage_seconds(case), chunks)
                contested = contest(case, kinds, rounds, steps)
                cells = [cell(seconds, computed_s, chunks) for seconds in contested.values()]
                what = "training" if trains else "forward"
                row = [str(stages), name, what, *cells, f"{computed_s / chunks * 1e3:.2f}"]
                lines.append(f"| {' | '.join(row)} |")
                print(lines[-1], flush=True)
    turns = f"{rounds} turns of {steps} steps each, {chunks} chunks"
    head = f"{datetime.date.today().isoformat()}, {machine()}; {turns}."
    if update:
        fill(readme, "on GPUs" if on_gpus else "results", "\n".join([head, "", *lines]))
    else:
        print(head)


def bound_s(seconds: list[float], chunks: int) -> float:
    """Seconds that a step computes at least: its longest stage, and what the others do before and after it."""
    longest = max(seconds)
    return longest + (sum(seconds) - longest) / chunks


def cell(seconds: list[float], computed_s: float, chunks: int) -> str:
    """Milliseconds a micro-batch beside the computation: median, and from the first to the ninth decile."""
    found = sorted((each - computed_s) / chunks * 1e3 for each in seconds)
    low, *_, high = statistics.quantiles(found, n=10)
    return f"{statistics.median(found):.2f} ({low:.2f} - {high:.2f})"


def contest(case: Case, kinds: Iterable[str], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of the steps of each contender, which take turns."""
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    with ExitStack() as stack:
        contenders = {kind: stack.enter_context(running(kind, case)) for kind in kinds}
        for processes in contenders.values():
            ask(processes, WARM_UP)
        for _ in range(rounds):
            for kind, processes in contenders.items():
                found[kind] += ask(processes, steps)
    return found


@contextmanager
def running(kind: str, case: Case) -> Iterator[list[subprocess.Popen[str]]]:
    """A contender's processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks: list[list[str]] = [[str(rank)] for rank in range(case.stages)] if kind == "peer" else [[]]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.overhead.contender", kind, case.spell(), str(port), *rank],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in ranks
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ask(processes: list[subprocess.Popen[str]], steps: int) -> list[float]:
    """Has a contender do some steps; the seconds of each."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    output = processes[0].stdout
    assert output is not None
    line = output.readline()
    if not line:
        raise RuntimeError(f"a contender ended with status {processes[0].wait()}")
    seconds: list[float] = json.loads(line)
    return seconds


if __name__ == "__main__":
    typer.run(main)
