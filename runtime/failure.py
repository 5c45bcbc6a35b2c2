"""Exceptions on workers, as the client gets to know them."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fxsplit.errors
from fxsplit.errors import FxsplitError, GuardError, WorkerError, WorkerLost
from fxsplit.runtime.transport import LostWorker


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
    shapes: str | None = None

    @classmethod
    def of(
        cls, worker: str, place: str, micro_batch: int | None, error: BaseException, shapes: str | None = None
    ) -> Failure:
        """Describes an exception that is being handled.

        Args:
            worker: where it was raised.
            place: what that worker was at.
            micro_batch: the same, if it was at one.
            error: the exception.
            shapes: of the inputs of the stage, if it had them.
        """
        details = None
        if isinstance(error, FxsplitError):
            details = {k: _text(getattr(error, k)) for k in ("what", "where", "found", "allowed", "hint")}
        text = traceback.format_exc()
        return cls(worker, place, micro_batch, type(error).__name__, str(error), details, text, shapes)


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
        found=f"inputs {result.shapes}" if result.shapes else None,
        hint=f"the traceback of the worker:\n{result.traceback}",
    )


def loss_of(lost: LostWorker, hint: str) -> WorkerLost:
    """The error of the client that has lost a worker.

    Args:
        lost: which, and how.
        hint: what to do.
    """
    place = None if lost.place is None else f"last heard of at: {lost.place}"
    error = WorkerLost(f"lost a worker: worker {lost.name}, {lost.cause}", where=place, hint=hint)
    error.worker, error.cause = lost.name, lost.cause
    if lost.place is not None:
        error.stage, error.micro_batch = lost.place.stage, lost.place.micro_batch
    return error
