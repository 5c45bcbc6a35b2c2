"""Functions that traced graphs call. They live at module level so that a shipped stage finds them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch

from fxsplit.errors import GuardError
from fxsplit.spec import TensorSpec

_DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True)
class Surroundings:
    """Gradient mode and autocast: what a model may switch for part of its forward, and a caller for all of it.

    Attributes:
        grad: whether gradients are recorded.
        autocast: (device type, dtype) for each type that is cast.
    """

    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...]

    @classmethod
    def current(cls) -> Surroundings:
        """Those of the calling thread."""
        types = [t for t in _DEVICE_TYPES if torch.is_autocast_enabled(t)]
        return cls(torch.is_grad_enabled(), tuple((t, torch.get_autocast_dtype(t)) for t in types))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Runs what is inside in these surroundings."""
        wanted = dict(self.autocast)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind in _DEVICE_TYPES:
                if kind in wanted or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, wanted.get(kind), enabled=kind in wanted))
            yield


def generator_states(devices: Iterable[torch.device]) -> list[torch.Tensor]:
    """The states of torch's default generators: the CPU's, and those of these CUDA devices; uint8, on the CPU."""
    return [torch.default_generator.get_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def call_in(surroundings: Surroundings, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function or module as the model did: within `torch.no_grad`, or with autocast switched."""
    grad = surroundings.grad and torch.is_grad_enabled()  # a caller's no_grad holds inside, too
    with Surroundings(grad, surroundings.autocast).active():
        return function(*args, **kwargs)


def check(found: Any, expected: Any, line: str) -> None:
    """A guard: the recorded way through the model depends on this value.

    While a stage is recorded as a CUDA graph it holds: libraries answer otherwise there (transformers makes masks
    that it leaves out at all other times), nothing of a tensor can be read, so that layouts alone decide, and the
    stage has just run as it is with these very layouts.

    Raises:
        GuardError: it is another one, so that this graph is not the model for this batch.
    """
    if found != expected and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        raise GuardError(
            "this batch takes another way through the model than the one that was recorded",
            where=line,
            found=found,
            allowed=expected,
        )


def literals(value: Any) -> Any:
    """What a call returned, every tensor and object replaced by its kind: the part that Python can decide on."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, tuple | list):
        return [literals(item) for item in value]
    if isinstance(value, dict):
        return {key: literals(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dict__"):
        return type(value).__name__
    return [
        type(value).__name__,
        {name: literals(v) for name, v in vars(value).items() if not name.startswith("_")},
    ]


def layout_of(tensor: torch.Tensor) -> TensorSpec:
    """Shape and dtype of a tensor, to be sent in its place."""
    return TensorSpec.of(tensor)


def stand_in(layout: TensorSpec, device: torch.device) -> torch.Tensor:
    """A tensor of this layout, with one element of memory, for those who read no more of it."""
    return torch.zeros((), dtype=layout.dtype, device=device).expand(layout.shape)


def apply_autograd_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Calls a user's own autograd function."""
    return function.apply(*args)


def call_method(name: str, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a method by name."""
    return getattr(tensor, name)(*args, **kwargs)


def make_mapping(kind: type[dict[Any, Any]], keys: tuple[Any, ...], *values: Any) -> Any:
    """Rebuilds an ordered dictionary or a `ModelOutput` that the model passes as an argument."""
    items = dict(zip(keys, values, strict=True))
    return kind(**items) if is_dataclass(kind) else kind(items)
