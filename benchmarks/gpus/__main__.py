"""The command line: `python -m benchmarks.gpus`."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine
from benchmarks.readme import fill

from .contenders import CONTENDERS, Contender
from .plot import draw
from .running import Failed, Running, take_turns, throughput

HERE = Path(__file__).parent
MODULE = "benchmarks.gpus.contender"
TITLES = {
    "mobilenet-64": "MobileNetV2, batch 64 at 224x224",
    "mobilenet-256": "MobileNetV2, batch 256 at 224x224",
    "roberta-32": "RoBERTa-base, batch 32 of 128 tokens",
}
app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    tasks: Annotated[str, typer.Option(help=f"Some of {', '.join(CONTENDERS)}.")] = ",".join(CONTENDERS),
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of steps of each contender.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Of a block.")] = 20,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps that are not counted.")] = 20,
    only: Annotated[str, typer.Option(help="Contenders instead, such as 'kind=ddp;kind=fxsplit,stages=4'.")] = "",
    limit_s: Annotated[float, typer.Option(help="For all of it; what is left out then is said.")] = 290.0,
    trace: Annotated[Path | None, typer.Option(help="A folder for traces of fxsplit's best.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Without GPUs, to try the script.")] = False,
) -> None:
    """Measure training steps on two GPUs, all contenders in turns."""
    names = [name for name in tasks.split(",") if name]
    begin = time.monotonic()
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine("torchvision", "transformers"),
        "steps": steps,
        "warm_up": warm_up,
        "tasks": {},
    }
    for number, name in enumerate(names):
        left = limit_s - (time.monotonic() - begin)
        deadline = time.monotonic() + left / (len(names) - number)
        wanted = [Contender.parse(text) for text in only.split(";")] if only else CONTENDERS[name]
        rows = measure(name, wanted, rounds, steps, warm_up, deadline, trace, ["--cpu"] if cpu else [])
        found["tasks"][name] = rows
        found["seconds"] = time.monotonic() - begin
        if out is not None:
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(table(name, rows), flush=True)
    print(f"{found['seconds']:.0f} s")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="What `run --json` wrote.")],
    readme: Annotated[Path, typer.Option(help="The README to fill.")] = HERE / "README.md",
) -> None:
    """Fill README and picture from a run."""
    found = json.loads(results.read_text(encoding="utf-8"))
    (readme.parent / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found["tasks"], TITLES, readme.parent / "gpus.png")
    intro = (
        f"{found['date']}, {found['machine']}; blocks of {found['steps']} steps in turns, after "
        f"{found['warm_up']} steps not counted; {found['seconds']:.0f} s in all."
    )
    fill(readme, "results", "\n".join([intro, "", *(table(name, rows) for name, rows in found["tasks"].items())]))


def measure(
    name: str,
    contenders: Sequence[Contender],
    rounds: int,
    steps: int,
    warm_up: int,
    deadline: float,
    trace: Path | None,
    flags: Sequence[str],
) -> list[dict[str, Any]]:
    """One task: a row for each contender, a failed one's with the reason."""
    running: list[Running] = []
    flags = [*flags, *block_flags(name, flags)]
    try:
        for contender in contenders:
            arguments = [name, contender.spell()]
            running.append(Running.start(contender.name, MODULE, arguments, contender.processes, flags))
        take_turns(running, rounds, steps, warm_up, deadline)
        pairs = list(zip(contenders, running, strict=True))
        done = [(statistics.median(r.seconds), r) for c, r in pairs if c.kind == "fxsplit" and r.seconds]
        if trace is not None and done:
            best = min(done, key=lambda entry: entry[0])[1]
            trace.mkdir(parents=True, exist_ok=True)
            best.ask(f"trace {(trace / f'{name}.json').absolute()}")
            try:
                best.answer("trace", 60.0)
            except Failed as error:
                best.give_up(error)
    finally:
        for one in running:
            one.end()
    batch = int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdigit() else 1
    return [row(contender, one, batch) for contender, one in zip(contenders, running, strict=True)]


def block_flags(name: str, flags: Sequence[str]) -> list[str]:
    """What the parts of the model take, for the cuts; nothing where it cannot be measured."""
    if "--cpu" in flags:
        return []
    measuring = Running.start("blocks", MODULE, [name, "kind=blocks"], 1, flags)
    try:
        seconds = measuring.answer("blocks", 60.0)["blocks"]
    except Failed as error:
        measuring.give_up(error)
        return []
    finally:
        measuring.end()
    return ["--blocks=" + ",".join(f"{forward:.3e}:{backward:.3e}" for forward, backward in seconds)]


def row(contender: Contender, one: Running, batch: int) -> dict[str, Any]:
    """What is kept of a contender."""
    return {
        "name": contender.name,
        "contender": contender.spell(),
        "batch": batch,
        "seconds": one.seconds,
        "queued_s": one.queued_s,
        "facts": one.facts,
        "reason": one.reason,
    }


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One task's table in Markdown; ratios are medians of the rounds' own."""
    base: list[float] = next((row["seconds"] for row in rows if row["name"] == "DDP"), [])
    lines = [
        f"### {TITLES.get(name, name)}",
        "",
        "| | samples / s | least - most | ms / step | of DDP's throughput | cuts |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        if not row["seconds"]:
            lines.append(f"| {row['name']} | fails: {row['reason']} | | | | |")
            continue
        rate, spread, ratio = throughput(row["batch"], row["seconds"], base)
        cuts = ", ".join(cut.rpartition(".")[2] for cut in row["facts"].get("cuts", ()))
        lines.append(
            f"| {row['name']} | {rate} | {spread} "
            f"| {1e3 * statistics.median(row['seconds']):.1f} | {ratio} | {cuts} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    app()
