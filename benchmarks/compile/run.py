"""How long it takes to compile a model and to start workers: medians and spread of several runs.

python benchmarks/compile/run.py
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
import typer
from rich.console import Console
from rich.table import Table

import fxsplit
from fxsplit.opening import trace_for_planning
from fxsplit.trace import Arguments
from fxsplit.verify_split import verify_split

CUTS = ["features.0.2", "classifier"]
SANDWICH = ["cpu", "server/cpu", "cpu"]
CHAIN = ["cpu", "one/cpu", "two/cpu"]


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    """Wall-clock seconds of each of several runs, after one that is not counted."""
    run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def compile_only(model: torch.nn.Module, x: torch.Tensor, cuts: list[str] | None) -> None:
    """Trace, verify, plan, rewrite and split, with no worker process."""
    traced = trace_for_planning(model, Arguments.of(x)) if cuts is None else fxsplit.trace(model, x, cuts=cuts)
    plan = fxsplit.plan(fxsplit.analyze(traced, x), SANDWICH, cuts=cuts, compressor="sortquant8")
    rewritten = fxsplit.rewrite(traced, plan)
    verify_split(rewritten, 3, Arguments.of(x))
    fxsplit.split(rewritten, 3)


def start_workers(model: torch.nn.Module) -> None:
    """Two worker processes, started and ended; the model is compiled at a first call that does not come."""
    with fxsplit.compile(model, CHAIN, cuts=CUTS):
        pass


def main(repeats: int = 5, threads: int = 1) -> None:
    """Prints the table."""
    torch.set_num_threads(threads)
    model = torchvision.models.mobilenet_v2()
    x = torch.randn(16, 3, 224, 224)
    rows: dict[str, Callable[[], Any]] = {
        "trace and verify, MobileNetV2 at 224": lambda: fxsplit.trace(model, x, cuts=CUTS),
        "compile, cuts given": lambda: compile_only(model, x, CUTS),
        "compile, cuts chosen": lambda: compile_only(model, x, None),
        "start and end two workers": lambda: start_workers(model),
    }
    table = Table(title=f"torch {torch.__version__}, {threads} thread(s), {platform.machine()}, {repeats} runs")
    for column in ("what", "median s", "least s", "most s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, run in rows.items():
        found = seconds(run, repeats)
        table.add_row(name, *(f"{f(found):.2f}" for f in (statistics.median, min, max)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
