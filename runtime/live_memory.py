"""How many bytes of activations a worker keeps for its backwards: counted, not estimated, when it is asked for.

Autograd hands every tensor that it saves to a hook and drops what the hook returned when it needs the tensor no
longer. What lies between is counted, each storage once. Parameters and buffers are not activations, and neither is
a slice of the user's own batch. The method needs no device's own accounting, so it is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Held:
    """One reason why a tensor is kept; it ends with this object.

    Attributes:
        tensor: what is kept.
    """

    def __init__(self, ledger: Ledger, tensor: Tensor) -> None:
        self.tensor = tensor
        self._ledger = ledger
        ledger._add(tensor)

    def __del__(self) -> None:
        self._ledger._remove(self.tensor)


class Ledger:
    """The bytes that a worker keeps now, and at most.

    Attributes:
        live_bytes: kept now.
        peak_bytes: the most since `reset`.
    """

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self._reasons: dict[int, int] = {}
        self._others = {_storage(t) for stage in stages for t in (*stage.parameters(), *stage.buffers())}

    def reset(self) -> None:
        """Looks for the peak from now on."""
        self.peak_bytes = self.live_bytes

    @contextmanager
    def saving(self, inputs: Iterable[object]) -> Iterator[None]:
        """Within, what autograd saves is counted.

        Args:
            inputs: of the stage; those that are part of something larger belong to somebody else.
        """
        others = self._others | {_storage(t) for t in inputs if isinstance(t, Tensor) and _is_slice(t)}

        def pack(tensor: Tensor) -> Tensor | Held:
            return tensor if _storage(tensor) in others else Held(self, tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield

    def hold(self, tensors: Iterable[Tensor]) -> list[Held]:
        """Counts what the executor itself keeps, as long as the list lives; slices are not its."""
        return [Held(self, t) for t in tensors if _storage(t) not in self._others and not _is_slice(t)]

    def _add(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        self._reasons[key] = self._reasons.get(key, 0) + 1
        if self._reasons[key] == 1:
            self.live_bytes += tensor.untyped_storage().nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _remove(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        self._reasons[key] -= 1
        if not self._reasons[key]:
            del self._reasons[key]
            self.live_bytes -= tensor.untyped_storage().nbytes()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_slice(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.nbytes


def _unpack(saved: Tensor | Held) -> Tensor:
    return saved.tensor if isinstance(saved, Held) else saved
