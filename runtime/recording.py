"""Recording of work for a GPU as a CUDA graph, and what tells beforehand whether it can be recorded."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_ONE_AT_A_TIME = threading.Lock()
"""Workers of one process record in turns."""

_DEPENDS_ON_DATA = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

_ATTENTION = frozenset(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention{direction}")
    for kind in ("efficient", "flash", "cudnn")
    for direction in ("", "_backward")
)
"""They keep the seed of their dropout on the host, though while they are recorded on the device."""


class Recorder(Protocol):
    """Records work, to be done again with other numbers in the same tensors."""

    reruns: bool
    """Whether the work is run again in Python, and so makes new tensors each time."""

    def new_pool(self) -> Any:
        """Memory for recordings that use each other's tensors."""

    def record(self, work: Callable[[], None], pool: Any) -> Callable[[], None]:
        """Records the work without doing it, and returns what does it."""


class CudaRecorder:
    """Records CUDA graphs on one device, on one stream of its own.

    `torch.cuda.graph` would do it on a stream that it makes once a process, on the device that was current then.

    Args:
        device: where the work is done.
    """

    reruns = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def new_pool(self) -> Any:
        """A memory pool of the caching allocator."""
        return torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None], pool: Any) -> Callable[[], None]:
        """A CUDA graph of the work; autograd's part of it runs in this thread."""
        graph = torch.cuda.CUDAGraph()
        with _ONE_AT_A_TIME, torch.cuda.device(self._device), _without_collection():
            torch.cuda.current_blas_handle()  # making it allocates, which a recording may not
            torch.cuda.synchronize(self._device)
            with torch.cuda.stream(self._stream), torch.autograd.set_multithreading_enabled(False):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    with _without_cast_cache():
                        work()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # what went wrong first says more
                        graph.capture_end()
                    raise
                graph.capture_end()
        return graph.replay


class Rerun:
    """The work itself, for devices without graphs: what a recording is tested against."""

    reruns = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_pool(self) -> None:
        """Nothing."""

    def record(self, work: Callable[[], None], pool: Any) -> Callable[[], None]:
        """The work."""
        return work


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""By type of device."""


class Inspector(TorchDispatchMode):
    """Looks at what is run within, on the way to a recording.

    A graph does the same again to other numbers. So nothing may depend on the numbers in Python, and all of them
    must be on the device.

    Args:
        device: of the work.

    Attributes:
        reason: why it cannot be recorded, if so.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._type = device.type
        self.reason: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and looks at it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.reason is None:
            self.reason = self._reason(func, (args, kwargs, result))
        return result

    def _reason(self, func: Any, values: Any) -> str | None:
        if any(tag in func.tags for tag in _DEPENDS_ON_DATA) and not _is_integer_indexing(func, values):
            return f"{func} reads numbers on the host"
        for value in pytree.tree_leaves(values):
            if isinstance(value, torch.Generator):
                return f"{func} draws from a generator of its own"
            is_elsewhere = isinstance(value, Tensor) and value.device.type not in (self._type, "meta")
            if is_elsewhere and not (func.overloadpacket in _ATTENTION and value.dim() == 0):
                return f"{func} has a tensor on {value.device}"
            if isinstance(value, Tensor) and value.layout != torch.strided:
                return f"{func} has a tensor of layout {value.layout}"
        return None


def _is_integer_indexing(func: Any, values: Any) -> bool:
    """Whether it is an indexing that depends on the shapes alone: only masks make it depend on numbers."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in values[0][1])


@contextlib.contextmanager
def _without_collection() -> Any:
    """Keeps Python from destroying tensors of other streams, which a recording may not."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _without_cast_cache() -> Any:
    """Weights that autocast has cast before are cast again, so that the recording does it."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)
