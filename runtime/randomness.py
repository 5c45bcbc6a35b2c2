"""Random numbers of the stages: the same after the same `torch.manual_seed`, whatever runs where and when.

A run of one micro-batch draws what the unsplit model draws: the state of the client's generator travels from
stage to stage and back to the client. With several micro-batches under way that would make them wait for each
other; then every stage draws for every micro-batch from a generator of its own, seeded by one number that the
client draws for the run.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsplit.runtime.host_random import host_states, refusing, set_host_states
from fxsplit.runtime.packet import Key
from fxsplit.trace.replay import generator_states

GENERATORS = threading.Lock()
"""Torch's default generators are one a process, and in-process workers are threads of one."""


@dataclass(frozen=True)
class Randomness:
    """How the stages of one run draw random numbers.

    Attributes:
        seed: of the run; None if it has a single micro-batch, whose generator state travels.
    """

    seed: int | None

    @classmethod
    def of_run(cls, draws: bool, chunks: int) -> Randomness | None:
        """That of the next run; None if no stage draws. Draws from the client's generator, if a seed is needed."""
        if not draws:
            return None
        return cls(None if chunks == 1 else int(torch.randint(2**63 - 1, ())))

    def stage_seed(self, stage: int, micro_batch: int) -> int:
        """The seed of one stage's forward of one micro-batch."""
        digest = hashlib.blake2b(f"{self.seed} {stage} {micro_batch}".encode(), digest_size=8)
        return int.from_bytes(digest.digest(), "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Runs what is inside with generators of this seed; afterwards they are as before."""
    with GENERATORS, torch.random.fork_rng(devices=_cuda(device)):
        torch.default_generator.manual_seed(seed)
        for index in _cuda(device):  # torch.manual_seed would seed those of other workers' devices, too
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def resumed(given: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Runs what is inside with generators in these states; afterwards they are as before."""
    with GENERATORS, torch.random.fork_rng(devices=_cuda(device)):
        set_states(given, device)
        yield


def states(device: torch.device) -> tuple[Tensor, ...]:
    """The states of the generators that a stage on this device draws from: the CPU's, and the device's own."""
    return tuple(generator_states(_cuda(device)))


def set_states(given: Sequence[Tensor], device: torch.device) -> None:
    """Goes on from the states that another stage left.

    A stage on a CUDA device behind one on the CPU seeds its generator from the CPU's.
    """
    torch.set_rng_state(given[0])
    for index in _cuda(device):
        if len(given) > 1:
            torch.cuda.set_rng_state(given[1], index)
        else:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(int(torch.randint(2**63 - 1, ())))


def process_states(device: torch.device) -> tuple[Tensor, ...]:
    """The states of the client's generators: of Python and numpy, and of torch; see `set_process_states`."""
    return (*host_states(), *states(device))


def set_process_states(given: Sequence[Tensor], device: torch.device) -> None:
    """Goes on from what `process_states` gave.

    Raises:
        SnapshotError: these are no such states.
    """
    set_host_states(given[:2])
    with refusing():
        set_states(given[2:], device)


def state_key(run: int, stage: int) -> Key:
    """The key of the states that a stage leaves for the next one."""
    return Key(run, "the random state", stage, stage + 1, 0, False)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
