"""What a plan remembers of how it was predicted: links, hops, and what it was compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fxsplit.planning.document import Reader, boolean, integer, number, positive, read_object, text
from fxsplit.planning.links import Link
from fxsplit.schedules import Hop, Times


@dataclass(frozen=True)
class PlannedLink:
    """One direction between two workers, as it was assumed.

    Attributes:
        sender: the worker that sends.
        receiver: the worker that receives.
        bytes_per_s: bandwidth.
        latency_s: seconds of a message beyond its bytes.
        origin: 'given', 'measured' or 'estimated'.
    """

    sender: str
    receiver: str
    bytes_per_s: float
    latency_s: float
    origin: str

    @classmethod
    def of(cls, sender: str, receiver: str, link: Link) -> PlannedLink:
        """Of a link of the planner."""
        return cls(sender, receiver, link.bytes_per_s, link.latency_s, link.origin)


@dataclass(frozen=True)
class PlannedHop:
    """All that one stage sends to another for one micro-batch, in one direction.

    Attributes:
        source: the stage that makes the values.
        target: the stage that uses them.
        is_backward: whether it is their gradients, which go from `target` to `source`.
        encode_s: seconds of the sender's encoder.
        wire_s: seconds that it occupies the link.
        latency_s: seconds that it is under way beyond that.
        decode_s: seconds of the receiver's decoder.
    """

    source: int
    target: int
    is_backward: bool
    encode_s: float
    wire_s: float
    latency_s: float
    decode_s: float

    @property
    def hop(self) -> Hop:
        """For a simulation."""
        return Hop(self.encode_s, self.wire_s, self.latency_s, self.decode_s)


@dataclass(frozen=True)
class Alternative:
    """Another plan that was looked at beside the best of those that were asked for.

    Attributes:
        what: 'all on cpu', 'no compression', 'the raw input sent'.
        step_s: its predicted seconds.
        keeps_budget: whether it keeps the budget.
    """

    what: str
    step_s: float
    keeps_budget: bool


def hops_of(times: Times, stages: int) -> tuple[PlannedHop, ...]:
    """The hops between the stages, forward and backward; what goes on to the client is left out."""
    return tuple(
        PlannedHop(*pair, is_backward, hop.encode_s, hop.wire_s, hop.latency_s, hop.decode_s)
        for is_backward, hops in ((False, times.forward), (True, times.backward))
        for pair, hop in sorted(hops.items())
        if pair[1] < stages
    )


def hops_by_pair(hops: Iterable[PlannedHop], *, is_backward: bool) -> dict[tuple[int, int], Hop]:
    """The hops of one direction, for a simulation."""
    return {(each.source, each.target): each.hop for each in hops if each.is_backward == is_backward}


_LINK: Mapping[str, Reader[Any]] = {
    "sender": text, "receiver": text, "bytes_per_s": positive, "latency_s": number, "origin": text,
}  # fmt: skip
_HOP: Mapping[str, Reader[Any]] = {
    "source": integer(0), "target": integer(1), "is_backward": boolean,
    "encode_s": number, "wire_s": number, "latency_s": number, "decode_s": number,
}  # fmt: skip
_ALTERNATIVE: Mapping[str, Reader[Any]] = {"what": text, "step_s": number, "keeps_budget": boolean}


def read_link(data: object, where: str) -> PlannedLink:
    """A link of a saved plan."""
    return PlannedLink(**read_object(data, where, _LINK))


def read_hop(data: object, where: str) -> PlannedHop:
    """A hop of a saved plan."""
    return PlannedHop(**read_object(data, where, _HOP))


def read_alternative(data: object, where: str) -> Alternative:
    """An alternative of a saved plan."""
    return Alternative(**read_object(data, where, _ALTERNATIVE))
