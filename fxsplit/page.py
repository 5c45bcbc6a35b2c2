"""The page of a plan: one HTML file with all its pictures inside, for a browser without a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from fxsplit.costs import CostTable
from fxsplit.errors import FxsplitError
from fxsplit.planning import Budget, Plan, Profile
from fxsplit.planning.explain import timeline_of
from fxsplit.planning.neighbours import LIMITS
from fxsplit.planning.planner import plan as make_plan
from fxsplit.planning.predict import Objective, moved_bytes
from fxsplit.plots import COLORS, CUT, INK, draw
from fxsplit.schedules import Timeline

CODECS = ("none", "uniform8", "sortquant8", "uniform4")
"""The compressors of the trade-off, beside the plan's own."""

_MOST_CUTS = 60
_SIZE = (11.0, 4.6)
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #2b2b2b }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600 }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd }
th:nth-child(2), td:nth-child(2), th:nth-child(3), td:nth-child(3) { text-align: left }
svg { width: 100%; height: auto } p { max-width: 50rem }
"""


def check_page_path(path: Path | None) -> None:
    """Refuses a path where no page can be written, before any work is done for it.

    Raises:
        FxsplitError: the folder does not exist, or the path is a folder.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        what = "the folder for the page does not exist"
        raise FxsplitError(what, found=path.parent, allowed="a folder that exists", hint=f"mkdir -p {path.parent}")
    if path.is_dir():
        raise FxsplitError("the path for the page is a folder", found=path, allowed="a file")


def save_page(
    costs: CostTable,
    plan: Plan,
    budget: Budget | None,
    profile: Profile | None,
    path: Path,
    objective: str = "step",
) -> None:
    """Writes the page of a plan, see `page`.

    Raises:
        FxsplitError: it cannot be written.
    """
    text = page(costs, plan, budget, profile, objective)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FxsplitError("the page cannot be written", where=path, found=error.strerror) from error


def page(
    costs: CostTable,
    plan: Plan,
    budget: Budget | None = None,
    profile: Profile | None = None,
    objective: str = "step",
) -> str:
    """The page of a plan as HTML: it refers to no other file, and runs no script.

    Args:
        costs: that the plan was made from.
        plan: it.
        budget: that it was made under.
        profile: that it was predicted with.
        objective: that it was made for.
    """
    is_training = Objective(objective).is_training
    if plan.moved:
        costs = costs.reordered(plan.cut_names[0], plan.moved)
    # A price is one of seconds, which are what is shown.
    seconds_of = "step" if is_training else objective
    rows = list(_trade_off(costs, plan, budget or Budget(), profile, seconds_of))
    sections = [
        ("What the model costs, and where it is cut", draw(costs, plan)),
        ("Step time against link bytes, over cuts and compressors", _draw_trade_off(rows, plan, is_training)),
        ("The predicted step", _draw_timeline(timeline_of(plan, is_training=is_training))),
    ]
    body = [f"<h1>{escape(plan.model)}, batch {plan.batch_size}</h1>", plan._repr_html_()]
    body += [f"<h2>{escape(title)}</h2>\n{_svg(figure)}" for title, figure in sections]
    head = f'<meta charset="utf-8"><title>{escape(plan.model)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _svg(figure: Figure) -> str:
    """The picture as an element of the page."""
    FigureCanvasAgg(figure)
    out = StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "fxsplit"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _trade_off(
    costs: CostTable, plan: Plan, budget: Budget, profile: Profile | None, objective: str
) -> Iterator[tuple[str, int, float]]:
    """Compressor, link bytes of a step and its seconds, for the plan's first cut at every place."""
    if not plan.cuts:
        return
    places = sorted({position for position in costs.cut_points.values() if position > 0})
    names = {index: name for name, index in reversed(list(costs.cut_points.items()))}
    rest = [costs.cut_points[name] for name in plan.cut_names[1:]]
    places = [place for place in places if not rest or place < rest[0]]
    places = places[:: max(1, -(-len(places) // _MOST_CUTS))]
    free = replace(budget, **dict.fromkeys(LIMITS))
    common: dict[str, Any] = {"chunks": plan.chunks, "schedule": plan.schedule, "profile": profile, "budget": free}
    common["objective"] = objective
    for codec in dict.fromkeys((*CODECS, plan.compressor.partition(";")[0])):
        for place in places:
            cuts = [names[place], *plan.cut_names[1:]]
            try:
                each = make_plan(costs, plan.devices, cuts=cuts, compressor=codec, **common)
            except FxsplitError:  # a compressor that does not take what crosses here
                continue
            wire_bytes = moved_bytes(each.edges, is_training=Objective(objective).is_training)
            yield codec, wire_bytes, each.predicted_step_s


def _draw_trade_off(rows: Sequence[tuple[str, int, float]], plan: Plan, is_training: bool) -> Figure:
    figure = Figure(figsize=_SIZE)
    axes = figure.subplots()
    codecs = dict.fromkeys(codec for codec, *_ in rows)
    for color, marker, codec in zip(COLORS, "osv^Dp<>", codecs, strict=False):
        found = [(count, step_s) for name, count, step_s in rows if name == codec]
        counts, seconds = zip(*found, strict=True)
        axes.scatter(counts, seconds, s=26, color=color, marker=marker, alpha=0.7, linewidths=0, label=codec)
    for each in plan.alternatives:
        if each.what.startswith("all on"):
            axes.axhline(each.step_s, color="#999999", linewidth=0.8, linestyle="--")
            where: Any = ("axes fraction", "data")
            axes.annotate(each.what, (1.0, each.step_s), xycoords=where, ha="right", va="bottom", fontsize=8)
    star: dict[str, Any] = {"color": CUT, "markersize": 15, "label": "this plan", "zorder": 5}
    axes.plot([moved_bytes(plan.edges, is_training=is_training)], [plan.predicted_step_s], "*", **star)
    axes.set(xscale="log" if rows else "linear", yscale="log")
    axes.set(xlabel="bytes over the links in a step", ylabel="predicted step")
    axes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
    axes.yaxis.set_major_formatter(EngFormatter(unit="s", sep=" "))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#e2e2e2", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="best")
    figure.tight_layout()
    return figure


def _draw_timeline(timeline: Timeline) -> Figure:
    """One row a resource, one bar for each piece of work, in the colour of its stage."""
    resources = list(dict.fromkeys(span.resource for span in timeline.spans))
    resources.sort(key=lambda name: (name.split(" ")[0] not in name or "->" in name, " " in name))
    figure = Figure(figsize=(_SIZE[0], 1.2 + 0.36 * len(resources)))
    axes = figure.subplots()
    for span in timeline.spans:
        color = COLORS[span.action.stage % len(COLORS)]
        row = resources.index(span.resource)
        alpha = 0.95 if span.action.is_forward else 0.5
        style: dict[str, Any] = {"alpha": alpha, "edgecolor": "white", "linewidth": 0.4}
        axes.barh(row, span.end_s - span.start_s, 0.72, span.start_s, color=color, **style)
    axes.set_yticks(range(len(resources)), resources, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.step_s * 1.01 or 1.0)
    axes.xaxis.set_major_formatter(EngFormatter(unit="s", sep=" "))
    axes.set_xlabel("full colour: forward; pale: backward; a colour a stage", fontsize=9, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.tight_layout()
    return figure
