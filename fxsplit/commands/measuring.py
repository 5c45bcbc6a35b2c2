"""`fxsplit calibrate` and `fxsplit probe`: what nodes, compressors and links take, measured."""

from __future__ import annotations

import sys
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxsplit.commands.common import errors_as_exit_status, names_in
from fxsplit.commands.inputs import parse_inputs
from fxsplit.compressors import compressor
from fxsplit.measure import COMPRESSORS, calibrate
from fxsplit.model_source import load_model
from fxsplit.planning.calibration import CLIENT, WORKER, Calibration
from fxsplit.planning.link_file import save_links
from fxsplit.planning.units import format_bytes, format_seconds
from fxsplit.runtime.probe import probe

BOTH = "both"


def calibrate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `fxsplit analyze`.")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", "-i", metavar="SIZES", help="As for `fxsplit analyze`.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="A device of this host.")] = "cpu",
    chunks: Annotated[int, typer.Option(min=1, help="Micro-batches of the batch.")] = 1,
    compressors: Annotated[str, typer.Option(metavar="NAMES", help="Those to measure.")] = ",".join(COMPRESSORS),
    repeats: Annotated[int, typer.Option(min=1, help="Of each measurement; their median counts.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one operation on a CPU.")] = None,
    training: Annotated[bool, typer.Option("--train/--eval", metavar=" ", help="The mode to measure.")] = True,
    role: Annotated[
        str, typer.Option(metavar="NAME", help="client, or worker, whose process keeps its memory; or both.")
    ] = BOTH,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write it there, the worker's of both, for another's --profile."),
    ] = None,
) -> None:
    """Measure what every node of a model, and compressors, take on a device of this machine.

    What is measured is kept in the user's cache; `fxsplit analyze` uses it for the same model, device and torch.
    """
    with errors_as_exit_status():
        shapes = parse_inputs(inputs or ())
        spellings = names_in(compressors) if compressors.strip() else []
        for spelling in spellings:
            compressor(spelling)
        if threads is not None:
            torch.set_num_threads(threads)
        with redirect_stdout(sys.stderr), Console(stderr=True).status(f"measuring {model}"):
            module, example = load_model(model, shapes)
            module.train(training)
            common: dict[str, Any] = {"chunks": chunks, "compressors": spellings, "repeats": repeats}
            roles = (CLIENT, WORKER) if role == BOTH else (role,)
            measured = [calibrate(module, example, device, role=each, **common) for each in roles]
            kept = [found.save() for found in measured]
            if save is not None:
                measured[-1].save(save)
        console = Console(highlight=False)
        for found, path in zip(measured, kept, strict=True):
            console.print(_node_table(found))
            if found.codecs:
                console.print(_codec_table(found))
            console.print(Text(f"kept: {path}"), soft_wrap=True)


def _node_table(found: Calibration) -> Table:
    """The outermost modules; a whole micro-batch below them."""
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for node in found.nodes:
        name = ".".join(node.module.split(".")[:2]) or node.name
        sums[name][0] += found.samples * node.forward_s + node.forward_call_s
        sums[name][1] += found.samples * node.backward_s + node.backward_call_s
    title = f"{found.model} on {found.device} as {found.role}, {found.samples} samples"
    title += f" ({found.machine}, threads: {found.threads})"
    table = Table(title=Text(title), title_justify="left")
    for column in ("module", "forward", "backward"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for name, seconds in sums.items():
        table.add_row(Text(name), *(format_seconds(each) for each in seconds))
    table.add_section()
    table.add_row("all", *(format_seconds(sum(each[way] for each in sums.values())) for way in (0, 1)))
    return table


def _codec_table(found: Calibration) -> Table:
    table = Table()
    for column in ("compressor", "encode", "decode", "call"):
        table.add_column(column, justify="left" if column == "compressor" else "right")
    for each in found.codecs:
        rates = (each.encode_s_per_byte, each.decode_s_per_byte)
        shown = [f"{format_bytes(1 / rate)}/s" if rate else "free" for rate in rates]
        table.add_row(Text(each.compressor), *shown, format_seconds(each.call_s))
    return table


def probe_command(
    devices: Annotated[str, typer.Option(metavar="DEVICES", help="The client's first.")] = "cpu,server/cpu",
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Wait there for named workers to join.")
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="For `fxsplit analyze --links FILE`.")] = None,
) -> None:
    """Measure bandwidth and latency between this machine and its workers, and between these."""
    with errors_as_exit_status():
        links = probe(names_in(devices), listen=listen)
        table = Table()
        for column in ("link", "bandwidth", "latency"):
            table.add_column(column, justify="left" if column == "link" else "right")
        for (sender, receiver), link in links.items():
            rate = f"{format_bytes(link.bytes_per_s)}/s"
            table.add_row(Text(f"{sender} -> {receiver}"), rate, format_seconds(link.latency_s))
        Console(highlight=False).print(table)
        if save is not None:
            save_links(links, save)
