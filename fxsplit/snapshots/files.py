"""Files that are there whole or not at all, and are what they were when they were written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fxsplit.errors import SnapshotError

TEMPORARY = ".tmp"
"""How the name of a file ends that is still being written."""


def write(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all, whatever happens meanwhile: the power may fail.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(data: bytes) -> str:
    """The checksum by which files are recognised: SHA-256."""
    return hashlib.sha256(data).hexdigest()


def read(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        SnapshotError: it is not there, is no regular file or a link, cannot be read, or is too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise damaged(path, error.strerror or str(error), "a file that can be read") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise damaged(path, "something else", "a regular file")
        size_bytes = status.st_size
        if size_bytes > most_bytes:
            raise damaged(path, f"{size_bytes} bytes", f"at most {most_bytes} bytes")
        try:
            return file.read(size_bytes)
        except OSError as error:
            raise damaged(path, error.strerror or str(error), "a file that can be read") from error


def read_verified(path: Path, size_bytes: int, checksum: str) -> bytes:
    """The content of a file, if it is what was written.

    Raises:
        SnapshotError: it is not.
    """
    data = read(path, size_bytes)
    if len(data) != size_bytes:
        raise damaged(path, f"{len(data)} bytes", f"{size_bytes} bytes")
    if (found := digest(data)) != checksum:
        raise damaged(path, f"checksum {found[:16]}...", f"checksum {checksum[:16]}...")
    return data


def tensors_to_bytes(tensors: Mapping[str, Tensor], where: str) -> bytes:
    """Tensors as safetensors has them.

    Raises:
        SnapshotError: it has no name for a dtype.
    """
    try:
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    except (KeyError, ValueError, RuntimeError) as error:
        raise SnapshotError("tensors that safetensors does not take", where=where, found=str(error)) from error


def tensors_of_bytes(data: bytes, where: Any) -> dict[str, Tensor]:
    """What `tensors_to_bytes` made bytes of.

    Raises:
        SnapshotError: these are no safetensors.
    """
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # safetensors has an exception class for some of what can be wrong
        raise damaged(where, str(error), "safetensors") from error


def damaged(where: Any, found: str, allowed: str) -> SnapshotError:
    """The error of a file that is not what it was, or should be."""
    return SnapshotError(
        "a file of a snapshot is damaged", where=where, found=found, allowed=allowed, hint="an older snapshot"
    )


class Lock:
    """A directory that one process has for itself, until it ends or lets go.

    Args:
        directory: which.

    Raises:
        SnapshotError: another process has it, or nothing can be written there.
    """

    NAME = ".lock"

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(directory / self.NAME, flags, 0o600)
        except OSError as error:
            raise SnapshotError(
                "snapshots cannot be written there",
                where=directory,
                found=error.strerror or str(error),
                allowed="a directory in which this user may write",
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise SnapshotError(
                "another pipeline has this directory",
                where=directory,
                hint="another directory; or close the other pipeline",
            ) from error

    def release(self) -> None:
        """Lets go; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
