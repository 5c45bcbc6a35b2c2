"""One contender: does so many steps for each line on its standard input and prints one JSON line for it.

    python -m benchmarks.overhead.contender KIND STAGES CHUNKS WIDTH TRAINS PORT [RANK]

KIND is a transport of fxsplit, or "peer", of which there is a process a stage.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit

SAMPLES = 2
"""Of a micro-batch."""


def model_of(stages: int, width: int) -> nn.Sequential:
    """One linear layer and one activation a stage."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(stages)))


def batch_of(chunks: int, width: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [chunks * SAMPLES, width]."""
    return torch.randn(chunks * SAMPLES, width), torch.randn(chunks * SAMPLES, width)


def stage_seconds(stages: int, chunks: int, width: int, trains: bool) -> list[float]:
    """What each stage computes for one batch, run alone and one micro-batch after another; least of some tries."""
    model, (x, y) = model_of(stages, width), batch_of(chunks, width)
    best = [float("inf")] * stages
    for _ in range(20):
        seconds = [0.0] * stages
        for row, target in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
            _one(model, row, target, trains, seconds)
        best = [min(pair) for pair in zip(best, seconds, strict=True)]
    return best


def _one(model: nn.Sequential, row: Tensor, target: Tensor, trains: bool, seconds: list[float]) -> None:
    """Forward and backward of a micro-batch, stage by stage; adds each one's seconds."""
    kept = []
    value = row
    for number, stage in enumerate(model):
        start = time.perf_counter()
        with torch.set_grad_enabled(trains):
            given = value.detach().requires_grad_(trains and number > 0)
            value = stage(given)
        seconds[number] += time.perf_counter() - start
        kept.append((given, value))
    if not trains:
        return
    start = time.perf_counter()
    given = value.detach().requires_grad_()
    (F.mse_loss(given, target) * 0.5).backward()
    seconds[-1] += time.perf_counter() - start
    gradient = given.grad
    for number in reversed(range(len(kept))):
        start = time.perf_counter()
        entered, left = kept[number]
        left.backward(gradient)
        gradient = entered.grad
        seconds[number] += time.perf_counter() - start


def of_fxsplit(kind: str, stages: int, chunks: int, width: int, trains: bool) -> Callable[[], Any]:
    """A step of fxsplit over a transport."""
    x, y = batch_of(chunks, width)
    pipe = fxsplit.compile(
        model_of(stages, width),
        ["cpu", *(f"w{number}/cpu" for number in range(1, stages))],
        cuts=[str(number) for number in range(1, stages)],
        chunks=chunks,
        schedule="1f1b" if trains else "gpipe",
        transport=kind,
        example_inputs=x,
        verify=False,
    )

    def step() -> None:
        if trains:
            pipe.step(x, target=y, loss_fn=F.mse_loss, return_output=False)
        else:
            with torch.no_grad():
                pipe(x)

    return step


def of_peer(rank: int, stages: int, chunks: int, width: int, trains: bool, port: int) -> Callable[[], Any]:
    """The same with `torch.distributed.pipelining` over gloo."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=stages)
    x, y = batch_of(chunks, width)
    stage = PipelineStage(model_of(stages, width)[rank], rank, stages, torch.device("cpu"))
    if trains:
        schedule: Any = Schedule1F1B(stage, chunks, loss_fn=F.mse_loss)
    else:
        schedule = ScheduleGPipe(stage, chunks)

    def step() -> None:
        with torch.set_grad_enabled(trains):
            ends = {"target": y, "losses": []} if trains and rank == stages - 1 else {}
            run = schedule.step if trains else schedule.eval
            run(*([x] if rank == 0 else []), **ends)
        dist.barrier()

    return step


def main(kind: str, stages: int, chunks: int, width: int, trains: bool, port: int, rank: int) -> None:
    """Serves until standard input ends."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if kind == "peer":
        step = of_peer(rank, stages, chunks, width, trains, port)
    else:
        step = of_fxsplit(kind, stages, chunks, width, trains)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        if rank == 0:
            print(json.dumps(seconds), flush=True)
    os._exit(0)  # a peer's group would wait for the other ranks


if __name__ == "__main__":
    kind, *numbers = sys.argv[1:]
    stages, chunks, width, trains, port, *rank = map(int, numbers)
    main(kind, stages, chunks, width, bool(trains), port, rank[0] if rank else 0)
