"""How loops are compiled: numba, without the interpreter's lock, kept on disk from one process to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compiles a function at its first call, or loads what an earlier process compiled.

    One whose name begins with an underscore is for other kernels alone: it gets no wrapper by which Python could
    call it, which takes long to compile.

    Where numba finds no folder to write to, beside the module or in the user's cache, every process compiles
    anew. A kernel calls others of its own module only: numba does not notice when another file changes.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
    options["no_cpython_wrapper"] = function.__name__.startswith("_")
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no locator available for caching
        return cast(Function, numba.njit(**options)(function))
