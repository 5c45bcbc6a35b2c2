"""What cannot be: a model that takes more ways through itself than can be recorded, or than one batch can take."""

from __future__ import annotations

from fxsplit.errors import GuardError, PipelineError

MAX_VARIANTS = 16
"""Recordings of one model: more than these mean that it decides on the data of nearly every batch."""


def too_many_ways(model: str, recordings: int, reason: str) -> PipelineError:
    """A model that would have to be recorded again for nearly every batch."""
    return PipelineError(
        f"{model} needs another graph for nearly every batch",
        found=f"{recordings} recordings; the last because {reason}",
        allowed=f"at most {MAX_VARIANTS}",
        hint="take the decision on data out of the model's forward, or keep it inside one module",
    )


def no_way(refusal: GuardError, chunks: int) -> PipelineError:
    """A batch that is refused by the graph recorded on it."""
    if chunks == 1:
        return PipelineError(
            "the model's way through itself depends on more than its inputs",
            where=refusal.where,
            found=f"{refusal.found} after {refusal.allowed} on the same batch",
            hint="switch off what chooses at random (layerdrop, say), or cut outside the module that does",
        )
    return PipelineError(
        "the micro-batches of one batch take different ways through the model",
        where=refusal.where,
        found=f"{refusal.found} where another micro-batch has {refusal.allowed}",
        hint="compile with chunks=1, or take the decision on data out of the model's forward",
    )
