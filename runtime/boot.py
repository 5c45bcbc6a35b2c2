"""How a worker process that the client has started begins: `python -P boot.py fxsplit.runtime.worker_main`.

It runs as a script and imports torch last: that takes seconds, in which the client may end already.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import threading


def main() -> None:
    """Reads the settings, watches the client, and becomes a worker."""
    line = sys.stdin.readline()
    settings = json.loads(line)
    folder = os.path.dirname(settings["store"])
    threading.Thread(target=_end_with_client, args=(folder,), name="client watch", daemon=True).start()
    importlib.import_module(sys.argv[1]).main(line)


def _end_with_client(folder: str) -> None:
    # The kernel closes the pipe when the client ends, by whatever cause. Nothing here is worth a tidy exit
    # (no files, no shared state), and a tidy one could wait for a peer that is gone.
    while sys.stdin.buffer.read(4096):
        pass
    if folder:
        shutil.rmtree(folder, ignore_errors=True)  # where we were to meet, if the client was killed before
    os._exit(0)


if __name__ == "__main__":
    main()
