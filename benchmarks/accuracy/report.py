"""Results for people: the table and what follows from it, between the marks of a README."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.readme import fill

from .configs import CONFIGS, PAIRS, Config

README = Path(__file__).with_name("README.md")
PICTURE = "![Test accuracy against bytes on the wire](accuracy.png)"
BASELINE = "none"
UNTRAINED = 20.0
"""Accuracy in percent below which a run counts as not trained: chance is 10."""

LIMITS = (0.5, 1.0, 2.0)
"""Points below no compression for which the fewest bytes are told."""

PROTOCOL = ("epochs", "batch_size", "learning_rate", "weight_decay", "width", "train_images", "test_images")


@dataclass(frozen=True)
class Sample:
    """Values by seed.

    >>> str(Sample({0: 87.0, 1: 88.0}))
    '87.50 ± 0.71'
    """

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float | None:
        """Their standard deviation (of a sample), if there are two or more."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def minus(self, other: Sample) -> Sample:
        """Differences seed by seed: both began with the same weights and saw the same batches."""
        return Sample({s: v - other.values[s] for s, v in self.values.items() if s in other.values})

    def text(self, form: str = ".2f") -> str:
        """Mean and spread."""
        if not self.values:
            return "-"
        return f"{self.mean:{form}}" + ("" if self.spread is None else f" ± {self.spread:.2f}")

    def __str__(self) -> str:
        return self.text()


@dataclass(frozen=True)
class Result:
    """What was found for one configuration.

    Attributes:
        config: which.
        rows: one a seed.
    """

    config: Config
    rows: Sequence[Mapping[str, Any]]

    @property
    def accuracy(self) -> Sample:
        """Test accuracy in percent, of the runs that came to their end."""
        return Sample({row["seed"]: row["accuracy"] for row in self.rows if row["accuracy"] is not None})

    @property
    def errors(self) -> list[str]:
        """Why the others did not."""
        return [row["error"] for row in self.rows if row["error"]]

    @property
    def wire(self) -> tuple[float, float]:
        """Wire ratio of activations and of gradients."""
        return self.rows[0]["activation_ratio"], self.rows[0]["gradient_ratio"]

    @property
    def wire_mean(self) -> float:
        """Wire ratio of both directions together."""
        return sum(self.wire) / 2

    @property
    def has_trained(self) -> bool:
        """Whether every run came to its end with more than chance."""
        return not self.errors and min(self.accuracy.values.values(), default=0.0) >= UNTRAINED


def results_of(rows: Iterable[Mapping[str, Any]]) -> list[Result]:
    """The results in the table's order; of two rows for one run the later counts.

    Raises:
        ValueError: there are no rows, or they do not have their protocol in common.
    """
    latest = {(row["config"], row["seed"]): row for row in rows}
    protocols = {json.dumps({name: row[name] for name in PROTOCOL}) for row in latest.values()}
    if len(protocols) != 1:
        raise ValueError(
            f"one protocol for all rows is needed; found: {', '.join(sorted(protocols)) or 'no rows'}"
        )
    groups = {
        config: [row for (name, _), row in sorted(latest.items()) if name == config.name] for config in CONFIGS
    }
    return [Result(config, found) for config, found in groups.items() if found]


def by_protocol(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows that have their protocol in common: first those of the most configurations, then by length."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps({name: row[name] for name in PROTOCOL}), []).append(row)
    by_length = sorted(groups.values(), key=lambda group: -group[0]["epochs"])
    most = max(by_length, key=lambda group: len({row["config"] for row in group}), default=None)
    return sorted(by_length, key=lambda group: group is not most)


def write_report(rows: Sequence[Mapping[str, Any]], readme: Path = README) -> list[Result]:
    """Puts tables and facts into the README, and the rows beside it; returns the results of the main protocol.

    Raises:
        ValueError: there are no rows, or the README lacks the marks.
    """
    studies = [results_of(group) for group in by_protocol(rows)] or [results_of(rows)]
    found, *others = studies
    fill(readme, "results", f"{about(found)}\n\n{PICTURE}\n\n{table(found)}")
    fill(readme, "facts", facts(found))
    fill(readme, "others", "\n\n".join(f"{about(each)}\n\n{table(each)}" for each in others) or "None.")
    lines = (json.dumps(row) for study in studies for result in study for row in result.rows)
    readme.with_name("results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def about(found: Sequence[Result]) -> str:
    """Date, machine and protocol of the rows."""
    rows = [row for result in found for row in result.rows]
    first = rows[0]
    dates = sorted({row["date"] for row in rows})
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    images = ", ".join(
        f"the first {first[f'{split}_images']} {split} images"
        for split in ("train", "test")
        if first[f"{split}_images"] is not None
    )
    width = f", width {first['width']:g}" if first["width"] != 1.0 else ""
    return (
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {machines}. {first['epochs']} epochs, batch "
        f"{first['batch_size']}, peak learning rate {first['learning_rate']:g}, weight decay "
        f"{first['weight_decay']:g}{width}; {images or 'all images'}."
    )


def table(found: Sequence[Result]) -> str:
    """All configurations, one a line."""
    lines = [
        "| configuration | activation | gradient | wire, activation | wire, gradient | test accuracy, % "
        "| difference, points | seeds |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    baseline = _baseline(found)
    for result in found:
        first, accuracy = result.rows[0], result.accuracy
        cells = [result.config.name, f"`{first['activation']}`", f"`{first['gradient']}`"]
        cells += [f"{ratio:.3f}" for ratio in result.wire]
        failed = (
            f"{len(result.errors)} of {len(result.rows)} broke off: {result.errors[0]}" if result.errors else ""
        )
        cells.append("; ".join(filter(None, (str(accuracy) if accuracy.values else "", failed))))
        is_baseline = result.config.name == BASELINE
        cells.append("" if baseline is None or is_baseline else accuracy.minus(baseline).text("+.2f"))
        lines.append(f"| {' | '.join([*cells, str(len(result.rows))])} |")
    return "\n".join(lines)


def facts(found: Sequence[Result]) -> str:
    """What the rows say, in sentences: no number is in them that is not a row's."""
    lines: list[str] = []
    baseline = _baseline(found)
    lines += _least_bytes(found, baseline) if baseline is not None else []
    by_name = {result.config.name: result for result in found}
    pairs = []
    for first, second, how in PAIRS:
        one, other = by_name.get(first), by_name.get(second)
        if one is None or other is None or not (one.has_trained and other.has_trained):
            continue
        difference = one.accuracy.minus(other.accuracy)
        if difference.values:
            ratio = one.wire_mean / other.wire_mean
            pairs.append(f"| {how} | {first} | {second} | {difference.text('+.2f')} | {ratio:.2f} |")
    if pairs:
        lines += ["", "| what is changed | to | from | points | bytes |", "|---|---|---|--:|--:|", *pairs, ""]
    broken = [f"{result.config.name} ({_fate(result)})" for result in found if not result.has_trained]
    lines.append(f"- Did not train: {', '.join(broken)}." if broken else "- Every configuration trained.")
    return "\n".join(lines).strip()


def _least_bytes(found: Sequence[Result], baseline: Sample) -> list[str]:
    lines = []
    for limit in LIMITS:
        near = [
            (result.wire_mean, result, difference)
            for result in found
            if result.config.name != BASELINE and result.has_trained
            for difference in [result.accuracy.minus(baseline)]
            if difference.values and difference.mean >= -limit
        ]
        if not near:
            lines.append(f"- Nothing is within {_points(limit)} of no compression.")
            continue
        ratio, result, difference = min(near, key=lambda each: each[0])
        lines.append(
            f"- Fewest bytes within {_points(limit)} of no compression: {result.config.name}, {ratio:.3f} of the "
            f"bytes of both directions, {difference.text('+.2f')} points."
        )
    return lines


def _points(limit: float) -> str:
    return f"{limit:g} point{'' if limit == 1 else 's'}"


def _fate(result: Result) -> str:
    reached = ", ".join(f"{value:.2f} %" for value in result.accuracy.values.values())
    return "; ".join(filter(None, (reached, *dict.fromkeys(result.errors))))


def _baseline(found: Sequence[Result]) -> Sample | None:
    return next((result.accuracy for result in found if result.config.name == BASELINE), None)
