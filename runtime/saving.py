"""The part of a pipeline that saves training and takes it up again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxsplit.errors import PipelineError, PlanError, SnapshotError
from fxsplit.runtime.durable import DurableEngine
from fxsplit.runtime.engine import Engine
from fxsplit.runtime.gradients import Gradients
from fxsplit.runtime.loop import Loop
from fxsplit.runtime.module_view import ModuleView
from fxsplit.runtime.optimizer import PipelineOptimizer
from fxsplit.runtime.snapshotter import Saver, Training
from fxsplit.snapshots import Checkpoint, Snapshots
from fxsplit.snapshots.checkpoint import newest
from fxsplit.snapshots.files import Lock
from fxsplit.snapshots.manifest import json_value, snapshot_folders

T = TypeVar("T")


class TrainingRecord:
    """What the client knows of a training. It does not know the pipeline, so that a forgotten one can end.

    Args:
        engine: of the pipeline.
        model: the name of the model's class.
        keys: of its state_dict; learned compressors add theirs.
        ties: name of a tied parameter -> its first name.
        gradients: of the pipeline, which know its optimizers.
        device: the client's.

    Attributes:
        kept: what else has a state, by name.
        loop: over the data.
    """

    def __init__(
        self,
        engine: Engine,
        model: str,
        keys: Sequence[str],
        ties: Mapping[str, str],
        gradients: Gradients,
        device: torch.device,
    ) -> None:
        self.kept: dict[str, Any] = {}
        self.loop = Loop(device)
        self.resumed: Checkpoint | None = None
        self._engine = engine
        self._model = model
        self._keys = keys
        self._ties = ties
        self._gradients = gradients
        if isinstance(engine, DurableEngine):
            engine.training = self.training
            engine.is_between_batches = lambda: self.loop.is_active
            self.loop.between = engine.take_now

    def training(self) -> Training:
        """As it is now.

        Raises:
            SnapshotError: something that is kept has a state that is not what JSON has.
        """
        optimizers = sorted(self._gradients.optimizers, key=lambda optimizer: optimizer.number)
        kept = {name: _plain(name, thing.state_dict()) for name, thing in self.kept.items()}
        return Training(
            step=self._engine.committed,
            model=self._model,
            keys=tuple(self._keys),
            ties=dict(self._ties),
            split=self._engine.split_name(),
            optimizers=tuple(_described(optimizer) for optimizer in optimizers),
            loop={**self.loop.position(), "kept": kept},
            random=self.loop.random_states(),
        )

    def apply(self, checkpoint: Checkpoint) -> None:
        """Takes over what concerns the client: optimizers, the loop and what is kept, those to come included."""
        self.resumed = checkpoint
        states = checkpoint.random_states("pass"), checkpoint.random_states("commit")
        self.loop.resume(checkpoint.manifest.loop, *states)
        for optimizer in self._gradients.optimizers:
            self.apply_to_optimizer(optimizer)
        for name in self.kept:
            self.apply_to_kept(name)

    def apply_to_optimizer(self, optimizer: PipelineOptimizer) -> None:
        """Gives an optimizer what the snapshot has of the one made in its place."""
        if self.resumed is None:
            return
        saved = self.resumed.manifest.optimizers
        if optimizer.number >= len(saved):
            return
        _set_options(optimizer, saved[optimizer.number], self.resumed)
        optimizer.take_entries(self.resumed.optimizer_entries(optimizer.number))

    def apply_to_kept(self, name: str) -> None:
        """Gives something that is kept its state in the snapshot."""
        saved = self.resumed.manifest.loop.get("kept", {}) if self.resumed is not None else {}
        if name not in saved or self.resumed is None:
            return
        self.kept[name].load_state_dict(saved[name])
        for optimizer in self._gradients.optimizers:  # a new scheduler has changed learning rates
            if optimizer.number < len(self.resumed.manifest.optimizers):
                _set_options(optimizer, self.resumed.manifest.optimizers[optimizer.number], self.resumed)


def _described(optimizer: PipelineOptimizer) -> dict[str, Any]:
    groups = [
        {"options": {k: _plain(k, v) for k, v in options.items()}, "parameters": list(names)}
        for options, names in optimizer.described_groups()
    ]
    return {"kind": f"{optimizer.kind.__module__}.{optimizer.kind.__qualname__}", "groups": groups}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        return json_value(value, name)
    except PlanError as error:
        raise SnapshotError(
            "a state cannot be saved", where=error.where, found=error.found, allowed="what JSON has"
        ) from error


def _set_options(optimizer: PipelineOptimizer, saved: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    kind = f"{optimizer.kind.__module__}.{optimizer.kind.__qualname__}"
    names = [names for _, names in optimizer.described_groups()]
    wanted = [group["parameters"] for group in saved["groups"]]
    if kind != saved["kind"] or names != wanted:
        raise SnapshotError(
            "an optimizer is not the one of the snapshot",
            where=checkpoint.folder,
            found=f"{kind} over {sum(map(len, names))} parameters in {len(names)} groups",
            allowed=f"{saved['kind']} over {sum(map(len, wanted))} parameters in {len(wanted)} groups",
            hint="make the same optimizers, in the same order",
        )
    for group, entry in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in entry["options"].items():
            present = group.get(key)
            if isinstance(present, Tensor):
                present.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(present, tuple) else value


class Saving(ModuleView):
    """Snapshots, checkpoints, and loops that are taken up where they were."""

    _engine: Engine
    _record: TrainingRecord
    _variants: list[Any]
    _pending: Checkpoint | None = None

    def _begin_record(self, model: str, keys: list[str], ties: Mapping[str, str], device: torch.device) -> None:
        self._record = TrainingRecord(self._engine, model, keys, ties, self._gradients, device)
        if isinstance(self._engine, DurableEngine):
            self._engine.begin()

    def _resume(self, snapshots: Snapshots, model: str) -> None:
        """Goes on from the newest snapshot, if there is one."""
        directory = Path(snapshots.directory)
        if not snapshots.resume:
            if snapshot_folders(directory):
                raise SnapshotError(
                    "the directory has snapshots already", where=directory, hint="another one, or resume=True"
                )
            return
        if (checkpoint := newest(directory)) is not None:
            _check_model(checkpoint, model)
            self._pending = checkpoint
            self._record.apply(checkpoint)

    def _restore_pending(self) -> None:
        """The stages are there: they get what was to be restored."""
        if self._pending is not None:
            checkpoint, self._pending = self._pending, None
            self._restore_stages(checkpoint)

    def _restore_stages(self, checkpoint: Checkpoint) -> None:
        if isinstance(self._engine, DurableEngine):
            self._engine.restore(checkpoint)
        else:
            saver = Saver(self._engine, checkpoint.folder)
            saver.restore(checkpoint, self._engine.split_name())
            self._engine.committed = checkpoint.step
        self._gradients.changed()

    @property
    def committed_steps(self) -> int:
        """Optimizer steps that all workers have made, those before a snapshot that was taken up included."""
        return self._pending.step if self._pending is not None else self._engine.committed

    def remaining(self, batches: Iterable[T]) -> Iterator[T]:
        """One pass over the data: without the batches that a snapshot has seen, when a training is taken up.

        Use it for each pass. Passes that are over give nothing and do not touch their data; the one that was under
        way gives the rest, with torch's generators as they were, for its shuffling and for what follows.

        Args:
            batches: a `DataLoader`, or anything else that gives the same again when the script is run again.
        """
        return self._record.loop.over(batches)

    def keep(self, **states: Any) -> None:
        """Has the states of other things saved with each snapshot, and restores them when one was taken up.

        Args:
            **states: objects with `state_dict` and `load_state_dict` of numbers and texts: learning rate
                schedulers, a `GradScaler`.
        """
        for name, thing in states.items():
            if not all(callable(getattr(thing, method, None)) for method in ("state_dict", "load_state_dict")):
                raise PipelineError(
                    f"'{name}' has no state to keep",
                    found=type(thing).__name__,
                    allowed="an object with state_dict and load_state_dict",
                )
            self._record.kept[name] = thing
            self._record.apply_to_kept(name)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a checkpoint: weights, gradients, optimizers, codecs' memories and random numbers.

        It is safetensors and JSON, read by `fxsplit.load`. One that is there is replaced.

        Raises:
            SnapshotError: it cannot be written.
        """
        self._require_built("save")
        folder = Path(directory)
        lock = Lock(folder)
        try:
            self._engine.flush_discards()
            saver, training = Saver(self._engine, folder), self._record.training()
            saver.look()
            saver.take(training)
            saver.write(folder, training)()
        except OSError as error:
            raise SnapshotError(
                "the checkpoint cannot be written", where=folder, found=error.strerror or str(error)
            ) from error
        finally:
            lock.release()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over what `fxsplit.load` has read: from any split, devices and compressors of the same model.

        Optimizers made before get their state; so do those made later, in the order in which they were made then.

        Raises:
            SnapshotError: it is another model's, or other optimizers'.
        """
        self._require_built("restore")
        _check_model(checkpoint, self._record.training().model)
        self._restore_stages(checkpoint)
        self._record.apply(checkpoint)


def _check_model(checkpoint: Checkpoint, model: str) -> None:
    if checkpoint.manifest.model != model:
        raise SnapshotError(
            "the snapshot is of another model",
            where=checkpoint.folder,
            found=checkpoint.manifest.model,
            allowed=model,
            hint="another directory",
        )
