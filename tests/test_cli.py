"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fxsplit.cli import app, main
from fxsplit.commands.inputs import parse_inputs
from fxsplit.errors import InputError
from fxsplit.model_source import InputShape
from fxsplit.planning import Plan

TYPE_1 = ("--devices", "cpu,cuda,cpu", "--cuts", "features.0.2,classifier")
MODEL_FILE = """
import torch
from torch import nn

print("a line of the user's own")
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
example_inputs = torch.rand(6, 8)
"""


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def analyzed(*arguments: object) -> dict[str, Any]:
    status, out, err = run("analyze", *arguments, "--json")
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def refused(*arguments: object) -> str:
    status, out, err = run("analyze", *arguments)
    assert (status, out) == (1, "")
    assert "Traceback" not in err
    return err


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "small_model.py"
    path.write_text(MODEL_FILE)
    return path


def test_the_parts_of_the_documents_type_1() -> None:
    found = analyzed("torchvision:mobilenet_v2", "--input", "64,3,224,224", *TYPE_1, "--compressor", "sortquant8")
    assert (found["model"], found["batch_size"], found["chunks"]) == ("MobileNetV2", 64, 1)
    assert [part["macs"] for part in found["parts"]] == [
        pytest.approx(expected, rel=0.01) for expected in (7.45e8, 1.93e10, 8.19e7)
    ]
    assert found["macs"] == sum(part["macs"] for part in found["parts"])
    assert [part["device"] for part in found["parts"]] == ["cpu", "cuda", "cpu"]
    assert found["parts"][0]["modules"] == ["features.0.0", "features.0.1"]
    assert found["parts"][2]["parameter_bytes"] == 4 * (1280 * 1000 + 1000)
    # 8 bits an element, and the least and the largest of four buckets as floats.
    first, second = 64 * 32 * 112 * 112 * 4, 64 * 1280 * 4
    assert [(cut["name"], cut["raw_bytes"], cut["wire_bytes"]) for cut in found["cuts"]] == [
        ("features.0.2", first, first // 4 + 32),
        ("classifier", second, second // 4 + 32),
    ]
    assert found["predicted_step_s"] > 0


def test_bytes_on_the_wire_are_the_compressors() -> None:
    found = analyzed(
        *("torchvision:mobilenet_v2", "-i", "8,3,64,64", *TYPE_1, "--no-verify"),
        *("--compressor", "uniform8", "--gradient-compressor", "none"),
    )
    (first, _) = found["cuts"]
    elements = 8 * 32 * 32 * 32
    assert first["compressor"] == "uniform8"
    assert first["raw_bytes"] == first["gradient_wire_bytes"] == 4 * elements
    assert first["wire_bytes"] == elements + 8 * 32, (
        "8 bits an element, and the least and the step of each channel"
    )


def test_a_model_file(model_file: Path) -> None:
    found = analyzed(model_file)
    assert (found["model"], found["batch_size"], found["mode"]) == ("Sequential", 6, "train")
    assert found["macs"] == 6 * (8 * 16 + 16 * 4)
    assert found["parameter_bytes"] == 4 * (8 * 16 + 16 + 16 * 4 + 4)
    assert len(found["parts"]) == 2


def test_shapes_on_the_command_line_come_before_the_files(model_file: Path) -> None:
    assert analyzed(model_file, "--input", "10,8", "--eval")["batch_size"] == 10


def test_the_table_the_totals_and_the_picture(model_file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "cuts.png"
    status, out, err = run(
        *("analyze", model_file, "--devices", "cpu,gpu-box/cuda:0", "--cuts", "2", "--plot", picture)
    )
    assert status == 0, err
    assert "gpu-box/cuda:0" in out and "predicted step" in out
    assert "in all 1.15e3 MACs forward in train mode, 848 B of parameters" in out
    assert "a line of the user's own" not in out
    assert "a line of the user's own" in err
    assert f"picture: {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_notes_of_the_trace_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "uncounted.py"
    path.write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.first = nn.Linear(8, 8)\n"
        "    def forward(self, x):\n        return torch.fft.rfft(self.first(x)).abs()\n"
        "model, example_inputs = Net(), torch.rand(4, 8)\n"
    )
    assert any("no MAC formula" in note for note in analyzed(path, "--devices", "cpu")["notes"])
    assert "note: no MAC formula" in run("analyze", path, "--devices", "cpu")[1]


def test_one_device_has_no_cuts(model_file: Path) -> None:
    found = analyzed(model_file, "--devices", "cpu")
    assert (len(found["parts"]), found["cuts"]) == (1, [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--compressor", "sortqant8"), ("unknown compressor", "sortquant")),
        (("--gradient-compressor", "uniform99"), ("99",)),
        (("--devices", "cpu,gpu"), ("not a device", "'gpu'")),
        (("--devices", "cpu,,cuda"), ("not a device", "''")),
        (("--cuts", "3"), ("no module of that name", "nearest")),
        (("--cuts", "1,2"), ("number of cuts", "1 for 2 devices")),
        (("--chunks", "7"), ("fewer samples", "6 samples, 7 chunks")),
        (("--input", "64,three"), ("not written as sizes", "64,three", "attention_mask=long")),
        (("--plot", "no/such/folder/cuts.png"), ("folder for the picture does not exist", "mkdir -p")),
        (("--plot", "cuts.bmp"), ("not written in this format", ".png")),
        (("--plot", "."), ("is a folder",)),
    ],
)
def test_refusals(model_file: Path, arguments: tuple[str, ...], said: tuple[str, ...]) -> None:
    err = refused(model_file, *arguments)
    assert all(part in err for part in said), err


def test_what_the_command_line_gets_wrong_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    missing = tmp_path / "missing.py"
    assert "no such model file" in refused(missing)
    assert "folder for the picture" in refused(missing, "--plot", tmp_path / "no" / "cuts.png")
    assert "unknown compressor" in refused(missing, "--compressor", "zip")


@pytest.mark.parametrize("arguments", [("--chunks", "0"), ("--chunks", "many"), ("--no-such-option",), ("extra",)])
def test_usage_errors_have_status_2(model_file: Path, arguments: tuple[str, ...]) -> None:
    status, out, err = run("analyze", model_file, *arguments)
    assert (status, out) == (2, "")
    assert "Usage" in err


def test_ctrl_c_ends_quietly(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxsplit.cli.load_model", interrupted)
    assert run("analyze", model_file) == (130, "", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_quietly(model_file: Path, unbuffered: str) -> None:
    command = f"{sys.executable} -c 'from fxsplit.cli import main; main()' analyze {model_file} --json | true"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, env=environment)
    assert result.stdout == ""
    assert "Error" not in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--help",), ("analyze", "fxsplit analyze torchvision:mobilenet_v2")),
        (("analyze", "--help"), ("--devices", "--cuts", "--plot", "Examples:", "--eval", "example_inputs")),
        (("--version",), ("fxsplit ", "torch ")),
    ],
)
def test_help(arguments: tuple[str, ...], said: tuple[str, ...]) -> None:
    status, out, _ = run(*arguments)
    assert status == 0
    assert all(part in out for part in said), out


def test_the_console_script_is_main() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="fxsplit")
    loaded: Callable[[], None] = script.load()
    assert loaded is main


def test_inputs_as_people_write_them() -> None:
    assert parse_inputs(["64, 3,224,224"]) == (InputShape((64, 3, 224, 224)),)
    assert parse_inputs(["long:2,8; bool:2", "mask=int:2,8"]) == (
        InputShape((2, 8), torch.int64),
        InputShape((2,), torch.bool),
        InputShape((2, 8), torch.int32, "mask"),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not written as sizes"),
        ("1,2,", "not written as sizes"),
        ("2x3", "not written as sizes"),
        ("-1,3", "not written as sizes"),
        ("1.5,3", "not written as sizes"),
        ("long:", "not written as sizes"),
        ("a=b=2,3", "not written as sizes"),
        ("3=2,3", "not written as sizes"),
        ("2,3;", "not written as sizes"),
        ("0,3", "empty"),
        ("lnog:2,3", "unknown type"),
        ("x=2;x=3", "given twice"),
    ],
)
def test_malformed_inputs(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_inputs([text])


def test_trace_shows_what_was_opened_guarded_and_crosses(tmp_path: Path) -> None:
    """The cut's values with their bytes; the lines on which the graph depends."""
    source = tmp_path / "deciding.py"
    source.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        y = self.a(x)\n"
        "        return self.b(y * 2 if len(x) > 100 else y)\n"
        "model, example_inputs = Net(), torch.ones(6, 4)\n"
    )
    status, out, err = run("trace", source, "--cuts", "b")
    assert status == 0, err
    for words in (
        "Net, traced by the recorder",
        "crosses the cut at b",
        "float32[6, 4]",
        "96 B",
        "in forward",
        "False",
    ):
        assert words in out, out
    status, _, err = run("trace", source, "--cuts", "c")
    assert status == 1 and "no module of that name" in err


def test_a_plan_is_chosen_saved_and_limited(model_file: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    asked = ("--devices", "cpu,server/cuda", "--bandwidth", "5Mbit/s", "--allow", "uniform8", "--chunks", "auto")
    found = analyzed(model_file, *asked, "--compressor", "auto", "--save", saved)
    plan = Plan.load(saved)
    assert plan.compressor == "uniform8" == found["cuts"][0]["compressor"] and plan.chunks == found["chunks"]
    alone = analyzed(model_file, "--devices", "cpu,server/cpu", "--placement", "auto", "--bandwidth", "1kB/s")
    assert [part["device"] for part in alone["parts"]] == ["cpu"]
    priced = ("--objective", "price", "--price", "cpu=1", "--price", "server/cuda=2.5")
    assert analyzed(model_file, *asked[:2], *priced)["predicted_step_s"] > 0
    assert "macs of cpu is missed by" in refused(model_file, "--devices", "cpu", "--budget", "macs.cpu=1k")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "memory"), "not a line of a budget"),
        (("--budget", "step_time.cpu=1s"), "not a line of a budget"),
        (("--budget", "memory=2GiB", "--budget", "memory=3GiB"), "given twice"),
        (("--budget", "energy=3J"), "unknown budget line"),
        (("--budget", "memory=2Gb"), "unknown unit"),
        (("--bandwidth", "-1Mbit/s"), "negative"),
        (("--price", "cpu"), "not a price"),
        (("--objective", "energy"), "unknown objective"),
        (("--placement", "some"), "unknown placement"),
        (("--schedule", "2f2b"), "unknown schedule"),
        (("--compressor", "auto", "--allow", "zip"), "unknown compressor"),
    ],
)
def test_what_a_plan_cannot_be_chosen_by(model_file: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(model_file, *arguments)
