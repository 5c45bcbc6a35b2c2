"""The picture: throughput of each contender, a panel a task."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

INK, GRID = "#2b2b2b", "#d9d9d9"
COLOURS = {"one": "#9a9a9a", "DDP": "#555555", "torch": "#c9812a", "fxsplit": "#3b6fb6"}


def draw(tasks: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str], path: Path) -> None:
    """Bars of the medians with their spread; a line at DDP."""
    most = max(len(rows) for rows in tasks.values())
    figure = Figure(figsize=(10.0, 0.9 + (0.7 + 0.3 * most) * len(tasks)), dpi=130)
    panels = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    for axes, (name, rows) in zip(panels, tasks.items(), strict=True):
        for place, row in enumerate(rows):
            rates = [row["batch"] / seconds for seconds in row["seconds"]]
            if not rates:
                axes.text(0, place, " fails", va="center", fontsize=7, color=INK)
                continue
            middle = statistics.median(rates)
            colour = COLOURS[row["name"].replace(",", " ").split()[0]]
            axes.barh(place, middle, color=colour, height=0.7)
            axes.plot([min(rates), max(rates)], [place, place], color=INK, linewidth=1.5)
            if row["name"] == "DDP":
                axes.axvline(middle, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(titles.get(name, name), fontsize=9, loc="left")
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[-1].set_xlabel("samples / s (median of the blocks, line: least to most)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
