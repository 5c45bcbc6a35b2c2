"""What devices, codecs and links take: measured where that was done, else estimated, and then said to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fxsplit.compressors.base import Compressor
from fxsplit.compressors.lossless import Lossless
from fxsplit.costs import CostTable, NodeCost
from fxsplit.errors import PlanError
from fxsplit.planning.calibration import CLIENT, WORKER, Calibration, MeasuredNode, cached
from fxsplit.planning.devices import Placement
from fxsplit.planning.links import Link

MACS_PER_S: Mapping[str, float] = {"cpu": 2.5e10, "cuda": 5e12, "mps": 1e12}
"""Estimated multiply-accumulate operations per second, by type of device."""

OPERATION_S: Mapping[str, float] = {"cpu": 1e-5, "cuda": 1e-5, "mps": 2e-5}
"""Estimated seconds of one torch operation beside its arithmetic, by type of device: launch and Python."""

PACKET_S = 1e-4
"""Estimated seconds to send one more value, without its bytes: to pack, post, receive and unpack it."""


CODEC_BYTES_PER_S: Mapping[str, float] = {"cpu": 5e8, "cuda": 5e10, "mps": 5e9}
"""Estimated uncompressed bytes per second of an encoder or a decoder, by type of device."""


@dataclass(frozen=True)
class CodecSpeed:
    """Seconds of a codec on a device.

    Attributes:
        encode_s_per_byte: of the encoder, for a byte before compression.
        decode_s_per_byte: of the decoder, for a byte before compression.
        call_s: of either, for a call.
    """

    encode_s_per_byte: float = 0.0
    decode_s_per_byte: float = 0.0
    call_s: float = 0.0


CODEC_SPEEDS: Mapping[tuple[str, str], CodecSpeed] = {
    ("bf16", "cpu"): CodecSpeed(4e-11, 3e-11, 1e-5),
    ("fp16", "cpu"): CodecSpeed(4e-11, 3e-11, 1e-5),
    ("fp8", "cpu"): CodecSpeed(2.5e-10, 2.2e-10, 7e-5),
    ("uniform", "cpu"): CodecSpeed(4.2e-11, 4.3e-10, 2e-4),
    ("fastquant", "cpu"): CodecSpeed(9.7e-11, 4.4e-10, 2e-4),
    ("sortquant", "cpu"): CodecSpeed(3.3e-10, 4.5e-10, 2e-4),
    ("kmeans", "cpu"): CodecSpeed(6.8e-10, 6e-11, 2e-3),
    ("poweriter", "cpu"): CodecSpeed(1.7e-9, 9e-11, 1e-4),
    ("svd", "cpu"): CodecSpeed(1.5e-9, 5e-11, 9e-5),
}
"""By name and type of device, for what was not measured where it runs: one core, activations of 6 MB."""


@dataclass(frozen=True)
class NodeSeconds:
    """Seconds of a node on a device.

    Attributes:
        forward_s: of its forward, for the batch.
        backward_s: of its backward, for the batch.
        call_s: of its forward, for each micro-batch, whatever its size.
        backward_call_s: the same of its backward; as long as that of its forward if not given.
    """

    forward_s: float
    backward_s: float
    call_s: float = 0.0
    backward_call_s: float = -1.0

    def __post_init__(self) -> None:
        if self.backward_call_s < 0:
            object.__setattr__(self, "backward_call_s", self.call_s)


@dataclass(frozen=True)
class Split:
    """A backward in two parts, each as a share of the backward in one piece; together they are no less than it.

    Attributes:
        input: the part that the stage before waits for, from half of the whole to all of it.
        weight: the other part.
    """

    input: float = 0.6
    weight: float = 0.7

    @classmethod
    def of(cls, input_share: float, weight_share: float) -> Split:
        """Of what was measured."""
        share = min(max(input_share, 0.5), 1.0)
        return cls(share, max(weight_share, 1.0 - share))


@dataclass(frozen=True)
class Profile:
    """Speeds of devices and codecs.

    Attributes:
        nodes: device as written -> node name -> its measured seconds.
        codecs: spelling of a compressor and device as written, or type of device -> its measured speed.
        links: (sending worker, receiving worker) -> its measured link.
        splits: device as written -> backwards in two parts, as measured there.
    """

    nodes: Mapping[str, Mapping[str, NodeSeconds]] = field(default_factory=dict)
    codecs: Mapping[tuple[str, str], CodecSpeed] = field(default_factory=dict)
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)

    def split(self, placement: Placement) -> Split:
        """A backward in two parts on a device; an estimate if it was not measured."""
        return self.splits.get(placement.replicas[0].spelling, Split())

    def node(self, node: NodeCost, placement: Placement) -> NodeSeconds:
        """Seconds of a node where it is placed; an estimate if they were not measured."""
        of_device = self.nodes.get(placement.replicas[0].spelling)
        if of_device is not None and node.name in of_device:
            return of_device[node.name]
        rate = MACS_PER_S[placement.device_type]
        call_s = node.operations * OPERATION_S[placement.device_type]
        return NodeSeconds(node.forward_macs / rate, node.backward_macs / rate, call_s)

    def codec(self, codec: Compressor, placement: Placement) -> CodecSpeed:
        """The speed of a codec on a device; that of its type if it was not measured there, or an estimate."""
        if isinstance(codec, Lossless):
            return CodecSpeed()
        device_type = placement.device_type
        for device in (placement.replicas[0].spelling, device_type):
            if (measured := self.codecs.get((str(codec), device))) is not None:
                return measured
        rate = 1.0 / CODEC_BYTES_PER_S[device_type]
        default = CodecSpeed(rate, rate, 2 * OPERATION_S[device_type])
        return CODEC_SPEEDS.get((codec.name, device_type), default)

    @classmethod
    def of(
        cls,
        costs: CostTable,
        calibrations: Mapping[str, Calibration],
        links: Mapping[tuple[str, str], Link] | None = None,
    ) -> Profile:
        """What was measured, for the batch and the nodes of a cost table.

        A node that was measured in parts, since more of the model was open then, takes as long as its parts.

        Args:
            costs: of the model.
            calibrations: device as written -> what was measured there.
            links: (sending worker, receiving worker) -> what was measured.

        Raises:
            PlanError: a calibration is of another model.
        """
        nodes, codecs, splits = {}, {}, {}
        for device, found in calibrations.items():
            if found.nodes:
                found.check_model(costs.model, costs.fingerprint)
                nodes[device] = _nodes_of(costs, found)
                splits[device] = Split.of(found.input_share, found.weight_share)
            for each in found.codecs:
                speed = CodecSpeed(each.encode_s_per_byte, each.decode_s_per_byte, each.call_s)
                codecs[each.compressor, device] = speed
        return cls(nodes, codecs, dict(links or {}), splits)

    @classmethod
    def kept(cls, costs: CostTable, devices: Iterable[str]) -> Profile:
        """What `fxsplit calibrate` has kept of a model on devices of this host; empty if that is nothing.

        Args:
            costs: of the model.
            devices: as written, the client's first; of named workers, those that are processes of this host.
        """
        found = {}
        for index, device in enumerate(dict.fromkeys(devices)):
            measured = cached(costs.fingerprint, device.rpartition("/")[2], WORKER if index else CLIENT)
            if measured is not None:
                found[device] = measured
        return cls.of(costs, found)

    def scaled(self, device: str, like: str, factor: float) -> Profile:
        """With a device that is not there: as another one that was measured, taking `factor` times its seconds.

        Raises:
            PlanError: nothing was measured on the other one, or the factor is not more than 0.
        """
        if like not in self.nodes or not 0 < factor < float("inf"):
            allowed = ", ".join(self.nodes) or "a device that was measured"
            found = f"{factor} times {like}"
            raise PlanError("a profile cannot be scaled", found=found, allowed=f"more than 0 times {allowed}")
        times = {
            name: NodeSeconds(
                factor * row.forward_s, factor * row.backward_s, factor * row.call_s, factor * row.backward_call_s
            )
            for name, row in self.nodes[like].items()
        }
        codecs = {
            (spelling, device): CodecSpeed(
                factor * speed.encode_s_per_byte, factor * speed.decode_s_per_byte, factor * speed.call_s
            )
            for (spelling, known), speed in self.codecs.items()
            if known == like
        }
        splits = {**self.splits, device: self.splits[like]} if like in self.splits else self.splits
        return replace(self, nodes={**self.nodes, device: times}, codecs={**self.codecs, **codecs}, splits=splits)

    def is_measured(self, placement: Placement, nodes: Iterable[NodeCost] = ()) -> bool:
        """Whether nodes were measured on a device, and all of these; the first of some replicas stands for all."""
        known = self.nodes.get(placement.replicas[0].spelling)
        return known is not None and all(node.name in known for node in nodes)


def _nodes_of(costs: CostTable, found: Calibration) -> dict[str, NodeSeconds]:
    """Seconds of the nodes of a cost table, as far as they, or their parts, were measured."""
    by_name = {node.name: [node] for node in found.nodes}
    inside: dict[str, list[MeasuredNode]] = {}
    for node in found.nodes:
        names = node.module.split(".") if node.module else []
        for depth in range(len(names)):
            inside.setdefault(".".join(names[: depth + 1]), []).append(node)
    seconds = {}
    for row in costs.nodes:
        parts = by_name.get(row.name) or inside.get(row.module, [])
        if parts:
            seconds[row.name] = NodeSeconds(
                costs.batch_size * sum(part.forward_s for part in parts),
                costs.batch_size * sum(part.backward_s for part in parts),
                sum(part.forward_call_s for part in parts),
                sum(part.backward_call_s for part in parts),
            )
    return seconds


def seconds_per_mac(placement: Placement) -> float:
    """Estimated seconds of one forward MAC on a device."""
    return 1.0 / MACS_PER_S[placement.device_type]
