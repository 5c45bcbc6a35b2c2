"""What a worker holds: its stages, and what belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from fxsplit.runtime.deferred_batch_norm import DeferredBatchNorm
from fxsplit.runtime.graphs import StageGraphs
from fxsplit.runtime.live_memory import Ledger
from fxsplit.runtime.shared_memory import memory_of
from fxsplit.stage import StageModule


@dataclass(frozen=True)
class Holding:
    """What a worker holds, and where the other stages are.

    Attributes:
        stages: the stages held here.
        devices: of each.
        workers: the worker of every stage.
        batch_norms: the layers whose statistics are deferred.
        checkpoint: the policy of every stage; empty: "never".
        graphs: recordings of the stages, if there are to be any.
        ledger: counts the bytes that are kept, if that was asked for.
        are_compiled: whether torch.compile compiles the stages.
    """

    stages: Mapping[int, StageModule] = field(default_factory=dict)
    devices: Mapping[int, torch.device] = field(default_factory=dict)
    workers: tuple[str, ...] = ()
    batch_norms: DeferredBatchNorm = field(default_factory=lambda: DeferredBatchNorm(()))
    checkpoint: tuple[str, ...] = ()
    graphs: StageGraphs | None = None
    ledger: Ledger | None = None
    are_compiled: bool = False

    @cached_property
    def buffer_memory(self) -> frozenset[int]:
        """The memory of the buffers, which every micro-batch may change in place."""
        return frozenset(memory_of(self.buffers()))

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Of all stages; they stay the same objects."""
        return tuple(dict.fromkeys(p for stage in self.stages.values() for p in stage.parameters()))

    def buffers(self) -> list[Tensor]:
        """Of all stages, as they are now."""
        return [buffer for owned in self._owned for buffer in owned.values() if buffer is not None]

    @cached_property
    def _owned(self) -> list[dict[str, Tensor | None]]:
        """Of each module that has buffers; the modules stay."""
        modules = dict.fromkeys(module for stage in self.stages.values() for module in stage.modules())
        return [module._buffers for module in modules if module._buffers]
