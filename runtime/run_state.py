"""What a worker keeps of a forward until its backward."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fxsplit.runtime.graphs import Inspection, Lease
from fxsplit.runtime.live_memory import Held
from fxsplit.runtime.packet import GradientTap
from fxsplit.runtime.randomness import Randomness
from fxsplit.split_backward import SplitBackward
from fxsplit.stage import Edge, Mode


@dataclass
class Saved:
    """What a stage's backward of one micro-batch needs.

    Attributes:
        taps: where the gradients of the inputs come out, if the stage was run as it is.
        values: those that left and lead a gradient back.
        weights: the second part of a backward in two.
        inspection: looks at it, if the stage was run as it is.
        lease: the slot, if it was replayed.
        waiting: the edge of each input whose maker waits for a gradient, then.
        held: what of this is counted, if memory is.
    """

    taps: dict[Edge, GradientTap]
    values: dict[str, Tensor]
    weights: SplitBackward | None = None
    inspection: Inspection | None = None
    lease: Lease | None = None
    waiting: tuple[Edge | None, ...] = ()
    held: list[Held] = field(default_factory=list)


@dataclass
class RunState:
    """One forward of the pipeline that may still be followed by its backward.

    Attributes:
        mode: which graphs run.
        randomness: how stages draw.
        saved: by stage and micro-batch.
    """

    mode: Mode
    randomness: Randomness | None = None
    saved: dict[tuple[int, int], Saved] = field(default_factory=dict)

    @property
    def has_graph(self) -> bool:
        """Whether a graph of autograd's is alive for it."""
        return any(saved.lease is None and (saved.values or saved.weights) for saved in self.saved.values())

    def count(self, stage: int) -> int:
        """The micro-batches that are kept of a stage."""
        return sum(number == stage for number, _ in self.saved)

    def forget(self) -> None:
        """Its backward will not come."""
        for saved in self.saved.values():
            if saved.lease is not None:
                saved.lease.release()
        self.saved.clear()
