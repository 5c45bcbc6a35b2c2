"""The peer: the same training with `torch.distributed.pipelining` (GPipe over gloo), one process a host.

Rank 0 does a step for each line on its standard input and prints one JSON line for it.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist
import typer
from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline

from benchmarks.two_machines.hosts import ADDRESSES, INTERFACES, interface_bytes
from benchmarks.two_machines.task import CUT, LEARNING_RATE, MOMENTUM, Task


def main(rank: int, chunks: int = 4, steps: int = 5, batch: int = 16, size: int = 224, port: int = 29611) -> None:
    """Trains some steps as one of the two ranks."""
    os.environ.update(MASTER_ADDR=ADDRESSES[0], MASTER_PORT=str(port), GLOO_SOCKET_IFNAME=INTERFACES[rank])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    task = Task.make(batch, size)
    split = {CUT: SplitPoint.BEGINNING}
    pipe = pipeline(task.model, mb_args=(task.x[: batch // chunks],), split_spec=split)
    stage = pipe.build_stage(rank, torch.device("cpu"))
    optimizer = torch.optim.SGD(stage.submod.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    schedule = ScheduleGPipe(stage, chunks, loss_fn=torch.nn.functional.cross_entropy)
    for _ in range(steps):
        if rank == 0:
            sys.stdin.readline()  # the other rank waits for this one's first activation
        before, start = interface_bytes(rank), time.perf_counter()
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(task.x)
        else:
            schedule.step(target=task.y, losses=[])
        optimizer.step()
        dist.barrier()
        if rank == 0:
            seconds, after = time.perf_counter() - start, interface_bytes(rank)
            line = {"step_s": seconds, "sent_bytes": after[0] - before[0], "received_bytes": after[1] - before[1]}
            print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
