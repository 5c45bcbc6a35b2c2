"""Where a training loop is in its data, so that it can be taken up there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxsplit.runtime.randomness import process_states, set_process_states

T = TypeVar("T")


class Loop:
    """Counts passes over the data and batches in them, and skips those that a snapshot has seen.

    Args:
        device: the client's, whose generators are put back.

    Attributes:
        is_active: whether a pass is under way.
        between: called between two batches.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_active = False
        self.between: Callable[[], None] = lambda: None
        self._device = device
        self._passes = 0
        self._batches = 0
        self._began: tuple[Tensor, ...] = ()
        self._target: tuple[int, int] | None = None
        self._states: tuple[Sequence[Tensor], Sequence[Tensor]] = (), ()

    def position(self) -> dict[str, int]:
        """Passes begun, and batches of the last one that were given out."""
        return {"passes": self._passes, "batches": self._batches}

    def random_states(self) -> dict[str, tuple[Tensor, ...]]:
        """The generators' states now, and as this pass began."""
        return {"commit": process_states(self._device), "pass": self._began}

    def resume(self, position: Any, began: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """Goes on at a position, with the generators as they were there.

        Args:
            position: as `position` gave it.
            began: the generators' states as that pass began.
            now: the same, at that position.
        """
        if now:
            set_process_states(now, self._device)
        if isinstance(position, dict) and position.get("passes"):
            self._target = int(position["passes"]), int(position["batches"])
            self._states = began, now

    def over(self, batches: Iterable[T]) -> Iterator[T]:
        """One pass over the data, without what was done before."""
        self._passes += 1
        self._batches, skipped = 0, 0
        if self._target is not None and self._passes < self._target[0]:
            return
        resumes = self._target is not None
        if self._target is not None:
            skipped, self._target = self._target[1], None
            set_process_states(self._states[0], self._device)
        self._began = process_states(self._device)
        iterator = iter(batches)
        next(islice(iterator, skipped, skipped), None)  # ends with the data, whatever number the snapshot has
        self._batches = skipped
        if resumes:
            set_process_states(self._states[1], self._device)
        try:
            self.is_active = True
            for item in iterator:
                self._batches += 1
                yield item
                self.between()
        finally:
            self.is_active = False
