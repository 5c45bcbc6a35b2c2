"""Where the models of the command line come from: Python files, torchvision and transformers."""

from __future__ import annotations

import inspect
import linecache
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fxsplit.errors import FxsplitError, InputError, nearest
from fxsplit.planning.units import format_bytes
from fxsplit.spec import TensorSpec
from fxsplit.trace import Arguments

# torchvision and transformers take a second or more to import: each is imported only when it is asked for.


@dataclass(frozen=True)
class InputShape:
    """One input to make up: random numbers, token ids, or a mask that masks nothing.

    Attributes:
        shape: its sizes, the batch first.
        dtype: None for what its name suggests: whole numbers for ids and masks, else float32.
        name: the argument of the model's forward; None is by position.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    name: str | None = None

    def tensor(self, vocabulary: int = 2) -> Tensor:
        """A tensor of this shape; token ids are below `vocabulary`, other whole numbers are 0 and 1.

        Raises:
            InputError: it does not fit into the memory of this machine.
        """
        name = self.name or ""
        is_whole = name.endswith(("_ids", "_mask"))
        dtype = self.dtype or (torch.long if is_whole else torch.float32)
        _check_fits(TensorSpec(self.shape, dtype).nbytes, "an input", self.shape, "give a smaller --input")
        if name.endswith("_mask") or dtype is torch.bool:
            return torch.ones(self.shape, dtype=dtype)
        if dtype.is_floating_point:
            return torch.rand(self.shape, dtype=dtype)
        # The lower ids are often padding and other marks, which models treat in their own way.
        low, high = (vocabulary // 2, vocabulary) if name.endswith("input_ids") else (0, 2)
        return torch.randint(low, high, self.shape, dtype=dtype)


def _check_fits(nbytes: int, what: str, found: object, hint: str) -> None:
    """Refuses what is larger than the memory here: the system would end the process without a word."""
    if hasattr(os, "sysconf") and nbytes > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise InputError(
            f"{what} does not fit into memory",
            found=f"{found}: {format_bytes(nbytes)}",
            allowed=f"less than {format_bytes(memory)}",
            hint=hint,
        )


def load_model(source: str, inputs: Sequence[InputShape] = ()) -> tuple[nn.Module, Arguments]:
    """The model that a command line names, and arguments for one call of it.

    Args:
        source: a Python file, 'torchvision:NAME' or 'transformers:NAME'. Models of libraries get random weights
            and their default configuration; nothing is downloaded.
        inputs: shapes of the inputs, instead of those that the file gives or that are usual for the model.

    Raises:
        FxsplitError: there is no such file or model, the file does not run, or it lacks model or inputs.
    """
    library, colon, name = source.partition(":")
    if colon and library in LIBRARIES:
        return LIBRARIES[library](name, inputs)
    if colon and library.isidentifier() and len(library) > 1 and not os.path.exists(source):
        raise FxsplitError(
            f"models are not loaded from {library!r}",
            found=source,
            allowed=f"a Python file, {', '.join(f'{known}:NAME' for known in LIBRARIES)}",
            hint=f"nearest: {nearest(library, LIBRARIES)}; or write a file with model = ...",
        )
    return _from_file(Path(source), inputs)


def example_arguments(inputs: Sequence[InputShape]) -> Arguments:
    """Arguments of a call with tensors of the given shapes: those without a name by position, in their order."""
    positional = tuple(shape.tensor() for shape in inputs if shape.name is None)
    return Arguments(positional, {shape.name: shape.tensor() for shape in inputs if shape.name is not None})


# ---- Python files ----


def _from_file(path: Path, inputs: Sequence[InputShape]) -> tuple[nn.Module, Arguments]:
    _check_file(path)
    module = _import_file(path)
    model = _model_of(module, path)
    return model, example_arguments(inputs) if inputs else _example_of(module, path)


def _check_file(path: Path) -> None:
    if os.path.isdir(path):  # which, unlike `Path.is_dir`, takes a name that no file can have
        inside = sorted(file.name for file in path.glob("*.py"))
        raise FxsplitError(
            "the model file is a folder",
            found=path,
            allowed="a Python file with `model` or `get_model()`",
            hint=f"one of the files in it: {', '.join(inside[:12])}" if inside else None,
        )
    if not os.path.isfile(path):
        beside = [file.name for file in path.parent.glob("*.py")] if os.path.isdir(path.parent) else []
        close = f"nearest in that folder: {nearest(path.name, sorted(beside))}; or " if beside else ""
        raise FxsplitError(
            "there is no such model file",
            found=path,
            allowed="a Python file, torchvision:NAME or transformers:NAME",
            hint=f"{close}a model of a library, such as torchvision:mobilenet_v2",
        )
    if path.suffix != ".py":
        raise FxsplitError(
            "the model file is not a Python file",
            found=path,
            allowed="a file that ends in .py, with `model` or `get_model()`",
            hint="saved weights have no forward: write a file that builds the model and loads them",
        )


def _import_file(path: Path) -> ModuleType:
    """The file as a module, imported as `python FILE` would run it: with its folder on the import path."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Not under its own name: a file called model.py or torch.py must not hide another module.
    name = f"fxsplit_model_{path.stem}"
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(path.resolve())
    with _user_code(path, "the model file does not import"):
        # Not with this file's own `from __future__` imports, which compile() would hand on.
        exec(compile(path.read_bytes(), module.__file__, "exec", dont_inherit=True), vars(module))
    return module


def _model_of(module: ModuleType, path: Path) -> nn.Module:
    if hasattr(module, "model"):
        model, name = module.model, "model"
    elif callable(getattr(module, "get_model", None)):
        with _user_code(path, "get_model() failed"):
            model, name = module.get_model(), "get_model()"
    else:
        raise FxsplitError(
            "the file has no model",
            where=path,
            found=", ".join(_defined(module)) or "nothing",
            allowed="model = ..., or def get_model(): ...",
            hint=_model_hint(module),
        )
    if not isinstance(model, nn.Module):
        raise FxsplitError(
            f"{name} is no torch.nn.Module",
            where=path,
            found=f"{model!r:.80} ({type(model).__name__})",
            allowed="an instance of torch.nn.Module",
            hint=f"{name} is a class: make an instance of it"
            if _is_module_class(model)
            else "give the model itself: a state_dict or a function has no modules to cut at",
        )
    return model


def _defined(module: ModuleType) -> dict[str, Any]:
    """What the file itself defines: not what it imports."""
    definitions = (type, FunctionType, BuiltinFunctionType)  # these know the module they are from
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and type(value).__module__ != "__future__"
        and (not isinstance(value, definitions) or value.__module__ == module.__name__)
    }


def _model_hint(module: ModuleType) -> str:
    """What to add to a file that has a model under another name, or only the class of one."""
    defined = _defined(module).items()
    models = [name for name, value in defined if isinstance(value, nn.Module)]
    classes = [f"{name}(...)" for name, value in defined if _is_module_class(value)]
    return f"add to the file: model = {[*models, *classes, '...'][0]}"


def _is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _example_of(module: ModuleType, path: Path) -> Arguments:
    for name in ("example_inputs", "get_example_inputs"):
        value = getattr(module, name, None)
        if callable(value) and not isinstance(value, Tensor):
            with _user_code(path, f"{name}() failed"):
                value = value()
        if value is not None:
            return Arguments.of(value)
    raise FxsplitError(
        "the file has no example inputs",
        where=path,
        found=", ".join(_defined(module)),
        allowed="example_inputs = a tensor, a tuple or a dict; or def get_example_inputs(): ...",
        hint="add them to the file, or give their shape: --input 64,3,224,224",
    )


@contextmanager
def _user_code(path: Path, what: str) -> Iterator[None]:
    """Says where the user's own file failed. A file that exits, as scripts without a main guard do, fails too."""
    try:
        yield
    except FxsplitError:
        raise
    except (Exception, SystemExit) as error:
        found = f"{type(error).__name__}: {error}"
        main = "put what a script does under: if __name__ == '__main__':"
        hint = main if isinstance(error, SystemExit) else f"make this run: python {path}"
        raise FxsplitError(what, where=_own_line(path, error), found=found, hint=hint) from error


def _own_line(path: Path, error: BaseException) -> str:
    """The last line of the user's file on the way to the error."""
    own, number = str(path.resolve()), 0
    if isinstance(error, SyntaxError) and error.filename == own:
        number = error.lineno or 0
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == own:
            number = traceback.tb_lineno
        traceback = traceback.tb_next
    code = linecache.getline(own, number).strip()
    return f"{path}, line {number}: {code}" if code else str(path)


# ---- torchvision ----

_IMAGE = (1, 3, 224, 224)
# By the beginning of the name. Where batch norm sees one value a channel and sample, training needs two samples.
_TORCHVISION_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "inception_v3": ((2, 3, 299, 299),),
    "deeplabv3": ((2, 3, 224, 224),),
    "lraspp": ((2, 3, 224, 224),),
    "raft": ((1, 3, 128, 128), (1, 3, 128, 128)),
    "r3d": ((1, 3, 16, 112, 112),),
    "mc3": ((1, 3, 16, 112, 112),),
    "r2plus1d": ((1, 3, 16, 112, 112),),
    "s3d": ((1, 3, 16, 224, 224),),
    "mvit": ((1, 3, 16, 224, 224),),
    "swin3d": ((1, 3, 16, 224, 224),),
}


def _from_torchvision(name: str, inputs: Sequence[InputShape]) -> tuple[nn.Module, Arguments]:
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise FxsplitError(
            f"torchvision has no model {name!r}",
            found=f"torchvision:{name}",
            allowed="a name of torchvision.models.list_models()",
            hint=f"nearest: {nearest(name, known)}",
        )
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # else torchvision downloads the backbone's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how older models are initialised is of no concern here
        model: nn.Module = builder(**options)
    if inputs:
        return model, example_arguments(inputs)
    shapes = next((s for start, s in _TORCHVISION_SHAPES.items() if name.startswith(start)), (_IMAGE,))
    return model, example_arguments([InputShape(shape) for shape in shapes])


# ---- transformers ----

_TOKENS = 128


def _from_transformers(name: str, inputs: Sequence[InputShape]) -> tuple[nn.Module, Arguments]:
    # Nothing of what follows needs the network; this makes sure. It is read when the hub is first imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    build, config = _transformers_class(transformers, name)
    _check_transformers_size(build, config, name)
    model: nn.Module = build(config)
    return model, _transformers_example(model, config, inputs)


def _transformers_class(transformers: Any, name: str) -> tuple[Callable[[Any], nn.Module], Any]:
    """What builds the model from its default configuration, and that configuration."""
    if name in transformers.CONFIG_MAPPING:
        config = transformers.CONFIG_MAPPING[name]()
        if type(config) in transformers.MODEL_MAPPING:
            return transformers.AutoModel.from_config, config
    elif name.isidentifier():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            kind = getattr(found, "config_class", None)
            if kind is not None:
                return found, kind()
    types = [key for key in transformers.CONFIG_MAPPING if key != name]
    classes = [key for key in dir(transformers) if key.endswith("Model") or "For" in key]
    raise FxsplitError(
        f"transformers has no model {name!r}",
        found=f"transformers:{name}",
        allowed="a model type, such as roberta, or a class, such as RobertaForSequenceClassification",
        hint=f"nearest: {nearest(name, [*types, *classes])}",
    )


def _check_transformers_size(build: Callable[[Any], nn.Module], config: Any, name: str) -> None:
    """Refuses a model that is larger than the memory here, as many default configurations are."""
    try:
        with torch.device("meta"):
            empty = build(config)
    except Exception:
        return  # some models cannot be built without memory; then nothing is known beforehand
    nbytes = sum(parameter.nbytes for parameter in empty.parameters())
    hint = "write a file with a smaller configuration: model = AutoModel.from_config(...)"
    _check_fits(nbytes, "the model in its default configuration", f"transformers:{name}", hint)


def _transformers_example(model: Any, config: Any, inputs: Sequence[InputShape]) -> Arguments:
    taken = inspect.signature(model.forward).parameters
    text = config.get_text_config()
    given = _transformers_shapes(model, inputs) if inputs else _usual_shapes(config, text, taken)
    if not given:
        raise InputError(
            f"the usual inputs of {type(model).__name__} are not known",
            found="no --input",
            allowed=", ".join(list(taken)[:8]),
            hint=f"name them, with their sizes: --input {model.main_input_name}=...",
        )
    if tokens := given.get("input_ids"):
        companions = ["attention_mask"]
        if getattr(config, "is_encoder_decoder", False) and not inputs:
            companions.append("decoder_input_ids")
        for companion in companions:
            if companion in taken:
                given.setdefault(companion, replace(tokens, name=companion))
    vocabulary = getattr(text, "vocab_size", None) or 2
    return Arguments((), {name: shape.tensor(vocabulary) for name, shape in given.items()})


def _transformers_shapes(model: Any, inputs: Sequence[InputShape]) -> dict[str, InputShape]:
    """The shapes that were given, by argument; one without a name is the model's main input."""
    unnamed = [shape for shape in inputs if shape.name is None]
    if len(unnamed) > 1:
        raise InputError(
            "only one input of a transformers model goes without a name",
            found=f"{len(unnamed)} without",
            allowed=", ".join(list(inspect.signature(model.forward).parameters)[:8]),
            hint=f"name them: --input {model.main_input_name}=32,128",
        )
    shapes = (shape if shape.name else replace(shape, name=model.main_input_name) for shape in inputs)
    return {str(shape.name): shape for shape in shapes}


def _usual_shapes(config: Any, text: Any, taken: Any) -> dict[str, InputShape]:
    """One sequence of tokens, one image, or both, as the configuration has it."""
    shapes: dict[str, InputShape] = {}
    if "input_ids" in taken and getattr(text, "vocab_size", None):
        # Some models keep the first two positions for themselves.
        longest = getattr(text, "max_position_embeddings", None) or _TOKENS + 2
        shapes["input_ids"] = InputShape((1, max(1, min(_TOKENS, longest - 2))), name="input_ids")
    vision = getattr(config, "vision_config", None) or config
    if "pixel_values" in taken and (size := getattr(vision, "image_size", None)):
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
        shape = (1, *frames, getattr(vision, "num_channels", 3), *sides)
        shapes["pixel_values"] = InputShape(shape, name="pixel_values")
    return shapes


LIBRARIES: dict[str, Callable[[str, Sequence[InputShape]], tuple[nn.Module, Arguments]]] = {
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
}
"""What stands before the colon in the name of a library's model, and what loads it."""
