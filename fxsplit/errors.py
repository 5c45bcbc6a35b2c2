"""Errors of fxsplit: what went wrong, where, what was found, what is allowed and what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Self


class FxsplitError(Exception):
    """The one root of every error that fxsplit raises on purpose.

    Args:
        what: one sentence: what is wrong.
        where: the node, module, source line, edge or worker concerned.
        found: what was found there.
        allowed: what would have been accepted.
        hint: the next thing to try.

    >>> print(CompressorError("unknown compressor", found="sortqant8", allowed="none, sortquant4-16"))
    unknown compressor
      found:   sortqant8
      allowed: none, sortquant4-16
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        allowed: object = None,
        hint: str | None = None,
    ) -> None:
        details = (("where", where), ("found", found), ("allowed", allowed), ("try", hint))
        lines = [f"  {label + ':':<8} {detail}" for label, detail in details if detail is not None]
        super().__init__("\n".join([what, *lines]))
        self.what = what
        self.where = where
        self.found = found
        self.allowed = allowed
        self.hint = hint

    def at(self, place: str) -> Self:
        """The same error, said to be at a place."""
        where = place if self.where is None else f"{place}; {self.where}"
        return type(self)(self.what, where=where, found=self.found, allowed=self.allowed, hint=self.hint)


class TraceError(FxsplitError):
    """The model cannot be traced, or its trace does not reproduce it."""


class GuardError(TraceError):
    """A batch takes another way through the model than the one that was recorded.

    Attributes:
        micro_batch: which one, if it was in a pipeline.
    """

    micro_batch: int | None = None


class PlanError(FxsplitError):
    """Cuts, devices or a saved plan do not fit the model."""


class BudgetError(PlanError):
    """No plan satisfies the budget; the message names the binding line."""


class CompressorError(FxsplitError):
    """An unknown compressor, a wrong argument of one, or a tensor it does not take."""


class PassError(FxsplitError):
    """A graph pass broke its contract, or was given a graph it does not take."""


class DeviceError(FxsplitError):
    """A device or worker that does not exist here."""


class SnapshotError(FxsplitError):
    """A snapshot cannot be written, or what is read is none, or is damaged."""


class InputError(FxsplitError):
    """A call of the pipeline with inputs it cannot take."""


class PipelineError(FxsplitError):
    """The pipeline cannot do what was asked in its present state."""


class WorkerError(PipelineError):
    """A worker died, did not start, or raised an exception."""


class WorkerLost(WorkerError):
    """A worker died, hangs, or cannot be reached.

    Attributes:
        worker: its name.
        stage: what it was at when it was last heard of; None if that was no action of a stage.
        micro_batch: the same.
        cause: how it was lost, in words.
    """

    worker: str = ""
    stage: int | None = None
    micro_batch: int | None = None
    cause: str = ""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `name`, for the hint of an error; all of them if none is like it and they are few.

    >>> nearest("featurs.1", ["features.0", "features.1", "classifier"])
    'features.1, features.0'
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.6)
    return ", ".join(close or names[:12])
