"""The picture of a plan: MACs and activation bytes along the model, with the cuts and the parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from fxsplit.costs import CostTable
from fxsplit.errors import FxsplitError, nearest
from fxsplit.planning import Plan
from fxsplit.planning.units import format_bytes, format_macs, format_seconds

COLORS = ("#3b6fb6", "#2e9e6b", "#c9812a", "#8a5fb0", "#b84a5a", "#4a8f9e", "#7d7d3c", "#6b6b6b")
INK, CUT = "#2b2b2b", "#c0392b"
_SHADE = 0.09
_HEIGHT = 6.6
_INCHES_PER_LETTER = 0.078
_INCHES_PER_LABEL, _INCHES_PER_LABEL_LETTER = 0.2, 0.065  # of the modules' names along the axis
_BOX, _BEND = 0.6, 0.3  # of the header's height: the lower edge of the boxes, and where the cuts' lines turn
_MARGINS = {"left": 0.075, "right": 0.985, "top": 0.93, "hspace": 0.09}


def check_picture_path(path: Path | None) -> None:
    """Refuses a path where no picture can be written, before any work is done for it.

    Raises:
        FxsplitError: the folder does not exist, the path is a folder, or the format is not known.
    """
    if path is None:
        return
    formats = sorted(FigureCanvasAgg.get_supported_filetypes())
    if not path.parent.is_dir():
        raise FxsplitError(
            "the folder for the picture does not exist",
            found=path.parent,
            allowed="a folder that exists",
            hint=f"mkdir -p {path.parent}",
        )
    if path.is_dir():
        raise FxsplitError(
            "the path for the picture is a folder", found=path, allowed="a file", hint=f"{path / 'cuts.png'}"
        )
    suffix = path.suffix.removeprefix(".")
    if suffix not in formats:
        raise FxsplitError(
            "pictures are not written in this format",
            found=path.name,
            allowed=", ".join(f".{name}" for name in formats),
            hint=f"nearest: {path.stem}.{nearest(suffix, formats, 1).split(', ')[0]}"
            if suffix
            else f"{path.name}.png",
        )


def save_picture(costs: CostTable, plan: Plan, path: Path) -> None:
    """Draws the plan into a file, in the format of its suffix.

    Raises:
        FxsplitError: it cannot be written.
    """
    try:
        draw(costs, plan).savefig(path, dpi=130)
    except OSError as error:
        raise FxsplitError("the picture cannot be written", where=path, found=error.strerror) from error


def draw(costs: CostTable, plan: Plan) -> Figure:
    """The picture of a plan for a model of these costs.

    From top to bottom: the parts, side by side; MACs of each node, in execution order; bytes that cross each
    place between two nodes, with what a cut there sends.
    """
    figure = Figure(figsize=(max(11.0, 1.9 * len(plan.parts)), _HEIGHT))
    FigureCanvasAgg(figure)
    width = figure.get_figwidth() * (_MARGINS["right"] - _MARGINS["left"])
    header, macs, crossing = figure.subplots(3, 1, sharex=True, height_ratios=(0.8, 1.15, 1.15))
    bounds = (0, *(costs.cut_points[name] for name in plan.cut_names), len(costs))
    colors = _worker_colors(plan)
    for axes in (macs, crossing):
        for color, (start, end) in zip(colors, pairwise(bounds), strict=True):
            axes.axvspan(start, end, color=color, alpha=_SHADE, linewidth=0)
        for position in bounds[1:-1]:
            axes.axvline(position, color=CUT, linewidth=1.2, zorder=4)
        axes.grid(axis="y", color="#d9d9d9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
    macs.tick_params(axis="x", length=0)
    _draw_macs(macs, costs, colors, bounds)
    _draw_crossing(crossing, costs, plan, bounds)
    _draw_header(header, plan, colors, bounds, width)
    header.set_xlim(0, len(costs))
    longest = _label_modules(crossing, costs, width)
    # Labels stand at 45 degrees: 0.7 of their length is below the axis.
    bottom = (0.25 + 0.7 * _INCHES_PER_LABEL_LETTER * longest) / _HEIGHT
    figure.subplots_adjust(bottom=bottom, **_MARGINS)
    # The header has no gap to the panel below, so that its lines meet the cuts.
    top, below = header.get_position(), macs.get_position()
    header.set_position((top.x0, below.y1, top.width, top.y1 - below.y1))
    _draw_title(figure, costs, plan)
    return figure


def _draw_title(figure: Figure, costs: CostTable, plan: Plan) -> None:
    facts = (
        f"batch {plan.batch_size}",
        f"{format_macs(costs.forward_macs)} MACs",
        f"{format_bytes(costs.parameter_bytes)} of parameters",
        f"compressor {plan.compressor}",
        f"predicted step {format_seconds(plan.predicted_step_s)}",
    )
    style: dict[str, Any] = {"color": INK, "va": "center"}
    figure.text(_MARGINS["left"], 0.965, plan.model, fontsize=13, weight="bold", **style)
    figure.text(_MARGINS["right"], 0.965, "  ·  ".join(facts), fontsize=9, ha="right", **style)


def _worker_colors(plan: Plan) -> list[str]:
    """One colour a stage; stages of one worker have the same."""
    workers = list(dict.fromkeys(plan.workers))
    return [COLORS[workers.index(worker) % len(COLORS)] for worker in plan.workers]


def _draw_macs(axes: Axes, costs: CostTable, colors: Sequence[str], bounds: Sequence[int]) -> None:
    """MACs on a linear scale: what the eye sees as area is work."""
    for color, (start, end) in zip(colors, pairwise(bounds), strict=True):
        heights = [node.forward_macs for node in costs.nodes[start:end]]
        width = 0.82 if len(costs) < 400 else 1.0
        axes.bar([start + 0.5 + i for i in range(len(heights))], heights, width, color=color, zorder=3)
    axes.set_ylim(0, 1.08 * max([node.forward_macs for node in costs.nodes], default=1) or 1)
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_ylabel("MACs of a node", fontsize=9, color=INK)


def _draw_crossing(axes: Axes, costs: CostTable, plan: Plan, bounds: Sequence[int]) -> None:
    """Bytes on a logarithmic scale: they span decades, and a compressor's ratio is the same length everywhere."""
    crossing = bytes_across(costs)
    floor = min([count for count in crossing if count], default=1)
    axes.set_yscale("log")
    edges = [max(0.0, i - 0.5) for i in range(len(crossing))] + [float(len(costs))]
    heights = [max(count, floor) for count in crossing]
    axes.stairs(heights, edges, color=INK, linewidth=1.3, baseline=None, zorder=3)
    sent = [cut.wire_bytes for cut in plan.cuts if cut.wire_bytes]
    low, high = min([floor, *sent]), max([*heights, *sent])
    top = math.log10(high) + 0.35
    axes.set_ylim(10 ** min(math.log10(low) - 0.35, top - 1.1), 10**top)  # a decade at least has a label
    for position, cut in zip(bounds[1:-1], plan.cuts, strict=True):
        if not cut.wire_bytes:
            continue
        axes.plot([position], [cut.raw_bytes], "o", color=CUT, markersize=6, zorder=6)
        if cut.wire_bytes != cut.raw_bytes:
            head = "-|>,head_width=0.3,head_length=0.6"
            arrow = {"arrowstyle": head, "color": CUT, "linewidth": 2.4, "shrinkA": 0, "shrinkB": 0}
            before, after = (position, cut.raw_bytes), (position, cut.wire_bytes)
            axes.annotate("", xy=after, xytext=before, arrowprops=arrow, zorder=6)
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
    axes.set_ylabel("bytes that cross", fontsize=9, color=INK)


def bytes_across(costs: CostTable) -> list[int]:
    """For each place between two nodes, the bytes of all values made before it and used after it.

    Place `i` is before node `i`; at the first only the model's inputs cross, at the last only its outputs.
    """
    change = [0] * (len(costs) + 2)
    for value in costs.values:
        # What is no tensor may hold some, as a tuple does.
        nbytes = value.nbytes if value.spec or value.producer < 0 else costs.nodes[value.producer].output_bytes
        change[value.producer + 1] += nbytes
        change[value.consumers[-1] + 1] -= nbytes
    crossing = [0]
    for step in change:
        crossing.append(crossing[-1] + step)
    return crossing[1 : len(costs) + 2]


def _draw_header(axes: Axes, plan: Plan, colors: Sequence[str], bounds: Sequence[int], width: float) -> None:
    """The parts as boxes of one width, whatever share of the nodes they have, each fanned out to its own.

    The lines of the cuts lead from between two boxes to their places, past labels that so never overlap.
    """
    axes.set_axis_off()
    axes.set_ylim(0, 1)
    end, stages = bounds[-1], len(plan.parts)
    cell, gap = end / stages, 0.05 / width * end
    lines = [[(stage * cell, _BOX), (stage * cell, _BEND), (bound, 0.0)] for stage, bound in enumerate(bounds)]
    letters = int(width / stages / _INCHES_PER_LETTER)
    for part, color in zip(plan.parts, colors, strict=True):
        fan = [*lines[part.stage], *reversed(lines[part.stage + 1])]
        axes.add_patch(Polygon(fan, color=color, alpha=_SHADE, linewidth=0))
        left = part.stage * cell + (gap if part.stage else 0)
        right = (part.stage + 1) * cell - (gap if part.stage + 1 < stages else 0)
        axes.add_patch(Rectangle((left, _BOX), right - left, 1 - _BOX, color=color, linewidth=0))
        device = part.device if part.worker in part.device else f"{part.device} ({part.worker})"
        work = f"{format_macs(part.macs)} MACs, {format_seconds(part.step_s)}"
        style: dict[str, Any] = {"x": (left + right) / 2, "ha": "center", "va": "center", "color": "white"}
        axes.text(y=0.88, s=_fit(f"{part.stage}: {device}", letters - 3), weight="bold", **style)
        axes.text(y=0.71, s=_fit(work, letters), fontsize=9, **style)
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": CUT, "linewidth": 1.0}
    for cut, line in zip(plan.cuts, lines[1:-1], strict=True):
        axes.plot(*zip(*line, strict=True), color=CUT, linewidth=1.2, zorder=4)
        sent = format_bytes(cut.raw_bytes)
        if cut.wire_bytes != cut.raw_bytes:
            sent += f" → {format_bytes(cut.wire_bytes)}"
        text = f"{_fit(cut.name, letters - 2)}\n{sent}"
        axes.text(line[0][0], 0.37, text, fontsize=8.5, ha="center", va="center", color=INK, bbox=box, zorder=5)


def _fit(text: str, letters: int) -> str:
    """The text, with dots in its middle where it is too long.

    >>> _fit("bert.encoder.layer.10.attention", 20)
    'bert.encod…attention'
    """
    if len(text) <= letters:
        return text
    tail = (letters - 1) // 2
    return f"{text[: letters - 1 - tail]}…{text[len(text) - tail :]}"


def _label_modules(axes: Axes, costs: CostTable, width: float) -> int:
    """Names modules along the axis, as deep as there is room for; returns the length of the longest name."""
    most = int(width / _INCHES_PER_LABEL)
    names = [node.module or node.name for node in costs.nodes]
    depth = max((name.count(".") for name in names), default=0)
    while depth and (len(groups := _groups(names, depth)) > most or _is_ragged(groups)):
        depth -= 1
    groups = _groups(names, depth)
    every = math.ceil(len(groups) / most) if groups else 1
    apart = len(names) / most
    shown: list[tuple[float, str]] = []
    for name, start, end in groups[::every]:
        middle = (start + end) / 2
        if not shown or middle - shown[-1][0] >= apart:
            # The name goes to the left and down from here, and ends where the picture does.
            room = 0.9 * _MARGINS["left"] / (_MARGINS["right"] - _MARGINS["left"]) + middle / len(names)
            letters = int(room * width / (0.7 * _INCHES_PER_LABEL_LETTER))
            shown.append((middle, _fit(name, min(32, letters))))
    axes.set_xticks([middle for middle, _ in shown])
    axes.set_xticklabels(
        [name for _, name in shown], rotation=45, ha="right", rotation_mode="anchor", fontsize=7.5
    )
    axes.tick_params(axis="x", length=3, pad=2)
    return max((len(name) for _, name in shown), default=0)


def _groups(names: Sequence[str], depth: int) -> list[tuple[str, int, int]]:
    """Runs of nodes in the same module, down to a depth: its name, its first node and the one after its last."""
    groups, start = [], 0
    for name, run in groupby(names, key=lambda name: ".".join(name.split(".")[: depth + 1])):
        end = start + sum(1 for _ in run)
        groups.append((name, start, end))
        start = end
    return groups


def _is_ragged(groups: Sequence[tuple[str, int, int]]) -> bool:
    """Whether many modules alternate with the modules inside them: a level less names them once."""
    inside = sum(1 for one, two in pairwise(groups) if one[0].startswith(f"{two[0]}."))
    return 4 * inside > len(groups)
