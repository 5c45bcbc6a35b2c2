"""The device list: which worker drives which device for which stage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fxsplit.errors import DeviceError

CLIENT = "client"
"""Worker name of the process that calls the pipeline."""

DEVICE_TYPES = ("cpu", "cuda", "mps")
"""Types of device that a stage may be placed on."""

_ALLOWED = "'cpu', 'cuda', 'cuda:0', 'mps', or 'worker/cuda:0' for a named worker"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DEVICE = re.compile(rf"({'|'.join(DEVICE_TYPES)})(:(0|[1-9][0-9]{{0,2}}))?")


@dataclass(frozen=True)
class Placement:
    """Where one stage runs.

    Attributes:
        spelling: the device as it was written, 'worker/device' or 'device'.
        worker: name of the worker process; 'client' for the first device and all that equal it.
        device: the `torch.device` string on that worker.
    """

    spelling: str
    worker: str
    device: str

    @property
    def is_client(self) -> bool:
        """Whether the stage runs in the process that calls the pipeline."""
        return self.worker == CLIENT

    @property
    def is_named(self) -> bool:
        """Whether it names its worker, which may then be on another host."""
        return "/" in self.spelling

    @property
    def device_type(self) -> str:
        """'cpu', 'cuda' or 'mps'."""
        return self.device.partition(":")[0]


def parse_devices(devices: Sequence[str]) -> tuple[Placement, ...]:
    """One placement a stage, in order. The first device is the client's; equal strings are the same worker.

    Nothing is checked for existence: machines that are not there can be planned for.

    Raises:
        DeviceError: an empty list, or an entry that is no device or has a name that is not allowed.

    >>> [p.worker for p in parse_devices(["cpu", "server/cuda:0", "cpu"])]
    ['client', 'server', 'client']
    """
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise DeviceError("devices is not a list", found=repr(devices), allowed="a list, one device a stage")
    if not devices:
        raise DeviceError("the device list is empty", found="[]", allowed="one device a stage, the client's first")
    parsed = [_placement(spelling, f"devices[{index}]") for index, spelling in enumerate(devices)]
    client = parsed[0]
    if client.is_named:
        # The client is this process: under a worker's name it would look like a second process of that name.
        raise DeviceError(
            "the first device is the client's and cannot be a named worker's",
            where="devices[0]",
            found=client.spelling,
            allowed=f"a device of this process, such as '{client.device}'",
        )
    return tuple(Placement(p.spelling, CLIENT, p.device) if p == client else p for p in parsed)


def _placement(spelling: object, where: str) -> Placement:
    """One entry of the list, before it is known whether it is the client's."""
    if not isinstance(spelling, str):
        raise DeviceError("a device is not a string", where=where, found=repr(spelling), allowed=_ALLOWED)
    name, slash, device = spelling.rpartition("/")
    if _DEVICE.fullmatch(device) is None:
        raise DeviceError("not a device", where=where, found=repr(spelling), allowed=_ALLOWED)
    if not slash:
        return Placement(spelling, spelling, spelling)
    if _NAME.fullmatch(name) is None:
        allowed = "1 to 64 of the letters a-z and A-Z, digits, '_', '-' and '.'"
        raise DeviceError("not a worker name", where=where, found=repr(name), allowed=allowed)
    if name == CLIENT:
        hint = f"repeat the first device as it is written there, or write '{device}'"
        raise DeviceError("the worker name 'client' is reserved", where=where, found=spelling, hint=hint)
    if _DEVICE.fullmatch(name) is not None:
        # A worker called 'cpu' would be the same worker as a plain 'cpu' later in the list.
        raise DeviceError("a worker has the name of a device", where=where, found=spelling, allowed=_ALLOWED)
    return Placement(spelling, name, device)


def available_devices() -> tuple[str, ...]:
    """The devices of this host, as `torch.device` strings: 'cpu', then 'cuda:0', ..., then 'mps'."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ("cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else []))


def check_available(placements: Iterable[Placement]) -> None:
    """Check that the devices of this host exist here; those of named workers are their worker's to check.

    Raises:
        DeviceError: naming the first that does not exist, and those that do.
    """
    here = available_devices()
    indexed = {_indexed(device) for device in here}
    for placement in placements:
        if not placement.is_named and _indexed(placement.device) not in indexed:
            raise DeviceError(
                f"there is no device '{placement.device}' here",
                found=placement.spelling,
                allowed=", ".join(here),
                hint="one of these, or 'worker/device' for a worker on another host",
            )


def _indexed(device: str) -> str:
    """The device with its index: 'cuda' is 'cuda:0'."""
    return device if ":" in device else f"{device}:0"
