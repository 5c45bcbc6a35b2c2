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
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxsplit.errors import PipelineError

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Call(NamedTuple):
    """One call of a layer for one micro-batch in a stage: which of the layers, and which of its calls."""

    stage: int
    micro_batch: int
    layer: int
    call: int
    size: int
    """How many values the mean and the variance of a channel are of."""
    channels: int


@dataclass
class Caught:
    """What layers saw: calls, and their means and unbiased variances [C], one after another or in one tensor."""

    calls: list[Call] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)

    def together(self) -> Tensor | None:
        """A copy of all numbers in one tensor; None if there are none."""
        return torch.cat(self.numbers) if self.numbers else None


class Seen(NamedTuple):
    """A call, and the mean and unbiased variance [C] of what the layer saw."""

    call: Call
    mean: Tensor
    variance: Tensor


class DeferredBatchNorm:
    """The batch norm layers of some stages: collects what they see, and updates them when told to.

    Their `forward` is replaced, one layer at a time; their classes, parameters and buffers stay. Evaluation, and
    layers that are frozen by `eval()` or keep no statistics, are as they were.

    A layer that a forward calls more than once is updated once for each of these calls, in their order: the first
    calls of all micro-batches together, then the second ones. What is run again in a backward (checkpointing)
    normalises and does not count.

    The replicas of a stage collect, too, and give each other what they saw. Unless statistics are those of whole
    batches, each then updates its layers with one micro-batch after the other, as one worker would do.

    On a GPU all of it is queued: nothing waits for a number.

    Args:
        stages: the modules whose layers are changed.
        by_batch: whether there is one update for the whole batch, or one for each micro-batch.
    """

    def __init__(self, stages: Iterable[nn.Module], by_batch: bool = True) -> None:
        modules = dict.fromkeys(module for stage in stages for module in stage.modules())
        self.layers = [module for module in modules if isinstance(module, _BatchNorm)]
        self._by_batch = by_batch
        self._collected: list[tuple[list[Call], Tensor]] = []
        self._caught: Caught | None = None
        for number, layer in enumerate(self.layers):
            setattr(layer, "forward", functools.partial(self._forward, number, layer.forward))  # noqa: B010

    def clear(self) -> None:
        """Forgets what was collected: the run was given up."""
        self._collected = []

    @contextmanager
    def collecting(self, stage: int, micro_batch: int) -> Iterator[None]:
        """Within, one micro-batch runs through a stage, and counts."""
        with self.catching() as caught:
            yield
        if (numbers := caught.together()) is not None:
            calls = [call._replace(stage=stage, micro_batch=micro_batch) for call in caught.calls]
            self._collected.append((calls, numbers))

    @contextmanager
    def catching(self) -> Iterator[Caught]:
        """Within, what layers see is caught, and not collected: a recording is made of what will be replayed."""
        before, self._caught = self._caught, Caught()
        try:
            yield self._caught
        finally:
            self._caught = before

    def replayed(self, calls: Sequence[Call], numbers: Tensor) -> None:
        """Layers saw this in a recorded forward."""
        if self._caught is not None:
            self._caught.calls += calls
            self._caught.numbers.append(numbers)

    @torch.no_grad()
    def commit(self, share: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None) -> None:
        """Updates the running statistics with all that was collected.

        Args:
            share: gives calls [calls, 6] and numbers to the other replicas, and returns those of all together.
        """
        collected, self._collected = self._collected, []
        calls = [call for some, _ in collected for call in some]
        numbers = [each for _, each in collected]
        if share is not None:
            like = next((layer.running_mean for layer in self.layers if layer.running_mean is not None), None)
            if like is None:
                return
            shared, together = share(
                torch.tensor(calls, dtype=torch.int64).view(-1, len(Call._fields)), _one(numbers, like)
            )
            calls, numbers = [Call(*row) for row in shared.tolist()], [together]
        parts: defaultdict[tuple[int, ...], list[Seen]] = defaultdict(list)
        for seen in sorted(_taken_apart(calls, numbers), key=lambda seen: seen.call[1::-1]):
            first = 0 if self._by_batch else seen.call.micro_batch
            parts[first, seen.call.stage, seen.call.call, seen.call.layer].append(seen)
        turns: defaultdict[int, list[tuple[_BatchNorm, Seen]]] = defaultdict(list)
        counts: Counter[int] = Counter()
        for key in sorted(parts):  # the first update of each layer, then the second of each, ...
            layer = key[-1]
            turns[counts[layer]].append((self.layers[layer], _merge(parts[key])))
            counts[layer] += 1
        for updates in turns.values():
            _update(updates)

    def _forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layer = self.layers[number]
        if not layer.training or not layer.track_running_stats or layer.running_mean is None:
            return forward(*args, **kwargs)
        with _empty_statistics(layer):
            output = forward(*args, **kwargs)
            mean, variance = layer.running_mean.detach(), layer.running_var.detach()  # type: ignore[union-attr]
        if (caught := self._caught) is not None:
            values: Tensor = next(iter((*args, *kwargs.values())))
            size = values.numel() // layer.num_features
            caught.calls.append(Call(-1, -1, number, caught.counts[number], size, layer.num_features))
            caught.numbers += (mean, variance)
            caught.counts[number] += 1
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


def _one(numbers: Sequence[Tensor], like: Tensor) -> Tensor:
    """One tensor of all numbers, with at least the precision of float32: of one dtype on all replicas."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return (
        torch.cat([each.to(like.device, dtype) for each in numbers]) if numbers else like.new_empty(0, dtype=dtype)
    )


def _taken_apart(calls: Sequence[Call], numbers: Sequence[Tensor]) -> Iterator[Seen]:
    """The numbers of each call; those of the calls of a micro-batch, or of all, are in one tensor."""
    left = iter(calls)
    for together in numbers:
        these, count = [], 0
        while count < together.numel():
            these.append(next(left))
            count += 2 * these[-1].channels
        halves = iter(together.split([call.channels for call in these for _ in range(2)]))
        yield from (Seen(call, next(halves), next(halves)) for call in these)


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


def _merge(parts: Sequence[Seen]) -> Seen:
    """Of all parts together, in double precision (Chan, Golub and LeVeque)."""
    if len(parts) == 1:
        return parts[0]
    means = torch.stack([part.mean for part in parts]).double()  # [parts, C]
    variances = torch.stack([part.variance for part in parts]).double()
    counts = [part.call.size for part in parts]
    sizes = torch.tensor(counts, dtype=torch.float64).view(-1, 1).to(means.device)
    mean = (sizes * means).sum(0) / sum(counts)
    squares = (sizes - 1.0).clamp(min=0.0) * variances + sizes * (means - mean).square()
    return Seen(parts[0].call._replace(size=sum(counts)), mean, squares.sum(0) / (sum(counts) - 1.0))


def _update(updates: Sequence[tuple[_BatchNorm, Seen]]) -> None:
    """What `torch.nn.BatchNorm2d` does after a forward, for different layers at once: few kernels for all."""
    tracked = [layer.num_batches_tracked for layer, _ in updates if layer.num_batches_tracked is not None]
    if tracked:
        torch._foreach_add_(tracked, 1)
    alike: defaultdict[Any, list[tuple[_BatchNorm, Seen]]] = defaultdict(list)
    for layer, seen in updates:
        if seen.call.size:  # an empty batch counts and changes nothing, as in torch
            assert layer.running_mean is not None, "layers without running statistics collect nothing"
            own = layer.momentum if layer.momentum is not None else layer
            alike[own, layer.running_mean.device, layer.running_mean.dtype].append((layer, seen))
    for (own, _, dtype), some in alike.items():
        halves = [half for layer, _ in some for half in (layer.running_mean, layer.running_var)]
        running = [half for half in halves if half is not None]
        values = torch.cat([half for _, seen in some for half in (seen.mean, seen.variance)]).double()
        factor = _mean_factor(own) if isinstance(own, _BatchNorm) else own
        after = (1.0 - factor) * torch.cat(running).double() + factor * values.to(running[0].device)
        torch._foreach_copy_(running, list(after.to(dtype).split([half.numel() for half in running])))


def _mean_factor(layer: _BatchNorm) -> Tensor | float:
    """What makes the running statistics the mean over all batches."""
    return 1.0 / layer.num_batches_tracked.double() if layer.num_batches_tracked is not None else 0.0
