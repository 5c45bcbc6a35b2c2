"""The road from a model to a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsplit.analyze import analyze
from fxsplit.compressors.inserted import InsertedModules
from fxsplit.compressors.learned import split_learned
from fxsplit.compressors.registry import Asked
from fxsplit.costs import CostTable
from fxsplit.errors import PipelineError, PlanError
from fxsplit.opening import trace_for_planning
from fxsplit.passes import rewrite
from fxsplit.planning import Budget, Placement, Plan, check_available, parse_devices
from fxsplit.planning import plan as make_plan
from fxsplit.planning.devices import single_placements
from fxsplit.planning.guard import Guard
from fxsplit.planning.planner import BRANCHES, GIVEN, check_chunks
from fxsplit.planning.profile import Profile
from fxsplit.planning.stages import AUTO, Codecs
from fxsplit.runtime.built import Built
from fxsplit.runtime.checkpointing import parse_policies
from fxsplit.runtime.compiled import check_alone, check_compilers
from fxsplit.runtime.deferred_batch_norm import check_batch_norms
from fxsplit.runtime.device_maps import sole_gpus
from fxsplit.runtime.durable import EngineOptions
from fxsplit.runtime.group import TIMEOUT_S
from fxsplit.runtime.pipeline import Pipeline
from fxsplit.runtime.rpc import Rpc
from fxsplit.runtime.stage_options import StageOptions
from fxsplit.runtime.torchrun import LISTEN
from fxsplit.runtime.transports import listening
from fxsplit.runtime.transports import transport as find_transport
from fxsplit.schedules import Times
from fxsplit.schedules import schedule as find_schedule
from fxsplit.snapshots import Snapshots
from fxsplit.trace import ExampleInputs, TracedModel, check_module, check_names, trace
from fxsplit.trace.call import Arguments
from fxsplit.trace.ordering import reordered
from fxsplit.verify_split import check_buffers, check_replicas, verify_split


def compile(
    model: nn.Module,
    devices: Sequence[str],
    *,
    compressor: Asked = None,
    gradient_compressor: Asked = AUTO,
    example_inputs: ExampleInputs | None = None,
    cuts: Sequence[str] | None = None,
    chunks: int | str = 1,
    budget: Budget | None = None,
    placement: str = GIVEN,
    guard: Guard | None = None,
    profile: Profile | None = None,
    optimizer: str = "adam",
    plan: Plan | str | None = None,
    schedule: str = "gpipe",
    transport: str = "rpc",
    verify: bool = True,
    deferred_batch_norm: bool = False,
    checkpoint: str | Sequence[str] = "never",
    cuda_graphs: bool = False,
    compile_stages: bool = False,
    listen: str | None = None,
    token: str | None = None,
    timeout_s: float = TIMEOUT_S,
    snapshots: Snapshots | None = None,
) -> Pipeline:
    """Splits a model over devices and starts the pipeline that runs it.

    Args:
        model: any module, unmodified; it stays as it is.
        devices: one entry a stage: a torch device of this host ("cpu", "cuda:0"), or "worker/device" for a
            worker of that name. The first is the client's: this process, where inputs are given and outputs come
            back. Equal entries are the same worker, so ["cpu", "cuda", "cpu"] is a sandwich. Several joined by "+"
            are the replicas of a stage, such as "a/cuda:0+b/cuda:0": micro-batches are dealt to them in turn, and
            at the end of a step their gradients are summed.
        compressor: what activations that cross between workers go through: "sortquant8", "uniform4"..., or a
            list with one for each cut; None sends them as they are; "auto" chooses for each cut what is
            predicted to be fastest of what `guard` allows, nothing among it.
        gradient_compressor: the same for their gradients; what the activations' compressor wants for gradients
            if not given, "same" for the same.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. If given, the model is
            compiled now, else at the first call.
        cuts: module names at which the stages but the first begin; chosen by cost if not given.
        chunks: micro-batches that a batch is cut into; "auto" chooses, and needs `example_inputs`.
        budget: limits that a plan must keep, and assumptions about the link.
        placement: "given", every device of the list gets a stage; or "auto", which needs `example_inputs`: all but
            the client's may be left out, and the client may send the inputs as they are and compute nothing.
        guard: what `compressor="auto"` may choose from.
        profile: measured speeds of devices and codecs; what is not in it is estimated. If not given, what
            `fxsplit calibrate` has kept of this model, for the devices of this host.
        optimizer: whose state counts in the budget's memory: "sgd", "momentum" or "adam".
        plan: a saved plan, or the path of one, instead of `cuts`, `compressor`, `chunks` and `schedule`.
        schedule: the order of work of `pipe.step`: "gpipe"; "1f1b" and "interleaved", which keep no more
            micro-batches than stages; "zero-bubble"; or "auto", which is made for the times that were measured.
            A call of the pipeline and the backward of its output are always GPipe.
        transport: "rpc" (worker processes) or "in_process" (threads; for debugging and tests).
        verify: check the traced model against the model itself, bit for bit.
        deferred_batch_norm: batch norm layers update their running statistics once a batch, with those of the
            whole batch, whatever `chunks` is, as torchgpipe's option of this name does; else once a micro-batch.
            Each micro-batch is normalised by its own statistics in either case, so outputs and gradients are the
            same. With `chunks=1` the running statistics are the model's, but for the rounding of the last bits.
            SyncBatchNorm is refused.
        checkpoint: "always" keeps the inputs of a stage and computes the rest again in its backward; "except_last"
            spares the last micro-batch; "never". One for all stages, or a list of one for each.
        cuda_graphs: stages on GPUs are replayed as CUDA graphs, one launch for a forward or backward of a
            micro-batch, with the same numbers. Each micro-batch that is kept at a time has memory of its own. A
            stage that cannot be recorded is run as it is, and a warning says why.
        compile_stages: stages are compiled by `torch.compile`, at the first micro-batch of each shape, which may
            take a minute. Random numbers are the same, and sums may be rounded in another order. Needs a C++
            compiler for stages on the CPU, and Triton for those on a GPU. Not together with `cuda_graphs`.
        listen: "HOST:PORT" at which the named workers join from other machines, by `fxsplit worker --join`; see
            docs/security.md. "torchrun": rank 0 is the client, and on every other rank this call is
            `fxsplit.serve()`. Not given: all workers are processes of this host.
        token: what they must know; the environment's FXSPLIT_TOKEN if not given, else one is made and printed.
        timeout_s: how long a worker may be silent before it is given up. It says once a second that it lives,
            however long it computes. One that has died is noticed at once.
        snapshots: where training is saved as it goes. A worker that is lost is then started again, or waited for
            if it had joined, and training goes on as if nothing had happened; and a script that is run again goes
            on from the newest snapshot. Under torchrun, its restarts are what goes on.

    Returns:
        the pipeline: call it as the model.

    Raises:
        FxsplitError: whatever does not fit, before any worker is started; see its subclasses.
    """
    check_module(model)
    if plan is not None:
        plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        cuts, chunks, schedule = plan.cut_names, plan.chunks, plan.schedule
        compressor, gradient_compressor = plan.compressor, plan.gradient_compressor
    placements = parse_devices(devices)
    check_available(placements)
    asked: dict[str, Any] = {"compressor": compressor, "gradient_compressor": gradient_compressor}
    has_learned = False
    if compressor != AUTO:
        codecs = Codecs.of(compressor, gradient_compressor, len(placements) - 1)
        asked = {"compressor": codecs.forward, "gradient_compressor": codecs.backward}
        has_learned = any(split_learned(codec)[0] is not None for codec in codecs.forward)
    if chunks != AUTO:
        check_chunks(chunks)
        find_schedule(schedule).orders([p.worker for p in placements], int(chunks), Times.unit(len(placements)))
    if example_inputs is None and (chunks == AUTO or placement in (AUTO, BRANCHES)):
        name = "chunks='auto'" if chunks == AUTO else f"placement={placement!r}"
        raise PlanError(f"{name} looks at the batch", found="no example_inputs", hint="give example_inputs")
    check_names(model, cuts or ())
    policies = parse_policies(checkpoint, len(placements))
    how = StageOptions(deferred_batch_norm, policies, cuda_graphs, compile_stages)
    _check_running(how, model, [p for p in placements if listen is None or not p.is_named], timeout_s)
    chosen = find_transport(transport) if listen is None else listening(listen, token, placements, transport)
    if isinstance(chosen, Rpc):
        chosen.gpus = sole_gpus(placements)
    options: dict[str, Any] = {"cuts": cuts, "chunks": chunks, "schedule": schedule, "budget": budget}
    options |= {**asked, "placement": placement, "guard": guard, "profile": profile}
    options["optimizer"] = optimizer
    builder = _Builder(model, placements, plan, options, verify, deferred_batch_norm, listen is None)
    built = None if example_inputs is None else builder(Arguments.of(example_inputs), None, False)
    count = built.plan.chunks if built is not None else int(chunks)
    if built is not None and len(built.plan.devices) != len(placements):
        placements = parse_devices(built.plan.devices)
        how = replace(how, checkpoint=parse_policies(checkpoint, len(placements)))
    engine = EngineOptions(how, timeout_s, snapshots, listen != LISTEN)
    return Pipeline(model, placements, count, chosen, builder, built, has_learned, engine)


@dataclass
class _Builder:
    """The road from a model to what its pipeline loads: trace, analyze, plan, rewrite, verify.

    Attributes:
        model: the model.
        placements: one a stage.
        plan: the plan that was given, if one was.
        options: of the planner.
        verify: whether trace and split are compared with the model.
        deferred: whether batch norm layers defer their statistics.
        is_local: whether named workers are processes of this host, too.
        inserted: the modules of learned compressors, which all recordings of the model share.
    """

    model: nn.Module
    placements: tuple[Placement, ...]
    plan: Plan | None
    options: dict[str, Any]
    verify: bool
    deferred: bool
    is_local: bool = True
    inserted: InsertedModules = field(default_factory=InsertedModules)

    def __call__(self, arguments: Arguments, first: Plan | None, exact: bool) -> Built:
        """See `fxsplit.runtime.built.Builder`."""
        example = _on_model(self.model, arguments, self.placements[0].device)
        if first is None:
            traced, made = self._first(example)
        else:
            made = first
            if made.moved:  # by names of nodes, which depend on what was opened
                traced = _in_order(trace_for_planning(self.model, example, verify=self.verify), made)
            else:
                traced = trace(self.model, example, cuts=first.cut_names, verify=self.verify, exact=exact)
        if self.verify:  # without compressors: these change the numbers, and are meant to
            verify_split(rewrite(traced, made, is_plain=True), len(made.parts), example, exact=exact)
        if self.deferred and any(graph.front_end == "export" for graph in traced.graphs.values()):
            raise PipelineError(
                "deferred_batch_norm needs batch norm layers, and torch.export has taken them apart",
                where=type(self.model).__name__,
                found="; ".join(traced.notes),
                hint="leave deferred_batch_norm out, or cut outside what the recorder refuses",
            )
        rewritten = rewrite(traced, made, self.inserted)
        check_buffers(rewritten, made.workers)
        check_replicas(rewritten, made.workers)
        return Built(rewritten, made)

    def _first(self, example: Arguments) -> tuple[TracedModel, Plan]:
        cuts = self.options["cuts"]
        if cuts is None or (self.plan is not None and self.plan.moved):
            traced = trace_for_planning(self.model, example, verify=self.verify)
        else:
            traced = trace(self.model, example, cuts=cuts, verify=self.verify)
        for note in traced.notes:
            warnings.warn(f"{type(self.model).__name__}: {note}", stacklevel=6)
        costs = analyze(traced, example)
        devices = tuple(placement.spelling for placement in self.placements)
        if self.plan is None:
            made = make_plan(costs, devices, **{**self.options, "profile": self._profile(costs)})
            return _in_order(traced, made), made
        _check_plan(self.plan, costs, devices)
        return _in_order(traced, self.plan), self.plan

    def _profile(self, costs: CostTable) -> Profile:
        """The one that was given, or what was measured of the model on this host before."""
        given: Profile | None = self.options["profile"]
        singles = single_placements(self.placements)
        is_here = [p.spelling for p in singles if self.is_local or not p.is_named]
        return Profile.kept(costs, is_here) if given is None else given


def _in_order(traced: TracedModel, plan: Plan) -> TracedModel:
    """The model in the order of the plan."""
    return reordered(traced, plan.cut_names[0], plan.moved) if plan.moved else traced


def _on_model(model: nn.Module, example: Arguments, client: str) -> Arguments:
    """The example where the model is: inputs come on the client's device, which may be another."""
    home = next((parameter.device for parameter in model.parameters()), None)
    tensors = [leaf for leaf in pytree.tree_leaves((example.args, example.kwargs)) if isinstance(leaf, Tensor)]
    on_client = all(tensor.device.type == torch.device(client).type for tensor in tensors)
    return example.to(home) if home is not None and on_client else example


def _check_running(options: StageOptions, model: nn.Module, here: Iterable[Placement], timeout_s: float) -> None:
    """Refuses what this model, or the devices of this host, cannot do, and what is no time-out."""
    if not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise PipelineError("not a time-out", where="timeout_s", found=repr(timeout_s), allowed="seconds, above 0")
    if options.compile_stages:
        check_alone(options.cuda_graphs)
        check_compilers([torch.device(placement.device) for placement in single_placements(here)], "this host")
    if options.deferred_batch_norm:
        check_batch_norms(model)


def _check_plan(plan: Plan, costs: CostTable, devices: Sequence[str]) -> None:
    plan.check_model(costs)
    if plan.devices != tuple(devices):
        raise PlanError("the plan is for other devices", found=", ".join(devices), allowed=", ".join(plan.devices))
