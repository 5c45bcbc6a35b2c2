"""The training examples: logs that are taken up again, GLUE's files, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.scripts import EXAMPLES, load_example

VISION = ["digits", "--image-size=32", "--images=64", "--epochs=3", "--batch-size=32", "--chunks=2"]
VISION += ["--compressor=sortquant", "--bits=8", "--split=2"]


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts find their shared module, write into a folder of the test's, and set no threads for others."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(example: ModuleType, *arguments: str) -> Any:
    return CliRunner().invoke(example.app, arguments, env={"COLUMNS": "100"})


def learned(log: str) -> list[tuple[float, float, float]]:
    """What does not depend on the machine, by epoch."""
    rows = [json.loads(line) for line in Path(log, "log.jsonl").read_text().splitlines()[1:]]
    return [(row["loss"], row["accuracy"], row["wire_bytes"]) for row in rows]


def test_a_stopped_run_goes_on_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = load_example("vision")
    whole = run(vision, *VISION, "--log=whole")
    assert whole.exit_code == 0, whole.output
    assert "sortquant8(split=2)" in Path("whole/log.jsonl").read_text()
    import experiment

    def stop_behind_the_second(folder: Path, number: int, *others: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        save(folder, number, *others)

    save = experiment.save
    monkeypatch.setattr(experiment, "save", stop_behind_the_second)
    assert run(vision, *VISION, "--log=part").exit_code != 0
    monkeypatch.setattr(experiment, "save", save)
    assert learned("part") == learned("whole")[:1]
    resumed = run(vision, *VISION, "--log=part", "--compare=whole/log.jsonl")
    assert resumed.exit_code == 0, resumed.output
    assert "going on behind epoch 1" in resumed.output
    assert learned("part") == learned("whole")
    assert Path("part/curves.png").read_bytes().startswith(b"\x89PNG")
    other = run(vision, *VISION, "--log=part", "--chunks=4")
    assert other.exit_code == 1
    assert "other settings" in other.output and "chunks: 2 there, 4 here" in other.output


def test_two_servers_learn_what_one_does() -> None:
    """A micro-batch each: the sum of two gradients is the same in either order, and so are the losses."""
    options = ["digits", "--image-size=32", "--images=64", "--epochs=1", "--batch-size=32", "--chunks=2"]
    for log, servers in (("one", "server/cpu"), ("two", "a/cpu+b/cpu")):
        done = run(load_example("vision"), *options, f"--devices=cpu,{servers},cpu", f"--log={log}")
        assert done.exit_code == 0, done.output
    assert [row[0] for row in learned("two")] == [row[0] for row in learned("one")]


@pytest.mark.parametrize("task", ["rte", "cola"])
def test_glue_files(task: str) -> None:
    words = ["the cat sat", "a dog ran off", "birds sing songs", "he saw nothing at all"]
    if task == "rte":
        Path("RTE").mkdir()
        lines = ["index\tsentence1\tsentence2\tlabel"]
        lines += [f"{i}\t{words[i % 4]}\t{words[i % 3]}\t{('not_' if i % 2 else '')}entailment" for i in range(16)]
        paths = [Path("RTE", f"{split}.tsv") for split in ("train", "dev")]
    else:
        lines = [f'gj04\t{i % 2}\t{"*" if i % 2 else ""}\t{words[i % 4]} "again' for i in range(16)]
        paths = [Path(f"CoLA-{split}.tsv") for split in ("train", "dev")]
    for path in paths:
        path.write_text("\n".join(lines) + "\n")
    options = ["--data=.", "--model=tiny", "--epochs=1", "--length=16", "--batch-size=8", "--chunks=2"]
    done = run(load_example("nlp"), task, *options, "--compressor=uniform8", "--condition=3", "--log=log")
    assert done.exit_code == 0, done.output
    assert "Matthews" in done.output
    ((loss, accuracy, wire_bytes),) = learned("log")
    assert 0.4 < loss < 1.0 and 0 <= accuracy <= 100 and wire_bytes > 0


@pytest.mark.parametrize(
    ("example", "arguments", "message"),
    [
        ("vision", ["cifar10"], "the folder of the data is needed"),
        ("vision", ["cifar10", "--data=."], "--download fetches it"),
        ("vision", ["digits", "--compressor=sortquant", "--bits=99"], "99"),
        ("vision", ["digits", "--batch-size=2", "--chunks=4"], "as many images as chunks"),
        ("nlp", ["rte", "--data=."], "RTE-train.tsv"),
        ("nlp", ["rte", "--data=.", "--condition=7"], "less than or equal to 4"),
    ],
)
def test_mistakes_are_said_without_a_traceback(example: str, arguments: list[str], message: str) -> None:
    done = run(load_example(example), *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output
