"""Exceptions on workers, as the client gets to know them."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fxsplit.errors
from fxsplit.errors import FxsplitError, GuardError, WorkerError


@dataclass(frozen=True)
class Failure:
    """An exception on a worker, as the client gets to know it."""

    worker: str
    place: str
    micro_batch: int | None
    kind: str
    message: str
    details: Mapping[str, Any] | None
    traceback: str

    @classmethod
    def of(cls, worker: str, place: str, micro_batch: int | None, error: BaseException) -> Failure:
        """Describes an exception that is being handled."""
        details = None
        if isinstance(error, FxsplitError):
            details = {k: _text(getattr(error, k)) for k in ("what", "where", "found", "allowed", "hint")}
        return cls(worker, place, micro_batch, type(error).__name__, str(error), details, traceback.format_exc())


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def raise_failure(result: Any) -> None:
    """Raises what happened on a worker as an error of the client."""
    if not isinstance(result, Failure):
        return
    place = f"worker {result.worker}, {result.place}"
    if result.details is not None:
        details = dict(result.details)
        kind = getattr(fxsplit.errors, result.kind, FxsplitError)
        own = details.pop("where")
        what = details.pop("what") or ""
        error = kind(what, where=f"{place}; {own}" if own else place, **details)
        if isinstance(error, GuardError):
            error.micro_batch = result.micro_batch
        raise error
    raise WorkerError(
        f"{result.kind} on worker {result.worker}: {result.message}",
        where=place,
        hint=f"the traceback of the worker:\n{result.traceback}",
    )
