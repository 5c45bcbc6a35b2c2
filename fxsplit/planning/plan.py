"""The plan: which stage runs where, what crosses the cuts, and what that is predicted to take."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from rich.table import Table

from fxsplit import schedules
from fxsplit.compressors import Compressor, compressor
from fxsplit.compressors.registry import compressors
from fxsplit.costs import CostTable
from fxsplit.errors import DeviceError, PlanError, nearest
from fxsplit.planning import document
from fxsplit.planning.devices import parse_devices
from fxsplit.planning.document import Reader, boolean, integer, list_of, number, read_object, refuse, text
from fxsplit.planning.forecast import (
    Alternative,
    PlannedHop,
    PlannedLink,
    hops_by_pair,
    read_alternative,
    read_hop,
    read_link,
)
from fxsplit.planning.links import Link
from fxsplit.planning.parts import (
    CUT_READERS,
    EDGE_READERS,
    Cut,
    Edge,
    Part,
    check_edge,
    edges_across,
    is_local,
    read_codec,
    read_cut,
    read_edge,
    read_part,
)
from fxsplit.planning.predict import stage_times
from fxsplit.planning.render import Report
from fxsplit.planning.stages import Codecs
from fxsplit.planning.units import format_bytes, format_macs, format_seconds
from fxsplit.schedules import Times

VERSION = 3
"""Version of the saved plan; a reader refuses others."""

SCHEDULES = tuple(kind.name for kind in schedules.SCHEDULES)
"""The schedules that a plan may name."""


@dataclass(frozen=True)
class Plan:
    """Cuts, placement, compressors and predictions for one model at one batch size; prints as a table.

    Attributes:
        model: class name of the model.
        fingerprint: digest of the model's structure.
        batch_size: samples in the batch that all bytes and times are for.
        devices: the device of each stage, as written; the first is the client's.
        cuts: one fewer than there are stages, in stage order.
        parts: one a stage.
        edges: every value that one stage makes and another needs, also between stages of one worker.
        recomputed: one entry a stage: the nodes of earlier stages that it computes again, since that is cheaper
            than to send their values (masks, positions, rotary tables).
        chunks: micro-batches of a batch.
        schedule: name of the pipeline schedule.
        compressor: spelling of the compressor of each cut; edges may have others, see `edges` and `codecs`.
        gradient_compressor: the same for gradients.
        predicted_step_s: predicted seconds of a training step.
        lower_bound_s: seconds below which no choice of cuts comes, by the same prediction.
        is_optimal: whether the cuts are proven to have the least predicted step time (under the budget).
        note: how the plan came about and what it assumes.
        links: each direction between two workers that the plan uses, as it was assumed; of a replicated stage's
            workers to themselves, the slowest between two replicas.
        hops: predicted times of what the stages send each other for one micro-batch.
        optimizer: the kind of optimizer whose state is in the stages' memory.
        alternatives: one device alone, the raw input, no compression: what they were predicted to take.
        moved: nodes that are run before the only cut, though the model's own order has them behind it.

    Raises:
        PlanError: the fields contradict each other.
    """

    model: str
    fingerprint: str
    batch_size: int
    devices: tuple[str, ...]
    cuts: tuple[Cut, ...]
    parts: tuple[Part, ...]
    edges: tuple[Edge, ...]
    recomputed: tuple[tuple[str, ...], ...]
    chunks: int
    schedule: str
    compressor: str
    gradient_compressor: str
    predicted_step_s: float
    lower_bound_s: float
    is_optimal: bool
    note: str
    links: tuple[PlannedLink, ...] = ()
    hops: tuple[PlannedHop, ...] = ()
    optimizer: str = "sgd"
    alternatives: tuple[Alternative, ...] = ()
    moved: tuple[str, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        self._check_stages()
        for index, edge in enumerate(self.edges):
            check_edge(edge, self.workers, f"plan.edges[{index}]")
        if len({(edge.value, edge.source, edge.target) for edge in self.edges}) < len(self.edges):
            refuse("plan.edges", "the same edge twice", "one edge for a value and a target")
        for index, cut in enumerate(self.cuts):
            expected = edges_across(cut.stage, self.edges, self.workers)
            if cut.stage != index + 1 or cut.edges != expected:
                allowed = f"the cut before stage {index + 1}, with all its edges"
                refuse(f"plan.cuts[{index}]", cut.name, allowed)

    def _check_stages(self) -> None:
        try:
            placements = parse_devices(self.devices)
        except DeviceError as error:
            refuse("plan.devices", error.found, f"{error.what}: {error.allowed}")
        stages = len(placements)
        if len(self.parts) != stages or len(self.cuts) != stages - 1:
            counts = f"{len(self.parts)} parts and {len(self.cuts)} cuts"
            refuse("plan", counts, f"{stages} parts and {stages - 1} cuts for {stages} devices")
        for index, (part, placement) in enumerate(zip(self.parts, placements, strict=True)):
            found = (part.stage, part.device, part.worker)
            expected = (index, placement.spelling, placement.worker)
            if found != expected:
                refuse(f"plan.parts[{index}]", found, f"{expected}, as the devices say")
        if len(self.recomputed) != stages:
            refuse("plan.recomputed", f"{len(self.recomputed)} entries", f"{stages}, one a stage")
        if self.moved and stages != 2:
            refuse("plan.moved", f"{len(self.moved)} nodes", "none, but with one cut")
        if self.chunks < 1:
            refuse("plan.chunks", self.chunks, "1 or more")
        for index, hop in enumerate(self.hops):
            if not hop.source < hop.target < stages:
                refuse(f"plan.hops[{index}]", (hop.source, hop.target), f"forward, from 0 to {stages - 1}")
        if self.schedule not in SCHEDULES:
            refuse("plan.schedule", self.schedule, ", ".join(SCHEDULES))

    @property
    def cut_names(self) -> tuple[str, ...]:
        """Names of the cuts, in stage order: with `devices`, all that is needed to plan the same again."""
        return tuple(cut.name for cut in self.cuts)

    @property
    def workers(self) -> tuple[str, ...]:
        """The worker of each stage."""
        return tuple(part.worker for part in self.parts)

    @property
    def inputs(self) -> tuple[Edge, ...]:
        """The edges from the model's inputs to the stages that use them, stage 0 included."""
        return tuple(edge for edge in self.edges if edge.source == -1)

    @property
    def outputs(self) -> tuple[Edge, ...]:
        """The edges from the stages to the model's outputs."""
        return tuple(edge for edge in self.edges if edge.target == len(self.parts))

    @property
    def codecs(self) -> Codecs:
        """The compressors of the cuts, and of the edges that have others."""
        cuts = len(self.cuts)
        found = Codecs(compressors(self.compressor, cuts), compressors(self.gradient_compressor, cuts))
        return replace(found, edges={key: pair for key, pair in self._coded() if pair != found.of_edge(*key)})

    def _coded(self) -> Iterator[tuple[tuple[str, int], tuple[Compressor, Compressor]]]:
        """Value and target of the activations that cross between workers, with their compressors."""
        for edge in self.edges:
            is_between = edge.source >= 0 and edge.target < len(self.parts)
            if is_between and not is_local(edge.source, edge.target, self.workers) and edge.gradient_wire_bytes:
                codecs = compressor(edge.compressor), compressor(edge.gradient_compressor)
                yield (edge.value, edge.target), codecs

    @property
    def gap(self) -> float:
        """Largest possible excess of `predicted_step_s` over the best cuts' there are; 0.1 is a tenth."""
        if self.is_optimal or self.lower_bound_s >= self.predicted_step_s:
            return 0.0
        return self.predicted_step_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else float("inf")

    @property
    def times(self) -> Times:
        """The predicted times of one micro-batch, from which `predicted_step_s` was simulated."""
        forward, backward = (hops_by_pair(self.hops, is_backward=way) for way in (False, True))
        links = {(link.sender, link.receiver): Link(link.bytes_per_s, link.latency_s) for link in self.links}
        between = lambda sender, receiver: links.get((sender, receiver), Link())  # noqa: E731
        return Times(stage_times(self.parts, self.chunks, between), forward, backward)

    def check_fingerprint(self, model: str, fingerprint: str) -> None:
        """Check that the plan was made for a model of this class and structure.

        Raises:
            PlanError: the fingerprint differs.
        """
        if self.fingerprint != fingerprint:
            raise PlanError(
                "the plan was made for another model",
                found=f"{self.model} ({self.fingerprint})",
                allowed=f"{model} ({fingerprint})",
                hint="plan again for this model",
            )

    def check_model(self, costs: CostTable) -> None:
        """Check that the plan was made for the model of `costs`; its batch size may be another.

        Raises:
            PlanError: the fingerprint differs, or a cut is not in the model.
        """
        self.check_fingerprint(costs.model, costs.fingerprint)
        for name in self.cut_names:
            if name not in costs.cut_points:
                close = nearest(name, costs.cut_points)
                raise PlanError("the plan cuts at a module that is not in the model", found=name, allowed=close)

    def to_json(self) -> str:
        """The plan as JSON text; bytes and MACs are whole numbers for a batch, times are seconds."""
        data: dict[str, object] = {name: getattr(self, name) for name in _READERS}
        # The edges of a cut are told by `edges`; its sums are written for other readers.
        data["cuts"] = [{name: getattr(cut, name) for name in CUT_READERS} for cut in self.cuts]
        for name in ("parts", "links", "hops", "alternatives"):
            data[name] = [asdict(row) for row in getattr(self, name)]
        data["edges"] = [
            {**{name: getattr(edge, name) for name in EDGE_READERS}, "spec": document.spec_to_json(edge.spec)}
            for edge in self.edges
        ]
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, source: str) -> Plan:
        """The plan of `to_json`. Everything is checked and nothing is evaluated.

        Raises:
            PlanError: damaged (line or field are named), written by a newer version, or larger than 64 MiB.
        """
        data = document.parse_json(source)
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and not isinstance(version, bool) and version != VERSION and version > 0:
            is_newer = version > VERSION
            raise PlanError(
                f"the plan was written by {'a newer' if is_newer else 'an older'} version of fxsplit",
                found=f"plan version {version}",
                allowed=f"{VERSION}",
                hint="update fxsplit, or plan again" if is_newer else "plan again",
            )
        fields = read_object(data, "plan", _READERS)
        workers = tuple(part.worker for part in fields["parts"])
        for index, edge in enumerate(fields["edges"]):
            check_edge(edge, workers, f"plan.edges[{index}]")
        cuts = []
        for index, row in enumerate(fields["cuts"]):
            cut = Cut(row["name"], row["stage"], edges_across(row["stage"], fields["edges"], workers))
            for name, value in row.items():
                if getattr(cut, name) != value:
                    refuse(f"plan.cuts[{index}].{name}", value, f"{getattr(cut, name)!r}, as its edges say")
            cuts.append(cut)
        return cls(**{**fields, "cuts": tuple(cuts)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON. The file appears whole or not at all.

        Raises:
            PlanError: it cannot be written there.
        """
        target = Path(path)
        try:
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(self.to_json() + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise PlanError("the plan cannot be written", where=target, found=error.strerror) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan of a file.

        Raises:
            PlanError: it cannot be read, or as `from_json`.
        """
        return document.load(path, "plan", cls.from_json)

    def report(self) -> Report:
        """The plan as a table: one row a stage, with what crosses the cut before it."""
        rows = []
        for part, cut in zip(self.parts, (None, *self.cuts), strict=True):
            bytes_over = (cut.raw_bytes, cut.wire_bytes, cut.gradient_wire_bytes) if cut is not None else ()
            crossing = [format_bytes(count) for count in bytes_over] or ["", "", ""]
            device = part.device if part.worker in part.device else f"{part.device} ({part.worker})"
            costs = (format_macs(part.macs), format_bytes(part.parameter_bytes), *crossing)
            seconds = f"{'' if part.is_measured else '~'}{format_seconds(part.step_s)}"
            row = (str(part.stage), device, _shorten(part.modules), *costs, seconds)
            rows.append(row)
        codecs = " / ".join(dict.fromkeys((self.compressor, self.gradient_compressor)))
        title = f"{self.model}, batch {self.batch_size}: {self.schedule}, chunks {self.chunks}, {codecs}"
        bound = f"at most {self.gap:.0%} above the best" if isfinite(self.gap) else "no bound known"
        found = "optimal" if self.is_optimal else bound
        step = f"predicted step {format_seconds(self.predicted_step_s)} ({found})"
        moved = f"run before the cut: {', '.join(self.moved)}" if self.moved else ""
        lines = (step, moved, self._by_edge(), self._compared(), self.note)
        return Report(title, _COLUMNS, tuple(rows), "\n".join(filter(None, lines)))

    def _by_edge(self) -> str:
        """The edges whose compressors are not those of their cut, in a line."""
        shown = [
            f"{value} to stage {target} {' / '.join(dict.fromkeys(map(str, pair)))}"
            for (value, target), pair in self.codecs.edges.items()
        ]
        return f"compressors of their own: {', '.join(shown)}" if shown else ""

    def _compared(self) -> str:
        """What the plan was compared with, in a line."""
        shown = [
            f"{each.what} {format_seconds(each.step_s)}{'' if each.keeps_budget else ' (breaks the budget)'}"
            for each in sorted(self.alternatives, key=lambda each: each.step_s)
        ]
        return f"beside it: {', '.join(shown)}" if shown else ""

    def __str__(self) -> str:
        return self.report().text()

    def __rich__(self) -> Table:
        return self.report().table()

    def _repr_html_(self) -> str:
        return self.report().html()


_COLUMNS = ("stage", "device", "modules", "MACs", "parameters", "over cut", "on wire", "gradients", "time")
"""`time` begins with '~' where it is an estimate."""


def _shorten(modules: tuple[str, ...], most: int = 3) -> str:
    """The first and the last of many names."""
    if len(modules) <= most:
        return ", ".join(modules)
    return f"{modules[0]} ... {modules[-1]} ({len(modules)})"


_READERS: Mapping[str, Reader[Any]] = {
    "version": integer(1),
    "model": text,
    "fingerprint": text,
    "batch_size": integer(1),
    "devices": list_of(text),
    "cuts": list_of(read_cut),
    "parts": list_of(read_part),
    "edges": list_of(read_edge),
    "recomputed": list_of(list_of(text)),
    "chunks": integer(1),
    "schedule": text,
    "compressor": read_codec,
    "gradient_compressor": read_codec,
    "predicted_step_s": number,
    "lower_bound_s": number,
    "is_optimal": boolean,
    "note": text,
    "links": list_of(read_link),
    "hops": list_of(read_hop),
    "optimizer": text,
    "alternatives": list_of(read_alternative),
    "moved": list_of(text),
}
