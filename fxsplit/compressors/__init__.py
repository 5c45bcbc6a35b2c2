"""Compressors: what makes the tensors that cross a cut smaller."""

from fxsplit.compressors.base import Compressor
from fxsplit.compressors.fast_quantization import FastQuantization
from fxsplit.compressors.lossless import Lossless
from fxsplit.compressors.registry import COMPRESSORS, compressor
from fxsplit.compressors.sort_quantization import SortQuantization
from fxsplit.compressors.uniform import Uniform

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "FastQuantization",
    "Lossless",
    "SortQuantization",
    "Uniform",
    "compressor",
]
