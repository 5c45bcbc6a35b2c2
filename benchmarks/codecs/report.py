"""Results of several runs, kept as JSON beside the README, and put into it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.readme import fill

from .tables import (
    about,
    best_codecs,
    cost_tables,
    device_name,
    error_about,
    error_table,
    hivemind_table,
    speed_tables,
    target_lines,
)
from .targets import judged

README = Path(__file__).with_name("README.md")
RUNS = ("cpu", "cuda", "error")
"""What there can be results of, one file each."""


def write_report(added: Sequence[Path], readme: Path = README) -> None:
    """Adds runs to those beside the README, the later of two of one kind, and rewrites tables and pictures.

    Args:
        added: files that `speed --json` and `error --json` wrote.
        readme: with the marks of the sections; pictures go beside it, and runs into `results` there.

    Raises:
        ValueError: there is nothing to report, or the README lacks a mark.
    """
    folder = readme.with_name("results")
    folder.mkdir(exist_ok=True)
    for path in added:
        found = json.loads(path.read_text(encoding="utf-8"))
        _file(folder, "error" if found.get("error") is True else found["device"]).write_text(
            json.dumps(found, indent=1) + "\n", encoding="utf-8"
        )
    kept = {name: json.loads(_file(folder, name).read_text()) for name in RUNS if _file(folder, name).exists()}
    if not kept:
        raise ValueError(f"no results in {folder}, and none were added")
    _report_speed([kept[name] for name in ("cpu", "cuda") if name in kept], readme)
    if "error" in kept:
        _report_error(kept["error"], readme)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _report_speed(runs: Sequence[dict[str, Any]], readme: Path) -> None:
    from .plot import draw_speed  # matplotlib may be missing where runs are made

    if not runs:
        return
    draw_speed(runs, readme.with_name("speed.png"))
    machines = "\n".join(f"- {about(found)}" for found in runs)
    fill(readme, "speed", f"{machines}\n\n{speed_tables(runs)}")
    fill(readme, "costs", cost_tables(runs))
    judgements = (f"{device_name(found)}:\n\n{target_lines(judged(found))}" for found in runs)
    fill(readme, "targets", "\n\n".join(judgements))
    if runs[0]["device"] == "cpu":
        fill(readme, "hivemind", hivemind_table(runs[0]))


def _report_error(found: dict[str, Any], readme: Path) -> None:
    from .plot import draw_error

    draw_error(found, readme.with_name("error.png"))
    fill(readme, "error", f"{error_about(found)}\n\n{error_table(found)}")
    fill(readme, "best", best_codecs(found))
