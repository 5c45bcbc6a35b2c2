"""Input shapes as they are written on a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from fxsplit.errors import InputError, nearest
from fxsplit.model_source import InputShape

_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "long": torch.int64,
    "int": torch.int32,
    "bool": torch.bool,
}
_INPUT = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?:(?P<dtype>[^:=,]*):)?(?P<sizes>[^:=]*)")


def parse_inputs(texts: Sequence[str]) -> tuple[InputShape, ...]:
    """Input shapes as they are written on the command line: '64,3,224,224', 'long:2,8;long:2,8', 'mask=bool:2,8'.

    Raises:
        InputError: one is malformed, empty, or names an unknown type or the same argument twice.

    >>> parse_inputs(["2,8; mask=bool:2,8"])[1]
    InputShape(shape=(2, 8), dtype=torch.bool, name='mask')
    """
    shapes = tuple(_parse_input(entry.strip()) for text in texts for entry in text.split(";"))
    names = [shape.name for shape in shapes if shape.name is not None]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError("an input is given twice", where="--input", found=twice[0], allowed="each name once")
    return shapes


def _parse_input(text: str) -> InputShape:
    match = _INPUT.fullmatch(text)
    sizes = match["sizes"].replace(" ", "").split(",") if match is not None else []
    if match is None or not all(re.fullmatch("[0-9]{1,18}", size) for size in sizes):
        raise InputError(
            "an input is not written as sizes",
            where="--input",
            found=repr(text),
            allowed="whole numbers with commas, with a type or a name before them: NAME=TYPE:64,3,224,224",
            hint="64,3,224,224, or long:32,128, or attention_mask=long:32,128",
        )
    dtype = match["dtype"]
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(
            "an input has an unknown type",
            where="--input",
            found=repr(dtype),
            allowed=", ".join(_DTYPES),
            hint=f"nearest: {nearest(dtype, _DTYPES)}",
        )
    shape = tuple(int(size) for size in sizes)
    if 0 in shape:
        raise InputError("an input is empty", where="--input", found=repr(text), allowed="sizes of at least 1")
    return InputShape(shape, _DTYPES[dtype] if dtype else None, match["name"])
