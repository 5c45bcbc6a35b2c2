"""Stages compiled by torch.compile: their operations are fused into few kernels, by Inductor.

A stage is compiled at its first micro-batch of a kind (shapes, dtypes, mode, autocast), its backward at the
first gradient; after `torch._dynamo.config.recompile_limit` kinds torch runs it as it is. Random numbers are those
of the stage as it is, and what is computed in half precision is rounded where it is there. Sums may be taken in
another order, and products be added without a rounding in between, so the last bits differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fxsplit.errors import DeviceError, PipelineError, PlanError
from fxsplit.stage import StageModule
from fxsplit.trace.patches import MASK_MODULES

_OPTIONS = {
    "fallback_random": True,  # else Inductor draws numbers of its own
    "emulate_precision_casts": True,
    "compile_threads": 1,  # no processes beside the worker
}


def check_alone(cuda_graphs: bool) -> None:
    """Refuses what excludes compiling.

    Raises:
        PlanError: stages are to be recorded as CUDA graphs.
    """
    if cuda_graphs:
        raise PlanError(
            "compile_stages and cuda_graphs both put something in place of a stage's own operations",
            found="compile_stages=True, cuda_graphs=True",
            allowed="one of them",
            hint="cuda_graphs=True keeps the numbers bit for bit; compile_stages=True works on the CPU, too",
        )


def check_compilers(devices: Iterable[torch.device], where: str) -> None:
    """Looks for what torch.compile needs on this host.

    Args:
        devices: of the stages.
        where: the worker.

    Raises:
        DeviceError: there is no C++ compiler for stages on the CPU, or no Triton for those on a GPU.
    """
    kinds = {device.type for device in devices}
    if "cpu" in kinds:
        from torch._inductor import config
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:  # of Inductor's own kinds, which differ between versions
            raise DeviceError(
                "compile_stages=True needs a C++ compiler for stages on the CPU",
                where=where,
                found=f"none of {', '.join(str(name) for name in config.cpp.cxx if name)}",
                allowed="g++ or clang++, in the PATH or named by the environment's CXX",
                hint="install one (apt install g++), or leave compile_stages out",
            ) from error
    if "cuda" in kinds:
        from torch.utils._triton import has_triton

        if not has_triton():
            raise DeviceError(
                "compile_stages=True needs Triton for stages on a GPU",
                where=where,
                found="no Triton that works with this GPU",
                hint="install triton, or leave compile_stages out",
            )


def compile_stages(stages: Mapping[int, StageModule], deferred: Iterable[nn.Module]) -> None:
    """Has stages compiled when they first run.

    Args:
        stages: by number.
        deferred: layers whose statistics Python collects; they run as they are.
    """
    for layer in deferred:
        setattr(layer, "forward", torch.compiler.disable(layer.forward))  # noqa: B010
    for number, stage in stages.items():
        stage.transform_forwards(partial(_Compiled, number))


class _Compiled:
    """A stage's forward, compiled.

    Args:
        number: the stage's.
        forward: of the stage.
    """

    def __init__(self, number: int, forward: Callable[..., tuple[Any, ...]]) -> None:
        _as_they_are(forward)
        self._forward = torch.compile(forward, dynamic=False, options=dict(_OPTIONS))
        self._number = number

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """Runs it.

        Raises:
            PipelineError: it cannot be compiled.
        """
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self._forward(*arguments)
        except TorchDynamoException as error:
            raise PipelineError(
                "a stage could not be compiled by torch.compile",
                where=f"stage {self._number}",
                found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                hint="compile_stages=False runs it as it is; TORCH_LOGS=dynamo,inductor says more",
            ) from error


def _as_they_are(forward: Callable[..., tuple[Any, ...]]) -> None:
    """Keeps torch.compile out of functions that build masks: in it they make some that they else leave out."""
    names = forward.__globals__  # a copy of its own, with all that the stage's graph calls
    for name, value in names.items():
        if getattr(value, "__module__", None) in MASK_MODULES:
            names[name] = torch.compiler.disable(value)
