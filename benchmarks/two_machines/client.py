"""The client of fxsplit: does a step for each line on its standard input and prints one JSON line for it."""

from __future__ import annotations

import json
import sys
import time
import warnings

import torch
import typer
from torch.nn import functional as F

import fxsplit
from benchmarks.two_machines.hosts import ADDRESSES, interface_bytes
from benchmarks.two_machines.task import CUT, LEARNING_RATE, MOMENTUM, Task


def main(
    codec: str = "none",
    chunks: int = 4,
    steps: int = 5,
    batch: int = 16,
    size: int = 224,
    schedule: str = "auto",
    port: int = 29612,
) -> None:
    """Trains some steps; the token is in the environment, the worker's name is `server`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    task = Task.make(batch, size)
    with fxsplit.compile(
        task.model,
        ["cpu", "server/cpu"],
        cuts=[CUT],
        chunks=chunks,
        compressor=codec,
        gradient_compressor="same",
        schedule=schedule,
        example_inputs=task.x,
        verify=False,
        listen=f"{ADDRESSES[0]}:{port}",
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM)
        for _ in range(steps):
            sys.stdin.readline()
            pipe.metrics.reset()
            before, start = interface_bytes(0), time.perf_counter()
            optimizer.zero_grad()
            pipe.step(task.x, target=task.y, loss_fn=F.cross_entropy)
            optimizer.step()
            seconds, after = time.perf_counter() - start, interface_bytes(0)
            line = {"step_s": seconds, "sent_bytes": after[0] - before[0], "received_bytes": after[1] - before[1]}
            for (source, _, _), traffic in pipe.metrics.links.items():
                name = "wire_out_bytes" if source == "client" else "wire_in_bytes"
                line[name] = line.get(name, 0) + traffic.wire_bytes
            for name, worker in pipe.metrics.workers.items():
                for what in ("compute_s", "encode_s", "decode_s", "wait_s"):
                    line[f"{name}_{what}"] = getattr(worker, what)
            line["server_weight_s"] = sum(
                span.seconds
                for name, spans in pipe.metrics.reports
                for span in spans
                if name == "server" and span.kind == "W"
            )
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    typer.run(main)
