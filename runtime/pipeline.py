"""The pipeline: what the user calls, trains and saves as if it were the model."""

from __future__ import annotations

import os
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from fxsplit.compressors.inserted import is_inserted
from fxsplit.errors import GuardError, InputError, PipelineError
from fxsplit.planning import Placement, Plan
from fxsplit.runtime import timeline
from fxsplit.runtime.autograd import differentiable_forward
from fxsplit.runtime.batches import check_batch, cut_batch
from fxsplit.runtime.built import Builder, Built, WorkerInfo, worker_infos
from fxsplit.runtime.durable import EngineOptions
from fxsplit.runtime.gradients import Gradients
from fxsplit.runtime.homes import canonical_names, homes_of
from fxsplit.runtime.live_report import LiveMemory, live_memory
from fxsplit.runtime.metrics import Metrics
from fxsplit.runtime.optimizer import ParameterHandle, PipelineOptimizer
from fxsplit.runtime.saving import Saving
from fxsplit.runtime.steps import StepReport, StepRequest, StepResult
from fxsplit.runtime.training_state import TrainingState, check_keys, on_cpu
from fxsplit.runtime.transport import Transport
from fxsplit.runtime.warm_up import warm_up
from fxsplit.runtime.ways import MAX_VARIANTS, no_way, too_many_ways
from fxsplit.split import SplitModel, split
from fxsplit.stage import Mode
from fxsplit.trace.call import Arguments, CallLayout, ExampleInputs, batch_size
from fxsplit.trace.traced import TracedModel, mode_name
from fxsplit.trace.verify import keeping_modes


class Pipeline(Saving):
    """A compiled model. `fxsplit.compile` makes it.

    It is called as the model is, and returns what the model returns, on the client's device, where autograd
    goes on: `loss_fn(pipe(x), y).backward()` runs the backward pipeline. `torch.no_grad()`, `train()` and
    `eval()` mean what they mean for the model. The model itself is not changed; `state_dict()` brings the
    trained parameters back under its names.

    Use it in a `with` block, or call `close()`.
    """

    def __init__(
        self,
        model: nn.Module,
        placements: Sequence[Placement],
        chunks: int,
        transport: Transport,
        builder: Builder,
        built: Built | None = None,
        has_learned: bool = False,
        options: EngineOptions = EngineOptions(),  # noqa: B008  # frozen
    ) -> None:
        self.training = model.training
        self._name = type(model).__name__
        self._placements = tuple(placements)
        self._chunks = chunks
        self._builder = builder
        self._variants: list[Built] = []
        self._has_learned = has_learned
        self._callbacks: list[Callable[[StepReport], Any]] = []
        self._model = model
        self._state_keys = list(model.state_dict())
        self._canonical = canonical_names(model)
        self._engine = options.engine(transport)
        self._gradients = Gradients(self._engine)
        self._handles = OrderedDict(
            (name, ParameterHandle(name, parameter, self._gradients))
            for name, parameter in model.named_parameters()
        )
        self._finalizer = weakref.finalize(self, self._engine.close)
        try:
            self._engine.start(placement.worker for placement in placements)
            device = torch.device(self._placements[0].device)
            self._begin_record(self._name, self._state_keys, self._canonical, device)
            if options.snapshots is not None:
                self._resume(options.snapshots, self._name)
            if built is not None:
                self._load([built])
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on one batch, in micro-batches through the pipeline.

        Tensors whose dimension 0 is that of the first one are cut into `chunks`; others go whole to each
        micro-batch.

        Raises:
            InputError: the batch is empty, has fewer samples than chunks, or is on another device than the
                client's; or the call differs from the compiled one.
            WorkerError: a worker failed or was lost.
        """
        return self._dispatch(Arguments(args, kwargs), self._run)

    def step(
        self,
        *args: Any,
        target: Any = None,
        loss_fn: Callable[..., Any],
        reduction: Literal["mean", "sum"] | None = None,
        loss_scale: float | Tensor = 1.0,
        return_output: bool = True,
        **kwargs: Any,
    ) -> StepResult:
        """Runs a whole training step, forward, loss and backward, in the order of the pipeline's schedule.

        Gradients are those of `(loss_fn(model(x), y) * share).backward()` for one micro-batch after another, with
        its share of the samples: bit for bit, whatever the schedule. A step that fails leaves all as it was.

        Args:
            *args: inputs of the model.
            target: a tensor, or a tuple, list or dict of them, cut along dimension 0 with the batch.
            loss_fn: called with a micro-batch's output and target (or output alone, if there is none) where the
                last stage is, to which both are sent.
            reduction: of the loss over samples; its own attribute `reduction` if not given, else "mean".
            loss_scale: factor of the gradients, not of the loss that is returned; `scaler.get_scale()` of a
                `torch.amp.GradScaler`, whose `step` and `update` then follow.
            return_output: whether the outputs are brought to the client.
            **kwargs: inputs of the model.

        Returns:
            the loss of the batch and the model's output, both without a graph.

        Raises:
            InputError: the loss is no scalar, the target has another length, or as in a call.
            WorkerError: a worker failed or was lost.
        """
        workers = tuple(placement.worker for placement in self._placements)
        request = StepRequest(target, loss_fn, reduction, float(loss_scale), return_output, workers)

        def run(number: int, leaves: Sequence[Any]) -> StepResult:
            layout = self._variants[number].rewritten.graph(self.training).output
            return request.run(self._engine, layout, leaves, Mode(number, self.training), self._chunks)

        self._require_open()
        request.check(pytree.tree_leaves((args, kwargs)))
        before = (metrics := self._engine.metrics).total_s
        result: StepResult = self._dispatch(Arguments(args, kwargs), run)
        for callback in self._callbacks:
            callback(StepReport(metrics.calls, result.loss, metrics.total_s - before, metrics))
        return result

    def on_step(self, callback: Callable[[StepReport], Any]) -> None:
        """Has a function called after each `step`, in the order in which they were given."""
        self._callbacks.append(callback)

    def _dispatch(self, arguments: Arguments, run: Callable[[int, Sequence[Any]], Any]) -> Any:
        """Runs a batch with one of the recorded graphs, recording another if none is for it."""
        self._require_open()
        check_batch(arguments, torch.device(self._placements[0].device), self._chunks)
        call, leaves = CallLayout.of(self._model, arguments)
        numbers = [
            number
            for number, built in enumerate(self._variants)
            if built.rewritten.call.key() == call.key() and self.training in built.rewritten.graphs
        ]
        if not numbers:
            reason = f"it was called in another way, in {mode_name(self.training)} mode"
            numbers = [self._add_variant(arguments, reason, exact=False)]
        self._gradients.share_frozen(self._handles.values())
        random_state = torch.get_rng_state()
        for number in reversed(numbers):
            try:
                return run(number, leaves)
            except GuardError as error:
                refusal = error
                torch.set_rng_state(random_state)
        tensors = cut_batch(leaves, batch_size(leaves), self._chunks)[refusal.micro_batch or 0]
        number = self._add_variant(Arguments(*call.arguments(tensors)), f"of {refusal.where}", exact=True)
        try:
            return run(number, leaves)
        except GuardError as error:
            raise no_way(error, self._chunks) from error

    def _run(self, number: int, leaves: Sequence[Any]) -> Any:
        """One batch through one of the recorded graphs."""
        traced = self._variants[number].rewritten.graph(self.training)
        mode = Mode(number, self.training)
        samples = batch_size(leaves)
        chunks = [
            [leaf for leaf in chunk if isinstance(leaf, Tensor)]
            for chunk in cut_batch(leaves, samples, self._chunks)
        ]
        sizes = [samples // self._chunks + (i < samples % self._chunks) for i in range(self._chunks)]
        if torch.is_grad_enabled():
            values = differentiable_forward(self._engine, chunks, mode)
        else:
            _, values = self._engine.forward(chunks, mode, grad=False)
        self._engine.metrics.samples += samples
        return traced.output.merge([self._engine.output_leaves(mode, v) for v in values], sizes)

    def _add_variant(self, arguments: Arguments, reason: str, exact: bool) -> int:
        """Records the model for arguments that no graph serves yet, and gives the workers the new graphs."""
        if not self._variants:
            self._load([self._builder(arguments, None, False)])
            return 0
        if len(self._variants) >= MAX_VARIANTS:
            raise too_many_ways(self._name, len(self._variants), reason)
        warnings.warn(f"{self._name} is traced again, because {reason}", stacklevel=4)
        self._engine.flush_discards()
        with self._present_state() as state:
            self._load([*self._variants, self._builder(arguments, self._variants[0].plan, exact)], state)
        return len(self._variants) - 1

    def _load(self, variants: list[Built], state: TrainingState | None = None) -> None:
        split_model = split([built.rewritten for built in variants], len(self._placements))
        self._adopt_inserted(split_model)
        homes = homes_of(variants[0].plan, split_model, self._canonical)
        self._engine.load(split_model, variants[0].plan, self._canonical)
        self._gradients.set_homes(homes, {n: h.requires_grad for n, h in self._handles.items()})
        if state is not None:
            state.restore(self._engine, self._gradients)
        self._variants = variants
        self._restore_pending()

    def _adopt_inserted(self, split_model: SplitModel) -> None:
        """The parameters and buffers of learned compressors become the pipeline's, behind those of the model."""
        for stage in split_model.stages:
            for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
                if is_inserted(name) and name not in self._canonical:
                    self._canonical[name] = name
                    self._state_keys.append(name)
                    if isinstance(tensor, nn.Parameter):
                        self._handles[name] = ParameterHandle(name, tensor, self._gradients)

    @contextmanager
    def _present_state(self) -> Iterator[TrainingState]:
        """The workers' state; while active, the model has the present weights, on which its ways may depend."""
        state = TrainingState.of(self.state_dict(), self._gradients)
        before = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._model.load_state_dict({k: v for k, v in state.weights.items() if not is_inserted(k)})
        try:
            with keeping_modes(self._model):
                if self._model.training != self.training:
                    self._model.train(self.training)
                yield state
        finally:
            self._model.load_state_dict(before)

    # ------------------------------------------------------------------ as a module

    def optimizer(
        self, kind: type[Optimizer], parameters: Iterable[Any] | None = None, **options: Any
    ) -> Optimizer:
        """An optimizer over parameters on all workers.

        Args:
            kind: a torch optimizer class, such as `torch.optim.AdamW`.
            parameters: handles or groups of handles, as torch's optimizers take them; all by default.
            options: the class's own: `lr`, `weight_decay`...

        Returns:
            a `torch.optim.Optimizer`, for schedulers and gradient clipping too.
        """
        self._require_open()
        if self._has_learned and not self._variants:
            raise PipelineError(
                "the layers of learned compressors are not there yet",
                found="an optimizer before the first call",
                hint="give example_inputs to fxsplit.compile, or call the pipeline once before",
            )
        groups = self.parameters() if parameters is None else parameters
        optimizer = PipelineOptimizer(kind, groups, self._gradients, options)
        self._gradients.optimizers.add(optimizer)
        self._record.apply_to_optimizer(optimizer)
        return optimizer

    def warm_up_compressors(
        self, batches: Iterable[ExampleInputs], *, lr: float = 1e-3, epochs: int = 1
    ) -> dict[str, list[float]]:
        """Trains the layers of learned compressors to imitate the identity, before the model is fine-tuned.

        Args:
            batches: inputs as `fxsplit.compile` takes examples; of a tuple with labels behind, the first entry.
            lr: learning rate of Adam.
            epochs: how often the batches are gone through, for each cut.

        Returns:
            for each pair of layers the relative error of what comes out, step by step.
        """
        modules = dict(self._require_built("warm_up_compressors").rewritten.primary.module.named_modules())
        was_training = self.training
        try:
            self.eval()
            return warm_up(self._engine, modules, self.state_dict, self._run_batch, batches, lr, epochs)
        finally:
            self.train(was_training)

    def _run_batch(self, batch: ExampleInputs) -> None:
        arguments = Arguments.of(batch)
        try:
            CallLayout.of(self._model, arguments)
        except InputError:
            arguments = Arguments(arguments.args[:1], {})
        with torch.no_grad():
            self(*arguments.args, **arguments.kwargs)

    def state_dict(self) -> OrderedDict[str, Any]:
        """The model's whole state_dict, under its own names, on the CPU."""
        self._require_open()
        if not self._variants:
            return OrderedDict((name, on_cpu(value)) for name, value in self._model.state_dict().items())
        merged: dict[str, Any] = {}
        for state in self._engine.broadcast("state").values():
            for name, value in state.items():
                merged.setdefault(self._canonical.get(name, name), value)
        return OrderedDict((key, merged[self._canonical.get(key, key)]) for key in self._state_keys)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state_dict of the model, from a pipeline or from the model itself.

        Raises:
            PipelineError: keys are missing or not the model's, or a shape differs.
        """
        self._require_built("load_state_dict")
        check_keys(state_dict, self._state_keys)
        self._engine.broadcast("load_state", dict(state_dict))

    # ------------------------------------------------------------------ looking at it

    @property
    def plan(self) -> Plan:
        """What runs where, and what was predicted of it."""
        return self._require_built("plan").plan

    @property
    def rewritten(self) -> TracedModel:
        """The rewritten model as one ordinary callable, codecs inside, over the original model's parameters."""
        return self._require_built("rewritten").rewritten

    @property
    def metrics(self) -> Metrics:
        """What was measured so far; work that GPUs still do is waited for."""
        return self._engine.settled_metrics()

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Writes what the latest steps really did and when, for https://ui.perfetto.dev: workers, codecs, links.

        Raises:
            PipelineError: no step was run yet, or the file cannot be written.
        """
        timeline.write(path, self.events())

    def events(self) -> list[dict[str, Any]]:
        """What the latest steps did and when, in the trace event format, by the client's clock."""
        self._require_built("events")
        clocks = timeline.clock_offsets_s(self._engine.remote, lambda worker: self._engine.call(worker, "clock"))
        return timeline.events(self.metrics.reports, clocks)

    def live_memory(self, step: Callable[[], Any]) -> LiveMemory:
        """Counts what a step's activations take, beside what its schedule's simulation says.

        Args:
            step: runs one `step` of this pipeline; it is called twice.
        """
        self._require_built("live_memory")
        return live_memory(self._engine, step)

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """All workers, the client first."""
        self._require_open()
        return worker_infos(self._placements, self._engine.describe())

    def __repr__(self) -> str:
        if not self._finalizer.alive:
            state = "closed"
        elif not self._variants:
            state = "compiles at its first call"
        else:
            state = f"cuts {', '.join(self._variants[0].plan.cut_names) or 'none'}"
        devices = ", ".join(placement.spelling for placement in self._placements)
        return f"Pipeline({self._name} over [{devices}], {self._chunks} chunks, {state})"

    def close(self) -> None:
        """Ends all workers. Never hangs; may be called twice."""
        self._finalizer()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise PipelineError(
                "the pipeline is closed",
                found=f"a call after close() of {self._name}",
                hint="compile the model again, or call close() later",
            )

    def _require_built(self, what: str) -> Built:
        self._require_open()
        if not self._variants:
            raise PipelineError(
                f"{what} is not there before the first call",
                found="a pipeline that has not seen an input",
                hint="give example_inputs= to compile, or call the pipeline first",
            )
        return self._variants[0]
