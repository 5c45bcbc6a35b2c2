"""Activation checkpointing: a stage keeps its inputs alone and computes the rest again in its backward.

The method is that of Chen et al. (2016, arXiv:1604.06174), by `torch.utils.checkpoint`; the policies are those of
torchgpipe (Kim et al., 2020). The numbers are the same: random numbers are drawn again from the same state, and
what the second run does to buffers (running statistics) is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxsplit.errors import PlanError
from fxsplit.runtime.randomness import resumed, states

POLICIES = ("never", "except_last", "always")
"""Which micro-batches of a stage are computed again; the last one's backward comes right after its forward."""


def parse_policies(wanted: str | Sequence[str], stage_count: int) -> tuple[str, ...]:
    """The policy of each stage.

    Args:
        wanted: one for all stages, or a list of one for each.
        stage_count: how many there are.

    Raises:
        PlanError: an unknown policy, or another number of them.
    """
    policies = (wanted,) * stage_count if isinstance(wanted, str) else tuple(wanted)
    for policy in policies:
        if policy not in POLICIES:
            raise PlanError("unknown checkpoint policy", found=repr(policy), allowed=", ".join(POLICIES))
    if len(policies) != stage_count:
        raise PlanError("not one checkpoint policy a stage", found=len(policies), allowed=f"{stage_count}, or one")
    return policies


def is_checkpointed(policy: str, micro_batch: int, last: int) -> bool:
    """Whether a micro-batch is computed again under a policy."""
    return policy == "always" or (policy == "except_last" and micro_batch < last)


def run_checkpointed(
    stage: nn.Module, run: Callable[..., tuple[Any, ...]], inputs: Sequence[Any], drawing: torch.device | None
) -> tuple[Any, ...]:
    """Runs a stage so that its backward computes it again.

    Args:
        stage: whose buffers the second run must leave as they are.
        run: the stage's forward.
        inputs: of it.
        drawing: its device, if it draws random numbers.
    """
    # Not checkpoint's own way: in-process workers share their generators, and it does not know of their lock.
    generators = None if drawing is None else states(drawing)

    def on_copies(*values: Any) -> tuple[Any, ...]:
        # A stage may change what it received in place; the second run needs it as it came.
        return run(*(value.clone() if isinstance(value, Tensor) else value for value in values))

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        again = nullcontext() if drawing is None or generators is None else resumed(generators, drawing)
        return nullcontext(), _again(stage, again)

    result: tuple[Any, ...] = checkpoint(
        on_copies, *inputs, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
    )
    return result


@contextmanager
def _again(stage: nn.Module, drawing: AbstractContextManager[Any]) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in stage.buffers()]
    try:
        with drawing:
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.data.copy_(value)  # for autograd, which may have kept the buffer, nothing has changed
