"""`fxsplit bench`: runs training steps of a pipeline and shows what they take."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor
from torch.utils import _pytree as pytree

from fxsplit.commands.common import errors_as_exit_status, names_in
from fxsplit.commands.inputs import parse_inputs
from fxsplit.compile import compile
from fxsplit.errors import InputError
from fxsplit.model_source import load_model
from fxsplit.planning.units import format_seconds
from fxsplit.runtime.pipeline import Pipeline

WARM_UP = 2


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `fxsplit analyze`.")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", "-i", metavar="SIZES", help="As for `fxsplit analyze`.")
    ] = None,
    devices: Annotated[str, typer.Option(metavar="DEVICES", help="The client's first.")] = "cpu,server/cpu",
    cuts: Annotated[str | None, typer.Option(metavar="MODULES", help="Chosen by cost if not given.")] = None,
    compressor: Annotated[str, typer.Option(metavar="NAME")] = "none",
    chunks: Annotated[int, typer.Option(min=1)] = 4,
    schedule: Annotated[str, typer.Option(metavar="NAME")] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Measured steps.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one operation, on every worker.")] = 1,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Wait there for named workers to join.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the last step.")] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the steps for Perfetto.")] = None,
) -> None:
    """Run training steps over the devices, and show bytes and seconds of every link, worker and stage.

    The loss is the mean square of the model's floating point outputs; the optimizer is SGD.
    """
    with errors_as_exit_status():
        if plot is not None:
            from fxsplit import plots

            plots.check_picture_path(plot)
        torch.set_num_threads(threads)
        module, example = load_model(model, parse_inputs(inputs or ()))
        console = Console(highlight=False)
        with console.status(f"compiling {model}"):
            pipe = compile(
                module,
                names_in(devices),
                cuts=names_in(cuts) if cuts else None,
                compressor=compressor,
                chunks=chunks,
                schedule=schedule,
                example_inputs=example,
                listen=listen,
            )
        with pipe:
            seconds = _run(pipe, example, steps, console)
            spread = f"{format_seconds(min(seconds))} to {format_seconds(max(seconds))}"
            median = format_seconds(statistics.median(seconds))
            console.print(Text(f"{steps} steps: median {median}, {spread}"))
            if trace is not None:
                pipe.trace(trace)
                console.print(Text(f"trace: {trace}"), soft_wrap=True)
            if plot is not None:
                from fxsplit.commands.step_picture import save_step

                save_step(pipe.events(), plot)
                console.print(Text(f"picture: {plot}"), soft_wrap=True)


def _run(pipe: Pipeline, example: Any, steps: int, console: Console) -> list[float]:
    """The seconds of each step, with a table that grows meanwhile; on a terminal it is drawn anew each time."""
    optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-6)
    seconds: list[float] = []
    pipe.on_step(lambda report: seconds.append(report.step_s))
    with Live(console=console, auto_refresh=False, transient=not console.is_terminal) as live:
        for number in range(-WARM_UP, steps):
            if number == 0:
                pipe.metrics.reset()
                seconds.clear()
            optimizer.zero_grad()
            pipe.step(*example.args, **example.kwargs, loss_fn=mean_square, return_output=False)
            optimizer.step()
            words = f"step {number + 1} of {steps}" if number >= 0 else "warming up"
            live.update(Group(Text(words), pipe.metrics.__rich__()), refresh=console.is_terminal)
    if not console.is_terminal:
        console.print(pipe.metrics)
    return seconds


def mean_square(output: Any) -> Tensor:
    """The loss: of all floating point outputs that need a gradient.

    Raises:
        InputError: there is none.
    """
    found = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not found:
        raise InputError("the model has no output that can be trained", found=type(output).__name__)
    return torch.stack([leaf.float().square().mean() for leaf in found]).sum()
