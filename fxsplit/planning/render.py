"""A table with a title and a footer, for terminals, for text and for notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 120
_WORDS = ("device", "modules", "plan", "because")  # columns of words stand left, the rest are numbers


@dataclass(frozen=True)
class Report:
    """Cells of text under column names.

    Attributes:
        title: one line above.
        columns: column names.
        rows: as many cells each as there are columns.
        footer: lines below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: str

    def table(self) -> Table:
        """The table for a rich console; no cell is taken for markup."""
        footer = Text(self.footer, justify="left")
        table = Table(title=Text(self.title, "bold"), caption=footer, box=box.SIMPLE_HEAD, title_justify="left")
        for column in self.columns:
            words = column in _WORDS
            table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def text(self) -> str:
        """The table as plain text, at most 120 columns wide, whatever terminal there is."""
        out = StringIO()
        console = Console(file=out, width=_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
        console.print(self.table())
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return self.html()

    def html(self) -> str:
        """The table as HTML; every text is escaped."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        footer = escape(self.footer).replace("\n", "<br>")
        table = f"<table><caption>{escape(self.title)}</caption><tr>{head}</tr>{rows}</table>"
        return f"{table}<p>{footer}</p>"
