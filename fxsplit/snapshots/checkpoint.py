"""A snapshot that was read: put together again, whatever the split was that it was taken of."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fxsplit.errors import SnapshotError
from fxsplit.snapshots import files
from fxsplit.snapshots.manifest import NAME, Manifest, snapshot_folders

STATE, BUFFER, GRADIENT, OPTIMIZER, CODEC, RANDOM = "state", "buffer", "gradient", "optimizer", "codec", "random"
HOST = "host"  # random numbers of Python and numpy, in the process of a worker
"""What a key in a file begins with, before the first slash."""

_RESTS: Mapping[str, str] = {
    STATE: ".+",
    BUFFER: ".+",
    GRADIENT: ".+",
    OPTIMIZER: r"[0-9]{1,9}/[^/]+/.+",
    CODEC: r"\[.+\]",
    RANDOM: "(commit|pass)/[0-9]{1,3}",
    HOST: "[01]",
}
_ARE_TENSORS = (GRADIENT, CODEC, RANDOM, HOST)
_MEMORY = (str, str, int, int, int, bool, str)


@dataclass(frozen=True)
class Checkpoint:
    """A training as it was at a step.

    Attributes:
        folder: where it was read.
        manifest: what belongs to it.
        parts: by worker, tensors and other values by key.
    """

    folder: Path
    manifest: Manifest
    parts: Mapping[str, Mapping[str, Any]]

    @property
    def step(self) -> int:
        """Optimizer steps that it has seen."""
        return self.manifest.step

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Reads a snapshot, and verifies every byte of it.

        Raises:
            SnapshotError: something is missing, or not what was written.
        """
        manifest = Manifest.load(folder)
        parts = {}
        for part in manifest.parts:
            path = folder / part.file
            tensors = files.tensors_of_bytes(files.read_verified(path, part.size_bytes, part.sha256), path)
            parts[part.worker] = {**tensors, **part.values}
            for key, value in parts[part.worker].items():
                _check_entry(key, value, path)
        return cls(folder, manifest, parts)

    def entries(self, kind: str) -> Iterator[tuple[str, Any]]:
        """What the parts have of a kind, without the kind in the keys."""
        for part in self.parts.values():
            for key, value in part.items():
                found, _, rest = key.partition("/")
                if found == kind:
                    yield rest, value

    def state_dict(self) -> OrderedDict[str, Any]:
        """The unsplit model's state_dict, under its own names; layers of learned compressors behind it.

        Raises:
            SnapshotError: an entry is missing.
        """
        merged: dict[str, Any] = {}
        ties = self.manifest.ties
        for name, value in self.entries(STATE):
            merged.setdefault(ties.get(name, name), value)
        state = OrderedDict((key, merged.get(ties.get(key, key))) for key in self.manifest.keys)
        if missing := [key for key in self.manifest.keys if ties.get(key, key) not in merged]:
            raise SnapshotError("a snapshot lacks entries of the state_dict", where=self.folder, found=missing[0])
        return state

    def gradients(self) -> dict[str, Tensor]:
        """By parameter name."""
        return dict(self.entries(GRADIENT))

    def optimizer_entries(self, index: int = 0) -> dict[str, dict[str, Any]]:
        """The state of an optimizer by parameter name.

        Args:
            index: which one, in the order in which they were made.
        """
        found: dict[str, dict[str, Any]] = {}
        for key, value in self.entries(OPTIMIZER):
            number, entry, name = key.split("/", 2)
            if int(number) == index:
                found.setdefault(name, {})[entry] = value
        return found

    def optimizer_state_dict(self, index: int = 0) -> dict[str, Any]:
        """The state_dict of the same torch optimizer over the unsplit model's parameters, in its order.

        Args:
            index: which one, in the order in which they were made.

        Raises:
            SnapshotError: there is none of this number.
        """
        optimizers = self.manifest.optimizers
        if not 0 <= index < len(optimizers):
            raise SnapshotError("no such optimizer", found=index, allowed=f"0 to {len(optimizers) - 1}")
        entries, state, groups, count = self.optimizer_entries(index), {}, [], 0
        for group in optimizers[index]["groups"]:
            names = group["parameters"]
            numbers = list(range(count, count + len(names)))
            state.update({i: entries[n] for i, n in zip(numbers, names, strict=True) if n in entries})
            groups.append({**group["options"], "params": numbers})
            count += len(names)
        return {"state": state, "param_groups": groups}

    def random_states(self, which: str) -> tuple[Tensor, ...]:
        """The states of the client's generators: "commit"; or "pass", as this pass over the data began."""
        found = sorted((key, value) for key, value in self.entries(RANDOM) if key.startswith(f"{which}/"))
        return tuple(value for _, value in found)


def memory_key(rest: str) -> tuple[Any, ...]:
    """Whose memory an entry of a compressor is, and what of it: the end of an edge, and a name.

    Args:
        rest: of the entry's key, behind the kind.

    Raises:
        ValueError: it does not say so.
    """
    key = json.loads(rest)
    if not isinstance(key, list) or tuple(map(type, key)) != _MEMORY:
        raise ValueError(f"{len(key)} values" if isinstance(key, list) else "no list")
    return tuple(key)


def _check_entry(key: str, value: Any, path: Path) -> None:
    """Refuses what no worker has written, though its checksum is right.

    Raises:
        SnapshotError: what it is called, or that it is no tensor.
    """
    kind, _, rest = key.partition("/")
    where = f"{path}, {key[:80]!r}"
    if kind not in _RESTS or not re.fullmatch(_RESTS[kind], rest, re.DOTALL):
        raise files.damaged(where, "an entry of this name", f"{', '.join(_RESTS)}, and what is kept of them")
    if kind in _ARE_TENSORS and not isinstance(value, Tensor):
        raise files.damaged(where, type(value).__name__, "a tensor")
    if kind == CODEC:
        try:
            memory_key(rest)
        except (ValueError, RecursionError) as error:
            raise files.damaged(where, str(error), "one end of an edge, and a name") from error


def load(directory: str | os.PathLike[str]) -> Checkpoint:
    """Reads what `pipe.save` has written, or the newest good snapshot of a directory of them.

    Nothing is unpickled; all sizes, names and checksums are verified.

    Args:
        directory: of `pipe.save`, or of `Snapshots`.

    Returns:
        the checkpoint: `model.load_state_dict(checkpoint.state_dict())`, or `pipe.restore(checkpoint)`.

    Raises:
        SnapshotError: there is none that is whole.
    """
    folder = Path(directory)
    if (folder / NAME).exists():
        return Checkpoint.read(folder)
    if (found := newest(folder)) is None:
        raise SnapshotError("no snapshot is there", where=folder, allowed=f"{NAME}, or folders step-NNNNNNNN")
    return found


def newest(directory: Path) -> Checkpoint | None:
    """The newest snapshot that is whole, with a warning for each newer one that is not; None if there are none.

    Raises:
        SnapshotError: there are some, and none is whole, or all are of other versions.
    """
    problems = []
    for folder in snapshot_folders(directory).values():
        if not (folder / NAME).exists() and not (folder / NAME).is_symlink():
            continue  # it was being written when everything ended
        try:
            checkpoint = Checkpoint.read(folder)
        except SnapshotError as error:
            problems.append((folder, error))
            continue
        for damaged, problem in problems:
            warnings.warn(f"{damaged.name} is not used, but {folder.name}: {problem}", stacklevel=3)
        return checkpoint
    if problems:
        folder, first = problems[0]
        raise SnapshotError(
            "no snapshot in this directory can be used",
            where=folder,
            found=f"{len(problems)} of them; of the newest: {first.what}, {first.found}",
            hint="another directory, to begin anew",
        ) from first
    return None
