"""Triton's kernels where there is no GPU: they compile for one, and interpreted they give the numbers of torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.ranges import RangeRule
from fxsplit.compressors.scheme import Scheme
from fxsplit.spec import TensorSpec

triton = pytest.importorskip("triton")

TYPES = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
    torch.uint32: "*u32",
    torch.uint64: "*u64",
}


class Compiler:
    """Takes the place of a launch: compiles what would have been launched, for an H100 or H200, once."""

    def __init__(self) -> None:
        self.compiled: dict[tuple[Any, ...], int] = {}
        """Parameters of each kernel, by its name and what it was compiled for."""

    def launch(
        self, launcher: Any, grid: Any, tensors: Any, integers: Any, constants: dict[str, Any], **options: Any
    ) -> None:
        """As `Launcher.__call__`, which Triton's own launch begins with: what it fixes, this fixes."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kernel, passed = launcher._kernel, iter([*tensors, *integers])
        signature, fixed, attributes = dict[str, str](), dict(constants), dict[tuple[int, ...], Any]()
        for index, name in enumerate(kernel.arg_names):
            value = None if name in constants else next(passed)
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
            elif value is None or value == 1:
                signature[name], fixed[name] = "constexpr", constants.get(name, 1)
            else:
                signature[name] = "i32" if value < 1 << 31 else "i64"
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if signature[name] != "constexpr" and number is not None and number % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        key = kernel.__name__, *signature.items(), *fixed.items(), *options.items()
        if key in self.compiled:
            return
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        from fxsplit.compressors.triton_launch import _parameters

        self.compiled[key] = len(_parameters(compiled))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """In the place of all launches."""
    from fxsplit.compressors.triton_launch import Launcher

    found = Compiler()
    monkeypatch.setattr(
        Launcher, "__call__", lambda launcher, *given, **options: found.launch(launcher, *given, **options)
    )
    return found


CASES = [
    (Layout(1, 1, 64), RangeRule(1), 8, 0, torch.float32),
    (Layout(1, 1, 100_003), RangeRule(4, 7), 8, 2, torch.float16),
    (Layout(16, 8, 400), RangeRule(2, touching=False), 4, 1, torch.float32),
    (Layout(1, 1, 3_000_000), RangeRule(4, touching=False), 8, 2, torch.float32),
    (Layout(4096, 96, 1), RangeRule(1), 12, 0, torch.float32),
]


@pytest.mark.parametrize("layout, rule, bits, split, dtype", CASES, ids=str)
def test_kernels_compile_for_a_gpu(
    layout: Layout, rule: RangeRule, bits: int, split: int, dtype: torch.dtype, compiler: Compiler
) -> None:
    """A kernel that Triton's compiler refuses would be found by nobody without a GPU."""
    from fxsplit.compressors import cuda_kernels

    values, scheme = torch.zeros(layout.numel, dtype=dtype), Scheme(layout, bits, split)
    found = cuda_kernels.ranges(values, layout, rule, scheme.levels, torch.float32)
    codes = cuda_kernels.encode(values, found.minima, found.inverse, None, scheme)
    random = Scheme(layout, bits, split, stochastic=True)
    cuda_kernels.encode(values, found.minima, found.inverse, cuda_kernels.seeds(found.table), random)
    cuda_kernels.decode(codes, found.table, scheme, TensorSpec((layout.numel,), dtype))
    cuda_kernels.extremes(values, layout)
    cuda_kernels.order_statistics(values, layout, [0, layout.group_size // 2, layout.group_size - 1])
    assert {"encode_kernel", "decode_kernel", "seeds_kernel"} < {key[0] for key in compiler.compiled}
    assert len(compiler.compiled) >= 6 and all(compiler.compiled.values())


def test_interpreted_they_give_the_numbers_of_torch() -> None:
    """In a process of its own: Triton decides when it is loaded."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
