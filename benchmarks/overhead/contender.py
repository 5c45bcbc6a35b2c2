"""One contender: does so many steps for each line on its standard input and prints one JSON line for it.

    python -m benchmarks.overhead.contender KIND CASE PORT [RANK]

KIND is a transport of fxsplit, "graphs" (in process, with CUDA graphs), or "peer", which is a process a stage.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        stages: one a worker; on GPUs, which are taken in turn.
        chunks: micro-batches of a step.
        width: of a stage's linear layer.
        trains: whether there are backwards.
        samples: of a micro-batch.
        on_gpus: where it is run.
    """

    stages: int
    chunks: int
    width: int
    trains: bool
    samples: int = 2
    on_gpus: bool = False

    def devices(self, named: bool = True) -> list[str]:
        """Of each stage, with the workers' names or without."""
        count = max(torch.cuda.device_count(), 1)
        bare = [f"cuda:{i % count}" if self.on_gpus else "cpu" for i in range(self.stages)]
        return [f"w{i}/{device}" if named and i else device for i, device in enumerate(bare)]

    def spell(self) -> str:
        """As one word."""
        return ",".join(str(int(value)) for value in astuple(self))

    @classmethod
    def parse(cls, text: str) -> Case:
        """What `spell` wrote."""
        stages, chunks, width, trains, samples, on_gpus = map(int, text.split(","))
        return cls(stages, chunks, width, bool(trains), samples, bool(on_gpus))


def model_of(case: Case) -> nn.Sequential:
    """One linear layer and one activation a stage."""
    torch.manual_seed(0)
    width = case.width
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(case.stages)))


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    """Inputs and targets [samples of a batch, width]."""
    shape = case.chunks * case.samples, case.width
    return torch.randn(shape), torch.randn(shape)


def stage_seconds(case: Case) -> list[float]:
    """What each stage computes for one batch, run alone and one micro-batch after another; least of some tries."""
    model, (x, y) = model_of(case), batch_of(case)
    best = [float("inf")] * case.stages
    for _ in range(20):
        seconds = [0.0] * case.stages
        for row, target in zip(x.chunk(case.chunks), y.chunk(case.chunks), strict=True):
            _one(model, row, target, case.trains, seconds)
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


def of_fxsplit(kind: str, case: Case) -> Callable[[], Any]:
    """A step of fxsplit over a transport."""
    devices = case.devices()
    x, y = (tensor.to(devices[0]) for tensor in batch_of(case))
    pipe = fxsplit.compile(
        model_of(case).to(devices[0]),
        devices,
        cuts=[str(number) for number in range(1, case.stages)],
        chunks=case.chunks,
        schedule="1f1b" if case.trains else "gpipe",
        transport="in_process" if kind == "graphs" else kind,
        cuda_graphs=kind == "graphs",
        example_inputs=x,
        verify=False,
    )

    def step() -> None:
        if case.trains:
            pipe.step(x, target=y, loss_fn=F.mse_loss, return_output=False)
        else:
            with torch.no_grad():
                pipe(x)

    return step


def of_peer(rank: int, case: Case, port: int) -> Callable[[], Any]:
    """The same with `torch.distributed.pipelining` over gloo or NCCL."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    device = torch.device(case.devices(named=False)[rank])
    ours: dict[str, Any] = {"device_id": device} if case.on_gpus else {}
    dist.init_process_group("nccl" if case.on_gpus else "gloo", rank=rank, world_size=case.stages, **ours)
    if case.on_gpus:
        torch.cuda.set_device(device)
    x, y = (tensor.to(device) for tensor in batch_of(case))
    stage = PipelineStage(model_of(case)[rank].to(device), rank, case.stages, device)
    if case.trains:
        schedule: Any = Schedule1F1B(stage, case.chunks, loss_fn=F.mse_loss)
    else:
        schedule = ScheduleGPipe(stage, case.chunks)

    def step() -> None:
        with torch.set_grad_enabled(case.trains):
            ends = {"target": y, "losses": []} if case.trains and rank == case.stages - 1 else {}
            run = schedule.step if case.trains else schedule.eval
            run(*([x] if rank == 0 else []), **ends)
        if not case.on_gpus:
            dist.barrier()

    return step


def main(kind: str, case: Case, port: int, rank: int) -> None:
    """Serves until standard input ends."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    step = of_peer(rank, case, port) if kind == "peer" else of_fxsplit(kind, case)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            for index in range(torch.cuda.device_count() if case.on_gpus else 0):
                torch.cuda.synchronize(index)
            seconds.append(time.perf_counter() - start)
        if rank == 0:
            print(json.dumps(seconds), flush=True)
    os._exit(0)  # a peer's group would wait for the other ranks


if __name__ == "__main__":
    kind, spelled, port, *rank = sys.argv[1:]
    main(kind, Case.parse(spelled), int(port), int(rank[0]) if rank else 0)
