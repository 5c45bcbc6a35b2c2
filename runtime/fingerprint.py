"""What a stage is made of, in a few bytes: a worker whose code is not the client's is found before it computes.

Stages travel with their graphs and tensors, but the classes and functions of importable modules go by name, and
what a worker's host has under that name may be another version. Both sides hash what they have; versions of torch
and Python are compared when they meet.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fxsplit.errors import PipelineError
from fxsplit.stage import StageModule

STRUCTURE = "stages"
_SAME_EVERYWHERE = ("torch", "builtins", "fxsplit")
_DIGITS = 12


def fingerprints(stages: Mapping[int, StageModule]) -> dict[str, str]:
    """The hash of the stages' structure, and of the code of each class and function that they have by name."""
    structure = hashlib.sha256()
    code: dict[str, Any] = {}
    for number, stage in sorted(stages.items()):
        for mode, graph in sorted(stage.graphs.items()):
            names = [(name, op, len(args)) for name, op, _, args, _ in graph.graph.rows]
            structure.update(repr((number, tuple(mode), names, graph.outputs)).encode())
            functions = (t for _, _, t, _, _ in graph.graph.rows if isinstance(t, types.FunctionType))
            code |= {f"{f.__module__}.{f.__qualname__}": f for f in functions if _may_differ(f)}
        for name, tensor in (*stage.named_parameters(), *stage.named_buffers()):
            structure.update(repr((name, list(tensor.shape), str(tensor.dtype))).encode())
        kinds = {kind for module in stage.modules() for kind in type(module).__mro__}
        code |= {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds if _may_differ(kind)}
    found = {name: _hash(b"".join(_pieces(value))) for name, value in sorted(code.items())}
    return {STRUCTURE: structure.hexdigest()[:_DIGITS], **found}


def check(client: Mapping[str, str], stages: Mapping[int, StageModule]) -> None:
    """Compares what a worker has with what the client sent.

    Raises:
        PipelineError: something differs; the message has both fingerprints.
    """
    here = fingerprints(stages)
    for name, wanted in client.items():
        if (found := here.get(name)) != wanted:
            what = "stages" if name == STRUCTURE else f"code of {name}"
            raise PipelineError(
                f"a worker has other {what} than the client",
                found=f"fingerprint {found} on the worker",
                allowed=f"fingerprint {wanted}, the client's",
                hint="install the same version of that module on the worker's host",
            )


def _may_differ(value: Any) -> bool:
    package = value.__module__.partition(".")[0]
    loader = getattr(sys.modules.get(value.__module__), "__loader__", None)
    # pytest rewrites assertions in modules of tests, in the client's process alone.
    is_rewritten = type(loader).__name__ == "AssertionRewritingHook"
    return package not in _SAME_EVERYWHERE and value.__module__ != "__main__" and not is_rewritten


def _pieces(value: Any) -> Iterator[bytes]:
    """The compiled code of a function, or of the methods of a class; properties count as their getters."""
    members: Iterable[Any] = [value]
    if isinstance(value, type):
        members = [member for _, member in sorted(vars(value).items())]
    for member in members:
        plain = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
        if isinstance(plain, types.FunctionType):
            yield from _code(plain.__code__)


def _code(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr((code.co_names, code.co_varnames)).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:  # the order of a set's elements differs from process to process
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
