"""Where to cut a chain of blocks so that a step is as short as its simulation says it can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise, product

import torch
from torch import Tensor, nn

from fxsplit.schedules import StageTimes, Times, schedule, simulate

from .tasks import Task

WEIGHT_SHARE = 0.3
"""Of a backward what gradients of weights take, where it is in two parts: a guess for both kinds of models."""


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


def block_seconds(task: Task, device: torch.device, repeats: int = 3) -> list[tuple[float, float]]:
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
    found: list[list[tuple[float, float]]] = []
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
            forwards = [a.elapsed_time(b) / 1e3 for a, b in pairwise(there)]
            backwards = [b.elapsed_time(a) / 1e3 for a, b in pairwise(back)]
            found.append(list(zip(forwards, backwards, strict=True)))
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return [min(values, key=sum) for values in zip(*found[1:], strict=True)]


def fastest_cuts(
    blocks: Sequence[str],
    seconds: Sequence[tuple[float, float]],
    stages: int,
    chunks: int,
    schedule_name: str,
    devices: int = 2,
) -> list[str]:
    """The modules at which the stages but the first begin.

    From equally long stages on, one cut or two are moved by a block as long as the simulated step gets shorter: a
    first and a last stage that are shorter than the others fill and drain a pipeline sooner.

    Args:
        blocks: where a stage may begin.
        seconds: of the parts between them, forward and backward; none: as if all took equally long.
        stages: at most one more than there are blocks; dealt out to the devices in turn.
        chunks: micro-batches.
        schedule_name: of fxsplit.
        devices: how many.
    """
    parts = list(seconds) or [(1.0, 2.0)] * (len(blocks) + 1)
    workers = [f"worker {stage % devices}" for stage in range(stages)]

    def step_s(cuts: Sequence[int]) -> float:
        times = Times(tuple(_stage(parts[a:b]) for a, b in pairwise([0, *cuts, len(parts)])))
        return simulate(schedule(schedule_name).orders(workers, chunks, times), workers, times).step_s

    best = partition([sum(part) for part in parts], stages)
    best_s = step_s(best)
    while True:
        found_s, found = min(((step_s(cuts), cuts) for cuts in _near(best, len(parts))), default=(best_s, best))
        if found_s >= best_s:
            return [blocks[first - 1] for first in best]
        best_s, best = found_s, found


def _stage(parts: Sequence[tuple[float, float]]) -> StageTimes:
    forward_s, backward_s = (sum(column) for column in zip(*parts, strict=True))
    return StageTimes(forward_s, backward_s * (1.0 - WEIGHT_SHARE), backward_s * WEIGHT_SHARE)


def _near(cuts: Sequence[int], count: int) -> Iterator[list[int]]:
    """Cuts of which one or two are moved by one."""
    indices = range(len(cuts))
    for moved in [*combinations(indices, 1), *combinations(indices, 2)]:
        for steps in product((-1, 1), repeat=len(moved)):
            near = list(cuts)
            for index, by in zip(moved, steps, strict=True):
                near[index] += by
            if all(a < b for a, b in pairwise([0, *near, count])):
                yield near
