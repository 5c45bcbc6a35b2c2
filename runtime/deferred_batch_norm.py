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
from itertools import accumulate
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
        self._planned: tuple[list[Call], list[_Update]] | None = None
        for number, layer in enumerate(self.layers):
            setattr(layer, "forward", functools.partial(self._forward, number, layer.forward))  # noqa: B010

    def clear(self) -> None:
        """Forgets what was collected: the run was given up."""
        self._collected = []

    @contextmanager
    def collecting(self, stage: int, micro_batch: int) -> Iterator[None]:
        """Within, one micro-batch runs through a stage, and counts."""
        if not self.layers:
            yield
            return
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

    def commit(self) -> None:
        """Updates the running statistics with all that was collected."""
        if self._collected and (collected := self.collected()) is not None:
            self.update(*collected)

    @torch.no_grad()
    def collected(self) -> tuple[list[Call], Tensor] | None:
        """What was collected, which is forgotten; None if no layer has running statistics.

        Returns:
            Calls, and their means and variances one after another, with at least the precision of float32.
        """
        collected, self._collected = self._collected, []
        running = [layer.running_mean for layer in self.layers if layer.running_mean is not None]
        if not running:
            return None
        dtype = functools.reduce(torch.promote_types, (mean.dtype for mean in running), torch.float32)
        numbers = [each.to(running[0].device, dtype) for _, each in collected]
        together = torch.cat(numbers) if numbers else running[0].new_empty(0, dtype=dtype)
        return [call for some, _ in collected for call in some], together

    @torch.no_grad()
    def update(self, calls: list[Call], numbers: Tensor) -> None:
        """Updates the running statistics with what these calls saw."""
        if self._planned is None or self._planned[0] != calls:  # most often they are those of the last time
            self._planned = calls, _planned(calls, self.layers, self._by_batch, numbers.device)
        for update in self._planned[1]:
            update.make(numbers)

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


def _planned(
    calls: Sequence[Call], layers: Sequence[_BatchNorm], by_batch: bool, device: torch.device
) -> list[_Update]:
    """The updates that calls make, in their order: the first of each layer, then the second of each, ..."""
    ends = list(accumulate(2 * call.channels for call in calls))
    parts: defaultdict[tuple[int, ...], list[tuple[Call, int]]] = defaultdict(list)
    for call, end in sorted(zip(calls, ends, strict=True), key=lambda pair: pair[0][1::-1]):
        first = 0 if by_batch else call.micro_batch
        parts[call.layer, first, call.stage, call.call].append((call, end - 2 * call.channels))
    turns: Counter[int] = Counter()
    alike: defaultdict[tuple[Any, ...], list[tuple[_BatchNorm, list[tuple[Call, int]]]]] = defaultdict(list)
    for key in sorted(parts):
        layer, some = layers[key[0]], parts[key]
        assert layer.running_mean is not None, "layers without running statistics collect nothing"
        own = layer.momentum if layer.momentum is not None else key[0]
        kind = layer.momentum is None, own, layer.running_mean.device, layer.running_mean.dtype
        alike[turns[key[0]], len(some), _is_empty(some), *kind].append((layer, some))
        turns[key[0]] += 1
    return [_Update.of(pairs, device) for _, pairs in sorted(alike.items(), key=lambda item: item[0][0])]


def _is_empty(parts: Sequence[tuple[Call, int]]) -> bool:
    return not any(call.size for call, _ in parts)


@dataclass(frozen=True)
class _Update:
    """One update of each of some layers, each of as many parts: few kernels for all.

    Attributes:
        layers: of one momentum, device and dtype; without momentum it is one.
        means: int64 [parts, C of all layers]: where they are among the numbers.
        variances: the same.
        sizes: float64 [parts, C of all layers].
        is_empty: whether no part has any values: it counts and changes nothing, as in torch.
    """

    layers: tuple[_BatchNorm, ...]
    means: Tensor
    variances: Tensor
    sizes: Tensor
    is_empty: bool

    @classmethod
    def of(cls, pairs: Sequence[tuple[_BatchNorm, list[tuple[Call, int]]]], device: torch.device) -> _Update:
        """Of layers, each with its parts and their places."""
        columns = list(zip(*(some for _, some in pairs), strict=True))  # by part
        channels = [torch.arange(some[0][0].channels) for _, some in pairs]
        means = torch.stack(
            [torch.cat([at + own for (_, at), own in zip(row, channels, strict=True)]) for row in columns]
        )
        widths = torch.cat([torch.full_like(own, len(own)) for own in channels])
        sizes = [[call.size for call, _ in row for _ in range(call.channels)] for row in columns]
        return cls(
            tuple(layer for layer, _ in pairs),
            means.to(device),
            (means + widths).to(device),
            torch.tensor(sizes, dtype=torch.float64).to(device),
            _is_empty(pairs[0][1]),  # as of all
        )

    def make(self, numbers: Tensor) -> None:
        """What `torch.nn.BatchNorm2d` does after a forward."""
        tracked = [layer.num_batches_tracked for layer in self.layers if layer.num_batches_tracked is not None]
        if tracked:
            torch._foreach_add_(tracked, 1)
        if self.is_empty:
            return
        seen = torch.cat(self._merged(numbers[self.means].double(), numbers[self.variances].double()))
        halves = [*(layer.running_mean for layer in self.layers), *(layer.running_var for layer in self.layers)]
        running = [half for half in halves if half is not None]
        factor = self._factor()
        after = (1.0 - factor) * torch.cat(running).double() + factor * seen.to(running[0].device)
        torch._foreach_copy_(running, list(after.to(running[0].dtype).split([half.numel() for half in running])))

    def _merged(self, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of all parts together (Chan, Golub and LeVeque)."""
        if len(means) == 1:
            return means[0], variances[0]
        total = self.sizes.sum(0)
        mean = (self.sizes * means).sum(0) / total
        squares = (self.sizes - 1.0).clamp(min=0.0) * variances + self.sizes * (means - mean).square()
        return mean, squares.sum(0) / (total - 1.0)

    def _factor(self) -> Tensor | float:
        first = self.layers[0]
        if first.momentum is not None:
            return first.momentum
        # The mean over all batches.
        return 1.0 / first.num_batches_tracked.double() if first.num_batches_tracked is not None else 0.0
