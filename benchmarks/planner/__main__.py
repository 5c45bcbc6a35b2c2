"""Seconds of planning: real models after tracing, and chains of more and more nodes.

python -m benchmarks.planner
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
import transformers
from torch import nn

import fxsplit
from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.opening import trace_for_planning
from fxsplit.planning import Budget
from fxsplit.planning.explain import timeline_of
from fxsplit.spec import TensorSpec
from fxsplit.trace import Arguments

RUNS = 5
EIGHT = ["cpu", *(f"worker{index}/cpu" for index in range(1, 8))]
GUARD = fxsplit.Guard(("uniform8", "fastquant8", "sortquant8"))


def chain(count: int, seed: int = 0) -> CostTable:
    """A chain of nodes with random MACs and outputs, batch 64."""
    draw = random.Random(seed)
    specs = [TensorSpec((64, draw.randint(1, 10**4)), torch.float32) for _ in range(count + 1)]
    values = tuple(
        Value(f"n{index}" if index >= 0 else "x", index, (index + 1,), spec, index >= 0)
        for index, spec in enumerate(specs, -1)
    )
    nodes = tuple(
        NodeCost(f"n{index}", f"m{index}", "Linear", draw.randint(10**6, 10**8), values[index + 1].nbytes, 1000)
        for index in range(count)
    )
    return CostTable("Chain", "", 64, nodes, values, {f"m{index}": index for index in range(count)})


def seconds_of(work: Callable[[], Any]) -> tuple[float, float, float, Any]:
    """Median, least and most of several runs, after one that is not counted, and the last result."""
    found, result = [], work()
    for _ in range(RUNS):
        start = time.perf_counter()
        result = work()
        found.append(time.perf_counter() - start)
    return statistics.median(found), min(found), max(found), result


def models() -> list[tuple[str, nn.Module, Any]]:
    """The models of the targets, with a batch."""
    ids = torch.randint(5, 1000, (16, 128))
    roberta = transformers.RobertaForSequenceClassification(transformers.RobertaConfig())
    return [
        ("MobileNetV2, batch 64", torchvision.models.mobilenet_v2(), torch.empty(64, 3, 224, 224)),
        ("RoBERTa-base, batch 16", roberta, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
    ]


def main() -> None:
    """Prints both tables."""
    print("| model | devices | schedule | median s | least | most | optimal |\n|---|---|---|--:|--:|--:|---|")
    cases = [(["cpu", "server/cuda", "cpu"], "gpipe"), (["cpu", "server/cuda"], "gpipe"), (EIGHT, "gpipe")]
    for name, model, batch in models():
        small = {k: v[:2] for k, v in batch.items()} if isinstance(batch, dict) else torch.randn(2, 3, 224, 224)
        traced = trace_for_planning(model, Arguments.of(small), verify=False)
        start = time.perf_counter()
        costs = fxsplit.analyze(traced, batch)
        analyzed = time.perf_counter() - start
        others = [(cases[0][0], each) for each in ("interleaved", "zero-bubble", "auto")]
        for devices, schedule in [*cases, *others]:
            options: dict[str, Any] = {
                "compressor": "auto",
                "guard": GUARD,
                "chunks": "auto",
                "schedule": schedule,
            }
            if schedule != "gpipe":
                options["chunks"] = 4
            budget = Budget(bandwidth="200Mbit/s")
            median, least, most, plan = seconds_of(
                lambda c=costs, d=devices, o=options, b=budget: fxsplit.plan(c, d, **o, budget=b)  # type: ignore[misc]
            )
            optimal = "yes" if plan.is_optimal else f"within {plan.gap:.1%}"
            where = " ".join(devices) if len(devices) < 4 else f"{len(devices)} workers"
            print(
                f"| {name} | {where} | {schedule} | {median:.3f} | {least:.3f} | {most:.3f} | {optimal} |",
                flush=True,
            )
        print(f"| {name} | analysis before it | | {analyzed:.3f} | | | |")
    print("\n| nodes | median s | least | most | microseconds a node | optimal |\n|--:|--:|--:|--:|--:|---|")
    for count in (1_000, 3_000, 10_000, 30_000, 100_000):
        costs = chain(count)
        median, least, most, plan = seconds_of(
            lambda c=costs: fxsplit.plan(c, EIGHT, chunks=8)  # type: ignore[misc]
        )
        optimal = "yes" if plan.is_optimal else f"within {plan.gap:.1%}"
        row = f"{count} | {median:.2f} | {least:.2f} | {most:.2f} | {1e6 * median / count:.0f} | {optimal}"
        print(f"| {row} |", flush=True)
    print("\n| devices | nodes | micro-batches | plan s | simulation s | predicted step s |")
    print("|--:|--:|--:|--:|--:|--:|")
    for count in (10, 100, 1000):
        print(f"| {many_devices(count)} |", flush=True)


def many_devices(count: int, chunks: int = 64) -> str:
    """A chain of twice as many nodes over machines that are not there: planned, and its step simulated, once."""
    costs, devices = chain(2 * count), ["cpu", *(f"worker{index}/cuda" for index in range(1, count))]
    start = time.perf_counter()
    plan = fxsplit.plan(costs, devices, chunks=chunks)
    planned = time.perf_counter()
    step_s = timeline_of(plan).step_s
    simulated = time.perf_counter()
    return f"{count} | {2 * count} | {chunks} | {planned - start:.2f} | {simulated - planned:.2f} | {step_s:.3f}"


if __name__ == "__main__":
    main()
