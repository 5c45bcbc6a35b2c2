"""The picture: throughput through each compressor, a line at that without any."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

INK, GRID, COLOUR, PLAIN = "#2b2b2b", "#d9d9d9", "#3b6fb6", "#555555"


def draw(rows: Sequence[Mapping[str, Any]], batch: int, path: Path) -> None:
    """Bars of the medians with their spread."""
    figure = Figure(figsize=(8.0, 1.2 + 0.3 * len(rows)), dpi=130)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        rates = [batch / seconds for seconds in row["seconds"]]
        if not rates:
            axes.text(0, place, " fails", va="center", fontsize=7, color=INK)
            continue
        middle = statistics.median(rates)
        axes.barh(place, middle, color=PLAIN if row["name"] == "none" else COLOUR, height=0.7)
        axes.plot([min(rates), max(rates)], [place, place], color=INK, linewidth=1.5)
        if row["name"] == "none":
            axes.axvline(middle, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("images / s (median of the blocks, line: least to most)", fontsize=8)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
