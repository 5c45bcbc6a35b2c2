"""The manifest of a snapshot: what belongs to it, with checksums. It is written last: it vouches for the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxsplit.errors import PlanError, SnapshotError
from fxsplit.planning.document import (
    SIZE_LIMIT,
    Reader,
    integer,
    list_of,
    parse_json,
    read_object,
    refuse,
    text,
)
from fxsplit.snapshots.files import damaged, digest, read, write

NAME = "manifest.json"
FORMAT = 2
"""Of the files; another number is refused. Of 1 there are files with and without the random numbers of Python."""

_PART_NAME = re.compile(r"part-\d{3}\.safetensors")
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_STEP = re.compile(r"step-(\d{8,19})")
_DEPTH = 12


@dataclass(frozen=True)
class Part:
    """The file of one worker.

    Attributes:
        worker: its name.
        file: name of the file, beside the manifest.
        size_bytes: of the file.
        sha256: of its content.
        values: what is no tensor, by the same kind of keys as the tensors in the file.
    """

    worker: str
    file: str
    size_bytes: int
    sha256: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A snapshot.

    Attributes:
        step: optimizer steps that were committed before it.
        model: the model's class.
        keys: of the model's state_dict, in its order.
        ties: name of a tied parameter or buffer -> its first name.
        split: what the pipeline was made of; codecs' memories fit only the same.
        optimizers: kind and parameter groups of each.
        loop: where in the training data the client was: `passes` begun and `batches` of the last one; and the
            states of what is `kept`.
        parts: the files.
        versions: of fxsplit and torch, for people.
    """

    step: int
    model: str
    keys: tuple[str, ...]
    ties: Mapping[str, str]
    split: str
    optimizers: tuple[Mapping[str, Any], ...]
    loop: Mapping[str, Any]
    parts: tuple[Part, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes it; before, all parts have to be on the disk.

        Raises:
            OSError: it cannot be written.
        """
        body = {**self.__dict__, "format": FORMAT, "parts": [part.__dict__ for part in self.parts]}
        line = json.dumps(body, allow_nan=True).encode()
        write(folder / NAME, line + b"\nsha256:" + digest(line).encode() + b"\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads it, and checks every field.

        Raises:
            SnapshotError: it is not there, or not what was written.
        """
        path = folder / NAME
        data = read(path, SIZE_LIMIT)
        line, _, rest = data.partition(b"\n")
        if rest != b"sha256:" + digest(line).encode() + b"\n":
            raise damaged(path, "another checksum than the one it ends with", "the file as it was written")
        try:
            return cls.from_json(parse_json(line.decode(), constants=True))
        except (PlanError, UnicodeDecodeError) as error:
            found = str(getattr(error, "found", error))
            where = f"{path}, {getattr(error, 'where', None) or 'the text'}"
            raise damaged(where, found, str(getattr(error, "allowed", None) or "JSON")) from error
        except SnapshotError as error:
            raise error.at(str(path)) from None

    @classmethod
    def from_json(cls, data: object) -> Manifest:
        """The manifest from its JSON value.

        Raises:
            PlanError: a field is missing, unknown, or not what it has to be.
            SnapshotError: another version of fxsplit wrote it.
        """
        _check_format(data)
        fields = read_object(data, "manifest", {**_FIELDS, "format": integer(1)})
        del fields["format"]
        for what in ("file", "worker"):
            names = [getattr(part, what) for part in fields["parts"]]
            if len(set(names)) < len(names):
                refuse("manifest.parts", names, f"each {what} once")
        return cls(**fields)


def step_folder(directory: Path, step: int) -> Path:
    """Where the snapshot of a step is."""
    return directory / f"step-{step:08d}"


def snapshot_folders(directory: Path) -> dict[int, Path]:
    """The folders that may be snapshots, by step, newest first.

    Raises:
        SnapshotError: the directory cannot be read.
    """
    try:
        names = [entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.is_symlink()]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SnapshotError("the directory cannot be read", where=directory, found=error.strerror) from error
    found = {int(match[1]): directory / name for name in names if (match := _STEP.fullmatch(name))}
    return dict(sorted(found.items(), reverse=True))


def _check_format(data: object) -> None:
    """Refuses what was whole for another version of fxsplit: nothing else can be said of its fields."""
    number = data.get("format") if isinstance(data, dict) else None
    if isinstance(number, int) and not isinstance(number, bool) and number > 0 and number != FORMAT:
        who, hint = ("a newer", "update fxsplit") if number > FORMAT else ("an older", "the version that wrote it")
        raise SnapshotError(
            f"the snapshot was written by {who} version of fxsplit",
            found=f"format {number}",
            allowed=f"{FORMAT}",
            hint=f"{hint}; or another directory, to begin anew",
        )


def _matching(pattern: re.Pattern[str], allowed: str) -> Reader[str]:
    def reader(data: object, where: str) -> str:
        if not isinstance(data, str) or not pattern.fullmatch(data):
            refuse(where, data, allowed)
        return data

    return reader


def _texts(data: object, where: str) -> dict[str, str]:
    if not isinstance(data, dict):
        refuse(where, data, "an object")
    return {text(key, where): text(value, f"{where}.{key}") for key, value in data.items()}


def json_value(data: object, where: str, depth: int = _DEPTH) -> Any:
    """A number, a text, true, false, null, or lists and objects of them.

    Raises:
        PlanError: it is something else, or nested too deeply.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if depth == 0:
        refuse(where, "more levels", f"at most {_DEPTH}")
    if isinstance(data, list | tuple):
        return [json_value(entry, f"{where}[{index}]", depth - 1) for index, entry in enumerate(data)]
    if isinstance(data, dict) and all(isinstance(key, str) for key in data):
        return {key: json_value(entry, f"{where}.{key}", depth - 1) for key, entry in data.items()}
    refuse(where, type(data).__name__, "what JSON has")


def _object(data: object, where: str) -> dict[str, Any]:
    value = json_value(data, where)
    if not isinstance(value, dict):
        refuse(where, data, "an object")
    return value


def _part(data: object, where: str) -> Part:
    readers: dict[str, Reader[Any]] = {
        "worker": text,
        "file": _matching(_PART_NAME, "part-NNN.safetensors"),
        "size_bytes": integer(0),
        "sha256": _matching(_CHECKSUM, "64 hexadecimal digits"),
        "values": _object,
    }
    return Part(**read_object(data, where, readers))


def _options(data: object, where: str) -> dict[str, Any]:
    options = _object(data, where)
    if "params" in options:
        refuse(where, "'params'", "options of an optimizer, beside its parameters")
    return options


def _optimizer(data: object, where: str) -> dict[str, Any]:
    group: Reader[dict[str, Any]] = lambda g, w: read_object(  # noqa: E731
        g, w, {"options": _options, "parameters": list_of(text)}
    )
    return read_object(data, where, {"kind": text, "groups": list_of(group)})


def _loop(data: object, where: str) -> dict[str, Any]:
    return read_object(data, where, {"passes": integer(0), "batches": integer(0), "kept": _object})


_FIELDS: Mapping[str, Reader[Any]] = {
    "step": integer(0),
    "model": text,
    "keys": list_of(text),
    "ties": _texts,
    "split": text,
    "optimizers": list_of(_optimizer),
    "loop": _loop,
    "parts": list_of(_part),
    "versions": _texts,
}
