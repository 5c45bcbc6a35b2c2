"""The client's settings of torch that change results: workers take them over."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TorchSettings:
    """Precision and determinism, as set in the client when the model is compiled.

    Attributes:
        matmul_precision: `torch.get_float32_matmul_precision()`.
        cudnn_allow_tf32: whether convolutions on CUDA may round their inputs to TF32.
        cudnn_deterministic: whether cuDNN is held to deterministic algorithms.
        cudnn_benchmark: whether cuDNN chooses algorithms by trying them.
        deterministic: whether operations that are not deterministic are refused...
        warn_only: ...or only warned of.
    """

    matmul_precision: str
    cudnn_allow_tf32: bool
    cudnn_deterministic: bool
    cudnn_benchmark: bool
    deterministic: bool
    warn_only: bool

    @classmethod
    def current(cls) -> TorchSettings:
        """Those of this process."""
        return cls(
            matmul_precision=torch.get_float32_matmul_precision(),
            cudnn_allow_tf32=torch.backends.cudnn.allow_tf32,
            cudnn_deterministic=torch.backends.cudnn.deterministic,
            cudnn_benchmark=torch.backends.cudnn.benchmark,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    def apply(self) -> None:
        """Sets them in this process."""
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.backends.cudnn.allow_tf32 = self.cudnn_allow_tf32
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
