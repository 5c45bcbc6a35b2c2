"""The device list: which worker drives which device for which stage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fxsplit.errors import DeviceError
from fxsplit.schedules.replicas import JOINT, replicas_of

CLIENT = "client"
"""Worker name of the process that calls the pipeline."""

DEVICE_TYPES = ("cpu", "cuda", "mps")
"""Types of device that a stage may be placed on."""

_ALLOWED = (
    "'cpu', 'cuda', 'cuda:0', 'mps', or 'worker/cuda:0' for a named worker; "
    "or several of these joined by '+' for a replicated stage"
)
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DEVICE = re.compile(rf"({'|'.join(DEVICE_TYPES)})(:(0|[1-9][0-9]{{0,2}}))?")


@dataclass(frozen=True)
class Placement:
    """Where one stage runs.

    Of a replicated stage, all three have an entry for each replica, joined by '+'.

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
    def replicas(self) -> tuple[Placement, ...]:
        """One for each replica; itself, if the stage has one worker.

        >>> [(p.worker, p.device) for p in parse_devices(["cpu", "a/cuda:0+b/cuda:1"])[1].replicas]
        [('a', 'cuda:0'), ('b', 'cuda:1')]
        """
        spelled = (self.spelling.split(JOINT), replicas_of(self.worker), self.device.split(JOINT))
        return tuple(Placement(*each) for each in zip(*spelled, strict=True))

    @property
    def device_type(self) -> str:
        """'cpu', 'cuda' or 'mps'; replicas have the same."""
        return self.device.partition(JOINT)[0].partition(":")[0]


def parse_devices(devices: Sequence[str]) -> tuple[Placement, ...]:
    """One placement a stage, in order. The first device is the client's; equal strings are the same worker.

    Nothing is checked for existence: machines that are not there can be planned for.

    Raises:
        DeviceError: an empty list, an entry that is no device or has a name that is not allowed, or replicas that
            are no different workers with the same kind of device.

    >>> [p.worker for p in parse_devices(["cpu", "server/cuda:0", "cpu"])]
    ['client', 'server', 'client']
    """
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise DeviceError("devices is not a list", found=repr(devices), allowed="a list, one device a stage")
    if not devices:
        raise DeviceError("the device list is empty", found="[]", allowed="one device a stage, the client's first")
    parsed = [_placement(spelling, f"devices[{index}]") for index, spelling in enumerate(devices)]
    client = parsed[0]
    _check_replicas(parsed)
    if client.is_named:
        # The client is this process: under a worker's name it would look like a second process of that name.
        raise DeviceError(
            "the first device is the client's and cannot be a named worker's",
            where="devices[0]",
            found=client.spelling,
            allowed=f"a device of this process, such as '{client.device}'",
        )
    return tuple(Placement(p.spelling, CLIENT, p.device) if p == client else p for p in parsed)


def single_placements(placements: Iterable[Placement]) -> tuple[Placement, ...]:
    """The placements of stages, those of replicated ones by their replicas."""
    return tuple(replica for placement in placements for replica in placement.replicas)


def _placement(spelling: object, where: str) -> Placement:
    """One entry of the list, before it is known whether it is the client's."""
    if not isinstance(spelling, str):
        raise DeviceError("a device is not a string", where=where, found=repr(spelling), allowed=_ALLOWED)
    replicas = [_single(each, where) for each in spelling.split(JOINT)]
    worker, device = (JOINT.join(getattr(each, what) for each in replicas) for what in ("worker", "device"))
    return Placement(spelling, worker, device)


def _check_replicas(placements: Sequence[Placement]) -> None:
    """Refuses replicas that are not so many workers with equal devices and the same stages."""
    teams: dict[str, str] = {}
    for stage, placement in enumerate(placements):
        replicas, where = placement.replicas, f"devices[{stage}]"
        names = [replica.worker for replica in replicas]
        if len(replicas) > 1 and (stage == 0 or placements[0].worker in names):
            raise DeviceError(
                "the client takes part in a replicated stage",
                where=where,
                found=placement.spelling,
                allowed="replicas on workers beside the client, whose device is the first",
                hint="name the workers: 'a/cpu+b/cpu' are two processes, on this host or another",
            )
        if len(set(names)) < len(names):
            raise DeviceError(
                "a worker is named twice among the replicas of a stage",
                where=where,
                found=placement.spelling,
                allowed="a worker for each replica",
                hint="give them names: 'a/cpu+b/cpu' are two processes with a replica each",
            )
        if len({replica.device_type for replica in replicas}) > 1:
            raise DeviceError(
                "the replicas of a stage have different kinds of device, which round differently",
                where=where,
                found=placement.spelling,
                allowed="one kind: all 'cpu', or all 'cuda'",
            )
        for name in names:
            if teams.setdefault(name, placement.worker) != placement.worker:
                raise DeviceError(
                    "a worker is a replica, and has a stage that the other replicas have not",
                    where=where,
                    found=f"{name}, in {placement.worker} and in {teams[name]}",
                    allowed="the same replicas for all stages of a worker",
                    hint="another worker for that stage",
                )


def _single(spelling: str, where: str) -> Placement:
    """One device, of one worker."""
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
    for placement in single_placements(placements):
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
