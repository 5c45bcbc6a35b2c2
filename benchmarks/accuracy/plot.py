"""The picture: accuracy against what crosses the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from .configs import FAMILIES
from .report import BASELINE, Result

INK, GRID = "#2b2b2b", "#d9d9d9"
COLORS = dict(zip(FAMILIES, ("#3b6fb6", "#c9812a", "#4d9a4f", "#8a5fb0", "#b8434e"), strict=True))
MARKERS = dict(zip(FAMILIES, "osD^v", strict=True))
LOWEST = 6.0
"""Points below no compression that the picture shows; what is lower stands on its lower edge."""

PLACES = [
    (dx, dy, side)
    for reach in range(0, 16)
    for dy in dict.fromkeys((10 * reach, -10 * reach))
    for dx, side in ((7, "left"), (-7, "right"))
]
"""Where a label may stand: points to the side and up, and its alignment; the nearest first."""


def draw(found: Sequence[Result], path: Path) -> None:
    """One dot a configuration, with the spread over the seeds and its name."""
    figure = Figure(figsize=(10, 6.6), dpi=130)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = [result for result in found if result.accuracy.values]
    baseline = next((result for result in shown if result.config.name == BASELINE), None)
    dots = [result for result in shown if result is not baseline]
    best = max(result.accuracy.mean for result in shown)
    lowest = min((r.accuracy.mean - (r.accuracy.spread or 0.0) for r in dots), default=best)
    floor = max(best - LOWEST, min(lowest, best - 1.0), 0.0)
    if baseline is not None:
        _draw_baseline(axes, baseline)
    for family in FAMILIES:
        members = [result for result in dots if result.config.family == family]
        if members:
            _draw_family(axes, family, members, floor)
    _dress(axes, dots, floor, best)
    figure.tight_layout()
    canvas.draw()  # type: ignore[no-untyped-call]
    _label(axes, canvas.get_renderer(), dots, floor)  # type: ignore[no-untyped-call]
    figure.savefig(path)


def _draw_baseline(axes: Axes, baseline: Result) -> None:
    mean, spread = baseline.accuracy.mean, baseline.accuracy.spread or 0.0
    axes.axhspan(mean - spread, mean + spread, color=INK, alpha=0.08, linewidth=0)
    axes.axhline(mean, color=INK, linewidth=1.0, label=f"no compression: {baseline.accuracy} %")


def _draw_family(axes: Axes, family: str, members: Sequence[Result], floor: float) -> None:
    axes.errorbar(
        [result.wire_mean for result in members],
        [max(result.accuracy.mean, floor) for result in members],
        yerr=[(result.accuracy.spread or 0.0) * (result.accuracy.mean >= floor) for result in members],
        fmt=MARKERS[family],
        color=COLORS[family],
        markersize=6,
        elinewidth=1.0,
        capsize=2.5,
        label=family,
        zorder=3,
    )


def _dress(axes: Axes, dots: Sequence[Result], floor: float, best: float) -> None:
    axes.set_xscale("log")
    ratios = [result.wire_mean for result in dots] or [1.0]
    axes.set_xlim(min(ratios) / 1.5, max(ratios) * 1.7)
    ticks = [
        tick for tick in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 1.0) if tick >= min(ratios) / 1.5
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(ratios) / 1.5, max(ratios) * 1.7)
    margin = 0.06 * (best - floor)
    axes.set_ylim(floor - margin, best + 2 * margin)
    axes.set_xlabel("bytes on the wire over bytes of the tensors, both cuts, both directions", color=INK)
    axes.set_ylabel("test accuracy, %", color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6)


def _label(axes: Axes, renderer: RendererAgg, dots: Sequence[Result], floor: float) -> None:
    """A name beside each dot, where it covers no other name and no dot, if there is such a place."""
    inside, taken = axes.get_window_extent(renderer), list[Bbox]()
    positions = [(result, (result.wire_mean, max(result.accuracy.mean, floor))) for result in dots]
    for _, point in positions:
        x, y = axes.transData.transform(point)
        taken.append(Bbox.from_bounds(x - 7, y - 7, 14, 14))
    for result, point in sorted(positions, key=lambda each: (each[1][0], -each[1][1])):
        below = result.accuracy.mean < floor
        text = f"{result.config.name} ({result.accuracy.mean:.1f} %)" if below else result.config.name
        color = COLORS[result.config.family]
        for dx, dy, side in PLACES:
            label = axes.annotate(
                text, point, (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=7, color=color,
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6} if dy else None,
            )  # fmt: skip
            label.update_positions(renderer)
            extent = Text.get_window_extent(label, renderer)  # without the line to the dot
            if inside.contains(*extent.min) and inside.contains(*extent.max) and not extent.count_overlaps(taken):
                break
            label.remove()
        else:
            label = axes.annotate(
                text, point, (7, 0), textcoords="offset points", va="center", fontsize=7, color=color
            )
            extent = label.get_window_extent(renderer)
        taken.append(extent)
