"""Which worker holds which parameter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fxsplit.planning import Plan, parse_devices
from fxsplit.split import SplitModel


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in pairs}


def stages_of(plan: Plan, worker: str) -> dict[int, str]:
    """The stages that a worker holds, or a replica of, each with its device there."""
    return {
        stage: replica.device
        for stage, placement in enumerate(parse_devices(plan.devices))
        for replica in placement.replicas
        if replica.worker == worker
    }


def homes_of(plan: Plan, split_model: SplitModel, canonical: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The workers that hold each parameter, in the order of their stages; replicas are one."""
    homes: dict[str, dict[str, None]] = {}
    for worker, stage in zip(plan.workers, split_model.stages, strict=True):
        for name, _ in stage.named_parameters(remove_duplicate=False):
            homes.setdefault(canonical[name], {})[worker] = None
    return {name: tuple(workers) for name, workers in homes.items()}
