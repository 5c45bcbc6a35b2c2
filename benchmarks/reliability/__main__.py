"""The command line: `python -m benchmarks.reliability workers`, `clients`, `soak`, `intruders` or `overhead`."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.machine import machine

from .intruders import intruders as run_intruders
from .kills import kill_clients, kill_workers
from .overhead import PARTS
from .overhead import overhead as run_overhead
from .soak import soak as run_soak

RESULTS = Path(__file__).parent / "results.json"

app = typer.Typer(add_completion=False)


def _note(name: str, result: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[name] = {**result, "date": datetime.date.today().isoformat(), "machine": machine()}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(result, indent=1))


@app.command()
def workers(kills: Annotated[int, typer.Option(min=1, help="How many workers are killed.")] = 30) -> None:
    """Kill workers at every kind of moment."""
    _note("workers", kill_workers(kills))


@app.command()
def clients(kills: Annotated[int, typer.Option(min=1, help="How often the client is killed.")] = 20) -> None:
    """Kill the client, and run it again."""
    _note("clients", kill_clients(kills))


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30.0,
    every: Annotated[float, typer.Option(min=1.0, metavar="SECONDS", help="Between two faults.")] = 20.0,
) -> None:
    """Train with random faults."""
    _note("soak", run_soak(minutes, every))


@app.command()
def intruders(steps: Annotated[int, typer.Option(min=144, help="Steps of the training.")] = 480) -> None:
    """Train while strangers connect to every port."""
    _note("intruders", run_intruders(steps))


@app.command()
def overhead(
    steps: Annotated[int, typer.Option(min=40, help="Steps of the training.")] = 400,
    part: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
) -> None:
    """Measure what checksums, transactions and snapshots cost."""
    parts = tuple(part or PARTS)
    if unknown := [name for name in parts if name not in PARTS]:
        raise typer.BadParameter(f"{unknown[0]}: one of {', '.join(PARTS)}", param_hint="--part")
    _note(
        "overhead" if set(parts) == set(PARTS) else f"overhead, {' and '.join(parts)}", run_overhead(steps, parts)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
