"""What a user asks of snapshots."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fxsplit.errors import SnapshotError


@dataclass(frozen=True)
class Snapshots:
    """Snapshots of a training, from which it goes on when a worker is lost, or when the script is run again.

    A snapshot is taken at a step of an optimizer, and written while training goes on. Steps after the newest one
    are kept in the client's memory, with their batches, and done again when a worker is lost.

    Args:
        directory: where; made if it is not there. One training has it for itself.
        every: optimizer steps between two snapshots, at most.
        keep: how many are kept; older ones are deleted.
        replay_s: one is taken earlier when the steps since the last would take longer than this to do again, as
            long as that costs no more than 1 % of the time.
        replay_bytes: one is taken earlier when the batches since the last take more memory than this.
        resume: whether a new pipeline goes on from the newest snapshot in the directory; else it has to be empty.

    Raises:
        SnapshotError: a number makes no sense.
    """

    directory: str | os.PathLike[str]
    every: int = 50
    keep: int = 3
    replay_s: float = 5.0
    replay_bytes: int = 1 << 30
    resume: bool = True

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        for name, least in (("every", 1), ("keep", 1), ("replay_s", 0), ("replay_bytes", 0)):
            value = getattr(self, name)
            is_number = isinstance(value, int | float if name == "replay_s" else int)
            if not is_number or isinstance(value, bool) or not value >= least:
                raise SnapshotError(
                    f"not a number for Snapshots({name}=...)", found=repr(value), allowed=f"{least} or more"
                )
        if not isinstance(self.directory, str | os.PathLike) or not os.fspath(self.directory):
            raise SnapshotError("not a directory", where="Snapshots(directory=...)", found=repr(self.directory))
