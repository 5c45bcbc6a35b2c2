"""Where to cut a chain of blocks so that the stages take equally long."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from .tasks import Task


def partition(costs: Sequence[float], parts: int) -> list[int]:
    """The first block of each part but the first, so that the costliest part is as cheap as can be.

    Args:
        costs: of the blocks, in order.
        parts: at most as many as blocks.

    >>> partition([4.0, 1.0, 1.0, 2.0], 2)
    [1]
    """
    sums = [0.0, *accumulate(costs)]
    count = len(costs)
    best: list[list[tuple[float, int]]] = [[(sums[i], 0) for i in range(count + 1)]]
    for part in range(1, parts):
        row = []
        for end in range(count + 1):
            options = [(max(best[-1][cut][0], sums[end] - sums[cut]), cut) for cut in range(part, end)]
            row.append(min(options, default=(float("inf"), 0)))
        best.append(row)
    cuts: list[int] = []
    end = count
    for row in reversed(best[1:]):
        end = row[end][1]
        cuts.insert(0, end)
    return cuts


def block_seconds(task: Task, device: torch.device, repeats: int = 3) -> list[float]:
    """Seconds of each part of the model between two places for a cut, forward and backward, on a device.

    The parts are told apart by hooks on the blocks. A large batch is used, so that kernels are measured and not
    their launches.

    Args:
        task: the model is moved to the device.
        device: a CUDA device.
        repeats: of which the least counts.
    """
    model = task.model.to(device)
    inputs = {name: value.to(device) for name, value in task.inputs.items()}
    forward: list[torch.cuda.Event] = []
    backward: dict[int, torch.cuda.Event] = {}
    handles = []

    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def watch(index: int) -> None:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            forward.append(now())
            if args and args[0].requires_grad:
                args[0].register_hook(lambda _: backward.__setitem__(index, now()))

        handles.append(model.get_submodule(task.blocks[index]).register_forward_pre_hook(before))

    for index in range(len(task.blocks)):
        watch(index)
    found: list[list[float]] = []
    with torch.cuda.device(device):
        for _ in range(repeats + 1):
            forward.clear()
            backward.clear()
            start = now()
            loss = task.loss(model(**inputs), task.target.to(device))
            middle = now()
            loss.backward()
            end = now()
            torch.cuda.synchronize(device)
            there = [start, *forward, middle]
            back = [end, *(backward[i] for i in range(len(task.blocks))), middle]
            seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(there)]
            found.append([s + b.elapsed_time(a) / 1e3 for s, (a, b) in zip(seconds, pairwise(back), strict=True)])
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return [min(values) for values in zip(*found[1:], strict=True)]


def balanced_cuts(blocks: Sequence[str], seconds: Sequence[float], stages: int) -> list[str]:
    """The modules at which the stages but the first begin.

    Args:
        blocks: where one may begin.
        seconds: of the parts between them; none: as if all took equally long.
        stages: at most one more than there are blocks.
    """
    costs = list(seconds) or [1.0] * (len(blocks) + 1)
    return [blocks[first - 1] for first in partition(costs, stages)]
