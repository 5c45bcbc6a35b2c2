"""The budget: what a plan may cost, and what the links between the workers are assumed to do."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TypeVar

from fxsplit.errors import BudgetError, nearest
from fxsplit.planning.units import Quantity, parse_bandwidth, parse_bytes, parse_count, parse_seconds

Limits = Quantity | Mapping[str, Quantity] | None
"""One quantity for all, one for each name, or no limit."""

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Budget:
    """Limits of a plan, and assumptions about its links. Strings are parsed at once; any subset may be given.

    Attributes:
        macs: forward MACs of one batch on a device: one limit for every device, or device -> limit.
        memory: bytes on a device, as `Part.memory_bytes` estimates them: one limit, or device -> limit.
        link_bytes: bytes of a batch over every link in its busier direction, gradients included where there are
            any; or of some: 'cpu -> server/cuda' -> of this direction (replicas count together), or cut name ->
            over that cut, if the plan cuts there.
        bandwidth: bytes per second of every link; or of some: device -> of all links of its worker, or
            'cpu -> server/cuda' -> of this direction. An assumption of the prediction, not a limit.
        latency: seconds a message takes, in the same ways. An assumption of the prediction, not a limit.
        step_time: seconds of a predicted training step.

    Raises:
        BudgetError: an unknown unit, or a quantity that is negative, not finite or not a quantity.

    >>> Budget(memory={"cuda": "2GiB"}, bandwidth="50Mbit/s").to_dict()
    {'memory': {'cuda': 2147483648}, 'bandwidth': 6250000.0}
    """

    macs: Limits = None
    memory: Limits = None
    link_bytes: Limits = None
    bandwidth: Limits = None
    latency: Limits = None
    step_time: Quantity | None = None

    def __post_init__(self) -> None:
        self._set("macs", _limits(self.macs, "macs", parse_count))
        self._set("memory", _limits(self.memory, "memory", parse_bytes))
        self._set("link_bytes", _limits(self.link_bytes, "link_bytes", parse_bytes))
        self._set("bandwidth", _limits(self.bandwidth, "bandwidth", parse_bandwidth))
        self._set("latency", _limits(self.latency, "latency", parse_seconds))
        self._set("step_time", _single(self.step_time, "step_time", parse_seconds))
        if self.step_time == 0:
            raise BudgetError("step_time must be more than zero", found=0, allowed="more than 0 s")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash(repr(self.to_dict()))

    def __reduce__(self) -> tuple[Callable[[object], Budget], tuple[dict[str, object]]]:
        # A read-only mapping does not pickle by itself.
        return Budget.from_dict, (self.to_dict(),)

    def macs_limit(self, device: str) -> int | None:
        """Forward MACs allowed on a device, as it is written in the device list; None is no limit."""
        return _limit_of(self.macs, device)

    def memory_limit(self, device: str) -> int | None:
        """Bytes allowed on a device, as it is written in the device list; None is no limit."""
        return _limit_of(self.memory, device)

    @property
    def link_limit(self) -> int | None:
        """Bytes allowed over every link in its busier direction; None is no limit."""
        return None if isinstance(self.link_bytes, Mapping) else _limit_of(self.link_bytes, "")

    @property
    def cut_limits(self) -> Mapping[str, int]:
        """Bytes allowed over a cut in its busier direction, by cut name."""
        limits = self.link_bytes if isinstance(self.link_bytes, Mapping) else {}
        return {cut: int(limit) for cut, limit in limits.items() if ends_of(cut) is None}

    def limit_between(self, sender: Container[str], receiver: Container[str]) -> int | None:
        """Bytes allowed from one worker to another, each by all of its names; None is no limit."""
        if not isinstance(self.link_bytes, Mapping):
            return self.link_limit
        pairs = ((ends_of(key), int(limit)) for key, limit in self.link_bytes.items())
        return min(
            (limit for ends, limit in pairs if ends and ends[0] in sender and ends[1] in receiver), default=None
        )

    @property
    def step_time_s(self) -> float | None:
        """Seconds allowed for a predicted training step."""
        return None if self.step_time is None else float(self.step_time)

    def to_dict(self) -> dict[str, object]:
        """The lines that are given, as numbers in base units, ready for JSON."""
        lines = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in lines.items()
            if value is not None
        }

    @classmethod
    def from_dict(cls, data: object) -> Budget:
        """The budget of `to_dict`, or of one written by hand, with units.

        Raises:
            BudgetError: not a mapping, an unknown line (the known are listed), or a wrong quantity.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping):
            raise BudgetError("a budget is not a mapping", found=type(data).__name__, allowed=", ".join(known))
        for name in data:
            if name not in known:
                raise BudgetError("unknown budget line", found=repr(name), allowed=", ".join(known))
        return cls(**data)

    def check_names(self, devices: Sequence[str], workers: Sequence[str], cut_names: Mapping[str, int]) -> None:
        """Check that every device and cut of the budget is one of the plan's.

        Raises:
            BudgetError: naming the unknown one, and the known devices or the nearest cuts.
        """
        for line, limits in (("macs", self.macs), ("memory", self.memory)):
            for device in limits if isinstance(limits, Mapping) else ():
                if device not in devices:
                    known = ", ".join(dict.fromkeys(devices))
                    raise BudgetError(f"the budget's {line} names an unknown device", found=device, allowed=known)
        for line in ("bandwidth", "latency", "link_bytes"):
            rates = getattr(self, line)
            for key in rates if isinstance(rates, Mapping) else ():
                alone = () if line == "link_bytes" else (key,)  # there a name alone is a cut's
                for end in ends_of(key) or alone:
                    if end not in devices and end not in workers:
                        known = f"{', '.join(dict.fromkeys([*devices, *workers]))}, or two of them with '->'"
                        raise BudgetError(f"the budget's {line} names an unknown device", found=key, allowed=known)
        for cut in self.cut_limits:
            if cut not in cut_names:
                close = nearest(cut, cut_names)
                raise BudgetError("the budget's link_bytes names an unknown cut", found=cut, allowed=close)


def ends_of(key: str) -> tuple[str, str] | None:
    """Sender and receiver of 'cpu -> server/cuda'; None for a name alone."""
    sender, arrow, receiver = key.partition("->")
    return (sender.strip(), receiver.strip()) if arrow else None


def _single(value: object, name: str, parse: Callable[[Quantity, str], Number]) -> Number | None:
    """One quantity; what is no quantity is refused by `parse`."""
    return None if value is None else parse(value, name)  # type: ignore[arg-type]


def _limits(
    value: object, name: str, parse: Callable[[Quantity, str], Number]
) -> Number | Mapping[str, Number] | None:
    """One quantity, or a read-only copy of a mapping of them."""
    if not isinstance(value, Mapping):
        return _single(value, name, parse)
    for key in value:
        if not isinstance(key, str) or not key:
            raise BudgetError(f"{name} has a key that is no name", found=repr(key), allowed="names")
    return MappingProxyType({key: parse(quantity, f"{name} of {key}") for key, quantity in value.items()})


def _limit_of(limits: Limits, name: str) -> int | None:
    """The limit for `name`; the quantities are numbers by now."""
    limit = limits.get(name) if isinstance(limits, Mapping) else limits
    return None if limit is None else int(limit)
