"""Graph rewrites: each pass is one file and one name in `PASSES`."""

if __name__ != "fxsplit.passes":
    raise ImportError("import this package as fxsplit.passes, not by its folder's name")

from dataclasses import replace

import torch

from fxsplit.compressors.inserted import InsertedModules
from fxsplit.errors import PlanError
from fxsplit.passes.assign_stages import AssignStages
from fxsplit.passes.base import Pass
from fxsplit.passes.insert_codecs import InsertCodecs
from fxsplit.passes.recompute_values import RecomputeValues
from fxsplit.planning import Plan
from fxsplit.planning.stages import Codecs
from fxsplit.trace.ordering import copied
from fxsplit.trace.traced import TracedGraph, TracedModel, mode_name

__all__ = ["PASSES", "AssignStages", "InsertCodecs", "Pass", "RecomputeValues", "rewrite"]

PASSES: tuple[type[Pass], ...] = (AssignStages, RecomputeValues, InsertCodecs)


def rewrite(
    traced: TracedModel, plan: Plan, inserted: InsertedModules | None = None, *, is_plain: bool = False
) -> TracedModel:
    """Carries a plan out on a traced model: every node gets its stage, and cut edges their codecs.

    The result is still an ordinary callable that runs whole in one process, codecs inside, over the same
    parameters. The traced model stays as it is.

    Args:
        traced: the model.
        plan: what to carry out.
        inserted: the modules of learned compressors, if another recording of the model has them already.
        is_plain: without the plan's compressors, so that the numbers stay the model's.

    Raises:
        PlanError: a cut of the plan is not reached in one of the model's modes.
        CompressorError: a learned compressor does not fit what crosses a cut.
    """
    inserted = InsertedModules() if inserted is None else inserted
    done: dict[int, TracedGraph] = {}
    graphs = {}
    for training, graph in traced.graphs.items():
        if id(graph) not in done:
            device = next((p.device for p in traced.model.parameters()), torch.device("cpu"))
            passes = passes_of(plan, graph, mode_name(training), device, inserted, is_plain=is_plain)
            module = copied(traced, graph.module)
            for each in passes:
                each(module)
            done[id(graph)] = replace(graph, module=module)
        graphs[training] = done[id(graph)]
    return replace(traced, graphs=graphs)


def passes_of(
    plan: Plan,
    graph: TracedGraph,
    mode: str,
    device: torch.device,
    inserted: InsertedModules,
    *,
    is_plain: bool = False,
) -> tuple[Pass, ...]:
    """The passes that carry a plan out, in their order."""
    for name in plan.cut_names:
        if name not in graph.cut_points:
            raise PlanError(
                f"the model does not call '{name}' in {mode} mode, so no stage can begin there",
                found=name,
                hint="cut at a module that both modes call",
            )
    codecs = Codecs.of(None, None, len(plan.cuts)) if is_plain else plan.codecs
    return (
        AssignStages(tuple(graph.cut_points[name] for name in plan.cut_names)),
        RecomputeValues(plan.workers, plan.recomputed, device),
        InsertCodecs(
            plan.workers,
            plan.cut_names,
            codecs.forward,
            codecs.backward,
            codecs.edges,
            inserted,
            device,
        ),
    )
