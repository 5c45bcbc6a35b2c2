"""The picture of a plan: what it shows, and that nothing in it stands on something else."""

from __future__ import annotations

from io import BytesIO
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.transforms import Bbox

from fxsplit.costs import CostTable, NodeCost, Value
from fxsplit.errors import FxsplitError
from fxsplit.planning import Plan, plan
from fxsplit.plots import bytes_across, check_picture_path, draw, save_picture
from fxsplit.spec import TensorSpec


def chain(length: int, depth: int = 3) -> CostTable:
    """A chain of blocks of `depth` layers, with a value from each layer to the next."""
    modules = [f"model.encoder.block.{i // depth}.layer_{i % depth}" for i in range(length)]
    nodes = tuple(
        NodeCost(f"node_{i}", module, "Linear", 10**6 * (1 + i % 7), 4000, 400) for i, module in enumerate(modules)
    )
    spec = TensorSpec((10, 100), torch.float32)
    values = tuple(Value(f"value_{i}", i, (i + 1,), spec, i >= 0) for i in range(-1, length))
    return CostTable("Chain", "0", 10, nodes, values, {module: i for i, module in enumerate(modules)})


def planned(costs: CostTable, stages: int) -> Plan:
    """Cuts that crowd at the front, which is the hard case for a picture."""
    devices = ["cpu", *(f"server{i}/cuda:{i}" for i in range(1, stages))]
    return plan(costs, devices, cuts=list(costs.cut_points)[1:stages], compressor="uniform8")


def boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    """Where each horizontal text that is drawn stands, in pixels."""
    figure.savefig(BytesIO())
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += axes.texts
        low, high = axes.get_ylim()
        if axes.axison:
            texts += [axes.yaxis.label]
            ticks = axes.yaxis.get_major_ticks()
            texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]


@pytest.mark.parametrize(("length", "stages"), [(1, 1), (6, 2), (24, 3), (95, 5), (400, 8), (2000, 4)])
def test_nothing_overlaps_and_nothing_is_cut_off(length: int, stages: int) -> None:
    costs = chain(length)
    figure = draw(costs, planned(costs, stages))
    found = boxes(figure)
    for (one, first), (two, second) in combinations(found, 2):
        assert not first.padded(-1).overlaps(second.padded(-1)), f"{one!r} stands on {two!r}"
    for text, box in found:
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, text


@pytest.mark.parametrize("length", [3, 40, 95, 400])
def test_module_names_are_thinned(length: int) -> None:
    costs = chain(length)
    figure = draw(costs, planned(costs, 2))
    labels = [label for label in figure.axes[2].get_xticklabels() if label.get_text()]
    assert labels
    places = [label.get_window_extent().x1 for label in labels]
    assert all(second - first >= 12 for first, second in pairwise(places))
    assert all(label.get_window_extent().x0 >= 0 and label.get_window_extent().y0 >= 0 for label in labels)


def test_parts_cuts_and_bytes_are_named() -> None:
    costs = chain(24)
    made = planned(costs, 3)
    texts = " ".join(text for text, _ in boxes(draw(costs, made)))
    for part in made.parts:
        assert part.device in texts
    for cut in made.cuts:
        assert cut.name in texts
    assert "4.00 kB → 1" in texts
    assert "batch 10" in texts and "uniform8" in texts


def test_bytes_across() -> None:
    costs = chain(3)
    assert bytes_across(costs) == [4000] * 4
    skip = Value("skip", 0, (3,), TensorSpec((5,), torch.float32), True)
    pair = Value("pair", 1, (2,), None, True)  # a tuple: its bytes are those of its node
    table = CostTable("Chain", "0", 10, costs.nodes, (*costs.values, skip, pair), costs.cut_points)
    assert bytes_across(table) == [4000, 4020, 8020, 4020]


def test_the_file(tmp_path: Path) -> None:
    costs, path = chain(24), tmp_path / "cuts.png"
    check_picture_path(path)
    save_picture(costs, planned(costs, 3), path)
    height, width = imread(path).shape[:2]
    assert 1000 <= width <= 2500 and 600 <= height <= 1500
    assert path.stat().st_size < 300_000
    save_picture(costs, planned(costs, 1), tmp_path / "cuts.svg")
    assert "<svg" in (tmp_path / "cuts.svg").read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/cuts.png", "mkdir -p"),
        ("cuts", "cuts.png"),
        ("cuts.pgn", "nearest: cuts.png"),
        ("folder.png", "is a folder"),
    ],
)
def test_paths_for_which_no_picture_can_be_written(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FxsplitError, match=said):
        check_picture_path(tmp_path / name)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    costs = chain(3)
    with pytest.raises(FxsplitError, match="cannot be written"):
        save_picture(costs, planned(costs, 1), tmp_path / "no" / "cuts.png")
