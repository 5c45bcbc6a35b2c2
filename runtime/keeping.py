"""What a worker puts into a snapshot, and takes out of one again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxsplit.errors import PlanError, SnapshotError
from fxsplit.runtime.holding import Holding
from fxsplit.runtime.host_random import host_states, seed_host, set_host_states
from fxsplit.runtime.parameters import ParameterStore
from fxsplit.snapshots import files
from fxsplit.snapshots.checkpoint import BUFFER, CODEC, GRADIENT, HOST, OPTIMIZER, STATE, memory_key
from fxsplit.snapshots.manifest import json_value

Memories = dict[tuple[Any, ...], dict[str, Tensor]]


class Written(NamedTuple):
    """What a worker has of its part of a snapshot.

    Attributes:
        size_bytes: of the file.
        sha256: of its content.
        values: what is no tensor.
        data: uint8, the content, if the client is to write it.
        error: why there is no file, if there is none.
    """

    size_bytes: int
    sha256: str
    values: dict[str, Any]
    data: Tensor | None
    error: str | None = None


class Source(NamedTuple):
    """A part to be read, and what is known of it."""

    path: str
    size_bytes: int
    sha256: str
    values: Mapping[str, Any]


class Keeper:
    """Takes the state of a worker at once, and writes it beside the computation.

    Args:
        parameters: of the worker.
        memories: of its compressors.
        name: of the worker, if its process is its own; random numbers of Python and numpy are then the worker's.
    """

    def __init__(self, parameters: ParameterStore, memories: Memories, name: str | None = None) -> None:
        self._parameters = parameters
        self._memories = memories
        self._name = name
        self._is_seeded = False
        self._holding = Holding()
        self._taken: tuple[dict[str, Tensor], dict[str, Any]] = {}, {}
        self._writer: ThreadPoolExecutor | None = None
        self.commands: Mapping[str, Callable[..., Any]] = {
            "seed_host": self.seed_host,
            "sees_file": self.sees_file,
            "take_snapshot": self.take,
            "write_snapshot": self.write,
            "restore_files": self.restore_files,
            "restore_entries": self.restore_entries,
        }

    def hold(self, holding: Holding) -> None:
        """Takes the stages."""
        self._holding = holding

    def seed_host(self, seed: int) -> None:
        """Begins the random numbers of Python and numpy in this worker's process, as the client's state has it."""
        if self._name is not None and not self._is_seeded:
            seed_host(seed, self._name)
            self._is_seeded = True

    def sees_file(self, path: str, content: str) -> bool:
        """Whether this worker reads, at this path, what the client has just written there."""
        try:
            return files.read(Path(path), len(content)) == content.encode()
        except SnapshotError:
            return False

    def take(self, extra: Mapping[str, Tensor]) -> None:
        """Copies everything that training has made, to the CPU.

        Args:
            extra: what else belongs into this worker's file.
        """
        tensors: dict[str, Tensor] = {key: value.clone() for key, value in extra.items()}
        values: dict[str, Any] = {}
        for key, value in self._entries():
            if isinstance(value, Tensor):
                tensors[key] = value.detach().to("cpu", copy=True)
            else:
                values[key] = _plain(key, value)
        self._taken = tensors, values

    def _entries(self) -> Any:
        for module in self._holding.stages.values():
            state = module.state_dict()
            yield from ((f"{STATE}/{name}", value) for name, value in state.items())
            yield from ((f"{BUFFER}/{name}", b) for name, b in module.named_buffers() if name not in state)
        for name, gradient in self._parameters.held_gradients():
            yield f"{GRADIENT}/{name}", gradient
        for number, name, entry in self._parameters.optimizer_entries():
            yield from ((f"{OPTIMIZER}/{number}/{key}/{name}", value) for key, value in entry.items())
        if self._name is not None:
            yield from ((f"{HOST}/{index}", state) for index, state in enumerate(host_states()))
        for end, memory in self._memories.items():
            yield from ((f"{CODEC}/{json.dumps([*end, key])}", value) for key, value in memory.items())

    def write(self, path: str | None) -> Future[Written]:
        """Writes what was taken, in the background.

        Args:
            path: of the file; None: the bytes are brought to the client.
        """
        taken, self._taken = self._taken, ({}, {})
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "fxsplit snapshot")
        return self._writer.submit(_write, path, *taken)

    def restore_files(self, sources: Sequence[Source], with_codecs: bool) -> None:
        """Restores what this worker holds, from the parts of a snapshot.

        Args:
            sources: the parts to look in.
            with_codecs: whether the split and the compressors are the same, so that memories fit.

        Raises:
            SnapshotError: a file is damaged, or something that this worker holds is in none of them.
        """
        entries: dict[str, Any] = {}
        for source in sources:
            path = Path(source.path)
            data = files.read_verified(path, source.size_bytes, source.sha256)
            entries |= {**files.tensors_of_bytes(data, path), **source.values}
        self.restore_entries(entries, with_codecs)

    @torch.no_grad()
    def restore_entries(self, entries: Mapping[str, Any], with_codecs: bool) -> None:
        """Restores what this worker holds, from entries of a snapshot; see `restore_files`."""
        state = {key.partition("/")[2]: v for key, v in entries.items() if key.startswith(f"{STATE}/")}
        for module in self._holding.stages.values():
            own = module.state_dict()
            if missing := [name for name in own if name not in state]:
                raise SnapshotError("the snapshot is of another model", found=f"no entry '{missing[0]}'")
            for name, value in own.items():
                if isinstance(value, Tensor) and value.shape != getattr(state[name], "shape", None):
                    found, allowed = list(getattr(state[name], "shape", ())), list(value.shape)
                    raise SnapshotError(
                        "the snapshot is of another model", where=name, found=found, allowed=allowed
                    )
            module.load_state_dict({name: state[name] for name in own})
            for name, buffer in module.named_buffers():
                kept = entries.get(f"{BUFFER}/{name}")
                if name not in own and isinstance(kept, Tensor) and kept.shape == buffer.shape:
                    buffer.copy_(kept)
        gradients = {k.partition("/")[2]: v for k, v in entries.items() if k.startswith(f"{GRADIENT}/")}
        self._parameters.replace_gradients(gradients)
        optimizers: dict[int, dict[str, dict[str, Any]]] = {}
        for key, value in entries.items():
            if key.startswith(f"{OPTIMIZER}/"):
                _, index, entry, name = key.split("/", 3)
                optimizers.setdefault(int(index), {}).setdefault(name, {})[entry] = value
        for number in self._parameters.optimizer_numbers:
            self._parameters.load_optimizer_state(number, optimizers.setdefault(number, {}))
        self._memories.clear()
        if with_codecs:
            self._restore_memories(entries)
            states = [entries[key] for key in (f"{HOST}/0", f"{HOST}/1") if key in entries]
            if self._name is not None and states:
                set_host_states(states)

    def _restore_memories(self, entries: Mapping[str, Any]) -> None:
        devices = {stage: device for stage, device in self._holding.devices.items()}
        for key, value in entries.items():
            if not key.startswith(f"{CODEC}/") or not isinstance(value, Tensor):
                continue
            *end, name = memory_key(key.partition("/")[2])
            stage = end[2] if (end[0] == "send") != end[5] else end[3]
            device = devices.get(stage, next(iter(devices.values()), torch.device("cpu")))
            self._memories.setdefault(tuple(end), {})[name] = value.to(device)

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        if self._writer is not None:
            self._writer.shutdown(wait=False, cancel_futures=True)


def _plain(key: str, value: Any) -> Any:
    try:
        return json_value(value, key)
    except PlanError as error:
        raise SnapshotError(
            "an entry cannot be saved: it is neither a tensor nor what JSON has",
            where=key,
            found=type(value).__name__,
            hint="keep such state in buffers",
        ) from error


def _write(path: str | None, tensors: dict[str, Tensor], values: dict[str, Any]) -> Written:
    try:
        data = files.tensors_to_bytes(tensors, "a worker's part of a snapshot")
        if path is None:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return Written(len(data), files.digest(data), values, content)
        files.write(Path(path), data)
    except (OSError, MemoryError, SnapshotError) as error:
        return Written(0, "", {}, None, str(error))
    return Written(len(data), files.digest(data), values, None)
