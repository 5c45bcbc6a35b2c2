"""The random numbers of Python and numpy: the state of a process, beside those of torch's generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORDS = 624  # of the Mersenne Twister, which both use


class HostRandom:
    """The present states, to be put back in this process."""

    def __init__(self) -> None:
        self._states = random.getstate(), np.random.get_state()

    def put_back(self) -> None:
        """Goes on from them."""
        python, numpy = self._states
        random.setstate(python)
        np.random.set_state(numpy)


def host_states() -> tuple[Tensor, Tensor]:
    """The states of `random` and `numpy.random`, float64: words and position, and the normal number kept, or nan.

    The second is `[0]` if numpy was given another generator than its own.
    """
    words, kept = random.getstate()[1:]
    python = torch.tensor([*words, float("nan") if kept is None else kept], dtype=torch.float64)
    state: Any = np.random.get_state()
    name, key, position, has_kept, number = state
    if name != "MT19937":
        return python, torch.empty(0, dtype=torch.float64)
    rest = np.array([position, number if has_kept else np.nan])
    return python, torch.from_numpy(np.concatenate([key.astype(np.float64), rest]))


def set_host_states(given: Sequence[Tensor]) -> None:
    """Goes on from what `host_states` gave."""
    python, numpy = given
    words, kept = python[:-1].tolist(), float(python[-1])
    random.setstate((3, tuple(map(int, words)), None if np.isnan(kept) else kept))
    if len(numpy):
        key, position, number = numpy[:_WORDS].numpy().astype(np.uint32), int(numpy[_WORDS]), float(numpy[-1])
        np.random.set_state(("MT19937", key, position, int(not np.isnan(number)), np.nan_to_num(number)))


def host_seed() -> int:
    """A number that depends on the states, and changes neither."""
    digest = hashlib.blake2b(digest_size=8)
    for state in host_states():
        digest.update(state.numpy().tobytes())
    return int.from_bytes(digest.digest(), "big")


def seed_host(seed: int, worker: str) -> None:
    """Begins the random numbers of a worker's process: those of each worker are others.

    Args:
        seed: the client's `host_seed`.
        worker: its name.
    """
    digest = hashlib.blake2b(f"{seed} {worker}".encode(), digest_size=8).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "big"))
