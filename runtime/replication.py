"""What the replicas of a stage do together: they sum their gradients, and share what batch norm layers saw.

Between two runs all replicas have the same parameters, buffers, gradients and optimizer states. So whatever else
is asked of workers (norms, clipping, steps of optimizers, snapshots) each does alike, and the first one speaks for
all. In a backward the first replica adds to the gradients that are there, and the others begin with none; at its
end the sum of all replaces each: the sum over all micro-batches, as of one worker, in another order.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fxsplit.errors import PipelineError, WorkerError
from fxsplit.runtime.replica_group import Check, ReplicaGroup
from fxsplit.runtime.report import LinkTraffic, RunReport
from fxsplit.runtime.stopwatch import CPU
from fxsplit.runtime.streams import Marks, wait_for
from fxsplit.runtime.transport import Endpoint, wait
from fxsplit.runtime.undo import Copies
from fxsplit.schedules import Action
from fxsplit.schedules.replicas import replicas_of
from fxsplit.stage import StageModule

BUCKET_BYTES = 1 << 25
"""Gradients are summed in pieces of about this size, of which two are under way at a time."""

Result = TypeVar("Result")
Waiting: TypeAlias = Generator[list[Future[Any]], None, Result]
"""Work that says what it waits for: its thread may have something else to do until then."""


class Replication:
    """One replica's part.

    Args:
        endpoint: of this worker.
        worker: the replicas, as the worker of their stages.
        stages: held here; by all replicas the same.
    """

    def __init__(self, endpoint: Endpoint, worker: str, stages: Mapping[int, StageModule]) -> None:
        self._group = ReplicaGroup(endpoint, worker)
        self._name = endpoint.name
        self._first_stage = min(stages)
        # In the same order on all replicas.
        held = dict.fromkeys(p for _, stage in sorted(stages.items()) for p in stage.parameters())
        self._held, self._buckets = tuple(held), list[Bucket]()
        self._device = self._held[0].device if self._held else CPU

    @classmethod
    def of(
        cls, endpoint: Endpoint, workers: Sequence[str], stages: Mapping[int, StageModule]
    ) -> Replication | None:
        """That of a worker; None if it is no replica.

        Args:
            endpoint: of the worker.
            workers: the worker of every stage of the pipeline.
            stages: held here.
        """
        own = [w for w in workers if len(replicas_of(w)) > 1 and endpoint.name in replicas_of(w)]
        return cls(endpoint, own[0], stages) if own else None

    def begin_backward(self) -> None:
        """The first replica goes on from the gradients there are, the others from none."""
        if self._group.rank > 0:
            for parameter in self._parameters():
                parameter.grad = None

    def sum_gradients(self, run: int, check: Check, report: RunReport) -> Waiting[None]:
        """Makes the gradients of all replicas their sum.

        A parameter that has a gradient on some replicas only, since its use depends on the data, counts as zero
        on the others: a flag for each travels with the numbers, so that no replica waits for another in vain.

        Args:
            run: under way.
            check: raises if waiting makes no more sense.
            report: what is measured goes here.

        Yields:
            What it waits for next.

        Raises:
            PipelineError: a gradient is sparse; or the run was given up.
            WorkerError: the replicas cannot reach each other.
        """
        with report.timing("reduce", Action(self._first_stage, self._group.rank), self._device):
            under_way: deque[tuple[Bucket, Tensor, Future[Marks]]] = deque()
            for bucket in self._bucketed():  # one is filled while another is summed
                flat = bucket.filled()
                under_way.append((bucket, flat, self._group.sum(flat, run, check)))
                self._count(flat.nbytes, report)
                if len(under_way) > 1:
                    yield from self._ended(*under_way.popleft(), run, check)
            while under_way:
                yield from self._ended(*under_way.popleft(), run, check)

    def _ended(self, bucket: Bucket, flat: Tensor, sum_: Future[Marks], run: int, check: Check) -> Waiting[None]:
        """The sum becomes the gradients."""
        marks = yield from _waited(sum_, check)
        wait_for(marks, flat)
        if not bucket.is_full:
            yield from _waited(self._group.finish(run, check), check)  # before flags are looked at
        bucket.put_back()

    def share(self, rows: Tensor, numbers: Tensor, run: int, check: Check) -> Waiting[tuple[Tensor, Tensor]]:
        """What all replicas have, one replica's after the other's: the same on each.

        Args:
            rows: integers [n, k] on the CPU; the last column counts half of the numbers of each.
            numbers: float32 or float64 [m], on the device of the stages.
            run: under way.
            check: raises if waiting makes no more sense.

        Yields:
            What it waits for next.
        """
        known = []
        for slot in self._group.exchange("what was seen", rows, run).values():
            packet = yield from _waited(slot, check)
            known.append(packet.payload[0])
        sizes = [2 * int(each[:, -1].sum()) for each in known]
        together = numbers.new_zeros(sum(sizes))
        if sum(sizes):  # a sum of each with zeros is exact
            together.split(sizes)[self._group.rank].copy_(numbers)
            marks = yield from _waited(self._group.sum(together, run, check), check)
            wait_for(marks, together)
        return torch.cat(known), together

    def finish(self, run: int, check: Check) -> Waiting[None]:
        """Ends when what is above is done, or is sure to be.

        A GPU waits for its peers for ever. Those of one process give up together; those of other processes are
        waited for here, where it is noticed that one is gone.

        Yields:
            What it waits for next.
        """
        if not self._group.is_within_process:
            yield from _waited(self._group.finish(run, check), check)

    def give_up(self) -> None:
        """A run was given up: the next one begins with a process group of its own."""
        self._group.drop()

    def _parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [parameter for parameter in self._held if parameter.requires_grad]

    def _bucketed(self) -> Iterable[Bucket]:
        """Their gradients, to be summed piece by piece; small ones are kept from step to step."""
        trained = self._parameters()
        if sum(parameter.nbytes for parameter in trained) > Copies.KEPT_BYTES:
            return map(Bucket, _in_buckets(trained))  # each when its turn comes
        known = [parameter for bucket in self._buckets for parameter in bucket.parameters]
        if list(map(id, known)) != list(map(id, trained)):
            self._buckets = [Bucket(some) for some in _in_buckets(trained)]
        return self._buckets

    def _count(self, nbytes: int, report: RunReport) -> None:
        """Of a ring all-reduce each member sends its neighbour so much."""
        names = self._group.names
        sent = 2 * (len(names) - 1) * nbytes // len(names)
        to = names[(self._group.rank + 1) % len(names)]
        traffic = LinkTraffic(self._name, to, True, sent, sent, 1)
        known = report.traffic.get((to, True))
        report.traffic[to, True] = traffic if known is None else known + traffic


def _waited(future: Future[Result], check: Check) -> Waiting[Result]:
    yield [future]
    result: Result = wait(future, check)
    return result


def check_digests(digests: Mapping[str, str]) -> None:
    """Refuses replicas that have drifted apart.

    Args:
        digests: of `digest_of`, by worker.

    Raises:
        WorkerError: they are not all the same.
    """
    if len(set(digests.values())) > 1:
        raise WorkerError(
            "the replicas of a stage have different parameters or buffers",
            where=", ".join(digests),
            found=", ".join(f"{name}: {digest[:12]}" for name, digest in digests.items()),
            allowed="the same, bit for bit",
            hint="hosts with the same kind of processor or GPU and the same libraries",
        )


def digest_of(stages: Mapping[int, nn.Module]) -> str:
    """SHA-256 of the parameters and buffers of stages: names, shapes, dtypes and numbers."""
    found = hashlib.sha256()
    for number, stage in sorted(stages.items()):
        for name, tensor in (*stage.named_parameters(), *stage.named_buffers()):
            found.update(repr((number, name, list(tensor.shape), str(tensor.dtype))).encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()


def _in_buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one device and dtype together, as many as fill a bucket."""
    buckets: list[list[nn.Parameter]] = []
    open_ones: dict[tuple[torch.device, torch.dtype], tuple[list[nn.Parameter], int]] = {}
    for parameter in parameters:
        key = parameter.device, parameter.dtype
        bucket, nbytes = open_ones.get(key, ([], BUCKET_BYTES))
        if nbytes + parameter.nbytes > BUCKET_BYTES:
            bucket, nbytes = [], 0
            buckets.append(bucket)
        bucket.append(parameter)
        open_ones[key] = bucket, nbytes + parameter.nbytes
    return buckets


class Bucket:
    """Some gradients one after another, and behind them a one for each that there is.

    Args:
        parameters: whose; of one device and dtype.

    Attributes:
        parameters: the same.
        is_full: whether all of them had a gradient when it was filled.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters, self.is_full = list(parameters), False
        sizes = [parameter.numel() for parameter in parameters]
        self._flat = parameters[0].new_empty(sum(sizes) + len(sizes))
        *places, self._flags = self._flat.split([*sizes, len(sizes)])
        self._places = [at.view(p.shape) for at, p in zip(places, parameters, strict=True)]

    @torch.no_grad()
    def filled(self) -> Tensor:
        """With the gradients of now, zero where there is none.

        Raises:
            PipelineError: one is sparse.
        """
        self._flags.fill_(1.0)
        there = []
        for index, (parameter, place) in enumerate(zip(self.parameters, self._places, strict=True)):
            if (gradient := parameter.grad) is None:
                place.zero_()
                self._flags[index] = 0.0
                continue
            if gradient.layout is not torch.strided:
                raise PipelineError(
                    "a parameter of a replicated stage has a sparse gradient",
                    found=f"{gradient.layout}, of a parameter of shape {list(parameter.shape)}",
                    allowed="dense gradients",
                    hint="nn.Embedding(..., sparse=False), or a stage without replicas",
                )
            there.append((place, gradient))
        self.is_full = len(there) == len(self.parameters)
        if there:
            torch._foreach_copy_([place for place, _ in there], [gradient for _, gradient in there])
        return self._flat

    @torch.no_grad()
    def put_back(self) -> None:
        """What is in it now becomes the gradients of those parameters that have one on some replica."""
        present = [True] * len(self.parameters)
        if not self.is_full:  # else nobody has to wait for a GPU
            present = (self._flags.real.cpu() > 0).tolist()
        there = []
        for parameter, place, is_there in zip(self.parameters, self._places, present, strict=True):
            if is_there:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                there.append((parameter.grad, place))
        if there:
            torch._foreach_copy_([gradient for gradient, _ in there], [place for _, place in there])
