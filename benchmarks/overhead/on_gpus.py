"""What stages compute on a GPU, and nothing else: their kernels, replayed one behind the other."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .contender import Case, batch_of, model_of

REPEATS = 20


def stage_seconds(case: Case) -> list[float]:
    """What each stage computes for one batch; least of some tries.

    Forward and backward of a micro-batch are one CUDA graph, of which one is launched for each micro-batch: their
    kernels alone, without what the host needs to launch them one by one.

    Args:
        case: whose device is a GPU.
    """
    device = torch.device("cuda:0")
    model, (x, y) = model_of(case).to(device), (t.to(device) for t in batch_of(case))
    row, target = x.chunk(case.chunks)[0], y.chunk(case.chunks)[0]
    found = []
    for number, stage in enumerate(model):
        given = row.clone().requires_grad_(case.trains and number > 0)

        def work(
            stage: torch.nn.Module = stage, given: torch.Tensor = given, is_last: bool = stage is model[-1]
        ) -> None:
            with torch.set_grad_enabled(case.trains):
                left = stage(given)
                if case.trains:
                    (F.mse_loss(left, target) if is_last else left).backward(None if is_last else row)

        found.append(_replayed_s(work, case.chunks))
    return found


def _replayed_s(work: Callable[[], None], chunks: int) -> float:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries make their handles and plans
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    best = float("inf")
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(chunks):
            graph.replay()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
