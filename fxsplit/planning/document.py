"""Readers of untrusted JSON: every field is checked, and errors name it, what it holds and what it may."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from fxsplit.errors import PlanError
from fxsplit.spec import TensorSpec

SIZE_LIMIT = 64 * 2**20
"""Bytes of the largest document that is read."""

LARGEST = 2**63 - 1
"""The largest whole number a document may hold."""

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
"""Dtypes by the name they have in a document: 'float32'."""

T = TypeVar("T")
Reader = Callable[[object, str], T]
"""Takes a JSON value and the path to it; gives what it stands for, or raises PlanError with the path."""


def refuse(where: str, found: object, allowed: str) -> NoReturn:
    """Raise the error of a damaged document."""
    text = repr(found)
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    raise PlanError("the plan is damaged", where=where, found=shown, allowed=allowed)


def parse_json(text: str, constants: bool = False) -> object:
    """The JSON value of `text`, with no key given twice; and with no NaN and no infinity, unless `constants`.

    Raises:
        PlanError: not JSON (line and column are named), or too large.
    """
    if len(text) > SIZE_LIMIT:
        refuse("the document", f"{len(text)} characters", f"at most {SIZE_LIMIT}")
    try:
        constant = float if constants else _no_constant
        return json.loads(text, parse_constant=constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise PlanError("the plan is damaged", where=place, found=error.msg, allowed="valid JSON") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end
        raise PlanError("the plan is damaged", found=str(error), allowed="valid JSON") from error


def load(path: str | os.PathLike[str], name: str, parse: Callable[[str], T], hint: str | None = None) -> T:
    """What `parse` makes of the text of a file.

    Args:
        path: the file.
        name: what errors call it, "plan" say; `parse` says "the plan" for all.
        parse: raises PlanError for text that it refuses.
        hint: what to try, where `parse` says nothing.

    Raises:
        PlanError: it cannot be read, is too large, or as `parse`, with the path before the place.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise PlanError(f"the {name} cannot be read", where=path, found=error.strerror) from error
    if len(content) > SIZE_LIMIT:
        raise PlanError(f"the {name} is too large", where=path, allowed=f"{SIZE_LIMIT} bytes")
    try:
        return parse(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PlanError(f"the {name} is damaged", where=path, found=str(error), allowed="UTF-8") from error
    except PlanError as error:
        raise PlanError(
            error.what.replace("the plan", f"the {name}"),
            where=f"{path}, {error.where}" if error.where is not None else path,
            found=error.found,
            allowed=error.allowed,
            hint=error.hint or hint,
        ) from error


def _no_constant(name: str) -> NoReturn:
    refuse("a number", name, "finite numbers")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        refuse("the keys of an object", [key for key, _ in pairs], "each key once")
    return data


def read_object(data: object, where: str, readers: Mapping[str, Reader[Any]]) -> dict[str, Any]:
    """The fields of a JSON object that has exactly the keys of `readers`, each read by its reader."""
    if not isinstance(data, dict):
        refuse(where, data, "an object")
    for key in data:
        if key not in readers:
            refuse(where, f"unknown key {key!r}", ", ".join(readers))
    for key in readers:
        if key not in data:
            refuse(where, f"no key {key!r}", ", ".join(readers))
    return {key: read(data[key], f"{where}.{key}") for key, read in readers.items()}


def integer(least: int) -> Reader[int]:
    """A whole number of at least `least`, in 64 bits."""

    def read(data: object, where: str) -> int:
        if not isinstance(data, int) or isinstance(data, bool) or not least <= data <= LARGEST:
            refuse(where, data, f"a whole number, {least} or more")
        return data

    return read


def number(data: object, where: str) -> float:
    """A finite number of at least zero."""
    ok = isinstance(data, (int, float)) and not isinstance(data, bool)
    if not ok or not 0 <= data <= LARGEST or not math.isfinite(data):  # type: ignore[operator, arg-type]
        refuse(where, data, "a finite number, 0 or more")
    return float(data)  # type: ignore[arg-type]


def positive(data: object, where: str) -> float:
    """A finite number of more than zero."""
    found = number(data, where)
    if not found:
        refuse(where, data, "a finite number, more than 0")
    return found


def boolean(data: object, where: str) -> bool:
    """True or false."""
    if not isinstance(data, bool):
        refuse(where, data, "true or false")
    return data


def text(data: object, where: str) -> str:
    """A printable string: what is printed from a document must not be able to steer a terminal."""
    if not isinstance(data, str) or not data.isprintable():
        refuse(where, data, "a printable string")
    return data


def list_of(reader: Reader[T]) -> Reader[tuple[T, ...]]:
    """A list, each entry read by `reader`."""

    def read(data: object, where: str) -> tuple[T, ...]:
        if not isinstance(data, list):
            refuse(where, data, "a list")
        return tuple(reader(entry, f"{where}[{index}]") for index, entry in enumerate(data))

    return read


def spec(data: object, where: str) -> TensorSpec | None:
    """A tensor spec `{"shape": [...], "dtype": "float32"}`, or null for a value that is no tensor."""
    if data is None:
        return None
    fields = read_object(data, where, {"shape": list_of(integer(0)), "dtype": text})
    if fields["dtype"] not in DTYPES:
        refuse(f"{where}.dtype", fields["dtype"], "a torch dtype, such as float32")
    found = TensorSpec(fields["shape"], DTYPES[fields["dtype"]])
    if found.nbytes > LARGEST:
        refuse(where, str(found), "a tensor of less than 2**63 bytes")
    return found


def spec_to_json(found: TensorSpec | None) -> dict[str, object] | None:
    """What `spec` reads."""
    if found is None:
        return None
    return {"shape": list(found.shape), "dtype": str(found.dtype).removeprefix("torch.")}
