"""Snapshots whose checksums are right, and whose content is somebody else's: refused before anything is used."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxsplit
from fxsplit.errors import SnapshotError
from fxsplit.planning.calibration import Calibration
from fxsplit.planning.link_file import load_links
from fxsplit.runtime.randomness import process_states
from fxsplit.snapshots.files import digest, tensors_of_bytes, tensors_to_bytes
from fxsplit.snapshots.manifest import Manifest

CPU = torch.device("cpu")


def rewritten(folder: Path, **changes: Any) -> None:
    """The manifest with other fields, and a checksum that is right."""
    body = {**json.loads((folder / "manifest.json").read_bytes().partition(b"\n")[0]), **changes}
    line = json.dumps(body).encode()
    (folder / "manifest.json").write_bytes(line + b"\nsha256:" + digest(line).encode() + b"\n")


PART = {"worker": "a", "file": "part-000.safetensors", "size_bytes": 1, "sha256": "0" * 64, "values": {}}
LOOP: dict[str, Any] = {"passes": 0, "batches": 0, "kept": {}}
BAD_FIELDS: dict[str, dict[str, Any]] = {
    "a path": {"parts": [{**PART, "file": "../part-000.safetensors"}]},
    "an absolute path": {"parts": [{**PART, "file": "/etc/passwd"}]},
    "a file twice": {"parts": [PART, PART]},
    "a huge size": {"parts": [{**PART, "size_bytes": 2**70}]},
    "a negative size": {"parts": [{**PART, "size_bytes": -1}]},
    "no checksum": {"parts": [{**PART, "sha256": ""}]},
    "an unknown field": {"more": 1},
    "no format": {"format": 0},
    "a format that is no number": {"format": "2"},
    "a worker twice": {"parts": [PART, {**PART, "file": "part-001.safetensors"}]},
    "a text for a number": {"step": "1"},
    "true for a number": {"step": True},
    "deep": {"loop": {**LOOP, "kept": {"a": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}}},
    "a text for a count": {"loop": {**LOOP, "batches": "1"}},
    "a count below nothing": {"loop": {**LOOP, "passes": -1}},
    "no count": {"loop": {"passes": 1, "kept": {}}},
    "options that are parameters": {
        "optimizers": [{"kind": "k", "groups": [{"options": {"params": []}, "parameters": []}]}]
    },
    "control characters": {"model": "\x1b[2J"},
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_manifest_with_a_right_checksum_is_not_trusted(case: str, snapshots: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(snapshots / "step-00000002", folder)
    rewritten(folder)
    assert fxsplit.load(folder).step == 2
    rewritten(folder, **BAD_FIELDS[case])
    with pytest.raises(SnapshotError, match="damaged"):
        fxsplit.load(folder)


@pytest.mark.parametrize(("number", "says"), [(1, "an older"), (3, "a newer")])
def test_another_format_is_not_called_damage(number: int, says: str, snapshots: Path, tmp_path: Path) -> None:
    """It is refused whole: what its files hold another version knows. One of this version is used instead."""
    shutil.copytree(snapshots, tmp_path / "s")
    newest, before = (tmp_path / "s" / f"step-0000000{step}" for step in (2, 1))
    rewritten(newest, format=number, anything="else")
    message = rf"written by {says} version of fxsplit[^$]*format {number}[^$]*allowed: 2[^$]*another directory"
    with pytest.raises(SnapshotError, match=message) as caught:
        fxsplit.load(newest)
    assert str(newest) in str(caught.value)
    with pytest.warns(UserWarning, match="step-00000002 is not used, but step-00000001"):
        assert fxsplit.load(tmp_path / "s").step == 1
    rewritten(before, format=number)
    with pytest.raises(SnapshotError, match=rf"can be used[^$]*2 of them[^$]*{says} version of fxsplit, format"):
        fxsplit.compile(tiny(), ["cpu"], transport="in_process", snapshots=fxsplit.Snapshots(tmp_path / "s"))


def tiny() -> nn.Module:
    """The model of these snapshots."""
    return nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))


def with_part(folder: Path, index: int, content: bytes) -> None:
    """Another file in the place of a part, and a manifest that vouches for it."""
    parts = json.loads((folder / "manifest.json").read_bytes().partition(b"\n")[0])["parts"]
    (folder / parts[index]["file"]).write_bytes(content)
    parts[index] |= {"size_bytes": len(content), "sha256": digest(content)}
    rewritten(folder, parts=parts)


def with_entries(folder: Path, entries: dict[str, torch.Tensor]) -> None:
    """More entries in the client's part, or others."""
    path = folder / "part-000.safetensors"
    with_part(folder, 0, tensors_to_bytes({**tensors_of_bytes(path.read_bytes(), path), **entries}, "here"))


BAD_ENTRIES = (
    "",
    "weights",
    "other/0.weight",
    "state/",
    "optimizer/momentum_buffer/0.weight",
    "optimizer/-1/step/0.weight",
    "optimizer/0/step",
    "random/now/0",
    "random/commit/first",
    "random/commit/0/0",
    "host/2",
    "codec/",
    "codec/[1]",
    "codec/{}",
    'codec/["send", "value", 0, 1, true, false, "feedback"]',
    "codec/" + "[" * 100_000 + "]",
)


@pytest.mark.parametrize("key", BAD_ENTRIES, ids=lambda key: key[:60])
def test_an_entry_of_another_name_is_refused(key: str, snapshots: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(snapshots / "step-00000002", folder)
    with_entries(folder, {'codec/["send", "value", 0, 1, 0, false, "feedback"]': torch.zeros(1)})
    assert fxsplit.load(folder).step == 2
    with_entries(folder, {key: torch.zeros(1)})
    with pytest.raises(SnapshotError, match="damaged"):
        fxsplit.load(folder)


BAD_STATES = {
    "python": ("random/commit/0", torch.zeros(3, dtype=torch.float64)),
    "python, no numbers": ("random/commit/0", torch.full((626,), float("nan"), dtype=torch.float64)),
    "numpy": ("random/commit/1", torch.zeros(2, 313, dtype=torch.float64)),
    "torch": ("random/commit/2", torch.zeros(7, dtype=torch.uint8)),
    "torch, of another type": ("random/commit/2", torch.zeros(5056)),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_random_states_that_are_none_are_refused(case: str, snapshots: Path, tmp_path: Path) -> None:
    shutil.copytree(snapshots / "step-00000002", tmp_path / "step-00000002")
    with_entries(tmp_path / "step-00000002", dict([BAD_STATES[case]]))
    settings = fxsplit.Snapshots(tmp_path)
    with (
        pytest.raises(SnapshotError, match="random numbers cannot go on"),
        fxsplit.compile(
            tiny(), ["cpu", "b/cpu"], cuts=["1"], transport="in_process", snapshots=settings, verify=False
        ) as pipe,
    ):
        for _ in pipe.remaining(range(9)):
            pass


def test_a_count_beyond_the_data_ends_with_the_data(snapshots: Path, tmp_path: Path) -> None:
    shutil.copytree(snapshots / "step-00000002", tmp_path / "step-00000002")
    rewritten(tmp_path / "step-00000002", loop={**LOOP, "passes": 1, "batches": 2**62})
    with_entries(tmp_path / "step-00000002", {f"random/pass/{i}": s for i, s in enumerate(process_states(CPU))})
    settings = fxsplit.Snapshots(tmp_path)
    with fxsplit.compile(
        tiny(), ["cpu", "b/cpu"], cuts=["1"], transport="in_process", snapshots=settings, verify=False
    ) as pipe:
        assert list(pipe.remaining(range(9))) == []


def test_a_manifest_says_what_it_was_given(tmp_path: Path) -> None:
    loop = {"passes": 1, "batches": 2, "kept": {"x": [1.5, None, True]}}
    manifest = Manifest(3, "M", ("a",), {"a": "a"}, "s", (), loop, ())
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert copy.deepcopy(manifest) == manifest


class Payload:
    """What a pickle runs when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_no_file_is_unpickled(snapshots: Path, tmp_path: Path) -> None:
    """A pickle in place of each kind of file, with right checksums where it has some, is refused and not run."""
    marker, folder = tmp_path / "marker", tmp_path / "s"
    evil = pickle.dumps(Payload(marker))
    zipped = tmp_path / "zipped"
    torch.save(Payload(marker), zipped)
    pickle.loads(evil)
    assert marker.exists(), "it would run"
    marker.unlink()
    for content in (evil, zipped.read_bytes()):
        file = tmp_path / "file"
        file.write_bytes(content)
        for read in (fxsplit.Plan.load, Calibration.load, load_links):
            with pytest.raises(fxsplit.FxsplitError):
                read(file)
        shutil.copytree(snapshots / "step-00000002", folder)
        with_part(folder, 0, content)
        with pytest.raises(SnapshotError):
            fxsplit.load(folder)
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(SnapshotError):
            fxsplit.load(folder)
        shutil.rmtree(folder)
    assert not marker.exists()


def test_a_huge_manifest_is_not_read(snapshots: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(snapshots / "step-00000002", folder)
    os.truncate(folder / "manifest.json", 1 << 40)  # sparse: no room is taken
    with pytest.raises(SnapshotError, match="at most"):
        fxsplit.load(folder)
