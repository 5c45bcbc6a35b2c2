"""Rows for people: a table for the terminal, one for the README, and totals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from .harness import CRITERIA, Outcome, Row

SIGNS = {
    Outcome.EXACT: "✓",
    Outcome.ABSENT: "",
    Outcome.REFUSED: "refused",
    Outcome.CRASHED: "crash",
    Outcome.WRONG: "WRONG",
}
PIPELINING = {"E": 38, "T": 39, "G": 39, "B": 20, "S": 4, "K": 11, "O": 0}
"""Of the 58 models, for how many each criterion holds with `torch.distributed.pipelining`; see the README."""

STYLES = {Outcome.EXACT: "green", Outcome.REFUSED: "yellow", Outcome.CRASHED: "red", Outcome.WRONG: "bold red"}


def line(row: Row) -> str:
    """A row in one line, with rich's markup."""
    signs = [f"{letter} {_styled(row.outcomes[letter])}" for letter in CRITERIA if SIGNS[row.outcomes[letter]]]
    return f"{row.name:42} {row.seconds:5.1f} s  {' '.join(signs)}"


def terminal_table(rows: Sequence[Row]) -> Table:
    """All rows for the terminal."""
    table = Table("model", "family", *CRITERIA, title="fxsplit against the unsplit model", title_justify="left")
    for row in rows:
        table.add_row(row.name, row.family, *(_styled(row.outcomes[letter]) for letter in CRITERIA))
    return table


def update_readme(path: Path, groups: Mapping[str, Sequence[Row]]) -> None:
    """Puts totals and rows into a README, between the comments that mark their places."""
    text = path.read_text(encoding="utf-8")
    rows = [row for members in groups.values() for row in members]
    for name, table in (("totals", totals_table(groups)), ("rows", markdown_table(rows))):
        place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
        text = place.sub(f"\n{table}\n\n", text)
    path.write_text(text, encoding="utf-8")


def totals_table(groups: Mapping[str, Sequence[Row]]) -> str:
    """Totals of each group, the first beside what was measured of torch.distributed.pipelining."""
    heads = ["fxsplit, the 58", "pipelining, the 58", *(f"fxsplit, {name}" for name in list(groups)[1:])]
    lines = [f"| criterion | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for letter, what in CRITERIA.items():
        cells = [_count(rows, letter) for rows in groups.values()]
        cells.insert(1, f"{PIPELINING[letter]} of 58" if letter in PIPELINING else "not measured")
        lines.append(f"| **{letter}** {what} | {' | '.join(cells)} |")
    for what, letters, measured in (("E T G B S K", "ETGBSK", "0 of 58"), ("all", "".join(CRITERIA), "0 of 58")):
        cells = [f"{_holding(rows, letters)} of {len(rows)}" for rows in groups.values()]
        cells.insert(1, measured)
        lines.append(f"| {what} together | {' | '.join(cells)} |")
    wrong = [sum(Outcome.WRONG in row.outcomes.values() for row in rows) for rows in groups.values()]
    lines.append(f"| models with other numbers and no error | {wrong[0]} | 34 | {wrong[1]} |")
    exact = [f"{sum(row.gradients_exact for row in rows)} of {len(rows)}" for rows in groups.values()]
    return "\n".join([*lines, f"| gradients equal bit for bit | {exact[0]} | 38 of 58 | {exact[1]} |"])


def markdown_table(rows: Sequence[Row]) -> str:
    """All rows for a README."""
    lines = [f"| model | family | {' | '.join(CRITERIA)} |", "|---|---|" + ":-:|" * len(CRITERIA)]
    for row in rows:
        signs = (SIGNS[row.outcomes[letter]] for letter in CRITERIA)
        lines.append(f"| {row.name} | {row.family} | {' | '.join(signs)} |")
    return "\n".join(lines)


def totals(rows: Sequence[Row]) -> str:
    """For how many models each criterion holds, of those to which it applies."""
    lines = [f"every criterion: {sum(row.passed for row in rows)} of {len(rows)} models"]
    for letter, what in CRITERIA.items():
        found = [row.outcomes[letter] for row in rows if row.outcomes[letter] is not Outcome.ABSENT]
        failed = [
            f"{found.count(outcome)} {outcome}" for outcome in Outcome if outcome.failed and outcome in found
        ]
        counts = f"{found.count(Outcome.EXACT)} of {len(found)}"
        lines.append(f"{letter} {what}: {', '.join([counts, *failed])}")
    exact = sum(row.gradients_exact for row in rows)
    return "\n".join([*lines, f"  of these, gradients equal bit for bit: {exact}"])


def failures(rows: Sequence[Row]) -> str:
    """What failed and how, one error a line."""
    lines = []
    for row in rows:
        by_error: dict[str, str] = {}
        for letter, error in row.failures.items():
            by_error[error] = by_error.get(error, "") + letter
        lines += [f"{row.name} {letters}: {error}" for error, letters in by_error.items()]
    return "\n".join(lines)


def _count(rows: Sequence[Row], letter: str) -> str:
    found = [row.outcomes[letter] for row in rows if row.outcomes[letter] is not Outcome.ABSENT]
    return f"{found.count(Outcome.EXACT)} of {len(found)}"


def _holding(rows: Sequence[Row], letters: str) -> int:
    return sum(not any(row.outcomes[letter].failed for letter in letters) for row in rows)


def _styled(outcome: Outcome) -> str:
    style = STYLES.get(outcome)
    return f"[{style}]{SIGNS[outcome]}[/]" if style else SIGNS[outcome]
