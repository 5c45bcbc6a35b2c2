"""The client: a step for each line on its standard input, and one JSON line for it."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import torch
import typer

import fxsplit
from benchmarks.prediction.tasks import task
from benchmarks.two_machines.hosts import ADDRESSES
from fxsplit.commands.bench import mean_square
from fxsplit.planning import Plan


def main(name: str, plan: Path, port: int) -> None:
    """Trains by a saved plan; a worker called `server` joins if the plan has a place for it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen, found = Plan.load(plan), task(name)
    inputs = found.batch if isinstance(found.batch, dict) else {}
    args = () if inputs else (found.batch,)
    joins = any("/" in device for device in chosen.devices)
    with fxsplit.compile(
        found.model,
        chosen.devices,
        plan=chosen,
        example_inputs=found.batch,
        verify=False,
        listen=f"{ADDRESSES[0]}:{port}" if joins else None,
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-6)
        for _ in sys.stdin:
            optimizer.zero_grad()
            start = time.perf_counter()
            pipe.step(*args, **inputs, loss_fn=mean_square, return_output=False)
            seconds = time.perf_counter() - start
            optimizer.step()
            print(json.dumps({"step_s": seconds}), flush=True)


if __name__ == "__main__":
    typer.run(main)
