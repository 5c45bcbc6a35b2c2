"""What the replicas of a stage do together: they sum their gradients, and share what batch norm layers saw.

Between two runs all replicas have the same parameters, buffers, gradients and optimizer states. So whatever else
is asked of workers (norms, clipping, steps of optimizers, snapshots) each does alike, and the first one speaks for
all. In a backward the first replica adds to the gradients that are there, and the others begin with none; at its
end the sum of all replaces each: the sum over all micro-batches, as of one worker, in another order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fxsplit.errors import PipelineError, WorkerError
from fxsplit.runtime.replica_group import Check, ReplicaGroup
from fxsplit.runtime.report import LinkTraffic, RunReport
from fxsplit.runtime.stopwatch import CPU
from fxsplit.runtime.transport import Endpoint
from fxsplit.schedules import Action
from fxsplit.schedules.replicas import replicas_of
from fxsplit.stage import StageModule

BUCKET_BYTES = 1 << 25
"""Gradients are summed in pieces of about this size, so that the copy takes no more memory than that."""


class Replication:
    """One replica's part.

    Args:
        endpoint: of this worker.
        worker: the replicas, as the worker of their stages.
        stages: held here; by all replicas the same.
    """

    def __init__(self, endpoint: Endpoint, worker: str, stages: Mapping[int, StageModule]) -> None:
        self._group = ReplicaGroup(endpoint, worker)
        self._stages = stages
        self._name = endpoint.name
        self._device = next((p.device for stage in stages.values() for p in stage.parameters()), CPU)

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

    def sum_gradients(self, run: int, check: Check, report: RunReport) -> None:
        """Makes the gradients of all replicas their sum.

        A parameter that has a gradient on some replicas only, since its use depends on the data, counts as zero
        on the others: a flag for each travels with the numbers, so that no replica waits for another in vain.

        Args:
            run: under way.
            check: raises if waiting makes no more sense.
            report: what is measured goes here.

        Raises:
            PipelineError: a gradient is sparse; or the run was given up.
            WorkerError: the replicas cannot reach each other.
        """
        with report.timing("reduce", Action(min(self._stages), self._group.rank), self._device):
            for bucket in _buckets(self._parameters()):
                flat = _flattened(bucket)
                self._group.sum(flat, run, check)
                if any(parameter.grad is None for parameter in bucket):  # it is looked at where there are others
                    self._group.finish(run, check)
                _put_back(flat, bucket)
                self._count(flat.nbytes, report)

    def share(self, rows: Tensor, numbers: Tensor, run: int, check: Check) -> tuple[Tensor, Tensor]:
        """What all replicas have, one replica's after the other's: the same on each.

        Args:
            rows: integers [n, k] on the CPU; the last column counts half of the numbers of each.
            numbers: float32 or float64 [m], on the device of the stages.
            run: under way.
            check: raises if waiting makes no more sense.
        """
        known = [found for (found,) in self._group.gather("what was seen", [rows], run, check)]
        sizes = [2 * int(each[:, -1].sum()) for each in known]
        together = numbers.new_zeros(sum(sizes))
        if sum(sizes):  # a sum of each with zeros is exact
            together.split(sizes)[self._group.rank].copy_(numbers)
            self._group.sum(together, run, check)
        return torch.cat(known), together

    def finish(self, run: int, check: Check) -> None:
        """Returns when what is above is done, or is sure to be.

        A GPU waits for its peers for ever. Those of one process give up together; those of other processes are
        waited for here, where it is noticed that one is gone.
        """
        if not self._group.is_within_process:
            self._group.finish(run, check)

    def give_up(self) -> None:
        """A run was given up: the next one begins with a process group of its own."""
        self._group.drop()

    def _parameters(self) -> Iterator[nn.Parameter]:
        """Those that are trained, in the same order on all replicas."""
        held = dict.fromkeys(p for _, stage in sorted(self._stages.items()) for p in stage.parameters())
        return (parameter for parameter in held if parameter.requires_grad)

    def _count(self, nbytes: int, report: RunReport) -> None:
        """Of a ring all-reduce each member sends its neighbour so much."""
        names = self._group.names
        sent = 2 * (len(names) - 1) * nbytes // len(names)
        to = names[(self._group.rank + 1) % len(names)]
        traffic = LinkTraffic(self._name, to, True, sent, sent, 1)
        known = report.traffic.get((to, True))
        report.traffic[to, True] = traffic if known is None else known + traffic


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


def _buckets(parameters: Iterator[nn.Parameter]) -> list[list[nn.Parameter]]:
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


@torch.no_grad()
def _flattened(bucket: Sequence[nn.Parameter]) -> Tensor:
    """The gradients one after another, zero where there is none, and behind them a one for each that there is."""
    sizes = [parameter.numel() for parameter in bucket]
    flat = bucket[0].new_empty(sum(sizes) + len(bucket))
    flags = flat[sum(sizes) :].fill_(1.0)
    places, gradients = [], []
    for index, (parameter, place) in enumerate(zip(bucket, flat.split([*sizes, len(bucket)]), strict=False)):
        if (gradient := parameter.grad) is None:
            place.zero_()
            flags[index] = 0.0
            continue
        if gradient.layout is not torch.strided:
            raise PipelineError(
                "a parameter of a replicated stage has a sparse gradient",
                found=f"{gradient.layout}, of a parameter of shape {list(parameter.shape)}",
                allowed="dense gradients",
                hint="nn.Embedding(..., sparse=False), or a stage without replicas",
            )
        places.append(place.view(parameter.shape))
        gradients.append(gradient)
    if places:
        torch._foreach_copy_(places, gradients)
    return flat


@torch.no_grad()
def _put_back(flat: Tensor, bucket: Sequence[nn.Parameter]) -> None:
    """The sums become the gradients of those parameters that have one on some replica."""
    sizes = [parameter.numel() for parameter in bucket]
    if any(parameter.grad is None for parameter in bucket):
        present = (flat[sum(sizes) :].real.cpu() > 0).tolist()
    else:  # as nearly always: nobody has to wait for a GPU
        present = [True] * len(bucket)
    places, gradients = [], []
    for parameter, place, is_there in zip(bucket, flat.split([*sizes, len(bucket)]), present, strict=False):
        if not is_there:
            continue
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        places.append(place.view(parameter.shape))
        gradients.append(parameter.grad)
    if gradients:
        torch._foreach_copy_(gradients, places)
