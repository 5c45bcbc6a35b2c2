"""The split stages are checked against the model, too: a value that crosses a cut is no longer shared memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxsplit.compressors.decaying_linear import Shrink
from fxsplit.errors import PlanError
from fxsplit.schedules.replicas import replicas_of
from fxsplit.split import SplitModel, split
from fxsplit.stage import CLIENT, Edge, Mode
from fxsplit.trace import Arguments, TracedModel, checked_call, two_samples
from fxsplit.trace.effects import changed_buffers
from fxsplit.trace.patches import without_cache
from fxsplit.trace.verify import compare_observations, observe, observe_model


def verify_split(rewritten: TracedModel, stage_count: int, example: Arguments, *, exact: bool = False) -> None:
    """Runs the stages one after another, each on copies of what it receives, and compares with the model.

    In-place operations may reach memory that a value on the other side of a cut shares in the unsplit model;
    the graph alone does not show it.

    Args:
        rewritten: the model with stages on its nodes.
        stage_count: how many.
        example: inputs; two samples of them are run.
        exact: run the example's own batch instead.

    Raises:
        TraceError: names the output or buffer that differs, and by how much.
    """
    model = rewritten.model
    call, leaves = checked_call(model, example)
    samples = leaves if exact else two_samples(model, call, leaves)
    split_model = split(rewritten, stage_count)
    for mode in split_model.boundaries:
        with without_cache(model):
            expected = observe_model(model, call, mode.training, samples)
        if expected is not None:
            found = observe(model, mode.training, functools.partial(_run, split_model, mode, samples))
            compare_observations(
                expected,
                found,
                f"{type(model).__name__} split into {stage_count} stages",
                mode.training,
                hint="a value is changed in place after it has crossed a cut: cut at another module",
            )


def check_buffers(rewritten: TracedModel, workers: Sequence[str]) -> None:
    """Refuses a split in which two workers would each keep a copy of a buffer that the forward changes.

    Args:
        rewritten: the model with stages on its nodes.
        workers: the worker of each stage.

    Raises:
        PlanError: names buffer and workers.
    """
    homes: dict[str, dict[str, None]] = {}
    for graph in rewritten.graphs.values():
        for node in graph.module.graph.nodes:
            for name in changed_buffers(node):
                if "stage" in node.meta:
                    homes.setdefault(name, {})[workers[node.meta["stage"]]] = None
    for name, found in homes.items():
        if len(found) > 1:
            raise PlanError(
                "two workers use a buffer that the model's forward changes",
                where=name,
                found=f"workers {', '.join(found)}",
                allowed="one worker",
                hint="cut so that every call of this module is on one worker",
            )


def check_replicas(rewritten: TracedModel, workers: Sequence[str]) -> None:
    """Refuses what the replicas of a stage cannot keep alike: state that forward changes, but for batch norm's.

    Args:
        rewritten: the model with stages on its nodes.
        workers: the worker of each stage, or its replicas.

    Raises:
        PlanError: names the buffer, or the compressor.
    """
    for graph in rewritten.graphs.values():
        for node in graph.module.graph.nodes:
            if "stage" not in node.meta or len(replicas := replicas_of(workers[node.meta["stage"]])) == 1:
                continue
            where = f"stage {node.meta['stage']}, on {', '.join(replicas)}"
            called = graph.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(called, Shrink):
                raise PlanError(
                    "decaylinear counts the steps of one worker, and the stage in front of it has replicas",
                    where=where,
                    found=str(called.codec),
                    hint="another compressor on that cut, or a stage without replicas",
                )
            for name in changed_buffers(node):
                owner = rewritten.model.get_submodule(name.rpartition(".")[0])
                if graph.front_end == "export" or not _is_batch_norm(owner):
                    raise PlanError(
                        "forward changes a buffer of a replicated stage, and each replica would have its own",
                        where=where,
                        found=f"{name}, of a {type(owner).__name__}",
                        allowed="running statistics of batch norm layers, which the replicas share; of whole "
                        "batches with deferred_batch_norm=True",
                        hint="cut so that this module is in a stage without replicas",
                    )


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether its statistics are those of a micro-batch; a SyncBatchNorm's are not."""
    return isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)


def _run(split_model: SplitModel, mode: Mode, leaves: Sequence[Any]) -> list[Any]:
    """The output leaves, with a copy at every edge."""
    boundary = split_model.boundaries[mode]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    values: dict[tuple[int, str], Any] = {(CLIENT, e.value): _copy(tensors[i]) for i, e in boundary.inputs}
    for number, stage in enumerate(split_model.stages):
        ports = stage.ports(mode)
        inputs = [_copy(values[edge.source, edge.value]) for edge in ports.inputs]
        outputs = stage.run(mode, *inputs)
        values.update({(number, name): _copy(v) for name, v in zip(ports.outputs, outputs, strict=True)})
    return [values[leaf.source, leaf.value] if isinstance(leaf, Edge) else leaf for leaf in boundary.outputs]


def _copy(value: Any) -> Any:
    return value.clone(memory_format=torch.preserve_format) if isinstance(value, Tensor) else value
