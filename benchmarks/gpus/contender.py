"""One contender's process: does so many steps for each number on its standard input, and says how long they took.

    python -m benchmarks.gpus.contender TASK CONTENDER [RANK PORT] [--blocks=SECONDS,...] [--cpu]

A line of its output that counts begins with `RESULT` and goes on in JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fxsplit

from .balance import block_seconds, fastest_cuts
from .contenders import Contender
from .tasks import LEARNING_RATE, MOMENTUM, TASKS, Task

Step = Callable[[], None]


def say(**what: Any) -> None:
    """One line for the parent."""
    print("RESULT", json.dumps(what), flush=True)


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)


def plain_step(model: Any, inputs: dict[str, Tensor], target: Tensor, loss_fn: Any) -> Step:
    """A training step of one process."""
    optimizer = optimizer_of(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(**inputs), target).backward()
        optimizer.step()

    return step


def single(task: Task, device: torch.device) -> Step:
    """The whole batch on one GPU."""
    inputs = {name: value.to(device) for name, value in task.inputs.items()}
    return plain_step(task.model.to(device), inputs, task.target.to(device), task.loss)


def ddp(task: Task, device: torch.device, rank: int) -> Step:
    """Half of the batch on each of two GPUs, gradients averaged by NCCL."""
    inputs = {name: value.chunk(2)[rank].to(device) for name, value in task.inputs.items()}
    ids = [device.index] if device.type == "cuda" else None
    model = torch.nn.parallel.DistributedDataParallel(task.model.to(device), device_ids=ids)
    return plain_step(model, inputs, task.target.chunk(2)[rank].to(device), task.loss)


def peer(task: Task, contender: Contender, device: torch.device, rank: int) -> Step:
    """`torch.distributed.pipelining` with a stage on each of two GPUs."""
    from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline

    chunks = contender.chunks
    cut = task.blocks[len(task.blocks) // 2] if len(task.blocks) < 12 else task.blocks[3]
    example = tuple(value[: len(value) // chunks] for value in task.inputs.values())
    pipe = pipeline(task.model, mb_args=example, split_spec={cut: SplitPoint.BEGINNING})
    stage = pipe.build_stage(rank, device)
    optimizer = optimizer_of(stage.submod.parameters())
    kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[contender.schedule]
    schedule = kind(stage, chunks, loss_fn=task.loss)
    inputs = tuple(value.to(device) for value in task.inputs.values())
    target = task.target.to(device)

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(*inputs)
        else:
            schedule.step(target=target, losses=[])
        optimizer.step()

    return step


def pipeline_of_fxsplit(
    task: Task, contender: Contender, devices: list[str], seconds: list[tuple[float, float]], stack: ExitStack
) -> Step:
    """fxsplit, all in one process: its client drives the first GPU, a worker thread the second.

    With replicas the client computes nothing, and each GPU has a worker.
    """
    home = torch.device(devices[0])
    places = [devices[i % len(devices)] for i in range(contender.stages)]
    cuts = fastest_cuts(task.blocks, seconds, contender.stages, contender.chunks, contender.schedule)
    if contender.replicas > 1:
        each = [devices[i % len(devices)].rpartition("/")[2] for i in range(contender.replicas)]
        places, cuts = [devices[0], "+".join(f"replica{i}/{one}" for i, one in enumerate(each))], [task.first]
    inputs: dict[str, Any] = {name: value.to(home) for name, value in task.inputs.items()}
    target = task.target.to(home)
    pipe = stack.enter_context(
        fxsplit.compile(
            task.model.to(home),
            places,
            cuts=cuts,
            chunks=contender.chunks,
            schedule=contender.schedule,
            transport=contender.transport,
            cuda_graphs=contender.cuda_graphs,
            example_inputs={name: value[: max(2, contender.chunks)] for name, value in inputs.items()},
            verify=False,
        )
    )
    optimizer = pipe.optimizer(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM)
    say(cuts=cuts)

    def run() -> None:
        optimizer.zero_grad()
        pipe.step(**inputs, target=target, loss_fn=task.loss, return_output=False)
        optimizer.step()

    return run


def serve(step: Step, rank: int | None, has_gpus: bool) -> None:
    """Does what is asked for until standard input ends."""

    def settle() -> None:
        for index in range(torch.cuda.device_count() if has_gpus else 0):
            torch.cuda.synchronize(index)
        if rank is not None:
            dist.barrier()
            if has_gpus:
                torch.cuda.synchronize()

    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "trace":
            profile(step, settle, rest)
            say(trace=rest)
            continue
        settle()
        start = time.perf_counter()
        for _ in range(int(word)):
            step()
        queued = time.perf_counter()
        settle()
        say(seconds=time.perf_counter() - start, queued_s=queued - start, steps=int(word))


def profile(step: Step, settle: Step, path: str) -> None:
    """Writes what kernels ran when in three steps, for Perfetto."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    settle()
    with profiling(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            step()
        settle()
    found.export_chrome_trace(path)


def main(
    name: str,
    described: str,
    place: Sequence[int],
    has_gpus: bool = True,
    seconds: Sequence[tuple[float, float]] = (),
) -> None:
    """Sets up, says so, and serves."""
    warnings.simplefilter("ignore")
    contender = Contender.parse(described)
    rank, port = place if place else (None, 0)
    devices = ["cuda:0", "cuda:1"] if has_gpus else ["cpu", "other/cpu"]
    device = torch.device(devices[rank or 0].rpartition("/")[2])
    if has_gpus:
        torch.cuda.set_device(device)
    with ExitStack() as stack:
        if rank is not None:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            ours: dict[str, Any] = {"device_id": device} if has_gpus else {}
            dist.init_process_group("nccl" if has_gpus else "gloo", rank=rank, world_size=2, **ours)
        task = TASKS[name]()
        if contender.kind == "blocks":
            say(blocks=block_seconds(task, device))
            return
        if contender.kind == "single":
            step = single(task, device)
        elif contender.kind == "ddp":
            step = ddp(task, device, rank or 0)
        elif contender.kind == "torch":
            step = peer(task, contender, device, rank or 0)
        else:
            step = pipeline_of_fxsplit(task, contender, devices, list(seconds), stack)
        say(ready=True)
        serve(step, rank, has_gpus)


if __name__ == "__main__":
    try:
        given = sys.argv[1:]
        numbers = [int(value) for value in given[2:4] if value.isdigit()]
        measured = [flag.removeprefix("--blocks=") for flag in given if flag.startswith("--blocks=")]
        pairs = [part.split(":") for part in measured[0].split(",")] if measured else []
        seconds = [(float(forward), float(backward)) for forward, backward in pairs]
        main(given[0], given[1], numbers, has_gpus="--cpu" not in given, seconds=seconds)
    except BaseException as error:
        traceback.print_exc()
        last = str(error).strip().partition("\n")[0]
        say(error=f"{type(error).__name__}: {last}"[:300])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a peer that waits for this one must not keep it
    os._exit(0)
