"""The command line: `python -m benchmarks.coverage`."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .cases import GROUPS
from .harness import Row
from .report import failures, line, terminal_table, totals, update_readme
from .runner import load, run, save, worse

RESULTS = Path(__file__).with_name("results.json")


def main(
    only: Annotated[str, typer.Option(help="Only cases with one of these, comma-separated, in their names.")] = "",
    group: Annotated[str, typer.Option(help=f"One of {', '.join(GROUPS)}; all if not given.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds a case may take.")] = 300.0,
    out: Annotated[Path | None, typer.Option(help="Write the results there, as JSON.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if a row is worse than in the results of the repository.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Put what was found into the results and README of the repository.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the tracebacks of failures.")] = False,
) -> None:
    """Examine the models and print a table: one row a model, one column a criterion."""
    console = Console(width=None if sys.stdout.isatty() else 130, soft_wrap=True, highlight=False)
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
        console.print(f"{len(rows):3}/{len(cases)} {line(row)}")
        if verbose:
            for letter, text in row.tracebacks.items():
                console.print(f"--- {row.name} {letter}\n{text}", markup=False)
    rows = in_order(rows)
    console.print(terminal_table(rows))
    console.print(totals(rows))
    console.print(failures(rows), markup=False)
    if out is not None:
        save(out, rows, _about())
    before = load(RESULTS) if RESULTS.exists() else {}
    lines = [text for row in rows if row.name in before for text in worse(row, before[row.name])]
    if update:
        merged = {**before, **{row.name: row for row in rows}}
        save(RESULTS, in_order(merged.values()), _about())
        found = {name: [merged[c.name] for c in members if c.name in merged] for name, members in GROUPS.items()}
        update_readme(RESULTS.with_name("README.md"), found)
    if check:
        console.print("\n".join(lines) or "no row got worse", markup=False)
        raise typer.Exit(1 if lines else 0)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of the cases; those of cases that are no more are left out."""
    by_name = {row.name: row for row in rows}
    return [by_name[case.name] for members in GROUPS.values() for case in members if case.name in by_name]


def _about() -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "transformers")},
    }


if __name__ == "__main__":
    typer.run(main)
