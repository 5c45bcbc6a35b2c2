"""`fxsplit worker`: a worker of a pipeline whose client is on another machine."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fxsplit.commands.common import errors_as_exit_status
from fxsplit.errors import DeviceError, FxsplitError
from fxsplit.planning.devices import available_devices
from fxsplit.runtime.serving import serve_joined
from fxsplit.runtime.transports import TOKEN_VARIABLE


def worker(
    join: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the client listens.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="By which the client's devices name this worker.")],
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="DEVICE", help="What it offers; may be repeated.", show_default="all devices"),
    ] = None,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for a client that does not listen yet.")
    ] = 60.0,
) -> None:
    """Join a pipeline on another machine and serve it until it ends.

    The token that the client has printed, or was given, comes in the environment variable FXSPLIT_TOKEN. Only join
    clients that you trust: they run code here.
    """
    with errors_as_exit_status():
        if not patience >= 0:  # nor nan, which no time would ever exceed
            raise FxsplitError(
                "not a time to wait", where="--patience", found=patience, allowed="0 or more seconds"
            )
        for offered in device or ():
            if offered not in available_devices():
                allowed = ", ".join(available_devices())
                raise DeviceError("there is no such device here", where="--device", found=offered, allowed=allowed)
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise FxsplitError(
                "a worker needs the client's token",
                found=f"no {TOKEN_VARIABLE} in the environment",
                hint=f"{TOKEN_VARIABLE}=... fxsplit worker --join {join} --name {name}; the client prints it",
            )
        serve_joined(join, name, token, device, patience, _join_again)


def _join_again() -> None:
    """Becomes the same command anew: a process that has served is not put back to its beginning otherwise."""
    os.execv(sys.executable, [sys.executable, "-m", "fxsplit", *sys.argv[1:]])
