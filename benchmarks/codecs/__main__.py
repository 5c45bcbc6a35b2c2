"""The command line: `python -m benchmarks.codecs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from fxsplit.errors import CompressorError

from .data import KINDS
from .first_use import FIRST_USED
from .report import README, write_report
from .speed import measure_speed
from .subjects import CODECS
from .tables import about, cost_tables, error_table, speed_tables, target_lines
from .targets import judged

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def speed(
    device: Annotated[str, typer.Option(help="cpu (one core of it) or cuda.")] = "cpu",
    mib: Annotated[float | None, typer.Option(help="Size of the tensor; 25 on a CPU, 98 on a GPU.")] = None,
    codecs: Annotated[str, typer.Option(help="Spellings, with semicolons between them.")] = "; ".join(CODECS),
    kind: Annotated[str, typer.Option(help=f"Of the data: {', '.join(KINDS)}.")] = "gaussian",
    repeats: Annotated[int, typer.Option(min=1, help="Of each, after one that is not counted.")] = 15,
    first_use: Annotated[bool, typer.Option(help="Measure the first use, too, in fresh processes.")] = True,
    out: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a target is missed.")] = False,
) -> None:
    """Time and memory of encode and decode, as multiples of a plain copy in the same run."""
    chosen = [each.strip() for each in codecs.split(";") if each.strip()]
    where = torch.device(device)
    size = mib or (25.0 if where.type == "cpu" else 98.0)
    try:
        found = measure_speed(where, size, chosen, kind, repeats, first_used=FIRST_USED if first_use else ())
    except CompressorError as error:
        raise typer.BadParameter(str(error), param_hint="--codecs") from error
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--kind") from error
    found["command"] = f"python -m benchmarks.codecs speed --device {device} --mib {size:g}"
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    targets = judged(found)
    print("\n\n".join((about(found), speed_tables([found]), cost_tables([found]), target_lines(targets))))
    if check:
        missed = [target for target, met in targets.items() if not met]
        print(f"{len(missed)} of {len(targets)} targets missed" if missed else "all targets met")
        sys.exit(1 if missed else 0)


@app.command()
def error(
    cifar: Annotated[Path | None, typer.Option(help="cifar10_jpeg.npz; images are made up without it.")] = None,
    steps: Annotated[int, typer.Option(min=0, help="Of training before activations are recorded.")] = 60,
    out: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file.")] = None,
) -> None:
    """What each codec loses for how many bits, on made and on recorded tensors."""
    from .error import measure_error  # the models that are recorded may be missing where speed is measured

    torch.set_num_threads(1)
    found = measure_error(cifar, steps)
    found["command"] = f"python -m benchmarks.codecs error{' --cifar cifar10_jpeg.npz' if cifar else ''}"
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(error_table(found))


@app.command()
def report(
    add: Annotated[list[Path] | None, typer.Option(help="A file of `speed --json` or `error --json`.")] = None,
    readme: Annotated[Path, typer.Option(help="The README; pictures and runs are kept beside it.")] = README,
) -> None:
    """Fill README and pictures from the runs that are kept, and from those added."""
    write_report(add or [], readme)


if __name__ == "__main__":
    app()
