"""Composition: what one compressor makes goes through the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxsplit.compressors.base import Compressor, Memory, shelf
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec


@dataclass(frozen=True)
class Chain(Compressor):
    """Compressors one after another, written with `+`: `poweriter(rank=3)+uniform8`.

    Each tensor of the first one's payload goes through the second, if that takes tensors of its kind, and so
    on; those that it does not take (positions, packed codes) are sent as they are.

    Args:
        parts: the compressors, at least two.
    """

    name: ClassVar[str] = "chain"

    parts: tuple[Compressor, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise CompressorError("a composition has at least two compressors", found=len(self.parts))

    def takes(self, spec: TensorSpec) -> bool:
        """Whether the first one takes it."""
        return self.parts[0].takes(spec)

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The specs of what the last one sends."""
        specs = self.parts[0].wire(spec)
        for part in self.parts[1:]:
            specs = tuple(out for s in specs for out in (part.wire(s) if part.takes(s) else (s,)))
        return specs

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The payload of all, in order."""
        return self._encode(x, lambda part, tensor, _: part.encode(tensor))

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """Undoes them from the last to the first."""
        return self._decode(payload, spec, lambda part, tensors, s, _: part.decode(tensors, s))

    def encode_next(self, x: Tensor, memory: Memory) -> tuple[Tensor, ...]:
        """As `encode`; every part has its own memory, one for each tensor that it gets."""
        return self._encode(x, lambda part, tensor, place: part.encode_next(tensor, shelf(memory, place)))

    def decode_next(self, payload: Sequence[Tensor], spec: TensorSpec, memory: Memory) -> Tensor:
        """As `decode`, with the memories of the receiving end."""
        return self._decode(
            payload, spec, lambda part, tensors, s, place: part.decode_next(tensors, s, shelf(memory, place))
        )

    def for_gradients(self) -> Compressor:
        """Of each part what it wants for gradients: behind the same factors, say, 8 bits and not 4."""
        return Chain(tuple(part.for_gradients() for part in self.parts))

    def memory_bytes(self, spec: TensorSpec) -> tuple[int, int]:
        """Those of all parts together."""
        sending, receiving = self.parts[0].memory_bytes(spec)
        specs = self.parts[0].wire(spec)
        for part in self.parts[1:]:
            kept = [part.memory_bytes(s) for s in specs if part.takes(s)]
            sending, receiving = sending + sum(k[0] for k in kept), receiving + sum(k[1] for k in kept)
            specs = tuple(out for s in specs for out in (part.wire(s) if part.takes(s) else (s,)))
        return sending, receiving

    def _encode(
        self, x: Tensor, run: Callable[[Compressor, Tensor, str], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        payload: tuple[Tensor, ...] = (x,)
        for number, part in enumerate(self.parts):
            passed: list[Tensor] = []
            for index, tensor in enumerate(payload):
                takes = number == 0 or part.takes(TensorSpec.of(tensor))
                passed += run(part, tensor, f"{number}.{index}") if takes else (tensor,)
            payload = tuple(passed)
        return payload

    def _decode(
        self,
        payload: Sequence[Tensor],
        spec: TensorSpec,
        run: Callable[[Compressor, Sequence[Tensor], TensorSpec, str], Tensor],
    ) -> Tensor:
        specs: list[tuple[TensorSpec, ...]] = [(spec,)]
        for number, part in enumerate(self.parts[:-1]):
            specs.append(tuple(out for s in specs[-1] for out in self._wire(number, part, s)))
        tensors = list(payload)
        for number in reversed(range(len(self.parts))):
            part, undone = self.parts[number], []
            for index, s in enumerate(specs[number]):
                count = len(self._wire(number, part, s))
                taken, tensors = tensors[:count], tensors[count:]
                takes = number == 0 or part.takes(s)
                undone += [run(part, taken, s, f"{number}.{index}") if takes else taken[0]]
            tensors = undone
        return tensors[0]

    def _wire(self, number: int, part: Compressor, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        return part.wire(spec) if number == 0 or part.takes(spec) else (spec,)

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))
