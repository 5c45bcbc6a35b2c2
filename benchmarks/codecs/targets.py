"""What is asked of the compressors' speed, and whether a measurement meets it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .speed import Found


@dataclass(frozen=True)
class Target:
    """The most that one number may be.

    Attributes:
        codec: the compressor's spelling.
        of: "encode" or "decode", in multiples of a copy; or "first use", in seconds.
        most: the number.
    """

    codec: str
    of: str
    most: float


TARGETS: dict[str, tuple[Target, ...]] = {
    "cpu": (
        Target("uniform8", "encode", 2.5),
        Target("sortquant8", "encode", 15),
        Target("fastquant8", "encode", 3),
        *(Target(codec, "decode", 2) for codec in ("uniform8", "sortquant8", "fastquant8")),
    ),
    "cuda": (
        Target("uniform8", "encode", 2.5),
        Target("sortquant8", "encode", 4),
        Target("fastquant8", "encode", 2.5),
        *(Target(codec, "decode", 1.6) for codec in ("uniform8", "sortquant8", "fastquant8")),
    ),
}
"""By the kind of device: one core of a CPU with 25 MiB, an H200 with 98 MiB."""

FIRST_USE = tuple(Target(codec, "first use", 3) for codec in ("uniform8", "sortquant8", "fastquant8"))

NOT_SLOWER = (("uniform4", "uniform8"), ("sortquant4", "sortquant8"), ("fastquant4", "fastquant8"))
"""On a GPU the first of each pair takes no longer than the second, but for `NOISE`."""

NOISE = 1.05

LEAN = ("uniform8", "uniform4", "sortquant8", "sortquant4", "fastquant8", "fastquant4")
"""These take, beyond what they are given, no more than `EXTRA` of the tensor and what they return."""

EXTRA = 0.05


def judged(found: Found, targets: Sequence[Target] | None = None) -> dict[str, bool]:
    """Each target in words with what was found, and whether it was met; what was not measured is left out.

    Args:
        found: as `speed.measure_speed` returns it.
        targets: in place of those of the device.
    """
    chosen = (*TARGETS[found["device"]], *FIRST_USE) if targets is None else targets
    lines = [*_limits(found, chosen), *_others(found)]
    return dict(lines)


def _limits(found: Found, targets: Iterable[Target]) -> Iterator[tuple[str, bool]]:
    for target in targets:
        if target.of == "first use":
            if target.codec in found["first_use"]:
                value = found["first_use"][target.codec]["empty"]
                yield f"{target.codec}: first use {value:.2f} s, at most {target.most:g}", value <= target.most
            continue
        for regime, measured in found["speed"].items():
            if target.codec in measured["subjects"]:
                value = measured["subjects"][target.codec][target.of]["multiple"][1]
                where = f", {regime} memory" if len(found["speed"]) > 1 else ""
                text = f"{target.codec}: {target.of} {value:.2f} copies{where}, at most {target.most:g}"
                yield text, value <= target.most


def _others(found: Found) -> Iterator[tuple[str, bool]]:
    for codec in LEAN:
        for way, extra in found["memory"].get(codec, {}).items():
            text = f"{codec}: {way} takes {extra:.1%} of the tensor beside its result, at most {EXTRA:.0%}"
            yield text, extra <= EXTRA
    if found["device"] != "cuda":
        return
    for measured in found["speed"].values():
        rows = measured["subjects"]
        for slim, wide in NOT_SLOWER:
            for way in ("encode", "decode"):
                if slim in rows and wide in rows:
                    values = [rows[codec][way]["multiple"][1] for codec in (slim, wide)]
                    text = f"{slim}: {way} {values[0]:.2f} copies, no slower than {wide} at {values[1]:.2f}"
                    yield text, values[0] <= NOISE * values[1]
