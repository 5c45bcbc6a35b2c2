"""The accuracy study: its harness on a few made-up images, on the CPU."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.io import encode_jpeg

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.configs import BOTH, CONFIGS, FAMILIES, PAIRS, Config, available, chosen
from benchmarks.accuracy.data import PADDING, Images, augmented, load, normalized, training_batches
from benchmarks.accuracy.report import README, Sample, results_of, table, write_report
from benchmarks.accuracy.runner import append, jobs_of, read, run_all
from benchmarks.accuracy.train import Settings, prepare, run
from fxsplit.compressors.nodes import Encode

TRAIN, TEST, BATCH = 32, 20, 16


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images of one colour a class, in the form of the real file."""
    generator = torch.Generator().manual_seed(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        labels = torch.randint(10, (count,), generator=generator)
        pixels = (labels * 25)[:, None, None, None].expand(-1, 3, 32, 32).to(torch.uint8)
        files = [encode_jpeg(image.contiguous()).numpy() for image in pixels]
        arrays[f"{split}_bytes"] = np.concatenate(files)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = labels.numpy()
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return path


def settings_for(data: Path) -> Settings:
    return Settings(data, data.parent, epochs=1, batch_size=BATCH, width=0.1, device="cpu")


def named(name: str) -> Config:
    (config,) = chosen(name)
    return config


def test_runs_are_collected_and_reported(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both configurations in processes side by side, lines of JSON, nothing twice, and the report."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"data": data, "configs": "none,uniform8", "seeds": "3", "epochs": 1, "width": 0.1}
    options |= {"batch_size": BATCH, "jobs": 2, "out": out, "device": "cpu", "cache": tmp_path}
    main(**options)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["config"]: (row["activation"], row["gradient"]) for row in rows} == {
        "none": ("none", "none"),
        "uniform8": ("uniform8(group=tensor)",) * 2,
    }
    for row in rows:
        expected = 1.0 if row["config"] == "none" else 0.25
        assert row["activation_ratio"] == row["gradient_ratio"] == pytest.approx(expected, abs=0.001)
        assert row["seed"] == 3 and row["error"] is None and 0 <= row["accuracy"] <= 100
        assert len(row["losses"]) == len(row["step_ms"]) == 1
    assert "uniform8 seed 3: " in capsys.readouterr().out
    main(**options, resume=True)
    assert read(out) == rows and capsys.readouterr().out == ""
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text())
    main(report=out, readme=readme)
    assert (
        "| uniform8 | `uniform8(group=tensor)` | `uniform8(group=tensor)` | 0.250 | 0.250 |" in readme.read_text()
    )
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_images_are_decoded_once(data: Path, tmp_path: Path) -> None:
    train, test = load(data, tmp_path)
    assert (train.pixels.shape, test.pixels.shape) == ((TRAIN, 32, 32, 3), (TEST, 32, 32, 3))
    found = train.pixels.float().mean((1, 2, 3)) / 25
    assert torch.equal(found.round().long(), train.labels)
    kept = next(tmp_path.glob("*.pt"))
    before = kept.stat().st_mtime_ns
    assert torch.equal(load(data, tmp_path)[0].pixels, train.pixels)
    assert kept.stat().st_mtime_ns == before


def test_augmented_are_crops_and_their_mirror_images() -> None:
    generator = torch.Generator().manual_seed(0)
    images = Images(
        torch.randint(256, (3, 6, 5, 3), generator=generator).to(torch.uint8), torch.arange(3)
    ).padded()
    windows = images.pixels.unfold(1, 6, 1).unfold(2, 5, 1)  # [3, 9, 9, 3, 6, 5]
    seen = set()
    picked = torch.tensor([1, 2] * 100)
    for index, image in zip(picked, augmented(images.pixels, picked, generator), strict=True):
        crops = normalized(windows[index].flatten(0, 1).permute(0, 2, 3, 1))
        kinds = [(side, place) for side, c in ((0, crops), (1, crops.flip(3))) for place in _equal(c, image)]
        assert kinds
        seen.update(kinds)
    assert 100 < len(seen) <= 2 * (2 * PADDING + 1) ** 2
    batches = list(training_batches(images, 2, generator))
    assert [len(labels) for _, labels in batches] == [2]


def _equal(crops: Tensor, image: Tensor) -> list[int]:
    found: list[int] = (crops == image).flatten(1).all(1).nonzero().view(-1).tolist()
    return found


def test_codecs_work_in_both_modes(data: Path) -> None:
    """At both cuts, in training and in evaluation, and the numbers change."""
    x, outputs, calls = torch.randn(4, 3, 32, 32), dict[tuple[str, bool], Tensor](), Counter[bool]()
    for name in ("none", "fastquant8"):
        torch.manual_seed(0)
        made = prepare(named(name), settings_for(data), torch.device("cpu"))
        encoders = [module for module in made.module.modules() if isinstance(module, Encode)]
        assert len(encoders) == (2 if name == "fastquant8" else 0)
        for module in encoders:
            module.register_forward_hook(lambda module, *_: calls.update([module.training]))
        for training in (True, False):
            made.set_training(training)
            torch.manual_seed(1)
            outputs[name, training] = made(x).detach()
    assert calls == {True: 2, False: 2}
    for training in (True, False):
        plain, compressed = outputs["none", training], outputs["fastquant8", training]
        assert not torch.equal(plain, compressed)
        torch.testing.assert_close(plain, compressed, atol=0.1, rtol=0.1)


def test_learned_layers_are_trained(data: Path) -> None:
    made = prepare(named("convinsert10"), settings_for(data), torch.device("cpu"))
    names = [name for name, _ in made.module.named_parameters() if name.startswith("fxsplit_learned")]
    assert len(names) == 8


def test_a_run_that_diverges_is_a_row(data: Path) -> None:
    row = run(named("uniform8"), 0, replace(settings_for(data), learning_rate=1e30, epochs=2))
    assert row["accuracy"] is None and "finite" in row["error"]
    assert "1 of 1 broke off" in table(results_of([row]))


def test_no_run_begins_after_the_limit(data: Path) -> None:
    jobs = jobs_of(chosen("none,uniform8"), [0, 1])
    assert [(job.seed, job.config.name) for job in jobs][:2] == [(0, "none"), (0, "uniform8")]
    ended = list(run_all(jobs, settings_for(data), 1, 0.0))
    assert len(ended) == 4 and all(e.row is None and "not begun" in e.reason for e in ended)


def test_the_table_of_configurations() -> None:
    names = [config.name for config in CONFIGS]
    assert len(set(names)) == len(names) and names[0] == "none"
    assert {name for pair in PAIRS for name in pair[:2]} <= set(names)
    assert {config.family for config in CONFIGS} == {"none", *FAMILIES}
    with pytest.raises(ValueError, match="no configuration nosuch"):
        chosen("none,nosuch")
    unknown = Config("new", "nosuch8", "same", "", FAMILIES[0])
    found, refused = available([named("none"), unknown])
    assert [config.name for config in found] == ["none"] and "unknown compressor" in refused["new"]
    assert named("uniform8").codecs() == ("uniform8(group=tensor)",) * 2 and named("uniform8").cuts == BOTH


def row_of(config: str, seed: int, accuracy: float, **others: Any) -> dict[str, Any]:
    protocol: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 2,
        "learning_rate": 0.1,
        "weight_decay": 0.0,
        "width": 1.0,
    }
    protocol |= {"train_images": None, "test_images": None, "machine": "none", "date": "2000-01-01"}
    ratio = 1.0 if config == "none" else 0.25
    found = {"accuracy": accuracy, "error": None, "activation_ratio": ratio, "gradient_ratio": ratio}
    return {"config": config, "seed": seed, "activation": "a", "gradient": "g", **protocol, **found, **others}


def test_differences_are_those_of_a_seed(tmp_path: Path) -> None:
    rows = [row_of("none", seed, accuracy) for seed, accuracy in enumerate((80.0, 84.0, 88.0))]
    rows += [row_of("uniform8", seed, accuracy) for seed, accuracy in enumerate((79.0, 83.0, 87.0))]
    none, uniform = results_of(rows)
    assert (none.accuracy.mean, none.accuracy.spread) == (84.0, 4.0)
    assert str(uniform.accuracy.minus(none.accuracy)) == "-1.00 ± 0.00"
    assert str(Sample({0: 1.0})) == "1.00" and str(Sample({})) == "-"
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text())
    write_report(rows, readme)
    text = readme.read_text()
    assert "Fewest bytes within 1 point of no compression: uniform8, 0.250" in text
    assert "Nothing is within 0.5 points" in text and "Every configuration trained" in text
    with pytest.raises(ValueError, match="one protocol"):
        results_of([*rows, row_of("fp8", 0, 1.0, epochs=7)])
    found = write_report([row_of("fp8", 0, 1.0, epochs=7), *rows, row_of("none", 0, 60.0, epochs=0)], readme)
    assert [result.config.name for result in found] == ["none", "uniform8"]
    others = readme.read_text().partition("<!-- others -->")[2]
    assert others.index("7 epochs") < others.index("0 epochs") and "-1.00 ± 0.00" not in others
    with pytest.raises(ValueError, match="no rows"):
        results_of([])


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    append(tmp_path, {"seed": 1})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"seed": 2, "acc')
    append(tmp_path, {"seed": 3})
    assert [row["seed"] for row in read(tmp_path)] == [1, 3]
