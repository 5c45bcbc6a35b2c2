"""Loading models: files of all the kinds that users write, and the names of libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxsplit.errors import FxsplitError, InputError
from fxsplit.model_source import InputShape, example_arguments, load_model

HEAD = "import torch\nfrom torch import nn\n"
LINEAR = "model = nn.Linear(3, 2)\n"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Writes a model file of some lines; its folder leaves the import path afterwards."""
    before = list(sys.path)

    def written(*lines: str, name: str = "a_model.py") -> Path:
        path = tmp_path / name
        path.write_text(HEAD + "\n".join(lines))
        return path

    yield written
    sys.path[:] = before


def refusal(source: object, *inputs: InputShape) -> str:
    with pytest.raises(FxsplitError) as caught:
        load_model(str(source), inputs)
    return str(caught.value)


@pytest.mark.parametrize(
    "example",
    [
        "example_inputs = torch.rand(5, 3)",
        "example_inputs = (torch.rand(5, 3),)",
        "example_inputs = [torch.rand(5, 3)]",
        "example_inputs = {'input': torch.rand(5, 3)}",
        "def example_inputs(): return torch.rand(5, 3)",
        "def get_example_inputs(): return {'input': torch.rand(5, 3)}",
    ],
)
@pytest.mark.parametrize("model", [LINEAR, "def get_model(): return nn.Linear(3, 2)\n"])
def test_a_file_with_a_model_and_inputs(write: Write, model: str, example: str) -> None:
    loaded, arguments = load_model(str(write(model, example)))
    assert loaded(*arguments.args, **arguments.kwargs).shape == (5, 2)


def test_given_shapes_come_before_the_files(write: Write) -> None:
    path = write(LINEAR, "example_inputs = torch.rand(5, 3)")
    _, arguments = load_model(str(path), [InputShape((7, 3))])
    assert arguments.args[0].shape == (7, 3)


def test_a_file_imports_what_is_beside_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "beside_the_model.py").write_text("WIDTH = 9\n")
    path = write("from beside_the_model import WIDTH", "model = nn.Linear(WIDTH, 2)", name="torch.py")
    model, _ = load_model(str(path), [InputShape((1, 9))])
    assert isinstance(model, nn.Linear) and model.in_features == 9
    assert sys.modules["torch"] is torch, "a file called torch.py must not hide torch"


def test_a_main_guard_does_not_run_and_annotations_stay_the_files_own(write: Write) -> None:
    path = write(
        "def f(x: int): ...",
        "assert f.__annotations__ == {'x': int}",
        LINEAR,
        "if __name__ == '__main__':",
        "    raise SystemExit('trained')",
    )
    load_model(str(path), [InputShape((1, 3))])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("import no_such_thing",), ("does not import", "line 3: import no_such_thing", "ModuleNotFound")),
        (("def f(:",), ("does not import", "line 3: def f(:", "SyntaxError")),
        (("def f():", "    return 1 / 0", "f()"), ("line 4: return 1 / 0", "ZeroDivisionError")),
        (("raise SystemExit(2)",), ("does not import", "SystemExit: 2", "__main__")),
        (("def get_model(): raise ValueError('no weights')",), ("get_model() failed", "no weights")),
        (("def get_model(size): ...",), ("get_model() failed", "TypeError")),
        (("x = 3",), ("has no model", "found:   x", "def get_model()")),
        ((), ("has no model", "found:   nothing")),
        (("net = nn.Linear(3, 2)",), ("has no model", "found:   net", "model = net")),
        (("class Net(nn.Module): ...",), ("has no model", "found:   Net", "model = Net(...)")),
        (("model = nn.Linear",), ("no torch.nn.Module", "make an instance")),
        (("model = {'weight': 3}",), ("no torch.nn.Module", "{'weight': 3} (dict)", "state_dict")),
        (("def get_model(): return None",), ("get_model() is no torch.nn.Module", "NoneType")),
        ((LINEAR,), ("no example inputs", "found:   model", "--input")),
        ((LINEAR, "def example_inputs(): return 1 / 0"), ("example_inputs() failed", "ZeroDivision")),
    ],
)
def test_files_that_cannot_be_used(write: Write, lines: tuple[str, ...], said: tuple[str, ...]) -> None:
    text = refusal(write(*lines))
    assert all(part in text for part in said), text


def test_paths_that_are_no_model_file(write: Write, tmp_path: Path) -> None:
    write(LINEAR)
    assert "no such model file" in refusal(tmp_path / "a_modle.py")
    assert "nearest in that folder: a_model.py" in refusal(tmp_path / "a_modle.py")
    assert "no such model file" in refusal(tmp_path / "no" / "model.py")
    assert "torchvision:mobilenet_v2" in refusal("mobilenet_v2")
    assert "is a folder" in refusal(tmp_path) and "a_model.py" in refusal(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"PK")
    assert "not a Python file" in refusal(tmp_path / "weights.pt")


def test_libraries_that_are_not_known() -> None:
    assert "nearest: torchvision" in refusal("torchvison:resnet18")
    assert "timm" in refusal("timm:resnet18")


def test_torchvision() -> None:
    model, arguments = load_model("torchvision:shufflenet_v2_x0_5")
    assert type(model).__name__ == "ShuffleNetV2"
    assert arguments.args[0].shape == (1, 3, 224, 224)
    _, arguments = load_model("torchvision:mc3_18", [InputShape((2, 3, 4, 64, 64))])
    assert arguments.args[0].shape == (2, 3, 4, 64, 64)
    text = refusal("torchvision:mobilenetv2")
    assert "no model 'mobilenetv2'" in text and "nearest: mobilenet_v2" in text


def test_torchvision_downloads_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("weights are being downloaded")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    _, arguments = load_model("torchvision:lraspp_mobilenet_v3_large")
    assert arguments.args[0].shape == (2, 3, 224, 224)


def test_transformers_by_type_and_by_class() -> None:
    model, arguments = load_model("transformers:electra")
    assert type(model).__name__ == "ElectraModel"
    assert {name: tuple(value.shape) for name, value in arguments.kwargs.items()} == {
        "input_ids": (1, 128),
        "attention_mask": (1, 128),
    }
    model, arguments = load_model("transformers:ElectraForSequenceClassification", [InputShape((3, 16))])
    assert arguments.kwargs["input_ids"].dtype == torch.long
    assert model(**arguments.kwargs).logits.shape == (3, 2)


def test_transformers_for_images() -> None:
    _, arguments = load_model("transformers:mobilevit")
    assert arguments.kwargs["pixel_values"].shape == (1, 3, 256, 256)
    _, arguments = load_model("transformers:mobilevit", [InputShape((4, 3, 64, 64))])
    assert arguments.kwargs["pixel_values"].shape == (4, 3, 64, 64)


@pytest.mark.parametrize("name", ["robeta", "RobertaForSequenceClasification", "AutoModel", "PreTrainedModel", ""])
def test_transformers_that_are_not_known(name: str) -> None:
    text = refusal(f"transformers:{name}")
    assert f"no model {name!r}" in text and "nearest: " in text


def test_inputs_that_transformers_does_not_tell() -> None:
    two = [InputShape((1, 8)), InputShape((1, 8))]
    assert "without a name" in refusal("transformers:electra", *two)


def test_what_does_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(InputError, match="does not fit into memory"):
        InputShape((10**6, 10**6, 10**3)).tensor()


@pytest.mark.parametrize(
    ("shape", "dtype", "values"),
    [
        (InputShape((4, 5)), torch.float32, (0, 1)),
        (InputShape((4, 5), torch.float16), torch.float16, (0, 1)),
        (InputShape((4, 5), torch.int32), torch.int32, (0, 1)),
        (InputShape((4, 5), name="input_ids"), torch.long, (50, 99)),
        (InputShape((4, 5), name="token_type_ids"), torch.long, (0, 1)),
        (InputShape((4, 5), name="attention_mask"), torch.long, (1, 1)),
        (InputShape((4, 5), torch.bool), torch.bool, (1, 1)),
    ],
)
def test_made_up_inputs(shape: InputShape, dtype: torch.dtype, values: tuple[int, int]) -> None:
    tensor: Tensor = shape.tensor(vocabulary=100)
    assert (tensor.shape, tensor.dtype) == ((4, 5), dtype)
    assert values[0] <= tensor.min() and tensor.max() <= values[1]


def test_arguments_go_by_position_and_by_name() -> None:
    arguments = example_arguments([InputShape((1,)), InputShape((2,), name="x"), InputShape((3,))])
    assert [tensor.shape for tensor in arguments.args] == [(1,), (3,)]
    assert arguments.kwargs["x"].shape == (2,)
