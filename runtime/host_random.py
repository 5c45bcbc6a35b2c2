"""The random numbers of Python and numpy: the state of a process, beside those of torch's generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxsplit.errors import SnapshotError

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
    """Goes on from what `host_states` gave.

    Raises:
        SnapshotError: these are no such states.
    """
    if [tuple(state.shape) for state in given] not in ([(_WORDS + 2,)] * 2, [(_WORDS + 2,), (0,)]):
        raise no_states(", ".join(str(list(state.shape)) for state in given))
    python, numpy = given
    with refusing():
        words, kept = python[:-1].tolist(), float(python[-1])
        random.setstate((3, tuple(map(int, words)), None if np.isnan(kept) else kept))
        if len(numpy):
            key, position, number = numpy[:_WORDS].numpy().astype(np.uint32), int(numpy[_WORDS]), float(numpy[-1])
            np.random.set_state(("MT19937", key, position, int(not np.isnan(number)), np.nan_to_num(number)))


def no_states(found: str) -> SnapshotError:
    """The error of states that are none."""
    what = "random numbers cannot go on from these states"
    return SnapshotError(what, found=found, allowed="states of generators", hint="an older snapshot")


@contextmanager
def refusing() -> Iterator[None]:
    """Says of errors inside, which are those of generators, that their states are none."""
    try:
        yield
    except (ValueError, TypeError, IndexError, OverflowError, RuntimeError) as error:
        raise no_states(str(error)) from error


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
