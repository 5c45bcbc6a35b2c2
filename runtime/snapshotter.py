"""The client's side of snapshots: has them taken and written, vouches for them, and deletes old ones."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxsplit.errors import FxsplitError, SnapshotError, WorkerError
from fxsplit.runtime.group import Group
from fxsplit.runtime.handshake import package_version
from fxsplit.runtime.keeping import Source, Written
from fxsplit.runtime.transport import CLIENT_NAME
from fxsplit.snapshots import files
from fxsplit.snapshots.checkpoint import RANDOM, Checkpoint
from fxsplit.snapshots.manifest import NAME, Manifest, Part, snapshot_folders, step_folder

_WRITE_S = 600.0
_POLL_S = 0.05
_PARTS = "part-*.safetensors"
_OTHER = 500  # the number of the first part, beside parts that begin at 0


@dataclass(frozen=True)
class Training:
    """What the client knows of a training, for the manifest; see `Manifest`."""

    step: int
    model: str
    keys: tuple[str, ...]
    ties: Mapping[str, str]
    split: str
    optimizers: tuple[Mapping[str, Any], ...]
    loop: Mapping[str, Any]
    random: Mapping[str, tuple[Tensor, ...]]


class Saver:
    """Has the workers of a group save what they have, into folders that client and workers may share or not.

    Args:
        group: the workers.
        directory: in which the folders are; the client can write there.
    """

    def __init__(self, group: Group, directory: Path) -> None:
        self._group = group
        self._directory = directory
        self._seeing: dict[str, bool] = {}
        self._abandoned = threading.Event()

    def look(self) -> None:
        """Finds out which workers see the directory; the others send what they have to the client."""
        probe = self._directory / f".probe-{secrets.token_hex(8)}"
        content = secrets.token_hex(16)
        try:
            files.write(probe, content.encode())
            self._seeing = self._group.broadcast("sees_file", str(probe.absolute()), content)
        except OSError as error:
            raise SnapshotError(
                "snapshots cannot be written there", where=self._directory, found=error.strerror or str(error)
            ) from error
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def take(self, training: Training) -> None:
        """Has every worker copy what it has, now."""
        extra = {f"{RANDOM}/{k}/{i}": t for k, own in training.random.items() for i, t in enumerate(own)}
        group = self._group
        workers = (*group.remote, CLIENT_NAME)
        group.gather(
            {w: group.start_command(w, "take_snapshot", extra if w == CLIENT_NAME else {}) for w in workers}
        )

    def write(self, folder: Path, training: Training) -> Callable[[], None]:
        """Has the copies written, and returns what waits for that and writes the manifest; for any thread.

        Raises:
            OSError: the folder cannot be made.
        """
        self._abandoned = abandoned = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.glob(_PARTS))
        first = _OTHER if folder / _part_name(0) in before else 0  # what is there stays good until the manifest
        futures: dict[str, tuple[Path, Future[Any]]] = {}
        for index, worker in enumerate((CLIENT_NAME, *self._group.remote)):
            path = folder / _part_name(first + index)
            told = str(path.absolute()) if self._seeing[worker] else None
            futures[worker] = path, self._group.start_command(worker, "write_snapshot", told)
        versions = {"fxsplit": package_version(), "torch": torch.__version__}

        def finish() -> None:
            try:
                parts = tuple(_part(w, path, future, abandoned) for w, (path, future) in futures.items())
                fields = {k: v for k, v in training.__dict__.items() if k != "random"}
                Manifest(**fields, parts=parts, versions=versions).save(folder)
            except BaseException:
                _remove(path for path, _ in futures.values())
                raise
            _remove(before)
            files.sync(folder.parent)

        return finish

    def restore(self, checkpoint: Checkpoint, split: str) -> None:
        """Gives every worker what it holds of a snapshot.

        Args:
            checkpoint: which.
            split: of the pipeline; see `Manifest`.

        Raises:
            SnapshotError: a file is damaged, or it is another model's.
        """
        group, manifest = self._group, checkpoint.manifest
        workers = (*group.remote, CLIENT_NAME)
        is_same = manifest.split == split and {part.worker for part in manifest.parts} >= set(workers)
        futures = {}
        for worker in workers:
            parts = [part for part in manifest.parts if part.worker == worker or not is_same]
            if self._seeing.get(worker):
                sources = [
                    Source(str((checkpoint.folder / p.file).absolute()), p.size_bytes, p.sha256, p.values)
                    for p in parts
                ]
                futures[worker] = group.start_command(worker, "restore_files", sources, is_same)
            else:
                entries = {k: v for p in reversed(parts) for k, v in checkpoint.parts[p.worker].items()}
                futures[worker] = group.start_command(worker, "restore_entries", entries, is_same)
        group.gather(futures)

    def abandon(self) -> None:
        """Lets whoever waits for files give up: a worker was lost."""
        self._abandoned.set()


def _part_name(index: int) -> str:
    return f"part-{index:03d}.safetensors"


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _part(worker: str, path: Path, future: Future[Any], abandoned: threading.Event) -> Part:
    end_s = time.monotonic() + _WRITE_S
    while not future.done():
        if abandoned.is_set() or time.monotonic() > end_s:
            raise SnapshotError("a worker has not written its part", where=worker)
        time.sleep(_POLL_S)
    written: Written = future.result()
    if written.error is not None:
        raise SnapshotError(
            "a worker cannot write its part", where=f"worker {worker}, {path}", found=written.error
        )
    if written.data is not None:
        files.write(path, written.data.numpy().tobytes())
    return Part(worker, path.name, written.size_bytes, written.sha256, written.values)


class Snapshotter:
    """Snapshots of a training, one after another.

    Args:
        saver: has them written.
        directory: where.
        keep: how many stay.
    """

    def __init__(self, saver: Saver, directory: Path, keep: int) -> None:
        self._saver = saver
        self._directory = directory
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "fxsplit manifest")
        self._pending: tuple[int, int, Future[None]] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether one is being written."""
        return self._pending is not None

    def begin(self, training: Training, mark: int) -> None:
        """Takes a snapshot; it is written in the background.

        Args:
            training: what the client knows.
            mark: handed back by `finished`.
        """
        self._saver.take(training)
        folder = step_folder(self._directory, training.step)
        try:
            finish = self._saver.write(folder, training)
        except OSError as error:
            self._warn(training.step, error)
            return
        with contextlib.suppress(RuntimeError):  # the interpreter is ending
            self._pending = training.step, mark, self._thread.submit(self._finish, finish, folder)

    def _finish(self, finish: Callable[[], None], folder: Path) -> None:
        try:
            finish()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        whole = [f for f in snapshot_folders(self._directory).values() if (f / NAME).exists()]
        for old in snapshot_folders(self._directory).values():
            if old not in whole[: self._keep]:
                with contextlib.suppress(OSError):
                    (old / NAME).unlink(missing_ok=True)
                shutil.rmtree(old, ignore_errors=True)

    def finished(self) -> tuple[int, int] | None:
        """Step and mark of a snapshot that is whole by now; a warning if it could not be written."""
        if self._pending is None or not self._pending[2].done():
            return None
        step, mark, future = self._pending
        self._pending = None
        error = future.exception()
        if error is None:
            return step, mark
        self._warn(step, error)
        return None

    def abandon(self) -> None:
        """Gives up what is being written: a worker was lost."""
        self._saver.abandon()
        if self._pending is not None:
            with contextlib.suppress(FxsplitError, OSError, WorkerError):
                self._pending[2].result(timeout=5.0)
        self._pending = None

    def wait(self, timeout_s: float) -> None:
        """Waits for what is being written."""
        if self._pending is not None:
            with contextlib.suppress(Exception):
                self._pending[2].result(timeout=timeout_s)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False)

    def _warn(self, step: int, error: BaseException) -> None:
        reason = f"{error.found} ({error.what})" if isinstance(error, FxsplitError) else str(error)
        warnings.warn(
            f"the snapshot of step {step} could not be written: {reason}; training goes on, and {self._directory} "
            "keeps the ones before",
            stacklevel=4,
        )
