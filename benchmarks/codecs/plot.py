"""The pictures: what encode and decode take, and what is lost for how many bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .speed import Found
from .tables import place
from .targets import TARGETS

INK, GRID = "#2b2b2b", "#d9d9d9"
ENCODE, DECODE = "#3b6fb6", "#c9812a"
LEAST_MULTIPLE = 0.1
"""Where bars begin: what is less is as good as nothing."""

STYLES: dict[str, tuple[str, str, str]] = {
    "casts": ("#555555", "P", "none"),
    "uniform": ("#9db7de", "o", "-"),
    "uniform, channel": ("#2f5fa8", "o", "-"),
    "uniform, stochastic": ("#2f5fa8", "x", "none"),
    "sort": ("#e9b872", "s", "-"),
    "sort, 1:1": ("#e9b872", "x", "none"),
    "sort, channel": ("#b8690f", "s", "-"),
    "k-means": ("#3f8f45", "^", "-"),
    "adaptive": ("#b8434e", "D", "--"),
    "top-k": ("#8a5fb0", "v", "-"),
    "power iteration": ("#1a9a9a", "<", "-"),
    "SVD": ("#0d5c5c", ">", ":"),
    "zstd": ("#8c6d4f", "*", "none"),
}
"""Of the families that are drawn: colour, marker, line. Fast quantization lies on sort quantization."""

HIGHEST_ERROR = 1.6
"""What is above stands on the upper edge: there the zero tensor, of error 1, is better."""


def draw_speed(runs: Sequence[Found], path: Path) -> None:
    """A panel each device and kind of memory, a pair of bars each subject, a tick each target."""
    columns = [(found, regime) for found in runs for regime in found["speed"]]
    names = list(dict.fromkeys(name for found in runs for name in found["wire"]))
    figure = Figure(figsize=(3.0 + 3.6 * len(columns), 1.4 + 0.36 * len(names)), dpi=130)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (found, regime) in zip(panels, columns, strict=True):
        _draw_bars(axes, found, regime, names)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="upper right", ncols=3)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path)


def _draw_bars(axes: Axes, found: Found, regime: str, names: Sequence[str]) -> None:
    measured = found["speed"][regime]["subjects"]
    for way, color, offset in (("encode", ENCODE, -0.2), ("decode", DECODE, 0.2)):
        places = [index + offset for index, name in enumerate(names) if name in measured]
        quartiles = [measured[name][way]["multiple"] for name in names if name in measured]
        widths = [max(middle, LEAST_MULTIPLE) for _, middle, _ in quartiles]
        axes.barh(places, widths, height=0.38, color=color, label=way)
        limits = {
            names.index(target.codec) + offset: target.most
            for target in TARGETS[found["device"]]
            if target.of == way and target.codec in names
        }
        for y, (_, middle, _), width in zip(places, quartiles, widths, strict=True):
            limit = limits.get(y, 0.0)
            right = limit if width < limit < 2 * width else width  # no number on a tick
            axes.text(
                right * 1.07, y, f"{middle:.2f}", va="center", fontsize=6.5, color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
            )  # fmt: skip
        axes.vlines(
            list(limits.values()),
            [y - 0.2 for y in limits],
            [y + 0.2 for y in limits],
            color="#b8434e",
            linewidth=2,
            label="the most allowed" if way == "decode" else "",
        )
    axes.set_xscale("log")
    longest = max(value["multiple"][1] for row in measured.values() for value in row.values())
    axes.set_xlim(LEAST_MULTIPLE, 2.2 * longest)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_title(place(found, regime), fontsize=9, color=INK)
    axes.set_xlabel("multiple of a copy", fontsize=8, color=INK)
    _dress(axes)


def draw_error(found: Mapping[str, Any], path: Path) -> None:
    """A panel each kind of tensor, relative error against bits an element, a line each family."""
    kinds = list(found["shapes"])
    rows = -(-(len(kinds) + 1) // 4)
    figure = Figure(figsize=(14, 3.6 * rows), dpi=110)
    panels = list(figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False).flat)
    for axes, kind in zip(panels, kinds, strict=False):
        for family, (color, marker, line) in STYLES.items():
            some = [
                row for row in found["rows"] if row["kind"] == kind and row["family"] == family and "bits" in row
            ]
            axes.plot(
                [row["bits"] for row in some],
                [min(row["error"], HIGHEST_ERROR) for row in some],
                color=color, marker=marker, linestyle=line, markersize=4.5, linewidth=1.2, label=family,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(0.15, 20)
        axes.set_ylim(1.4e-4, HIGHEST_ERROR * 1.15)
        axes.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16], ["1/4", "1/2", "1", "2", "4", "8", "16"])
        axes.set_title(kind, fontsize=10, color=INK)
        axes.tick_params(labelbottom=True)
        _dress(axes)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    panels[len(kinds)].legend(handles, labels, frameon=False, fontsize=9, loc="center")
    figure.supxlabel("bits an element", fontsize=10, color=INK)
    figure.supylabel("norm of the error over norm of the tensor", fontsize=10, color=INK)
    figure.tight_layout()
    figure.savefig(path)


def _dress(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
