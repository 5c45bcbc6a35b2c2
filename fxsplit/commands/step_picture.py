"""A picture of a step: one row a thread and link, one bar for each piece of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLORS = {
    "F": "#4c78a8",
    "B": "#f58518",
    "I": "#ffbf79",
    "W": "#eeca3b",
    "loss": "#b279a2",
    "encode": "#72b7b2",
    "decode": "#54a24b",
    "send": "#9d9da1",
    "reduce": "#e45756",
}
_WORDS = {"F": "forward", "B": "backward", "I": "input gradients", "W": "weight gradients", "reduce": "all-reduce"}


def save_step(events: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the last step of some and writes it.

    Args:
        events: as `fxsplit.runtime.timeline.events` makes them.
        path: of the picture; its ending is the format.
    """
    labels = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [e for e in events if e["ph"] == "X" and e["cat"] in COLORS]
    starts = [e["ts"] for e in spans if e["cat"] == "F" and e["args"] == {"stage": 0, "micro-batch": 0}]
    begin = max(starts, default=0.0)
    spans = [e for e in spans if e["ts"] >= begin]
    rows = sorted({(e["pid"], e["tid"]) for e in spans})
    figure = Figure(figsize=(11, 0.5 * len(rows) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for event in spans:
        row = rows.index((event["pid"], event["tid"]))
        left, width = (event["ts"] - begin) / 1e3, event["dur"] / 1e3
        axes.barh(row, width, left=left, height=0.8, color=COLORS[event["cat"]], edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(rows)), [f"{labels[pid, None]}: {labels[pid, tid]}" for pid, tid in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms from the step's first forward")
    shown = dict.fromkeys(event["cat"] for event in spans)
    patches = [Patch(color=COLORS[kind], label=_WORDS.get(kind, kind)) for kind in COLORS if kind in shown]
    axes.legend(handles=patches, ncols=len(patches), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
