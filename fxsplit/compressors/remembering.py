"""Error feedback and deltas: options of every compressor, which look back at the tensor before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxsplit.compressors.base import Compressor, Memory, shelf
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

OPTIONS = ("feedback", "delta")
"""The options that are written with any compressor: `topk(ratio=0.1, feedback=true)`."""


@dataclass(frozen=True)
class Remembering(Compressor):
    """A compressor with a memory of the step before.

    Steps follow each other in training; where no gradient is recorded, the compressor works without a memory.
    A tensor of another shape or dtype starts afresh.

    Args:
        inner: the compressor.
        feedback: what was lost of a tensor is added to the next one (Seide et al. 2014, "1-Bit Stochastic
            Gradient Descent"; Karimireddy et al. 2019, arXiv:1901.09847). Meant for gradients. The sender keeps
            one tensor of the edge's size for each micro-batch.
        delta: what is encoded is the difference from the tensor before, as the receiver has it (AQ-SGD, Wang
            et al. 2022, arXiv:2206.01299). It pays only where the same samples come again at every step, in
            the same order; both ends keep one tensor of the edge's size for each micro-batch.

    Raises:
        CompressorError: both options, or neither: a delta already carries over what was lost.
    """

    name: ClassVar[str] = "remembering"

    inner: Compressor
    feedback: bool = False
    delta: bool = False

    def __post_init__(self) -> None:
        for option in OPTIONS:
            if type(getattr(self, option)) is not bool:
                raise CompressorError(
                    "wrong type of argument",
                    where=f"{self.inner}: {option}",
                    found=repr(getattr(self, option)),
                    allowed="true or false",
                )
        if self.feedback == self.delta:
            raise CompressorError(
                "feedback and delta exclude each other",
                where=str(self.inner),
                found=f"feedback={self.feedback}, delta={self.delta}",
                allowed="one of them",
                hint="a delta carries over what was lost by itself",
            )

    def takes(self, spec: TensorSpec) -> bool:
        """Whether the inner one takes it."""
        return self.inner.takes(spec)

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """As the inner one."""
        return self.inner.wire(spec)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """As the inner one, without memory."""
        return self.inner.encode(x)

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """As the inner one, without memory."""
        return self.inner.decode(payload, spec)

    def encode_next(self, x: Tensor, memory: Memory) -> tuple[Tensor, ...]:
        """The payload of `x` with what was lost before, or of its difference from the tensor before."""
        x, spec = x.detach(), TensorSpec.of(x)
        kept = _kept(memory, spec)
        wanted = x if kept is None else (x - kept if self.delta else x + kept)
        payload = self.inner.encode_next(wanted, shelf(memory, "inner"))
        # The receiver's tensor, by the receiver's means: a decoder of its own, with its own memory.
        received = self.inner.decode_next(payload, spec, shelf(memory, "mirror"))
        if self.feedback:
            memory["kept"] = wanted - received
        else:
            memory["kept"] = received if kept is None else kept + received
        return payload

    def decode_next(self, payload: Sequence[Tensor], spec: TensorSpec, memory: Memory) -> Tensor:
        """The tensor that was encoded."""
        kept = _kept(memory, spec)
        x = self.inner.decode_next(payload, spec, shelf(memory, "inner"))
        if self.delta:
            x = x if kept is None else kept + x
            memory["kept"] = x.clone()  # the stage that gets it may change it in place
        return x

    def for_gradients(self) -> Compressor:
        """What the inner one wants for gradients, with the same option."""
        return Remembering(self.inner.for_gradients(), self.feedback, self.delta)

    def memory_bytes(self, spec: TensorSpec) -> tuple[int, int]:
        """One tensor at the sender, for deltas at the receiver too, and what the inner one keeps."""
        sending, receiving = self.inner.memory_bytes(spec)
        return spec.nbytes + sending + receiving, receiving + (spec.nbytes if self.delta else 0)

    def __str__(self) -> str:
        option = "feedback=true" if self.feedback else "delta=true"
        inner = str(self.inner)
        return f"{inner[:-1]}, {option})" if inner.endswith(")") else f"{inner}({option})"


def _kept(memory: Memory, spec: TensorSpec) -> Tensor | None:
    kept = memory.get("kept")
    return kept if isinstance(kept, torch.Tensor) and TensorSpec.of(kept) == spec else None
