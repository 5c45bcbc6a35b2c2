"""The command line: `python -m benchmarks.coverage`."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .cases import GROUPS, Case
from .harness import CRITERIA, Outcome, Row
from .runner import load, run, save, worse

RESULTS = Path(__file__).with_name("results.json")
SIGNS = {
    Outcome.EXACT: "[green]✓[/]",
    Outcome.ABSENT: "[dim]–[/]",
    Outcome.REFUSED: "[yellow]refused[/]",
    Outcome.CRASHED: "[red]crash[/]",
    Outcome.WRONG: "[bold red]WRONG[/]",
}


def main(
    only: Annotated[str, typer.Option(help="Only cases with one of these, comma-separated, in their names.")] = "",
    group: Annotated[str, typer.Option(help=f"One of {', '.join(GROUPS)}; all if not given.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds a case may take.")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="Write the results there, as JSON.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if a row is worse than in the results of the repository.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the tracebacks of failures.")] = False,
) -> None:
    """Examine the models and print a table: one row a model, one column a criterion."""
    console = Console()
    if group and group not in GROUPS:
        raise typer.BadParameter(f"{group!r} is none of {', '.join(GROUPS)}", param_hint="--group")
    cases = [
        case
        for name, members in GROUPS.items()
        for case in members
        if group in ("", name) and any(part.lower() in case.name.lower() for part in only.split(","))
    ]
    rows = []
    for row in run(cases, jobs, limit):
        rows.append(row)
        console.print(f"{len(rows):3}/{len(cases)} {_line(row)}", highlight=False)
        if verbose:
            for letter, text in row.tracebacks.items():
                console.print(f"--- {row.name} {letter}\n{text}", markup=False, highlight=False)
    order = [case.name for case in cases]
    rows.sort(key=lambda row: order.index(row.name))
    console.print(_table(rows))
    console.print(summary(rows), highlight=False)
    if out is not None:
        save(out, rows, _about())
    if check:
        before = load(RESULTS)
        lines = [line for row in rows if row.name in before for line in worse(row, before[row.name])]
        console.print("\n".join(lines) or "no row got worse", markup=False, highlight=False)
        raise typer.Exit(1 if lines else 0)


def _line(row: Row) -> str:
    signs = " ".join(f"{letter}{SIGNS[row.outcomes[letter]]}" for letter in CRITERIA)
    return f"{row.name:36} {row.seconds:5.1f} s  {signs}"


def _table(rows: Sequence[Row]) -> Table:
    table = Table("model", "family", *CRITERIA, title="fxsplit against the unsplit model", title_justify="left")
    for row in rows:
        table.add_row(row.name, row.family, *(SIGNS[row.outcomes[letter]] for letter in CRITERIA))
    return table


def summary(rows: Sequence[Row]) -> str:
    """How many of the models each criterion holds for."""
    lines = [f"all criteria: {sum(row.passed for row in rows)} of {len(rows)} models"]
    for letter, what in CRITERIA.items():
        found = [row.outcomes[letter] for row in rows if row.outcomes[letter] is not Outcome.ABSENT]
        others = ", ".join(
            f"{found.count(o)} {o}" for o in (Outcome.REFUSED, Outcome.CRASHED, Outcome.WRONG) if o in found
        )
        lines.append(f"{letter} {what}: {found.count(Outcome.EXACT)} of {len(found)}" + (f" ({others})" if others else ""))
    exact = sum(row.gradients_exact for row in rows)
    return "\n".join([*lines, f"  gradients equal bit for bit: {exact} of {len(rows)}"])


def _about() -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "transformers")},
    }


if __name__ == "__main__":
    typer.run(main)
