"""What `vision.py` and `nlp.py` share: training by epochs with a log that can be taken up again, curves, tables.

A run has a folder: `log.jsonl` with its settings and one line an epoch, `curves.png`, and a checkpoint of the
last epoch (safetensors and JSON). Begun again with the same settings it goes on behind that epoch, with the same
numbers as if it had never stopped: the order of the data and all random numbers follow from seed and epoch. (Of
what compressors remember from step to step nothing is kept.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxsplit
from fxsplit.planning.units import format_bytes, format_seconds

console = Console()

Batch = tuple[Mapping[str, Tensor], Tensor]
"""Keyword arguments of the model, and labels."""


@dataclass(frozen=True)
class Epoch:
    """A line of the log.

    Attributes:
        number: from 1.
        loss: mean training loss.
        accuracy: of the validation data, in percent.
        other: another measure of the validation data, such as Matthews' correlation; None if there is none.
        learning_rate: behind the epoch.
        wire_bytes: of a training batch, both directions.
        ratio: of these to the bytes without compression.
        compute_s: computing of a training batch, all workers together.
        batch_s: a training batch.
    """

    number: int
    loss: float
    accuracy: float
    other: float | None
    learning_rate: float
    wire_bytes: float
    ratio: float
    compute_s: float
    batch_s: float


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: for titles.
        batches: training batches of an epoch, in an order that follows from the generator alone.
        validation: the validation batches.
        logits: class scores from what the model returns.
        loss: of class scores and labels.
        other: a measure beside the accuracy, of guesses and labels, and its name.
    """

    name: str
    batches: Callable[[torch.Generator], Iterator[Batch]]
    validation: Callable[[], Iterator[Batch]]
    logits: Callable[[Any], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    other: tuple[str, Callable[[Tensor, Tensor], float]] | None = None


class Log:
    """The log of a run: settings in the first line, then one line an epoch."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / "log.jsonl"
        self.epochs: list[Epoch] = []
        folder.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._write([settings])
            return
        known, self.epochs = read(self.path)
        differing = [f"{key}: {known.get(key)} there, {value} here" for key, value in settings.items()
                     if known.get(key) != value]  # fmt: skip
        if differing:
            raise fxsplit.FxsplitError(
                f"{self.path} is of a run with other settings",
                found="; ".join(differing),
                hint="give these settings, or another folder with --log",
            )

    def add(self, epoch: Epoch, settings: Mapping[str, Any]) -> None:
        """Another line."""
        self.epochs.append(epoch)
        self._write([settings, *map(asdict, self.epochs)])

    def drop_from(self, number: int) -> None:
        """Forgets the epochs from a number on: their checkpoint is missing."""
        self.epochs = [epoch for epoch in self.epochs if epoch.number < number]

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        replace(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read(path: Path) -> tuple[dict[str, Any], list[Epoch]]:
    """Settings and epochs of a log.

    Raises:
        FxsplitError: it is none.
    """
    try:
        settings, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        return settings, [Epoch(**row) for row in rows]
    except (OSError, ValueError, TypeError) as error:
        raise fxsplit.FxsplitError(f"{path} is no log of a run", found=str(error)) from error


def replace(path: Path, content: bytes) -> None:
    """Writes a file as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


# ---------------------------------------------------------------------- checkpoints


def save(folder: Path, number: int, pipe: fxsplit.Pipeline, optimizer: Any, schedule: Any) -> None:
    """The checkpoint behind an epoch, in place of the one before."""
    state, (tensors, numbers) = pipe.state_dict(), flat(optimizer.state_dict())
    tensors |= {f"model/{name}": value for name, value in state.items()}
    target = folder / f"epoch{number}.safetensors"
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, target)
    progress = {"epoch": number, "optimizer": numbers, "schedule": schedule.state_dict()}
    replace(folder / "checkpoint.json", json.dumps(progress).encode())
    for old in folder.glob("epoch*.safetensors"):
        if old != target:
            old.unlink()


def restore(folder: Path, pipe: fxsplit.Pipeline, optimizer: Any, schedule: Any) -> int:
    """The epoch whose checkpoint was loaded; 0 if there is none."""
    if not (folder / "checkpoint.json").exists():
        return 0
    progress = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / f"epoch{progress['epoch']}.safetensors")
    pipe.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
    optimizer.load_state_dict(unflat(progress["optimizer"], tensors))
    schedule.load_state_dict(progress["schedule"])
    return int(progress["epoch"])


def flat(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name, and the rest, which JSON can hold."""
    tensors = {
        f"optimizer/{index}/{name}": value
        for index, values in state["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    others = {
        str(index): {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        for index, values in state["state"].items()
    }
    return tensors, {"state": others, "param_groups": state["param_groups"]}


def unflat(numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `flat`."""
    state: dict[Any, dict[str, Any]] = {index_of(k): dict(v) for k, v in numbers["state"].items()}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            index, _, name = rest.rpartition("/")
            state[index_of(index)][name] = value
    return {"state": state, "param_groups": numbers["param_groups"]}


def index_of(text: str) -> int | str:
    """A parameter's number, or its name."""
    return int(text) if text.isdecimal() else text


# ---------------------------------------------------------------------- training


def index_batches(count: int, size: int, generator: torch.Generator | None) -> list[list[int]]:
    """Indices of batches: in random order, without the rest that fills none, if there is a generator.

    Else all of them in order, in batches of nearly equal sizes: a small last one might have fewer samples than
    there are micro-batches.
    """
    if generator is None:
        return [part.tolist() for part in torch.arange(count).tensor_split(-(-count // size))]
    order = torch.randperm(count, generator=generator)[: count // size * size]
    return [part.tolist() for part in order.split(size)]


def train(
    pipe: fxsplit.Pipeline,
    task: Task,
    optimizer: Any,
    schedule: Any,
    log: Log,
    settings: Mapping[str, Any],
    epochs: int,
    seed: int,
) -> None:
    """Trains from where the checkpoint stands to the last epoch; the log has a line for each."""
    folder = log.path.parent
    done = restore(folder, pipe, optimizer, schedule)
    log.drop_from(done + 1)
    if done:
        console.print(f"going on behind epoch {done}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, accuracy {task.fields[accuracy]:.1f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(task.name, total=epochs, completed=done, loss=float("nan"), accuracy=0.0)
        for number in range(done + 1, epochs + 1):
            torch.manual_seed(1000 * seed + number)
            pipe.train()
            pipe.metrics.reset()
            losses = []
            for inputs, labels in task.batches(torch.Generator().manual_seed(1000 * seed + number)):
                loss = task.loss(task.logits(pipe(**inputs)), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                progress.update(bar, loss=losses[-1])
            metrics, calls = pipe.metrics, max(pipe.metrics.calls, 1)
            measured = {
                "wire_bytes": metrics.wire_bytes / calls,
                "ratio": metrics.ratio,
                "compute_s": metrics.compute_s / calls,
                "batch_s": metrics.total_s / calls,
            }
            accuracy, other = validate(pipe, task)
            rate = schedule.get_last_lr()[0]
            epoch = Epoch(number, sum(losses) / len(losses), accuracy, other, rate, **measured)
            save(folder, number, pipe, optimizer, schedule)
            log.add(epoch, settings)
            progress.update(bar, advance=1, accuracy=accuracy)


@torch.no_grad()
def validate(pipe: fxsplit.Pipeline, task: Task) -> tuple[float, float | None]:
    """Accuracy in percent, and the other measure."""
    pipe.eval()
    guesses, labels = [], []
    for inputs, expected in task.validation():
        guesses.append(task.logits(pipe(**inputs)).argmax(1))
        labels.append(expected)
    guess, label = torch.cat(guesses), torch.cat(labels)
    return 100 * (guess == label).float().mean().item(), task.other[1](guess, label) if task.other else None


# ---------------------------------------------------------------------- results


def spelled(compressor: str, bits: int | None, split: int | None) -> str:
    """A compressor with its bits and split bits: `sortquant`, 8 and 2 are `sortquant8(split=2)`.

    Raises:
        BadParameter: there is no such compressor.
    """
    name = compressor if bits is None else f"{compressor}{bits}"
    name = name if split is None else f"{name}(split={split})"
    try:
        fxsplit.compressor(name)
    except fxsplit.FxsplitError as error:
        raise typer.BadParameter(str(error), param_hint="--compressor") from error
    return name


def summary(log: Log, other: str | None) -> Table:
    """The epochs in a table: all of a short run, the last ten of a long one."""
    result = Table(title=str(log.path.parent), caption="bytes and times: means of a training batch")
    for head in ("epoch", "loss", "accuracy", *([other] if other else []), "wire", "ratio", "compute", "batch"):
        result.add_column(head, justify="right", no_wrap=True)
    for epoch in log.epochs[-10:]:
        cells = [str(epoch.number), f"{epoch.loss:.3f}", f"{epoch.accuracy:.2f} %"]
        cells += [f"{epoch.other:.3f}"] if other and epoch.other is not None else []
        cells += [format_bytes(epoch.wire_bytes), f"{epoch.ratio:.3f}"]
        result.add_row(*cells, format_seconds(epoch.compute_s), format_seconds(epoch.batch_s))
    return result


def draw(paths: Sequence[Path], title: str, target: Path) -> None:
    """The learning curves of one or several logs as a picture."""
    figure = Figure(figsize=(10, 4), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2)
    for path in paths:
        settings, epochs = read(path)
        if not epochs:
            continue
        numbers, best = [e.number for e in epochs], max(e.accuracy for e in epochs)
        name = settings["compressor"]
        left.plot(numbers, [e.accuracy for e in epochs], marker="o", markersize=3, label=f"{name}: {best:.1f} %")
        label = f"{name}: {epochs[-1].ratio:.2f} of the bytes"
        right.plot(numbers, [e.loss for e in epochs], marker="o", markersize=3, label=label)
    for axes, text in ((left, "Validation accuracy in %"), (right, "Training loss")):
        axes.set_title(text, loc="left", fontsize=12)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    figure.savefig(target)
