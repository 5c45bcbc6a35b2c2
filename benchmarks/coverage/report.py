"""Rows for people: a table for the terminal, one for the README, and totals."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .harness import CRITERIA, Outcome, Row

SIGNS = {
    Outcome.EXACT: "✓",
    Outcome.ABSENT: "",
    Outcome.REFUSED: "refused",
    Outcome.CRASHED: "crash",
    Outcome.WRONG: "WRONG",
}
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


def _styled(outcome: Outcome) -> str:
    style = STYLES.get(outcome)
    return f"[{style}]{SIGNS[outcome]}[/]" if style else SIGNS[outcome]
