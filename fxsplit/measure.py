"""Measuring: seconds of every node of a model, and of compressors, on a device."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from fxsplit.allocator import keep_memory
from fxsplit.compressors import Compressor, Lossless, compressor
from fxsplit.compressors.learned import split_learned
from fxsplit.errors import DeviceError, PlanError
from fxsplit.opening import trace_for_planning
from fxsplit.planning.calibration import CLIENT, WORKER, Calibration, MeasuredCodec, MeasuredNode, machine_of
from fxsplit.planning.devices import available_devices
from fxsplit.spec import TensorSpec
from fxsplit.split_backward import SplitBackward
from fxsplit.trace import Arguments, ExampleInputs
from fxsplit.trace.call import batch_size, is_batched
from fxsplit.trace.transforms import transforms_closed

COMPRESSORS = ("uniform8", "fastquant8", "sortquant8")
"""What is measured if nothing else is asked for: what `compressor="auto"` chooses from, and the plainest."""

_WARM_UP = {"cpu": 1, "cuda": 3}
"""Runs that do not count, by type of device: on a GPU, kernels are loaded and chosen in the first ones."""

_CODEC_SHAPES = ((4, 32, 112, 112), (1, 32, 14, 14))


def calibrate(
    model: nn.Module,
    example_inputs: ExampleInputs,
    device: str = "cpu",
    *,
    chunks: int = 1,
    compressors: Sequence[str] = COMPRESSORS,
    repeats: int = 5,
    role: str = CLIENT,
) -> Calibration:
    """Measures what every node of a model takes on a device of this host, forward and backward.

    Each node runs alone, and the whole model in one piece: the sums of the first are scaled to those of the
    second, in which allocator and caches are as they will be. This is done for micro-batches of two sizes, so
    that what a call costs and what a sample costs are known apart. Backwards in two parts, as zero-bubble
    schedules have them, are measured at the larger size. Weights, buffers and random numbers stay.

    Args:
        model: any module that can be traced, in the mode to measure.
        example_inputs: a batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        device: a device of this host.
        chunks: micro-batches of the batch: the larger size is that of one of them, the smaller half of it.
        compressors: spellings of those to measure, too.
        repeats: of each measurement; their median counts.
        role: 'client', or 'worker': this process then keeps freed memory from now on, as workers do.

    Raises:
        DeviceError: there is no such device here.
        PlanError: an unknown role.
        TraceError: the model cannot be traced.
        CompressorError: an unknown compressor.
    """
    if device not in available_devices() and device != "cuda":
        raise DeviceError("there is no such device here", found=device, allowed=", ".join(available_devices()))
    if role not in (CLIENT, WORKER):
        raise PlanError("unknown role", found=repr(role), allowed=f"{CLIENT}, {WORKER}")
    codecs = [compressor(spelling) for spelling in compressors]
    if role == WORKER:
        keep_memory()
    example = Arguments.of(example_inputs)
    traced = trace_for_planning(model, example, verify=False)
    module = copy.deepcopy(traced.primary.module).to(device)
    leaves = [leaf for leaf in traced.leaves(example) if isinstance(leaf, Tensor)]
    largest = max(1, batch_size(leaves) // chunks)
    seconds: dict[int, list[tuple[float, float]]] = {}
    shares = 1.0, 0.0
    with torch.random.fork_rng(), transforms_closed():
        for samples in sorted({largest, max(1, largest // 2)}):
            inputs = [leaf[:samples] if is_batched(leaf, batch_size(leaves)) else leaf for leaf in leaves]
            inputs = [leaf.to(device) for leaf in inputs]
            seconds[samples] = _seconds_of_nodes(module, inputs, device, repeats)
            if samples == largest:
                shares = _shares_of_parts(module, inputs, device, repeats)
    nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    return Calibration(
        type(model).__name__,
        traced.fingerprint,
        device,
        machine_of(device),
        torch.__version__,
        torch.get_num_threads(),
        role,
        largest,
        *shares,
        tuple(_fitted(node, {s: rows[i] for s, rows in seconds.items()}) for i, node in enumerate(nodes)),
        tuple(measure_codec(codec, device, repeats) for codec in codecs),
    )


def measure_codec(codec: Compressor, device: str, repeats: int = 5) -> MeasuredCodec:
    """Measures encoder and decoder of a compressor on float32 activations of two sizes."""
    _, codec = split_learned(codec)
    if isinstance(codec, Lossless):
        return MeasuredCodec(str(codec), 0.0, 0.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for shape in _CODEC_SHAPES:
        x = torch.randn(shape, generator=generator).relu_().to(device)
        payload, spec = codec.encode(x), TensorSpec.of(x)
        encode_s = _median(lambda x=x: codec.encode(x), device, repeats)  # type: ignore[misc]
        decode_s = _median(lambda p=payload, s=spec: codec.decode(p, s), device, repeats)  # type: ignore[misc]
        rows.append((x.nbytes, encode_s, decode_s))
    (large, *of_large), (small, *of_small) = rows
    rates = [max(0.0, (a - b) / (large - small)) for a, b in zip(of_large, of_small, strict=True)]
    calls = [max(0.0, b - rate * small) for b, rate in zip(of_small, rates, strict=True)]
    return MeasuredCodec(str(codec), rates[0], rates[1], max(calls))


def _seconds_of_nodes(
    module: GraphModule, inputs: Sequence[Tensor], device: str, repeats: int
) -> list[tuple[float, float]]:
    """Seconds of each node, forward and backward, scaled to what the whole takes."""
    rows: list[list[tuple[float, float]]] = []
    whole: list[tuple[float, float]] = []
    for number in range(-_warm_up(device), repeats):
        timed, total = _NodeTimes(module, device), _whole(module, inputs, device)
        timed.run(*inputs)
        if number >= 0:
            rows.append(timed.seconds())
            whole.append(total)
    medians = [
        tuple(statistics.median(row[node][way] for row in rows) for way in (0, 1)) for node in range(len(rows[0]))
    ]
    factors = []
    for way in (0, 1):
        alone, together = sum(each[way] for each in medians), statistics.median(total[way] for total in whole)
        factors.append(together / alone if alone else 0.0)
    return [(each[0] * factors[0], each[1] * factors[1]) for each in medians]


def _shares_of_parts(
    module: GraphModule, inputs: Sequence[Tensor], device: str, repeats: int
) -> tuple[float, float]:
    """Of the nodes whose inputs need gradients, both parts of a backward in two as shares of one in one piece."""
    whole, first, second = list[float](), list[float](), list[float]()
    for number in range(-_warm_up(device), repeats):
        timed = _NodeTimes(module, device, in_parts=True)
        timed.run(*inputs)
        if number >= 0:
            for seconds, found in zip((whole, first, second), timed.parts(), strict=True):
                seconds.append(found)
    total = statistics.median(whole)
    if not total:
        return 1.0, 0.0
    return statistics.median(first) / total, statistics.median(second) / total


def _fitted(node: Node, seconds: dict[int, tuple[float, float]]) -> MeasuredNode:
    """What a sample takes and what a call takes, from micro-batches of one or two sizes."""
    most = max(seconds)
    fits = []
    for way in (0, 1):
        slope, call = seconds[most][way] / most, 0.0
        if len(seconds) > 1:
            least = min(seconds)
            call = (seconds[least][way] - slope * least) / (1 - least / most)
            call = min(max(call, 0.0), seconds[most][way])
            slope = (seconds[most][way] - call) / most
        fits.append((slope, call))
    return MeasuredNode(node.name, node.meta["module"], fits[0][0], fits[1][0], fits[0][1], fits[1][1])


def _whole(module: GraphModule, inputs: Sequence[Tensor], device: str) -> tuple[float, float]:
    """Seconds of the whole graph, forward and backward."""
    outputs: list[Any] = []
    forward_s = timed(lambda: outputs.append(module(*inputs)), device)
    found = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not found:
        return forward_s, 0.0
    gradients = [torch.ones_like(leaf) for leaf in found]
    return forward_s, timed(lambda: torch.autograd.backward(found, gradients), device)


class _NodeTimes(Interpreter):
    """Runs each node on inputs that are cut off from what made them, and its backward at once behind it.

    Args:
        module: the graph.
        device: where it is.
        in_parts: whether backwards in two parts are run, too, behind forwards of their own.
    """

    def __init__(self, module: GraphModule, device: str, *, in_parts: bool = False) -> None:
        super().__init__(module)
        self._device = device
        self._in_parts = in_parts
        self._seconds: dict[Node, tuple[float, float]] = {}
        self._parts: list[tuple[float, float, float]] = []

    def seconds(self) -> list[tuple[float, float]]:
        """Of each node, in their order."""
        return list(self._seconds.values())

    def parts(self) -> tuple[float, float, float]:
        """Of all backwards that were run in parts: seconds in one piece, of the first part, of the second."""
        whole, first, second = (
            (sum(each) for each in zip(*self._parts, strict=True)) if self._parts else (0.0,) * 3
        )
        return whole, first, second

    def run_node(self, n: Node) -> Any:
        """The node's result; its backward runs with a gradient of ones."""
        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        result, found, _, forward_s = self._forward(n)
        backward_s = 0.0
        if found:
            gradients = [torch.ones_like(leaf) for leaf in found]
            backward_s = timed(lambda: torch.autograd.backward(found, gradients), self._device)
        self._seconds[n] = forward_s, backward_s
        if found and self._in_parts:
            self._run_in_parts(n, backward_s)
        return pytree.tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), result)

    def _run_in_parts(self, n: Node, whole_s: float) -> None:
        _, found, anchors, _ = self._forward(n)
        if anchors:
            gradients, made = [torch.ones_like(leaf) for leaf in found], list[SplitBackward]()
            first_s = timed(lambda: made.append(SplitBackward(found, gradients, anchors)), self._device)
            self._parts.append((whole_s, first_s, timed(made[0].finish, self._device)))

    def _forward(self, n: Node) -> tuple[Any, list[Tensor], list[Tensor], float]:
        """The result of a node, what of it needs a gradient, the inputs that it comes from, and seconds."""
        anchors: list[Tensor] = []

        def cut_off(x: Tensor) -> Tensor:
            """A copy that needs a gradient if the value did: no leaf, since a node may change it in place."""
            if not x.requires_grad or isinstance(x, nn.Parameter):
                return x
            anchors.append(x.detach().requires_grad_())
            return anchors[-1].clone()

        with ExitStack() as stack:
            stack.enter_context(self._set_current_node(n))
            args, kwargs = pytree.tree_map_only(Tensor, cut_off, self.fetch_args_kwargs_from_env(n))
            results: list[Any] = []
            seconds = timed(lambda: results.append(getattr(self, n.op)(n.target, args, kwargs)), self._device)
        found = [x for x in pytree.tree_leaves(results[0]) if isinstance(x, Tensor) and x.requires_grad]
        return results[0], found, anchors, seconds


def _median(work: Callable[[], Any], device: str, repeats: int) -> float:
    found = []
    for number in range(-_warm_up(device), repeats):
        with torch.no_grad():
            seconds = timed(work, device)
        if number >= 0:
            found.append(seconds)
    return statistics.median(found)


def _warm_up(device: str) -> int:
    return _WARM_UP.get(torch.device(device).type, 1)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of some work on a device that has nothing else to do.

    On a GPU by its own clock: from an event before the work to one behind it, with the gaps in which it waits for
    the host to launch more, as in a stage that runs.
    """
    if torch.device(device).type != "cuda":
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
