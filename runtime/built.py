"""What a pipeline is made of, and what it tells of its workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fxsplit.planning import Placement, Plan
from fxsplit.planning.devices import single_placements
from fxsplit.trace.call import Arguments
from fxsplit.trace.traced import TracedModel


@dataclass(frozen=True)
class Built:
    """A model on its way into the pipeline: planned and rewritten."""

    rewritten: TracedModel
    plan: Plan


class Builder(Protocol):
    """Traces, plans and rewrites a model."""

    def __call__(self, arguments: Arguments, first: Plan | None, exact: bool) -> Built:
        """For the arguments of the first call; or, with the plan that was made then, for others.

        Args:
            arguments: of the call.
            first: the plan that was made at the first call.
            exact: for exactly this batch, which takes a way of its own through the model.
        """


class WorkerInfo(NamedTuple):
    """One worker: its name, its devices, the host and process it runs in."""

    name: str
    device: str
    host: str
    pid: int


def worker_infos(placements: Iterable[Placement], places: Mapping[str, tuple[str, int]]) -> tuple[WorkerInfo, ...]:
    """All workers, the client first, from where the stages are and where the workers are."""
    devices: dict[str, dict[str, None]] = {}
    for placement in single_placements(placements):
        devices.setdefault(placement.worker, {})[placement.device] = None
    return tuple(WorkerInfo(name, ", ".join(own), *places[name]) for name, own in devices.items())
