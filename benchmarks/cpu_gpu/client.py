"""One compressor's client: does so many steps for each number on its standard input, and says how long they took.

python -m benchmarks.cpu_gpu.client COMPRESSOR BATCH SIZE CHUNKS [--cpu]

A compressor is a spelling, or one for each of the two cuts with " then " between them; `chosen` is what the
planner chooses for each edge, from what it measures here first.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from benchmarks.gpus.contender import say
from benchmarks.gpus.tasks import LEARNING_RATE, MOMENTUM
from fxsplit.planning import Guard, Plan, Profile
from fxsplit.planning.calibration import WORKER

CUTS = ("features.0.2", "classifier")
"""The documents' sandwich: the client has the first convolution and the classifier."""


CHOSEN = "chosen"
"""Stands for the planner's choice."""

GUARDED = ("fp16", "uniform8", "fastquant8")
"""What it may choose from, beside none."""


def chosen(model: nn.Module, x: Tensor, server: str, chunks: int) -> Plan:
    """The plan with the same cuts, from measured nodes, compressors and links."""
    costs = fxsplit.analyze(fxsplit.trace(model, x[:2], cuts=CUTS, verify=False), x)
    common: dict[str, Any] = {"chunks": chunks, "compressors": GUARDED, "repeats": 3}
    measured = {
        "cpu": fxsplit.calibrate(model, x, "cpu", **common),
        server: fxsplit.calibrate(model, x, server.partition("/")[2], role=WORKER, **common),
    }
    profile = Profile.of(costs, measured, fxsplit.probe(["cpu", server]))
    found = fxsplit.plan(
        costs,
        ["cpu", server, "cpu"],
        cuts=CUTS,
        compressor="auto",
        guard=Guard(GUARDED),
        chunks=chunks,
        profile=profile,
    )
    print(found, file=sys.stderr)
    return found


def main(codec: str, batch: int, size: int, chunks: int, server: str) -> None:
    """Trains until standard input ends."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(num_classes=10).train()
    x, y = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    options: dict[str, Any] = {"example_inputs": x[: max(2, chunks)], "verify": False}
    if codec == CHOSEN:
        options["plan"] = chosen(model, x, server, chunks)
    else:
        codecs = codec.split(" then ")
        options |= {"cuts": CUTS, "chunks": chunks, "compressor": codecs if len(codecs) > 1 else codec}
    with fxsplit.compile(model, ["cpu", server, "cpu"], **options) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM)
        say(ready=True)
        for line in sys.stdin:
            pipe.metrics.reset()
            start = time.perf_counter()
            for _ in range(int(line)):
                optimizer.zero_grad()
                loss = pipe.step(x, target=y, loss_fn=F.cross_entropy, return_output=False).loss
                optimizer.step()
            loss.item()
            seconds, times = time.perf_counter() - start, pipe.metrics.workers
            per = 1.0 / int(line)
            say(
                seconds=seconds,
                queued_s=seconds,
                steps=int(line),
                wire_bytes=pipe.metrics.wire_bytes * per,
                ratio=pipe.metrics.ratio,
                loss=loss.item(),
                encode_s={name: worker.encode_s * per for name, worker in times.items()},
                decode_s={name: worker.decode_s * per for name, worker in times.items()},
            )


if __name__ == "__main__":
    try:
        given = [value for value in sys.argv[1:] if not value.startswith("--")]
        where = "server/cpu" if "--cpu" in sys.argv else "server/cuda:0"
        main(given[0], int(given[1]), int(given[2]), int(given[3]), where)
    except BaseException as error:
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        say(error=f"{type(error).__name__}: {first}"[:300])
        sys.stdout.flush()
        os._exit(1)
