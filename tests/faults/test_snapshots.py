"""Files of snapshots: whole or not at all, verified byte by byte, and good for any split of the same model."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import SnapshotError
from tests.faults.scripts import CHAIN, CUTS, assert_same, batch, small_model, train

OPTIONS: dict[str, Any] = {"cuts": CUTS, "chunks": 2, "verify": False, "transport": "in_process"}


def whole(steps: int) -> dict[str, torch.Tensor]:
    with fxsplit.compile(small_model(), CHAIN, **OPTIONS) as pipe:
        torch.manual_seed(1)
        return train(pipe, steps)


@pytest.mark.parametrize(
    "build", ["the same", "other devices", "another split", "another compressor", "over processes"]
)
def test_a_checkpoint_is_taken_up_by(build: str, tmp_path: Path) -> None:
    """Any split of the model goes on with the numbers of one that was never saved."""
    directory = tmp_path / "checkpoint"
    with fxsplit.compile(small_model(), CHAIN, **OPTIONS) as pipe:
        torch.manual_seed(1)
        train(pipe, 6, at_end=lambda: pipe.save(directory))
        state, optimizer = pipe.state_dict(), next(iter(pipe._gradients.optimizers)).state_dict()
    checkpoint = fxsplit.load(directory)
    assert checkpoint.step == 6
    for key, value in checkpoint.state_dict().items():
        assert torch.equal(value, state[key])
    model = small_model()
    model.load_state_dict(checkpoint.state_dict())
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(checkpoint.optimizer_state_dict())
    for index, entry in optimizer["state"].items():
        for key, value in entry.items():
            assert torch.equal(plain.state_dict()["state"][index][key], value)

    others: dict[str, dict[str, Any]] = {
        "the same": {},
        "other devices": {},
        "another split": {"cuts": ["4"]},
        "another compressor": {"compressor": "uniform8"},
        "over processes": {"transport": "rpc"},
    }
    devices = {"another split": CHAIN[:2], "other devices": ["cpu", "three/cpu", "cpu"]}.get(build, CHAIN)
    options = {**OPTIONS, **others[build], "example_inputs": batch(0)[0]}
    with fxsplit.compile(small_model(), devices, **options) as pipe:
        pipe.restore(checkpoint)
        found = train(pipe, 12)
        assert pipe.committed_steps == 12
    if build in ("the same", "other devices", "over processes"):
        assert_same(found, whole(12))
    assert len(found["loss"]) == 6


def test_every_flipped_byte_and_every_truncation_is_noticed(snapshots: Path, tmp_path: Path) -> None:
    """Of every file, every byte; the snapshot before is used, with a warning, and what is damaged never."""
    folder = tmp_path / "step-00000002"
    shutil.copytree(snapshots / "step-00000002", folder)
    good = fxsplit.load(tmp_path)
    assert good.step == 2
    tried = 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for index in range(len(data)):
            path.write_bytes(data[:index] + bytes([data[index] ^ (1 << index % 8)]) + data[index + 1 :])
            with pytest.raises(SnapshotError):
                fxsplit.load(folder)
            path.write_bytes(data[:index])
            with pytest.raises(SnapshotError):
                fxsplit.load(folder)
            tried += 2
        path.write_bytes(data + b"\0")
        with pytest.raises(SnapshotError):
            fxsplit.load(folder)
        path.write_bytes(data)
    assert tried > 2000
    assert fxsplit.load(tmp_path).step == 2


def damaged(folder: Path, damage: str) -> None:
    part = folder / "part-001.safetensors"
    if damage == "a part is missing":
        part.unlink()
    elif damage == "the manifest is missing":
        (folder / "manifest.json").unlink()
    elif damage == "the manifest is empty":
        (folder / "manifest.json").write_bytes(b"")
    else:
        part.rename(folder / "x")
        part.symlink_to(folder / "x") if damage == "a part is a link" else os.mkfifo(part)


DAMAGE = (
    "a part is missing",
    "the manifest is missing",
    "the manifest is empty",
    "a part is a link",
    "a part is a pipe",
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_snapshot_before_is_used_when(damage: str, snapshots: Path, tmp_path: Path) -> None:
    shutil.copytree(snapshots, tmp_path / "s")
    damaged(tmp_path / "s" / "step-00000002", damage)
    if damage == "the manifest is missing":  # as if it was being written when the power failed
        assert fxsplit.load(tmp_path / "s").step == 1
        return
    with pytest.warns(UserWarning, match="step-00000002 is not used"):
        assert fxsplit.load(tmp_path / "s").step == 1
    shutil.rmtree(tmp_path / "s" / "step-00000001")
    with pytest.raises(SnapshotError, match="no snapshot in this directory can be used"):
        fxsplit.load(tmp_path / "s")


def test_old_snapshots_go(snapshots: Path, tmp_path: Path) -> None:
    settings = fxsplit.Snapshots(tmp_path, every=1, keep=2)
    with fxsplit.compile(small_model(), CHAIN, **OPTIONS, snapshots=settings) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        for number in range(5):
            x, y = batch(number)
            pipe.step(x, target=y, loss_fn=F.cross_entropy)
            optimizer.step()
            optimizer.zero_grad()
            pipe._engine._snapshotter.wait(10.0)  # type: ignore[attr-defined]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000004", "step-00000005"]
    with pytest.raises(SnapshotError, match="has snapshots already"):
        fxsplit.compile(small_model(), CHAIN, **OPTIONS, snapshots=fxsplit.Snapshots(tmp_path, resume=False))
    with pytest.raises(SnapshotError, match="of another model"):
        fxsplit.compile(nn.Linear(1, 1), ["cpu"], transport="in_process", snapshots=settings)


@contextmanager
def small_disk(folder: Path, size_kib: int) -> Iterator[None]:
    """A file system of its own; the test is skipped where this user may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Until there is no room."""
    descriptor = os.open(disk / "ballast", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space"):
        while True:
            os.write(descriptor, bytes(4096))
    os.close(descriptor)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_training_goes_on_when_the_disk_is(fault: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 200):
        settings = fxsplit.Snapshots(disk, every=2, keep=1)
        with (
            pytest.warns(UserWarning, match="could not be written.*training goes on"),
            fxsplit.compile(small_model(), CHAIN, **OPTIONS, snapshots=settings) as pipe,
        ):
            torch.manual_seed(1)

            def break_it(step: int) -> None:
                if step == 5:
                    pipe._engine._snapshotter.wait(10.0)  # type: ignore[attr-defined]
                    if fault == "full":
                        fill(disk)
                    else:
                        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

            found = train(pipe, 12, break_it)
        assert_same(found, whole(12))
        assert 2 <= fxsplit.load(disk).step <= 6


def test_a_checkpoint_is_replaced_or_stays(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 120), fxsplit.compile(small_model(), CHAIN, **OPTIONS) as pipe:
        pipe(batch(0)[0])
        for _ in range(3):
            pipe.save(disk)
            assert len(list(disk.glob("part-*"))) == 3
        expected = pipe.state_dict()
        pipe.load_state_dict({key: value + 1 for key, value in expected.items()})
        fill(disk)
        with pytest.raises(SnapshotError, match="No space"):
            pipe.save(disk)
        found = fxsplit.load(disk).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(SnapshotError, match="cannot be written there"):
            fxsplit.compile(small_model(), CHAIN, **OPTIONS, snapshots=fxsplit.Snapshots(path))
    for bad in ({"every": 0}, {"keep": 0}, {"every": 1.5}, {"replay_s": -1.0}, {"every": True}):
        with pytest.raises(SnapshotError, match="not a number"):
            fxsplit.Snapshots(tmp_path, **bad)
    with pytest.raises(SnapshotError, match="no snapshot is there"):
        fxsplit.load(tmp_path)


def test_shuffled_data_is_taken_up_in_its_order(tmp_path: Path) -> None:
    """Three passes over a shuffling DataLoader on torch's own generator, interrupted in the second."""
    data: list[torch.Tensor] = [batch(number, 1)[0][0] for number in range(16)]

    def run(stop: int, seen: list[float]) -> None:
        torch.manual_seed(3)
        loader: Any = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)  # type: ignore[arg-type]
        settings = fxsplit.Snapshots(tmp_path / "s", every=2)
        with fxsplit.compile(small_model(), CHAIN, **OPTIONS, snapshots=settings) as pipe:
            optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
            for _ in range(3):
                for x in pipe.remaining(loader):
                    if len(seen) == stop:
                        return
                    seen.append(float(x.sum()))
                    pipe.step(x, target=torch.zeros(4).long(), loss_fn=F.cross_entropy)
                    optimizer.step()
                    optimizer.zero_grad()

    expected: list[float] = []
    run(-1, expected)
    shutil.rmtree(tmp_path / "s")
    first: list[float] = []
    run(7, first)
    rest: list[float] = []
    run(-1, rest)
    assert len(expected) == 12 and first == expected[:7]
    assert 5 <= len(rest) <= 10 and rest == expected[-len(rest) :]
