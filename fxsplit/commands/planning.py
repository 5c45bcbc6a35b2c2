"""The options of the command line that a plan is chosen by, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fxsplit.costs import CostTable
from fxsplit.errors import BudgetError, PlanError
from fxsplit.planning import Budget, Guard, Profile
from fxsplit.planning.calibration import Calibration
from fxsplit.planning.link_file import load_links
from fxsplit.planning.links import Link
from fxsplit.planning.stages import AUTO

_PANEL = "Plan"

BudgetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="LINE=LIMIT",
        show_default=False,
        help="A limit: memory=2GiB, memory.cuda=2GiB, macs.cpu=1e9, link_bytes=8MB, 'link_bytes.cpu->cuda=8MB', "
        "step_time=400ms. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
BandwidthOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RATE",
        show_default="1 GB/s",
        help="Of the links, each way: 50Mbit/s. Of some: server/cuda=50Mbit/s, 'cpu->server/cuda=1MB/s'. "
        "Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
LatencyOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TIME",
        show_default="300 us",
        help="Of the links: 20ms; of some, as for --bandwidth. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
OptimizerOption = Annotated[
    str,
    typer.Option(
        metavar="KIND", help="Whose state counts as memory: sgd, momentum or adam.", rich_help_panel=_PANEL
    ),
]
ObjectiveOption = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="What is least: step, latency, throughput or price.", rich_help_panel=_PANEL
    ),
]
ScheduleOption = Annotated[
    str, typer.Option(metavar="NAME", help="Order of a training step.", rich_help_panel=_PANEL)
]
PlacementOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="given: every device gets a part; auto: devices may be left out, and inputs sent as they are; "
        "branches: as auto, and of two devices each may get any branches of the model.",
        rich_help_panel=_PANEL,
    ),
]
PriceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--price",
        metavar="DEVICE=PRICE",
        show_default=False,
        help="Price of an hour of a device, for --objective price. May be repeated.",
        rich_help_panel=_PANEL,
    ),
]
AllowOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        show_default="fastquant8,sortquant8",
        help="What --compressor auto may choose from, beside none.",
        rich_help_panel=_PANEL,
    ),
]
ChunksOption = Annotated[
    str, typer.Option(metavar="COUNT", help="Micro-batches of a batch, or auto.", rich_help_panel=_PANEL)
]


ProfileOption = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="DEVICE=FILE",
        show_default="what `fxsplit calibrate` has kept",
        help="Measured seconds of a device, by `fxsplit calibrate --save`; none: estimates alone. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
LinksOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", show_default=False, help="Links that `fxsplit probe` has measured.", rich_help_panel=_PANEL
    ),
]


@dataclass(frozen=True)
class Measured:
    """What was measured and may be planned with.

    Attributes:
        files: device as written -> what was measured there.
        here: the devices of this host for which the cache is looked at.
        links: (sending worker, receiving worker) -> their link.
    """

    files: dict[str, Calibration]
    here: tuple[str, ...]
    links: dict[tuple[str, str], Link]

    @classmethod
    def read(cls, profiles: list[str] | None, links: Path | None, devices: Sequence[str]) -> Measured:
        """From the command line.

        Raises:
            PlanError: a file cannot be read or is damaged, or a device is not in the list.
        """
        files = {}
        for entry in profiles or ():
            device, equals, path = (word.strip() for word in entry.partition("="))
            if device == "none" and not equals and len(profiles or ()) == 1:
                return cls({}, (), {} if links is None else load_links(links))
            if not equals or device not in devices or device in files:
                allowed = f"none, or DEVICE=FILE once for each of {', '.join(dict.fromkeys(devices))}"
                raise PlanError("not a profile", where="--profile", found=repr(entry), allowed=allowed)
            files[device] = Calibration.load(path)
        here = tuple(dict.fromkeys(device for device in devices if "/" not in device))
        return cls(files, here, {} if links is None else load_links(links))

    def of(self, costs: CostTable) -> Profile:
        """For a model.

        Raises:
            PlanError: a calibration is of another model.
        """
        kept, given = Profile.kept(costs, self.here), Profile.of(costs, self.files)
        return Profile({**kept.nodes, **given.nodes}, {**kept.codecs, **given.codecs}, self.links)


def read_budget(
    lines: list[str] | None, bandwidth: list[str] | None = None, latency: list[str] | None = None
) -> Budget:
    """The budget of the command line.

    Raises:
        BudgetError: an unknown line, or a quantity that is none.

    >>> read_budget(["memory.cuda=2GiB", "step_time=400ms"], ["50Mbit/s"]).to_dict()
    {'memory': {'cuda': 2147483648}, 'bandwidth': 6250000.0, 'step_time': 0.4}
    """
    found: dict[str, Any] = {}
    for line in lines or ():
        name, equals, limit = line.partition("=")
        word, dot, key = name.strip().partition(".")
        if not equals or (dot and word not in ("macs", "memory", "link_bytes")):
            allowed = "LINE=LIMIT, or macs, memory or link_bytes with a name: memory.cuda=2GiB"
            raise BudgetError("not a line of a budget", where="--budget", found=repr(line), allowed=allowed)
        known = found.get(word)
        if word in found and not (dot and isinstance(known, dict) and key not in known):
            raise BudgetError("a budget line is given twice", where="--budget", found=repr(line))
        found[word] = {**(known or {}), key: limit.strip()} if dot else limit.strip()
    for name, values in (("bandwidth", bandwidth), ("latency", latency)):
        if values:
            found[name] = _of_links(values, f"--{name}")
    return Budget.from_dict(found)


def _of_links(values: list[str], option: str) -> str | dict[str, str]:
    """One quantity for all links, or one for each of some."""
    if len(values) == 1 and "=" not in values[0]:
        return values[0]
    rates: dict[str, str] = {}
    for value in values:
        name, equals, rate = (word.strip() for word in value.partition("="))
        if not equals or name in rates:
            allowed = "one quantity, or DEVICE=QUANTITY or 'DEVICE->DEVICE=QUANTITY' once for each"
            raise BudgetError("not a quantity of a link", where=option, found=repr(value), allowed=allowed)
        rates[name] = rate
    return rates


def read_prices(prices: list[str] | None) -> dict[str, float]:
    """Device -> price of an hour.

    Raises:
        PlanError: not DEVICE=PRICE.
    """
    found = {}
    for price in prices or ():
        device, _, per_h = price.partition("=")
        try:
            found[device.strip()] = float(per_h)
        except ValueError:
            raise PlanError("not a price", where="--price", found=repr(price), allowed="DEVICE=PRICE") from None
    return found


def read_guard(allowed: str | None) -> Guard | None:
    """The guard of the command line."""
    return None if allowed is None else Guard(tuple(name.strip() for name in allowed.split(",")))


def read_chunks(chunks: str) -> int | str:
    """A number of micro-batches, or 'auto'.

    Raises:
        typer.BadParameter: neither.
    """
    if chunks == AUTO:
        return AUTO
    if not chunks.isdecimal() or int(chunks) < 1:
        raise typer.BadParameter(
            f"{chunks!r} is neither a number of micro-batches nor auto", param_hint="--chunks"
        )
    return int(chunks)
