"""Who takes part: ways to train on one or two GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        kind: "single", "ddp", "torch" (`torch.distributed.pipelining`) or "fxsplit"; "blocks" measures the
            parts of the model for the cuts.
        stages: of the pipeline, dealt out to the GPUs in turn.
        chunks: micro-batches.
        schedule: of the pipeline.
        cuda_graphs: whether fxsplit replays its stages.
        transport: of fxsplit.
        replicas: of the whole model, each on a GPU, in place of stages.
    """

    kind: str
    stages: int = 2
    chunks: int = 1
    schedule: str = "gpipe"
    cuda_graphs: bool = True
    transport: str = "in_process"
    replicas: int = 1

    @property
    def processes(self) -> int:
        """How many processes it is."""
        return 2 if self.kind in ("ddp", "torch") else 1

    @property
    def name(self) -> str:
        """For the table."""
        if self.kind == "single":
            return "one GPU"
        if self.kind == "ddp":
            return "DDP"
        if self.kind == "torch":
            return f"torch pipelining, {self.schedule}, {self.chunks} chunks"
        graphs = ", graphs" if self.cuda_graphs else ", no graphs"
        over = "" if self.transport == "in_process" else f", {self.transport}"
        schedule = "" if self.schedule == "gpipe" else f", {self.schedule}"
        if self.replicas > 1:
            return f"fxsplit, {self.replicas} replicas, {self.chunks} chunks{schedule}{graphs}{over}"
        return f"fxsplit, {self.stages} stages, {self.chunks} chunks{schedule}{graphs}{over}"

    def spell(self) -> str:
        """As one word."""
        return ",".join(f"{key}={value}" for key, value in asdict(self).items())

    @classmethod
    def parse(cls, text: str) -> Contender:
        """What `spell` wrote; what is not said has its default.

        >>> Contender.parse("kind=fxsplit,stages=4,cuda_graphs=False").name
        'fxsplit, 4 stages, 1 chunks, no graphs'
        """
        given = dict(part.split("=") for part in text.split(","))
        kinds = {field.name: field.type for field in fields(cls)}
        read: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "bool": lambda value: value == "True"}
        return cls(**{key: read[str(kinds[key])](value) for key, value in given.items()})


BASE = (Contender("single"), Contender("ddp"))
REPLICAS = Contender("fxsplit", stages=1, chunks=2, replicas=2)

CONTENDERS: Mapping[str, Sequence[Contender]] = {
    "mobilenet-64": (
        *BASE,
        Contender("torch", chunks=4),
        Contender("fxsplit", 4, 2, cuda_graphs=False),
        *(Contender("fxsplit", stages, 2) for stages in (4, 6)),
        *(Contender("fxsplit", stages, chunks, "auto") for stages, chunks in ((4, 2), (6, 2))),
        REPLICAS,
    ),
    "mobilenet-256": (
        *BASE,
        Contender("torch", chunks=4),
        *(Contender("fxsplit", stages, 4) for stages in (4, 6)),
        Contender("fxsplit", 4, 4, "auto"),
        REPLICAS,
    ),
    "roberta-32": (
        *BASE,
        Contender("torch", chunks=4),
        Contender("fxsplit", 4, 2, cuda_graphs=False),
        *(Contender("fxsplit", stages, 2) for stages in (6, 8)),
        Contender("fxsplit", 6, 2, "auto"),
        REPLICAS,
    ),
}
"""By task."""
