"""Links between workers: bandwidth and latency of each direction, given, measured or estimated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fxsplit.planning.budget import Budget, Limits, ends_of
from fxsplit.planning.devices import Placement
from fxsplit.schedules.replicas import JOINT, replicas_of

ESTIMATED, MEASURED, GIVEN = "estimated", "measured", "given"


@dataclass(frozen=True)
class Link:
    """What one direction between two workers is assumed to do; the defaults are estimates for workers on one host.

    Attributes:
        bytes_per_s: bandwidth.
        latency_s: seconds from sending a message to its arrival, beyond its bytes.
        origin: 'given' by the budget, 'measured' by a probe, or 'estimated'.
    """

    bytes_per_s: float = 1e9
    latency_s: float = 3e-4
    origin: str = ESTIMATED


@dataclass(frozen=True)
class Links:
    """The links of all workers.

    Attributes:
        default: of those that are not named.
        pairs: (sending worker, receiving worker) -> their link.
    """

    default: Link = field(default_factory=Link)
    pairs: Mapping[tuple[str, str], Link] = field(default_factory=dict)

    def between(self, sender: str, receiver: str) -> Link:
        """The link from one worker to another; of replicas, the slowest between two of them in each respect."""
        if JOINT not in sender and JOINT not in receiver:
            return self.pairs.get((sender, receiver), self.default)
        ends = [(s, r) for s in replicas_of(sender) for r in replicas_of(receiver) if s != r]
        found = [self.pairs.get(pair, self.default) for pair in ends]
        slowest = min(found, key=lambda link: link.bytes_per_s)
        return replace(slowest, latency_s=max(link.latency_s for link in found))

    def kind(self, one: str, other: str) -> tuple[Link, Link]:
        """Both directions between two workers."""
        return self.between(one, other), self.between(other, one)

    @classmethod
    def of(
        cls,
        budget: Budget,
        placements: Sequence[Placement],
        measured: Mapping[tuple[str, str], Link] | None = None,
    ) -> Links:
        """The links as the budget says, where it says nothing as they were measured, else by estimate.

        A bandwidth or latency of a pair ('cpu -> server/cuda') counts for this direction; one of a device for
        all links of its worker, the slower of two.
        """
        single = cls._said(Link(), budget.bandwidth, budget.latency)
        names: dict[str, set[str]] = {}
        for placement in placements:
            for replica in placement.replicas:
                known = names.setdefault(replica.worker, {replica.worker})
                known |= {replica.spelling, placement.worker, placement.spelling}
        is_named = any(isinstance(line, Mapping) for line in (budget.bandwidth, budget.latency))
        if not measured and not is_named:
            return cls(single)
        pairs = {}
        for sender, receiver in _pairs(names):
            link = (measured or {}).get((sender, receiver), Link())
            rates = list(_values(budget.bandwidth, names[sender], names[receiver]))
            waits = list(_values(budget.latency, names[sender], names[receiver]))
            link = cls._said(link, min(rates, default=None), max(waits, default=None))
            if link != single:
                pairs[sender, receiver] = link
        return cls(single, pairs)

    @staticmethod
    def _said(link: Link, bytes_per_s: Limits, latency_s: Limits) -> Link:
        if isinstance(bytes_per_s, (int, float)):
            link = replace(link, bytes_per_s=float(bytes_per_s), origin=GIVEN)
        if isinstance(latency_s, (int, float)):
            link = replace(link, latency_s=float(latency_s), origin=GIVEN)
        return link


def _pairs(workers: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for sender in workers:
        for receiver in workers:
            if sender != receiver:
                yield sender, receiver


def _values(line: Limits, sender: set[str], receiver: set[str]) -> Iterator[float]:
    """What a line of the budget says of one direction; a pair counts before the devices."""
    if not isinstance(line, Mapping):
        if line is not None:
            yield float(line)
        return
    ends = {key: ends_of(key) for key in line}
    exact = [key for key, both in ends.items() if both is not None and both[0] in sender and both[1] in receiver]
    for key in exact or [key for key in line if key in sender | receiver]:
        yield float(line[key])
