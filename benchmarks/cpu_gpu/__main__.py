"""The command line: `python -m benchmarks.cpu_gpu`."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpus.running import Running, take_turns, throughput
from benchmarks.machine import machine
from benchmarks.readme import fill

from .plot import draw

HERE = Path(__file__).parent
MODULE = "benchmarks.cpu_gpu.client"
CODECS = (
    "none",
    "chosen",
    "fp16",
    "fp8",
    "uniform8",
    "uniform4",
    "sortquant8",
    "sortquant4",
    "fastquant8",
    "fastquant4",
    "adaptive4",
    "kmeans4",
    "topk(ratio=0.1)",
    "poweriter(rank=3)",
    "convinsert(ratio=0.097) then insertlinear(ratio=0.097)",
    "uniform8+zstd",
)
app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    codecs: Annotated[str, typer.Option(help="Spellings, with semicolons between them.")] = "; ".join(CODECS),
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of steps of each.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Of a block.")] = 4,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps that are not counted.")] = 4,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    size: Annotated[int, typer.Option(min=32, help="Of the images.")] = 224,
    chunks: Annotated[int, typer.Option(min=1, help="Micro-batches.")] = 4,
    limit_s: Annotated[float, typer.Option(help="No round begins after so long.")] = 165.0,
    out: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="A server without a GPU, to try the script.")] = False,
) -> None:
    """Measure training steps with a client on the CPU and a server on a GPU, every compressor in turns."""
    begin = time.monotonic()
    names = [name.strip() for name in codecs.split(";") if name.strip()]
    running: list[Running] = []
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine("torchvision"),
        "batch": batch,
        "size": size,
        "chunks": chunks,
        "steps": steps,
        "warm_up": warm_up,
    }
    try:
        for name in names:
            arguments = [name, str(batch), str(size), str(chunks)]
            running.append(Running.start(name, MODULE, arguments, 1, ["--cpu"] if cpu else []))
        for more in range(rounds):
            take_turns(running, 1, steps, warm_up, begin + limit_s, is_new=more == 0)
            found["rows"] = [row(one) for one in running]
            found["seconds"] = time.monotonic() - begin
            if out is not None:
                out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            if time.monotonic() > begin + limit_s:
                break
    finally:
        for one in running:
            one.end()
    print(table(found))


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="What `run --json` wrote.")],
    readme: Annotated[Path, typer.Option(help="The README to fill.")] = HERE / "README.md",
    more: Annotated[bool, typer.Option("--more", help="Fill the second table, of some compressors only.")] = False,
) -> None:
    """Fill README and picture from a run."""
    found = json.loads(results.read_text(encoding="utf-8"))
    if more:
        fill(readme, "more", table(found))
        return
    (readme.parent / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found["rows"], found["batch"], readme.parent / "cpu_gpu.png")
    fill(readme, "results", table(found))


def row(one: Running) -> dict[str, Any]:
    """What is kept of a compressor."""
    return {"name": one.name, "seconds": one.seconds, "last": one.last, "reason": one.reason}


def table(found: Mapping[str, Any]) -> str:
    """The table in Markdown; ratios are medians of the rounds' own."""
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    base: list[float] = next((r["seconds"] for r in rows if r["name"] == "none"), [])
    lines = [
        f"{found['date']}, {found['machine']}; batch {found['batch']} at {found['size']}x{found['size']}, "
        f"{found['chunks']} chunks; blocks of {found['steps']} steps in turns, after {found['warm_up']} steps not "
        f"counted; {found['seconds']:.0f} s in all.",
        "",
        "| compressor | images / s | least - most | of none's | MB a step | encode ms, client / server "
        "| decode ms, client / server |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in rows:
        if not entry["seconds"]:
            lines.append(f"| {entry['name']} | fails: {entry['reason']} | | | | | |")
            continue
        rate, spread, ratio = throughput(found["batch"], entry["seconds"], base)
        last = entry["last"]
        codes = " | ".join(
            " / ".join(f"{1e3 * last[what].get(worker, 0.0):.0f}" for worker in ("client", "server"))
            for what in ("encode_s", "decode_s")
        )
        lines.append(
            f"| {entry['name']} | {rate} | {spread} | {ratio} | {last['wire_bytes'] / 1e6:.1f} | {codes} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    app()
