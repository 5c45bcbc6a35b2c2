"""The command line: `python -m benchmarks.tracing`."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.readme import fill

from .growth import draw, growth_tables, growth_targets, measure_growth
from .memory import measure_memory, memory_tables, memory_targets
from .speed import measure_speed, speed_tables, speed_targets

README = Path(__file__).with_name("README.md")
PICTURE = README.with_name("growth.png")
SECTIONS = ("speed", "growth", "memory")


def main(
    only: Annotated[
        str, typer.Option(help=f"Some of {', '.join(SECTIONS)}, comma-separated; all if not given.")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, after one that is not counted.")] = 5,
    check: Annotated[bool, typer.Option("--check", help="Fail if a target is missed.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Put what was found into the README here.")] = False,
) -> None:
    """Measure what tracing costs, on one core and one thread, and print the tables."""
    chosen = only.split(",") if only else list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        raise typer.BadParameter(f"{', '.join(unknown)}: none of {', '.join(SECTIONS)}", param_hint="--only")
    warnings.filterwarnings("ignore")
    on_one_core()
    missed = []
    for name in chosen:
        tables, targets = measure_section(name, repeats, update)
        missed += [target for target, met in targets.items() if not met]
        lines = "\n".join(f"- {'met' if met else '**missed**'}: {target}" for target, met in targets.items())
        text = f"{_about()}\n\n{tables}\n\n{lines}"
        print(f"\n{text}", flush=True)
        if update:
            fill(README, name, text)
    if check:
        print(f"\n{len(missed)} targets missed" if missed else "\nall targets met")
        sys.exit(1 if missed else 0)


def on_one_core() -> None:
    """From here on this process, its threads and its children have one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def measure_section(name: str, repeats: int, update: bool) -> tuple[str, dict[str, bool]]:
    """A section's tables, and its targets with whether they were met."""
    if name == "speed":
        times = measure_speed(repeats)
        tables, targets = speed_tables(times), speed_targets(times)
    elif name == "growth":
        points = measure_growth(max(1, repeats - 2))
        tables, targets = growth_tables(points), growth_targets(points)
        if update:
            draw(points, PICTURE)
    else:
        peaks = measure_memory(max(1, repeats - 2))
        tables, targets = memory_tables(peaks), memory_targets(peaks)
    return tables, targets


def _about() -> str:
    versions = [f"{package} {version(package)}" for package in ("torch", "torchvision", "transformers")]
    return (
        f"{datetime.date.today().isoformat()}; one of {os.cpu_count()} cores, {platform.machine()}, no GPU; "
        f"Python {platform.python_version()}, {', '.join(versions)}; load average {os.getloadavg()[0]:.1f}."
    )


if __name__ == "__main__":
    typer.run(main)
