"""Pipelines under `torchrun`: rank 0 is the client, the other ranks are its workers rank1, rank2, and so on.

They meet at torchrun's own store, where rank 0 leaves the address at which it listens and a token for the
pipeline. Who can reach that store can join: torchrun trusts its network, and so does this.
"""

from __future__ import annotations

import datetime
import os
import secrets
import socket
from collections.abc import Sequence
from typing import NoReturn

from torch._C._distributed_c10d import TCPStore

from fxsplit.errors import DeviceError, PipelineError
from fxsplit.runtime.handshake import join_address
from fxsplit.runtime.serving import serve_joined

LISTEN = "torchrun"
"""What `listen=` says for a pipeline under torchrun."""

_WAIT = datetime.timedelta(seconds=300)


def rank() -> int:
    """This process's rank.

    Raises:
        PipelineError: it was not started by torchrun.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise PipelineError(
            "this process was not started by torchrun",
            found=f"no {', '.join(missing)} in the environment",
            hint="torchrun --nproc-per-node 2 script.py",
        )
    return int(os.environ["RANK"])


def announce() -> tuple[str, str]:
    """Rank 0's part: chooses address and token, and leaves them for the others."""
    host = os.environ["MASTER_ADDR"]
    try:
        with socket.create_server((host, 0)) as probe:
            port = probe.getsockname()[1]
    except OSError as error:
        raise DeviceError("cannot listen at torchrun's address", found=f"{host}: {error}") from error
    address, token = join_address(host, port), secrets.token_urlsafe(16)
    _store().set(_key(), f"{address} {token}")
    return address, token


def serve(devices: Sequence[str] | None = None) -> NoReturn:
    """Serves the client of rank 0 as worker `rankN`; this process ends when the client does.

    Call it on every rank but 0. With `listen="torchrun"`, `fxsplit.compile` does, so that all ranks can run one
    script.

    Args:
        devices: what this worker offers; if not given, all CUDA devices and the CPU.

    Raises:
        PipelineError: this is rank 0, or was not started by torchrun.
        WorkerError: the client refuses this worker.
    """
    own = rank()
    if own == 0:
        raise PipelineError("rank 0 is the client", found="fxsplit.serve() on rank 0", hint="serve on other ranks")
    store = _store()
    store.wait([_key()], _WAIT)
    address, token = store.get(_key()).decode().split(" ")
    serve_joined(address, f"rank{own}", token, devices, _WAIT.total_seconds())


def _key() -> str:
    """Of the client's address. The store outlives a restart, the client that listened there does not."""
    return f"fxsplit/client/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store() -> TCPStore:
    """Torchrun's store, as a client of it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank() == 0
    return TCPStore(host, port, is_master=is_master, timeout=_WAIT, wait_for_workers=False)
