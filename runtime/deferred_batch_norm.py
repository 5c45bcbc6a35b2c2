"""Batch norm that keeps statistics of whole batches, though it sees them in micro-batches.

The method is that of `torchgpipe.batchnorm.DeferredBatchNorm` (Kim et al., torchgpipe, 2020): each micro-batch is
normalised by its own mean and variance, and the running ones are updated once a batch, by those of the whole
batch, as if it had not been cut. The sums are torchgpipe's in meaning but not in form: means and variances are
merged (Chan, Golub and LeVeque, 1979), since a difference of large sums of squares loses the variance.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxsplit.errors import PipelineError

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Seen(NamedTuple):
    """What one call of a layer saw: mean and unbiased variance [C], and how many values each is of.

    The layer is a number, and so is the call, among those of a micro-batch in a stage.
    """

    layer: int
    micro_batch: int
    stage: int
    call: int
    mean: Tensor
    variance: Tensor
    size: int


class DeferredBatchNorm:
    """The batch norm layers of some stages: collects what they see, and updates them when told to.

    Their `forward` is replaced, one layer at a time; their classes, parameters and buffers stay. Evaluation, and
    layers that are frozen by `eval()` or keep no statistics, are as they were.

    A layer that a forward calls more than once is updated once for each of these calls, in their order: the first
    calls of all micro-batches together, then the second ones. What is run again in a backward (checkpointing)
    normalises and does not count.

    The replicas of a stage collect, too, and give each other what they saw. Unless statistics are those of whole
    batches, each then updates its layers with one micro-batch after the other, as one worker would do.

    Args:
        stages: the modules whose layers are changed.
        by_batch: whether there is one update for the whole batch, or one for each micro-batch.
    """

    def __init__(self, stages: Iterable[nn.Module], by_batch: bool = True) -> None:
        modules = dict.fromkeys(module for stage in stages for module in stage.modules())
        self.layers = [module for module in modules if isinstance(module, _BatchNorm)]
        self._by_batch = by_batch
        self._seen: list[Seen] = []
        self._place: tuple[int, int] | None = None
        self._calls: Counter[int] = Counter()
        for number, layer in enumerate(self.layers):
            setattr(layer, "forward", functools.partial(self._forward, number, layer.forward))  # noqa: B010

    def clear(self) -> None:
        """Forgets what was collected: the run was given up."""
        self._seen = []

    @contextmanager
    def collecting(self, stage: int, micro_batch: int) -> Iterator[None]:
        """Within, one micro-batch runs through a stage, and counts."""
        self._place = micro_batch, stage
        self._calls.clear()
        try:
            yield
        finally:
            self._place = None

    @torch.no_grad()
    def commit(self, share: Callable[[list[Tensor]], list[list[Tensor]]] | None = None) -> None:
        """Updates the running statistics with all that was collected.

        Args:
            share: gives tensors to the other replicas, and returns those that each has, this one's own included.
        """
        seen = self._seen
        if share is not None:
            seen = [each for tensors in share(_packed(seen)) for each in _unpacked(*tensors)]
        parts: defaultdict[tuple[int, ...], list[Seen]] = defaultdict(list)
        for each in sorted(seen, key=lambda each: each[:4]):
            first = 0 if self._by_batch else each.micro_batch
            parts[each.layer, first, each.stage, each.call].append(each)
        for key in sorted(parts):
            _update(self.layers[key[0]], parts[key])
        self.clear()

    def _forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layer = self.layers[number]
        if not layer.training or not layer.track_running_stats or layer.running_mean is None:
            return forward(*args, **kwargs)
        with _empty_statistics(layer):
            output = forward(*args, **kwargs)
            mean, variance = layer.running_mean.detach(), layer.running_var.detach()  # type: ignore[union-attr]
        if self._place is not None:
            call = self._calls[number]
            self._calls[number] += 1
            values: Tensor = next(iter((*args, *kwargs.values())))
            size = values.numel() // layer.num_features
            self._seen.append(Seen(number, *self._place, call, mean, variance, size))
        return output


def check_batch_norms(model: nn.Module) -> None:
    """Refuses layers of which the statistics of a batch are not on one worker.

    Raises:
        PipelineError: the model has a `SyncBatchNorm`.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    if found:
        raise PipelineError(
            "deferred_batch_norm is not for SyncBatchNorm, whose batch lies in several processes",
            where=found[0],
            found=f"{len(found)} SyncBatchNorm",
            allowed="BatchNorm1d, BatchNorm2d, BatchNorm3d",
            hint="put BatchNorm layers in their place, or leave deferred_batch_norm out",
        )


def _packed(seen: Sequence[Seen]) -> list[Tensor]:
    """As tensors on the CPU: int64 [calls, 6], and the means and variances one after another, float64."""
    rows = [(s.layer, s.micro_batch, s.stage, s.call, s.size, s.mean.numel()) for s in seen]
    numbers = [half.double().cpu() for s in seen for half in (s.mean, s.variance)]
    return [torch.tensor(rows, dtype=torch.int64).view(-1, 6), torch.cat(numbers) if numbers else torch.empty(0)]


def _unpacked(rows: Tensor, numbers: Tensor) -> list[Seen]:
    halves = iter(numbers.split([size for size in rows[:, 5].tolist() for _ in range(2)]))
    return [
        Seen(layer, micro_batch, stage, call, next(halves), next(halves), size)
        for layer, micro_batch, stage, call, size, _ in rows.tolist()
    ]


@contextmanager
def _empty_statistics(layer: _BatchNorm) -> Iterator[None]:
    """Within, the layer has running statistics that are empty, and its next forward fills them with its own.

    That is how the statistics come out of it without a second pass over its input, in whatever way a subclass
    calls it. Training never reads the running statistics that it writes.
    """
    momentum, kept = layer.momentum, {name: layer._buffers[name] for name in _STATISTICS}
    layer.momentum = 1.0
    layer._buffers.update({name: None if b is None else torch.zeros_like(b) for name, b in kept.items()})
    try:
        yield
    finally:
        layer.momentum = momentum
        layer._buffers.update(kept)


def _update(layer: _BatchNorm, parts: Sequence[Seen]) -> None:
    """What `torch.nn.BatchNorm2d` does after a forward, for the micro-batches as one batch."""
    batches = layer.num_batches_tracked
    if batches is not None:
        batches.add_(1)
    if not any(part.size for part in parts):
        return  # an empty batch counts and changes nothing, as in torch
    factor = layer.momentum
    if factor is None:  # the mean over all batches
        factor = 1.0 / float(batches) if batches is not None else 0.0
    for running, seen in zip((layer.running_mean, layer.running_var), _merge(parts), strict=True):
        assert running is not None, "layers without running statistics collect nothing"
        running.copy_((1.0 - factor) * running.double() + factor * seen.to(running.device))


def _merge(parts: Sequence[Seen]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance [C] of all parts together, in double precision."""
    means = torch.stack([part.mean for part in parts]).double()  # [parts, C]
    variances = torch.stack([part.variance for part in parts]).double()
    sizes = torch.tensor([[part.size] for part in parts], dtype=torch.float64, device=means.device)
    mean = (sizes * means).sum(0) / sizes.sum()
    squares = (sizes - 1.0).clamp(min=0.0) * variances + sizes * (means - mean).square()
    return mean, squares.sum(0) / (sizes.sum() - 1.0)
