"""`fxsplit bench`: runs training steps of a pipeline and shows what they take."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsplit.analyze import analyze
from fxsplit.commands import planning as options
from fxsplit.commands.common import errors_as_exit_status, names_in
from fxsplit.commands.inputs import parse_inputs
from fxsplit.compile import compile
from fxsplit.costs import CostTable
from fxsplit.errors import InputError
from fxsplit.model_source import load_model
from fxsplit.opening import trace_for_planning
from fxsplit.planning import Plan
from fxsplit.planning import plan as make_plan
from fxsplit.planning.neighbours import neighbours as next_to
from fxsplit.planning.units import format_seconds
from fxsplit.runtime.pipeline import Pipeline
from fxsplit.schedules import schedule as find_schedule
from fxsplit.trace import Arguments
from fxsplit.trace import trace as trace_model

WARM_UP = 2

_SavedPlan = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="Run this one, in place of --devices, --cuts and the like."),
]
_CompileStages = Annotated[
    bool, typer.Option("--compile-stages", metavar=" ", help="Compile the stages by torch.compile.")
]


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
    saved: _SavedPlan = None,
    neighbours: Annotated[
        int, typer.Option("--neighbours", min=0, help="Plans next to it that are run, too; none with --listen.")
    ] = 2,
    compile_stages: _CompileStages = False,
    bandwidth: options.BandwidthOption = None,
    latency: options.LatencyOption = None,
    profile: options.ProfileOption = None,
    links: options.LinksOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the last step.")] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the steps for Perfetto.")] = None,
) -> None:
    """Run training steps over the devices, and show bytes and seconds of every link, worker and stage.

    The plan is run, and then the plans next to it that are predicted to be fastest: predicted beside measured. The
    loss is the mean square of the model's floating point outputs; the optimizer is SGD.
    """
    with errors_as_exit_status():
        if plot is not None:
            from fxsplit import plots

            plots.check_picture_path(plot)
        torch.set_num_threads(threads)
        budget = options.read_budget(None, bandwidth, latency)
        given = None if saved is None else Plan.load(saved)
        placed = names_in(devices) if given is None else list(given.devices)
        measured = options.Measured.read(profile, links, placed)
        find_schedule(schedule)
        module, example = load_model(model, parse_inputs(inputs or ()))
        console = Console(highlight=False)
        with console.status(f"planning {model}"):
            names = list(given.cut_names) if given is not None else names_in(cuts) if cuts else None
            costs = _costs(module, example, names, given)
            speeds = measured.of(costs)
            common: dict[str, Any] = {"compressor": compressor, "chunks": chunks, "schedule": schedule}
            common |= {"budget": budget, "profile": speeds}
            found = make_plan(costs, placed, cuts=names, **common) if given is None else given
            beside = next_to(costs, found, budget=budget, profile=speeds)[: 0 if listen else neighbours]
        plans = {"the plan": found, **{each.what: each.plan for each in beside}}
        rows = []
        for what, plan in plans.items():
            with console.status(f"compiling {what}"):
                how: dict[str, Any] = {"listen": listen, "compile_stages": compile_stages}
                pipe = compile(module, plan.devices, plan=plan, example_inputs=example, **how)
            with pipe:
                rows.append((what, plan, _run(pipe, example, steps, console, is_shown=plan is found)))
                if plan is found:
                    _save(pipe, plot, trace, console)
        console.print(_comparison(rows))
        console.print(Text(found.note))
        if unmeasured := list(dict.fromkeys(part.device for part in found.parts if not part.is_measured)):
            named = ", ".join(unmeasured)
            hint = f"predictions rest on estimates of {named}: `fxsplit calibrate {model}` measures"
            console.print(Text(hint), soft_wrap=True)


def _costs(module: nn.Module, example: Arguments, cuts: list[str] | None, given: Plan | None) -> CostTable:
    """What the model costs, with as many places to cut as the planner would have, and those that were named.

    Raises:
        PlanError: the plan that was given is of another model.
    """
    traced = trace_for_planning(module, example)
    if given is not None:
        given.check_fingerprint(type(module).__name__, traced.fingerprint)
    if cuts is not None and not set(cuts) <= set(traced.primary.cut_points):
        traced = trace_model(module, example, cuts=cuts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what has no formula; `fxsplit analyze` says so
        return analyze(traced, example)


def _save(pipe: Pipeline, plot: Path | None, trace: Path | None, console: Console) -> None:
    if trace is not None:
        pipe.trace(trace)
        console.print(Text(f"trace: {trace}"), soft_wrap=True)
    if plot is not None:
        from fxsplit.commands.step_picture import save_step

        save_step(pipe.events(), plot)
        console.print(Text(f"picture: {plot}"), soft_wrap=True)


def _comparison(rows: Sequence[tuple[str, Plan, list[float]]]) -> Table:
    """Predicted beside measured."""
    steps = len(rows[0][2])
    table = Table(title=Text(f"{steps} steps each: median, least and most of a step"), title_justify="left")
    for column in ("plan", "predicted", "measured", "least", "most", "measured / predicted"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for what, plan, seconds in rows:
        median = statistics.median(seconds)
        shown = [format_seconds(each) for each in (plan.predicted_step_s, median, min(seconds), max(seconds))]
        ratio = f"{median / plan.predicted_step_s:.2f}" if plan.predicted_step_s else ""
        cuts = ", ".join(plan.cut_names) or f"all on {plan.devices[0]}"
        table.add_row(Text(f"{what}: {cuts}" if plan is rows[0][1] else what), *shown, ratio)
    return table


def _run(pipe: Pipeline, example: Any, steps: int, console: Console, *, is_shown: bool) -> list[float]:
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
    if is_shown and not console.is_terminal:
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
