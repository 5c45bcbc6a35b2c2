"""What was measured of a model on a device, as a document: JSON in a folder of the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxsplit.errors import PlanError
from fxsplit.planning.document import (
    Reader,
    integer,
    list_of,
    number,
    parse_json,
    read_object,
    text,
)
from fxsplit.planning.document import load as load_document

CLIENT, WORKER = "client", "worker"
"""The roles of a process."""

VERSION = 2
"""Version of the document; a reader refuses others."""

CACHE_VARIABLE = "FXSPLIT_CACHE"
"""Environment variable of the folder in which calibrations are kept."""


@dataclass(frozen=True)
class MeasuredNode:
    """Seconds of a node.

    Attributes:
        name: of the node in the graph.
        module: the module that it is, or is in.
        forward_s: of its forward, for a sample.
        backward_s: of its backward, for a sample.
        forward_call_s: of its forward, for a micro-batch of whatever size.
        backward_call_s: the same of its backward.
    """

    name: str
    module: str
    forward_s: float
    backward_s: float
    forward_call_s: float
    backward_call_s: float


@dataclass(frozen=True)
class MeasuredCodec:
    """Seconds of a compressor.

    Attributes:
        compressor: its spelling.
        encode_s_per_byte: of the encoder, for a byte before compression.
        decode_s_per_byte: of the decoder, for a byte before compression.
        call_s: of either, for a call.
    """

    compressor: str
    encode_s_per_byte: float
    decode_s_per_byte: float
    call_s: float


@dataclass(frozen=True)
class Calibration:
    """What was measured of one model on one device.

    Attributes:
        model: class name of the model.
        fingerprint: digest of its structure, '' if only codecs were measured.
        device: a `torch.device` string of the machine that measured.
        machine: the processor or GPU.
        torch_version: of torch.
        threads: of one operation on a CPU.
        role: 'client' or 'worker': a worker's process keeps its memory from step to step, which is faster.
        samples: of the largest micro-batch that was measured.
        input_share: of backwards in two parts, the first one's seconds as a share of a backward in one piece.
        weight_share: the same of the second one.
        nodes: in the order of the graph.
        codecs: the compressors that were measured.
    """

    model: str
    fingerprint: str
    device: str
    machine: str
    torch_version: str
    threads: int
    role: str
    samples: int
    input_share: float
    weight_share: float
    nodes: tuple[MeasuredNode, ...]
    codecs: tuple[MeasuredCodec, ...] = ()
    version: int = field(default=VERSION)

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return cache_path(self.fingerprint, self.device, self.machine, self.torch_version, self.threads, self.role)

    def to_json(self) -> str:
        """The document."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, source: str) -> Calibration:
        """The calibration of `to_json`; everything is checked and nothing is evaluated.

        Raises:
            PlanError: damaged, or of another version of fxsplit.
        """
        data = parse_json(source)
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise PlanError(
                "the calibration is of another version of fxsplit",
                found=f"version {version}",
                allowed=f"{VERSION}",
                hint="fxsplit calibrate MODEL",
            )
        return cls(**read_object(data, "calibration", _READERS))

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Writes it, to where calibrations are kept if no path is given; returns the path.

        Raises:
            PlanError: it cannot be written there.
        """
        target = self.path if path is None else Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            if path is None:
                target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise PlanError("the calibration cannot be written", where=target, found=error.strerror) from error
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """The calibration of a file.

        Raises:
            PlanError: it cannot be read, or as `from_json`.
        """
        return load_document(path, "calibration", cls.from_json, hint="fxsplit calibrate MODEL")

    def check_model(self, model: str, fingerprint: str) -> None:
        """Checks that it is of this model.

        Raises:
            PlanError: the fingerprint differs.
        """
        if self.fingerprint != fingerprint:
            raise PlanError(
                "the calibration is of another model",
                found=f"{self.model} ({self.fingerprint})",
                allowed=f"{model} ({fingerprint})",
                hint="fxsplit calibrate MODEL",
            )


def cached(fingerprint: str, device: str, role: str) -> Calibration | None:
    """What was measured here of a model on a device of this host with this torch, in a role; None if nothing was.

    A damaged document is as good as none: it is measured anew.
    """
    threads = torch.get_num_threads()
    path = cache_path(fingerprint, device, machine_of(device), torch.__version__, threads, role)
    try:
        return Calibration.load(path) if path.exists() else None
    except PlanError:
        return None


def cache_path(fingerprint: str, device: str, machine: str, torch_version: str, threads: int, role: str) -> Path:
    """The file of what was measured with all of this."""
    of_threads = str(threads) if device == "cpu" else ""
    facts = (fingerprint, device, machine, torch_version, of_threads, role, str(VERSION))
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
    return cache_folder() / "calibrations" / f"{digest}.json"


def cache_folder() -> Path:
    """The folder of FXSPLIT_CACHE, or fxsplit's in the user's cache."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "fxsplit"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fxsplit"
    return Path(os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")) / "fxsplit"


def machine_of(device: str) -> str:
    """The processor of this host, or the name of a GPU."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


_NODE: Mapping[str, Reader[Any]] = {
    "name": text, "module": text, "forward_s": number, "backward_s": number,
    "forward_call_s": number, "backward_call_s": number,
}  # fmt: skip
_CODEC: Mapping[str, Reader[Any]] = {
    "compressor": text, "encode_s_per_byte": number, "decode_s_per_byte": number, "call_s": number,
}  # fmt: skip


def _node(data: object, where: str) -> MeasuredNode:
    return MeasuredNode(**read_object(data, where, _NODE))


def _codec(data: object, where: str) -> MeasuredCodec:
    return MeasuredCodec(**read_object(data, where, _CODEC))


_READERS: Mapping[str, Reader[Any]] = {
    "model": text, "fingerprint": text, "device": text, "machine": text, "torch_version": text,
    "threads": integer(1), "role": text, "samples": integer(1), "input_share": number, "weight_share": number,
    "nodes": list_of(_node), "codecs": list_of(_codec), "version": integer(1),
}  # fmt: skip
