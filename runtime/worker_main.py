"""A worker process that the client has started; `boot.py` calls it."""

from __future__ import annotations

import os
from functools import partial

import torch
from torch._C._distributed_c10d import FileStore

from fxsplit.runtime.launch import WorkerSettings, die_with_parent
from fxsplit.runtime.pulse import Pulse, page_of
from fxsplit.runtime.rpc import START_TIMEOUT_S
from fxsplit.runtime.serving import Serving, serve_joined
from fxsplit.runtime.transport import LOOPBACK


def main(line: str) -> None:
    """Serves the client that has started this process.

    Args:
        line: the settings, as JSON.
    """
    settings = WorkerSettings.from_json(line)
    if settings.join:
        die_with_parent(settings.parent_pid)
        page = page_of(settings.page)
        serve_joined(settings.join, settings.name, settings.token, None, START_TIMEOUT_S, page=page)
    torch.set_num_threads(settings.threads)
    store = FileStore(settings.store, settings.world_size)
    serving = Serving(settings.name, settings.session, Pulse.of_descriptors(settings.pulse, settings.page))
    store.set(f"ready/{settings.name}", "1")
    watch = partial(die_with_parent, settings.parent_pid)
    serving.run(store, settings.rank, settings.world_size, LOOPBACK, watch, os.path.dirname(settings.store))
