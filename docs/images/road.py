"""Draws the road from a model to a pipeline: `python docs/images/road.py` writes road.png beside this file."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK = "#22303c"
QUIET = "#6b7a86"
CLIENT = "#e3eef8"
SERVER = "#fdebd8"
CODEC = "#d9730d"
STEPS = ("trace", "analyze", "plan", "rewrite", "split", "run")
PRODUCTS = ("model", "graph", "cost\ntable", "plan", "graph +\ncodecs", "stages", "pipeline")


def box(axes: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str = INK) -> None:
    """A box with round corners around its centre."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=fill, edgecolor=edge, lw=1.3))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """An arrow from one point to another."""
    look = {"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
    axes.annotate("", xy=end, xytext=start, arrowprops=look)


def draw_road(axes: Axes, y: float) -> None:
    """What there is after each step, and the steps between."""
    for index, product in enumerate(PRODUCTS):
        x = 0.75 + 1.75 * index
        box(axes, x, y, 1.2, 0.85, "#f3f5f7")
        axes.text(x, y, product, ha="center", va="center", color=INK, fontsize=11.5, linespacing=1.1)
    for index, step in enumerate(STEPS):
        x = 0.75 + 1.75 * index
        arrow(axes, (x + 0.63, y), (x + 1.12, y))
        axes.text(x + 0.875, y + 0.58, step, ha="center", va="bottom", color=CODEC, fontsize=12, weight="bold")


def draw_stages(axes: Axes, y: float) -> None:
    """A graph of nodes in three stages, with codecs on the edges that cross."""
    stages = (
        (1.40, 2.6, CLIENT, "client: stage 0", ("conv, bn", "encode")),
        (6.00, 5.2, SERVER, "server: stage 1", ("decode", "relu6", "blocks", "encode")),
        (10.60, 2.6, CLIENT, "client: stage 2", ("decode", "classifier")),
    )
    ends: list[tuple[float, float]] = []
    for x, width, fill, title, nodes in stages:
        box(axes, x, y + 0.22, width, 1.56, fill, edge="none")
        axes.text(x - width / 2 + 0.15, y + 0.7, title, ha="left", va="center", color=INK, fontsize=12)
        places = [x + (i - (len(nodes) - 1) / 2) * 1.26 for i in range(len(nodes))]
        for place, node in zip(places, nodes, strict=True):
            is_codec = node in ("encode", "decode")
            box(axes, place, y, 0.98, 0.6, CODEC if is_codec else "white", CODEC if is_codec else INK)
            axes.text(place, y, node, ha="center", va="center", color="white" if is_codec else INK, fontsize=10.5)
        for left, right in itertools.pairwise(places):
            arrow(axes, (left + 0.5, y), (right - 0.5, y))
        ends.append((places[0] - 0.5, places[-1] + 0.5))
    for (_, start), (end, _) in itertools.pairwise(ends):
        arrow(axes, (start, y + 0.1), (end, y + 0.1), CODEC)
        arrow(axes, (end, y - 0.1), (start, y - 0.1), QUIET)


def main() -> None:
    """Writes the picture."""
    figure = Figure(figsize=(10, 4), dpi=160, facecolor="white")
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(0, 12)
    axes.set_ylim(0, 4.8)
    axes.set_axis_off()
    draw_road(axes, 3.75)
    draw_stages(axes, 1.55)
    arrow(axes, (0.3, 0.3), (0.9, 0.3), CODEC)
    axes.text(1.0, 0.3, "values, encoded", va="center", color=QUIET, fontsize=11)
    arrow(axes, (3.9, 0.3), (3.3, 0.3), QUIET)
    axes.text(4.0, 0.3, "their gradients, encoded", va="center", color=QUIET, fontsize=11)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
