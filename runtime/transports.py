"""The table of transports."""

from __future__ import annotations

import os
import secrets
import sys
import warnings
from collections.abc import Sequence

from fxsplit.errors import PlanError
from fxsplit.planning import Placement
from fxsplit.planning.devices import single_placements
from fxsplit.runtime import torchrun
from fxsplit.runtime.handshake import parse_address
from fxsplit.runtime.in_process import InProcess
from fxsplit.runtime.rpc import Rpc
from fxsplit.runtime.transport import Transport

TRANSPORTS: tuple[type[Transport], ...] = (Rpc, InProcess)

TOKEN_VARIABLE = "FXSPLIT_TOKEN"
"""Environment variable of the token that client and joining workers share."""


def transport(name: str) -> Transport:
    """A new transport of a name.

    Raises:
        PlanError: there is none.
    """
    for kind in TRANSPORTS:
        if kind.name == name:
            return kind()
    raise PlanError("unknown transport", found=name, allowed=", ".join(kind.name for kind in TRANSPORTS))


def listening(listen: str, token: str | None, placements: Sequence[Placement], name: str) -> Transport:
    """A new RPC transport that lets the named workers join.

    Args:
        listen: "HOST:PORT", or "torchrun": rank 0 is the client, and on every other rank this call serves it.
        token: what workers must know; from the environment, or made and printed, if None.
        placements: one a stage.
        name: of the transport that was asked for.

    Raises:
        PlanError: another transport was asked for, or no worker has a name, so that none could join.
        DeviceError: `listen` is no address.
    """
    if listen == torchrun.LISTEN:
        if torchrun.rank() != 0:
            torchrun.serve()
        listen, token = torchrun.announce()
    parse_address(listen, "listen")
    if name != Rpc.name:
        raise PlanError("only the transport 'rpc' can listen", found=name, allowed=Rpc.name)
    joining: dict[str, list[str]] = {}
    for placement in single_placements(placements):
        if placement.is_named:
            joining.setdefault(placement.worker, []).append(placement.device)
    if not joining:
        raise PlanError(
            "listen= is for workers that join, and no device names one",
            found=", ".join(placement.spelling for placement in placements),
            allowed="at least one entry such as 'server/cuda:0'",
        )
    _warn_of_peers(listen)
    known = os.environ.get(TOKEN_VARIABLE) if token is None else token
    if not known:
        known = secrets.token_urlsafe(16)
        for worker in joining:
            command = f"{TOKEN_VARIABLE}={known} fxsplit worker --join {listen} --name {worker}"
            print(f"fxsplit waits for worker {worker}; on its machine: {command}", file=sys.stderr, flush=True)
    return Rpc(listen, known, joining)


def _warn_of_peers(listen: str) -> None:
    """Says what listening beyond this host means."""
    host, _ = parse_address(listen, "listen")
    if host == "localhost" or host.startswith("127.") or host == "::1":
        return
    warnings.warn(
        f"fxsplit listens at {listen}: workers that join prove that they know the token, but afterwards all speak "
        "torch's RPC on that network, without authentication and encryption. Whoever can connect to it there can "
        "run code as this user, on every worker. Use a private network, such as WireGuard: docs/security.md",
        stacklevel=4,
    )
