"""What the commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from fxsplit.errors import FxsplitError


@contextmanager
def errors_as_exit_status() -> Iterator[None]:
    """Errors in their own words and status 1; Ctrl-C quietly, 130. A closed pipe is typer's: it ends quietly."""
    try:
        yield
    except FxsplitError as error:
        Console(stderr=True, highlight=False).print(Text(str(error), "red"), soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def names_in(text: str) -> list[str]:
    """The entries of a list with commas."""
    return [entry.strip() for entry in text.split(",")]
