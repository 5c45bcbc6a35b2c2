"""Replicated stages: several workers that hold the same stage, and to which its micro-batches are dealt.

In plans and orders the worker of a replicated stage is the names of its replicas joined by '+': 'a+b'. Micro-batch
m is dealt to replica m modulo their number, forward and backward, as in PipeDream's round-robin (Narayanan et al.,
2019, arXiv:1806.03377): it is known before a step runs who does what. This file alone knows that notation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from fxsplit.errors import PlanError

JOINT = "+"
"""Between the replicas of a stage, in names of workers and in device lists."""


@lru_cache(maxsize=1024)
def replicas_of(worker: str) -> tuple[str, ...]:
    """The workers behind a stage's worker: its replicas, or itself.

    >>> replicas_of("a+b"), replicas_of("server")
    (('a', 'b'), ('server',))
    """
    return tuple(worker.split(JOINT))


def replica_for(worker: str, micro_batch: int) -> str:
    """The replica that does a micro-batch."""
    replicas = replicas_of(worker)
    return replicas[micro_batch % len(replicas)]


def replica_counts(workers: Iterable[str]) -> list[int]:
    """How many replicas each stage has."""
    return [len(replicas_of(worker)) for worker in workers]


def single_workers(workers: Iterable[str]) -> tuple[str, ...]:
    """Every worker behind those of the stages, once, in their order."""
    return tuple(dict.fromkeys(name for worker in workers for name in replicas_of(worker)))


def share_of(chunks: int, replicas: int) -> int:
    """Micro-batches that the busiest of some replicas gets."""
    return -(-chunks // replicas)


def check_replicas(workers: Sequence[str], chunks: int) -> None:
    """Refuses a batch of which some replica would get no micro-batch.

    Raises:
        PlanError: always then.
    """
    for stage, worker in enumerate(workers):
        replicas = replicas_of(worker)
        if chunks < len(replicas):
            raise PlanError(
                "a stage has more replicas than the batch has micro-batches",
                where=f"stage {stage}, on {', '.join(replicas)}",
                found=f"chunks={chunks}",
                allowed=f"at least {len(replicas)}, one for each replica",
                hint="more chunks, or fewer replicas",
            )
