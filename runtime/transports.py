"""The table of transports."""

from __future__ import annotations

from fxsplit.errors import PlanError
from fxsplit.runtime.in_process import InProcess
from fxsplit.runtime.rpc import Rpc
from fxsplit.runtime.transport import Transport

TRANSPORTS: tuple[type[Transport], ...] = (Rpc, InProcess)


def transport(name: str) -> Transport:
    """A new transport of a name.

    Raises:
        PlanError: there is none.
    """
    for kind in TRANSPORTS:
        if kind.name == name:
            return kind()
    raise PlanError("unknown transport", found=name, allowed=", ".join(kind.name for kind in TRANSPORTS))
