"""How stages are run, beside what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageOptions:
    """What a pipeline asks of the workers that run its stages; see `fxsplit.compile`.

    Attributes:
        deferred_batch_norm: running statistics are those of whole batches.
        checkpoint: the policy of every stage; none: "never".
        cuda_graphs: stages on GPUs are replayed as CUDA graphs.
        compile_stages: stages are compiled by torch.compile.
    """

    deferred_batch_norm: bool = False
    checkpoint: Sequence[str] = ()
    cuda_graphs: bool = False
    compile_stages: bool = False
