"""Measured links as a file: JSON, for plans that are made later."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fxsplit.errors import PlanError
from fxsplit.planning.document import SIZE_LIMIT, Reader, integer, list_of, parse_json, read_object
from fxsplit.planning.forecast import PlannedLink, read_link
from fxsplit.planning.links import Link

_VERSION = 1


def save_links(links: Mapping[tuple[str, str], Link], path: str | os.PathLike[str]) -> None:
    """Writes links as `fxsplit.probe` measured them.

    Raises:
        PlanError: the file cannot be written.
    """
    rows = [asdict(PlannedLink.of(*pair, link)) for pair, link in links.items()]
    try:
        Path(path).write_text(json.dumps({"version": _VERSION, "links": rows}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise PlanError("the links cannot be written", where=path, found=error.strerror) from error


def load_links(path: str | os.PathLike[str]) -> dict[tuple[str, str], Link]:
    """The links of a file.

    Raises:
        PlanError: it cannot be read, or is damaged.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(SIZE_LIMIT).decode("utf-8")
        data = read_object(parse_json(text), "links", _READERS)
    except OSError as error:
        raise PlanError("the links cannot be read", where=path, found=error.strerror) from error
    except (PlanError, UnicodeDecodeError) as error:
        found = error.found if isinstance(error, PlanError) else str(error)
        allowed = error.allowed if isinstance(error, PlanError) else "UTF-8"
        hint = "fxsplit probe --save FILE"
        what = "the file of links is damaged"
        raise PlanError(what, where=path, found=found, allowed=allowed, hint=hint) from error
    rows: tuple[PlannedLink, ...] = data["links"]
    return {(row.sender, row.receiver): Link(row.bytes_per_s, row.latency_s, row.origin) for row in rows}


_READERS: Mapping[str, Reader[Any]] = {"version": integer(_VERSION), "links": list_of(read_link)}
