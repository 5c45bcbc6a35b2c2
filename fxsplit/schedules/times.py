"""What the work of one micro-batch takes: the numbers that schedules are simulated with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class StageTimes:
    """One stage, for one micro-batch.

    Attributes:
        forward_s: seconds of its forward.
        input_s: of a backward in two parts, seconds of the one that the stage before waits for.
        weight_s: seconds of the other part.
        live_bytes: what is kept from the forward to the end of the backward.
        backward_s: seconds of a backward in one piece; those of both parts if not given.
        reduce_s: seconds of the all-reduce of its gradients, once a step, if it is replicated.
    """

    forward_s: float
    input_s: float
    weight_s: float
    live_bytes: int = 1
    backward_s: float = -1.0
    reduce_s: float = 0.0

    def __post_init__(self) -> None:
        if self.backward_s < 0:
            object.__setattr__(self, "backward_s", self.input_s + self.weight_s)


@dataclass(frozen=True)
class Hop:
    """All that one stage sends to another for one micro-batch, in one direction.

    Attributes:
        encode_s: seconds of the sender's encoder.
        wire_s: seconds that it occupies the link.
        latency_s: seconds that it is under way beyond that.
        decode_s: seconds of the receiver's decoder.
    """

    encode_s: float = 0.0
    wire_s: float = 0.0
    latency_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Times:
    """What a schedule may know of stages and links.

    Attributes:
        stages: one entry a stage.
        forward: (sending stage, receiving stage) -> what its activations take; no entry: no time.
        backward: the same for gradients, under the same keys: (made by, used by), as the activations go.
    """

    stages: tuple[StageTimes, ...]
    forward: Mapping[tuple[int, int], Hop] = field(default_factory=dict)
    backward: Mapping[tuple[int, int], Hop] = field(default_factory=dict)

    @classmethod
    def unit(cls, stages: int) -> Times:
        """Equal stages, a backward twice as long as a forward, links that take no time."""
        return cls((StageTimes(1.0, 1.0, 1.0),) * stages)

    @cached_property
    def neighbours(self) -> tuple[list[list[int]], list[list[int]]]:
        """For each stage, those that send it activations and those that get its own, skip connections included."""
        count = len(self.stages)
        sources: list[set[int]] = [{stage - 1} if stage else set() for stage in range(count)]
        targets: list[set[int]] = [{stage + 1} if stage + 1 < count else set() for stage in range(count)]
        for source, target in self.forward:
            sources[target].add(source)
            targets[source].add(target)
        return [sorted(each) for each in sources], [sorted(each) for each in targets]
