"""The command line: what a split of a model would cost, before anything is started."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from fxsplit.analyze import analyze as analyze_costs
from fxsplit.commands import planning as options
from fxsplit.commands.bench import bench
from fxsplit.commands.common import errors_as_exit_status, names_in
from fxsplit.commands.inputs import parse_inputs
from fxsplit.commands.measuring import calibrate_command, probe_command
from fxsplit.commands.worker import worker
from fxsplit.costs import CostTable
from fxsplit.errors import InputError
from fxsplit.model_source import InputShape, load_model
from fxsplit.opening import trace_for_planning
from fxsplit.planning import Plan, parse_devices
from fxsplit.planning import plan as make_plan
from fxsplit.planning.explain import explain_plan
from fxsplit.planning.planner import GIVEN, check_choices
from fxsplit.planning.render import Report
from fxsplit.planning.stages import AUTO, Codecs
from fxsplit.planning.units import format_bytes, format_macs
from fxsplit.trace import TracedModel, check_front_end, trace
from fxsplit.trace.traced import mode_name
from fxsplit.trace_report import report

_PLAN_PANEL, _OUTPUT_PANEL = "Plan", "Output"

app = typer.Typer(
    name="fxsplit",
    help="Split an unmodified PyTorch model over uneven devices and slow links.",
    epilog="Begin with: fxsplit analyze torchvision:mobilenet_v2 --input 64,3,224,224",
    no_args_is_help=True,
    add_completion=False,
    # A traceback that gets through is a fault of fxsplit: it is wanted whole, as Python prints it.
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Runs the command line of this process."""
    try:
        app()
    finally:
        _flush()


def _flush() -> None:
    """Writes out what is left; a reader that has gone away, as in `fxsplit ... | head`, is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Else the interpreter tries once more at its end, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fxsplit {version('fxsplit')} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", metavar=" ", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass  # what is here makes `analyze` a subcommand, the first of several


_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A Python file with `model` or `get_model()`, torchvision:NAME, or transformers:NAME, where NAME "
        "is a model type (roberta) or a class (RobertaForSequenceClassification). Weights are random, "
        "nothing is downloaded.",
    ),
]
_Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="SIZES",
        show_default=False,
        help="Sizes of the inputs, batch first: 64,3,224,224. Several with ';' or by repeating the option; with a "
        "type: long:32,128; for a keyword argument: attention_mask=long:32,128. "
        "Without it, a file's `example_inputs` or `get_example_inputs()`, or what is usual for the model.",
    ),
]
_Devices = Annotated[
    str,
    typer.Option(
        metavar="DEVICES",
        help="Device of each part, the client's first; equal ones are one worker; worker/cuda:0 is a named "
        "worker's; a/cuda:0+b/cuda:0 are the replicas of a part. They need not exist here.",
        rich_help_panel=_PLAN_PANEL,
    ),
]
_Cuts = Annotated[
    str | None,
    typer.Option(
        metavar="MODULES",
        show_default=False,
        help="Modules with whose first call a new part begins, one fewer than devices: features.0.2,classifier. "
        "Without it, those with the least predicted step time.",
        rich_help_panel=_PLAN_PANEL,
    ),
]
_Compressor = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="For what crosses a cut: sortquant8, uniform4...", rich_help_panel=_PLAN_PANEL
    ),
]
_GradientCompressor = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="For the gradients that come back: auto, same...", rich_help_panel=_PLAN_PANEL
    ),
]
_Training = Annotated[
    bool, typer.Option("--train/--eval", metavar=" ", help="The mode to price.", rich_help_panel=_PLAN_PANEL)
]
_Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        metavar=" ",
        help="Check the traced graph against the model, bit for bit.",
        rich_help_panel=_PLAN_PANEL,
    ),
]
_FrontEnd = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What traces the model: recorder, export (torch.export), or auto: the recorder, and torch.export for "
        "what it refuses.",
        rich_help_panel=_PLAN_PANEL,
    ),
]
_Json = Annotated[
    bool, typer.Option("--json", metavar=" ", help="Print one JSON object instead.", rich_help_panel=_OUTPUT_PANEL)
]
_Save = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help="Save the plan, for fxsplit.compile(..., plan=FILE).",
        rich_help_panel=_OUTPUT_PANEL,
    ),
]
_Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help="Draw MACs and bytes along the model, with the cuts, into a .png, .svg or .pdf.",
        rich_help_panel=_OUTPUT_PANEL,
    ),
]

_Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        show_default=False,
        help="Write a page: costs with the cuts, step time against link bytes, the predicted timeline.",
        rich_help_panel=_OUTPUT_PANEL,
    ),
]
_Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        metavar=" ",
        help="Say why not the plans next to it, and what each line of the budget costs.",
        rich_help_panel=_OUTPUT_PANEL,
    ),
]


@app.command(
    epilog="Examples:\n\n"
    "fxsplit analyze torchvision:mobilenet_v2 -i 64,3,224,224 --compressor sortquant8 --plot cuts.png\n\n"
    "fxsplit analyze torchvision:mobilenet_v2 --devices cpu,cuda,cpu --cuts features.0.2,classifier\n\n"
    "fxsplit analyze transformers:roberta -i 32,128 --devices cpu,server/cuda:0 --json\n\n"
    "fxsplit analyze model.py --devices cpu,server/cuda --bandwidth 50Mbit/s --compressor auto --chunks auto"
)
def analyze(
    model: _Model,
    inputs: _Inputs = None,
    devices: _Devices = "cpu,cuda",
    cuts: _Cuts = None,
    compressor: _Compressor = "none",
    gradient_compressor: _GradientCompressor = AUTO,
    chunks: options.ChunksOption = "1",
    schedule: options.ScheduleOption = "gpipe",
    placement: options.PlacementOption = GIVEN,
    objective: options.ObjectiveOption = "step",
    price: options.PriceOption = None,
    budget: options.BudgetOption = None,
    bandwidth: options.BandwidthOption = None,
    latency: options.LatencyOption = None,
    allow: options.AllowOption = None,
    optimizer: options.OptimizerOption = "adam",
    profile: options.ProfileOption = None,
    links: options.LinksOption = None,
    training: _Training = True,
    verify: _Verify = True,
    as_json: _Json = False,
    save: _Save = None,
    plot: _Plot = None,
    html: _Html = None,
    explain: _Explain = False,
) -> None:
    """Show where a model would be cut, what each part computes, and what crosses each cut."""
    with errors_as_exit_status():
        # What the command line itself gets wrong is said before the work, which may take a minute.
        shapes = parse_inputs(inputs or ())
        names = names_in(cuts) if cuts and cuts.strip() else None
        placements = parse_devices(names_in(devices))
        if compressor != AUTO:
            Codecs.of(compressor, gradient_compressor, len(placements) - 1)
        chosen: dict[str, Any] = {
            "cuts": names, "compressor": compressor, "gradient_compressor": gradient_compressor,
            "chunks": options.read_chunks(chunks), "schedule": schedule, "placement": placement,
            "budget": options.read_budget(budget, bandwidth, latency), "guard": options.read_guard(allow),
            "objective": objective, "price": options.read_prices(price), "optimizer": optimizer,
        }  # fmt: skip
        check_choices(schedule, placement, objective, optimizer)
        measured = options.Measured.read(profile, links, names_in(devices))
        if plot is not None or html is not None:
            from fxsplit import plots  # matplotlib takes a while to import, and only a picture needs it
            from fxsplit.page import check_page_path, save_page

            check_page_path(html)
            plots.check_picture_path(plot)
        # Whatever the model's own code prints, standard output is for the result alone.
        with redirect_stdout(sys.stderr), Console(stderr=True).status(f"analyzing {model}"):
            _, costs, notes = _traced_costs_of(model, shapes, names, training, verify)
            _check_chunks(chosen["chunks"], costs.batch_size)
            chosen["profile"] = measured.of(costs)
            plan = make_plan(costs, names_in(devices), **chosen)
            reasons = explain_plan(costs, plan, names_in(devices), chosen) if explain else None
            if save is not None:
                plan.save(save)
            if plot is not None:
                plots.save_picture(costs, plan, plot)
            if html is not None:
                save_page(costs, plan, chosen["budget"], chosen["profile"], html, objective)
        if as_json:
            print(json.dumps({**summary(costs, plan), "mode": mode_name(training), "notes": notes}, indent=2))
            return
        _print_plan(costs, plan, mode_name(training), notes)
        _print_more(reasons, {"picture": plot, "page": html})


@app.command(
    "trace",
    epilog="Examples:\n\n"
    "fxsplit trace transformers:roberta -i 32,128 --cuts encoder.layer.6\n\n"
    "fxsplit trace model.py --cuts features.3 --eval --front-end export",
)
def trace_command(
    model: _Model,
    inputs: _Inputs = None,
    cuts: _Cuts = None,
    training: _Training = True,
    verify: _Verify = True,
    front_end: _FrontEnd = "auto",
) -> None:
    """Show how a model is traced: what is opened, verified and guarded, and what crosses each cut."""
    with errors_as_exit_status():
        shapes = parse_inputs(inputs or ())
        names = names_in(cuts) if cuts and cuts.strip() else None
        check_front_end(front_end)
        with redirect_stdout(sys.stderr), Console(stderr=True).status(f"tracing {model}"):
            traced, costs, notes = _traced_costs_of(model, shapes, names, training, verify, front_end)
        Console().print(report(replace(traced, notes=tuple(notes)), costs, names or (), verify))


app.command()(worker)
app.command()(bench)
app.command("calibrate")(calibrate_command)
app.command("probe")(probe_command)


def _traced_costs_of(
    source: str,
    shapes: Sequence[InputShape],
    cuts: Sequence[str] | None,
    training: bool,
    verify: bool,
    front_end: str = "auto",
) -> tuple[TracedModel, CostTable, list[str]]:
    """The traced model, what it costs, and what the user should know of both."""
    model, example = load_model(source, shapes)
    model.train(training)
    if cuts is None:
        traced = trace_for_planning(model, example, verify=verify, front_end=front_end)
    else:
        traced = trace(model, example, cuts=cuts, verify=verify, front_end=front_end)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        costs = analyze_costs(traced, example)
    return traced, costs, [*traced.notes, *dict.fromkeys(str(warning.message) for warning in caught)]


def _check_chunks(chunks: int | str, samples: int) -> None:
    if isinstance(chunks, int) and chunks > samples:
        raise InputError(
            "the batch has fewer samples than there are chunks",
            found=f"{samples} samples, {chunks} chunks",
            allowed=f"--chunks up to {samples}",
            hint="give a larger batch with --input",
        )


def summary(costs: CostTable, plan: Plan) -> dict[str, Any]:
    """The plan and the model's totals as JSON data; the names are those of a saved plan."""
    return {
        "model": plan.model,
        "batch_size": plan.batch_size,
        "macs": costs.forward_macs,
        "parameter_bytes": costs.parameter_bytes,
        "parts": [{**asdict(part), "modules": list(part.modules)} for part in plan.parts],
        "cuts": [
            {
                "name": cut.name,
                "stage": cut.stage,
                "raw_bytes": cut.raw_bytes,
                "wire_bytes": cut.wire_bytes,
                "gradient_wire_bytes": cut.gradient_wire_bytes,
                "compressor": cut.compressor,
            }
            for cut in plan.cuts
        ],
        "chunks": plan.chunks,
        "predicted_step_s": plan.predicted_step_s,
        "is_optimal": plan.is_optimal,
        "alternatives": [asdict(each) for each in plan.alternatives],
    }


def _print_plan(costs: CostTable, plan: Plan, mode: str, notes: Sequence[str]) -> None:
    console = Console(highlight=False)
    console.print(plan if console.is_terminal else Text(str(plan)), soft_wrap=not console.is_terminal)
    totals = (
        f"in all {format_macs(costs.forward_macs)} MACs forward in {mode} mode, "
        f"{format_bytes(costs.parameter_bytes)} of parameters and buffers, {len(costs)} nodes"
    )
    console.print(Text(totals), soft_wrap=True)
    for note in notes:
        console.print(Text(f"note: {note}", "yellow"), soft_wrap=True)


def _print_more(reasons: Report | None, files: Mapping[str, Path | None]) -> None:
    """What was asked for beside the plan."""
    console = Console(highlight=False)
    if reasons is not None:
        console.print()
        console.print(reasons.table() if console.is_terminal else Text(reasons.text()), soft_wrap=True)
    for what, path in files.items():
        if path is not None:
            console.print(Text(f"{what}: {path}"), soft_wrap=True)
