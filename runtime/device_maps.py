"""Which tensors go from GPU to GPU between processes: TensorPipe's device maps.

TensorPipe wants to be told, for each pair of workers, where on the receiver a tensor on a device of the sender
goes. That is clear between workers of one host with one CUDA device each; what others send goes by way of host
memory, where it gets a checksum of its bytes.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from fxsplit.planning import Placement
from fxsplit.planning.devices import single_placements

SWITCH = "FXSPLIT_DEVICE_MAPS"
"""Environment variable of the client: "0" sends everything by way of the hosts."""

CHANNELS = ["basic", "cuda_ipc", "cuda_basic"]
"""Of TensorPipe, when GPUs take part: by one GPU's access to the other's memory, or through the host's."""

_KEY = "devices"


def sole_gpus(placements: Iterable[Placement]) -> dict[str, int]:
    """The CUDA device of each worker that has exactly one; none if it is switched off.

    >>> from fxsplit.planning import parse_devices
    >>> sole_gpus(parse_devices(["cuda:0", "a/cuda:1", "b/cuda:0", "b/cuda:1", "cpu"]))
    {'client': 0, 'a': 1}
    """
    if os.environ.get(SWITCH) == "0":
        return {}
    found: dict[str, set[int]] = {}
    for placement in single_placements(placements):
        if placement.device_type == "cuda":
            found.setdefault(placement.worker, set()).add(torch.device(placement.device).index or 0)
    return {worker: min(indices) for worker, indices in found.items() if len(indices) == 1}


def exchange(store: Store, name: str, rank: int, gpus: Mapping[str, int]) -> dict[str, int]:
    """What the client knows of the GPUs of the workers that are on the same host as this one, by worker.

    Args:
        store: by which the members of the group meet.
        name: of this worker.
        rank: of this worker; the client's is 0.
        gpus: as the client knows them; of no matter elsewhere.
    """
    if rank == 0:
        store.set(_KEY, json.dumps(dict(gpus)))
    known: dict[str, int] = json.loads(store.get(_KEY))
    if name not in known:
        return {}
    here = _host()
    store.set(f"{_KEY}/{name}", here)
    return {peer: index for peer, index in known.items() if store.get(f"{_KEY}/{peer}").decode() == here}


def _host() -> str:
    """Tells this host from all others, whatever their names are."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def peers_of(name: str, gpus: Mapping[str, int]) -> dict[str, dict[torch.device, torch.device]]:
    """A worker's device map: peer -> own device -> the peer's."""
    if name not in gpus:
        return {}
    own = torch.device("cuda", gpus[name])
    return {peer: {own: torch.device("cuda", index)} for peer, index in gpus.items() if peer != name}


def options_of(
    maps: Mapping[str, Mapping[torch.device, torch.device]],
) -> tuple[list[str], Any, list[torch.device]]:
    """Channels, reverse device maps and devices for TensorPipe's agent: maps lead both ways between each pair."""
    if not maps:
        return ["basic"], {}, []
    torch.cuda.init()
    return CHANNELS, maps, list(dict.fromkeys(own for pairs in maps.values() for own in pairs))
