"""What is compared: a codec for activations and one for gradients, at both cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxsplit.compressors.registry import spelling_of
from fxsplit.errors import CompressorError
from fxsplit.planning.stages import Codecs

BOTH = ("body", "pool")
"""The cuts: behind the first convolution with its batch norm, and before pooling and classifier."""

POOLED = ("body", "classifier")
"""The second cut behind the pooling: 1280 features cross, which linear layers can take."""


@dataclass(frozen=True)
class Config:
    """One row of the table.

    Attributes:
        name: by which it is asked for.
        activation: spelling of the codec of the activations; those of the two cuts may differ, with `;` between.
        gradient: the same for their gradients; "auto" is what the activations' codec wants.
        reason: why it is in the study.
        family: what the picture colours it by.
        is_default: whether it is run when no names are given.
        cuts: module names.
    """

    name: str
    activation: str
    gradient: str
    reason: str
    family: str
    is_default: bool = True
    cuts: tuple[str, ...] = BOTH

    def refusal(self) -> str | None:
        """Why this version of fxsplit does not have the codecs; None if it has them."""
        try:
            self.codecs()
        except CompressorError as error:
            return " ".join(str(error).split())
        return None

    def codecs(self) -> tuple[str, str]:
        """The canonical spellings of both codecs.

        Raises:
            CompressorError: there is no such codec.
        """
        found = Codecs.of(self.activation, self.gradient, len(self.cuts))
        return spelling_of(found.forward), spelling_of(found.backward)


GRADIENT8 = "uniform8(group=channel)"
GRADIENT4 = "uniform4(group=channel, rounding=stochastic)"
KMEANS = "kmeans{}(iterations=3, group=channel)"
"""Few iterations do: each begins with the codebook of the last step."""

SORT4 = "sortquant4(split=2)"
SORT4_CHANNEL = "sortquant4(split=2, group=channel)"

EIGHT, FEWER, RANK, SPARSE, LEARNED = "8 and 16 bits", "2 to 4 bits", "low rank", "sparse", "learned layers"
FAMILIES = (EIGHT, FEWER, RANK, SPARSE, LEARNED)

CONFIGS: tuple[Config, ...] = (
    Config("none", "none", "none", "the baseline of every row", "none"),
    # Two bytes an element.
    Config("fp16", "fp16", "same", "half of the bytes, with a wide margin", EIGHT),
    Config("bf16", "bf16", "same", "the range of float32, fewer digits", EIGHT),
    # One byte an element.
    Config("sortquant8", "sortquant8", "same", "the documents' own codec, both ways", EIGHT),
    Config("sortquant8-channel", "sortquant8(group=channel)", "same", "buckets for each channel", EIGHT),
    Config("fastquant8", "fastquant8", "same", "buckets from a sample: is it as good as a sort?", EIGHT),
    Config("uniform8", "uniform8(group=tensor)", "same", "one range for the tensor", EIGHT),
    Config("uniform8-channel", GRADIENT8, "same", "one range a channel", EIGHT),
    Config("fp8", "fp8", "fp8(format=e5m2)", "relative precision instead of ranges", EIGHT),
    # Fewer bits.
    Config("sortquant4", SORT4, "same", "2 + 2 bits for the tensor, both ways", FEWER),
    Config("sortquant4-g8", SORT4, GRADIENT8, "the same, with gradients apart", FEWER),
    Config(
        "sortquant4-g8-tensor",
        SORT4,
        "uniform8(group=tensor)",
        "gradients with one range: is it the range?",
        FEWER,
        False,
    ),
    Config("sortquant4-channel-g8", SORT4_CHANNEL, GRADIENT8, "buckets for each channel", FEWER),
    Config("sortquant4-channel-g4", SORT4_CHANNEL, GRADIENT4, "gradients in 4 bits, rounded at random", FEWER),
    Config("fastquant4-g8", "fastquant4(split=2)", GRADIENT8, "2 + 2 bits, buckets from a sample", FEWER),
    Config("kmeans4-g8", "kmeans4(group=tensor)", GRADIENT8, "the best 16 values for the tensor", FEWER),
    Config("kmeans4-channel-g8", KMEANS.format(4), GRADIENT8, "the best 16 values a channel", FEWER),
    Config("kmeans4-channel-g4", KMEANS.format(4), GRADIENT4, "gradients in 4 bits", FEWER),
    Config("kmeans3-channel-g8", KMEANS.format(3), GRADIENT8, "the best 8 values a channel", FEWER),
    Config("kmeans3-channel-g4", KMEANS.format(3), GRADIENT4, "gradients in 4 bits", FEWER),
    Config("kmeans2-channel-g8", KMEANS.format(2), GRADIENT8, "the best 4 values a channel", FEWER),
    Config("kmeans2-channel-g4", KMEANS.format(2), GRADIENT4, "gradients in 4 bits", FEWER),
    Config("adaptive4-g8", "adaptive4", GRADIENT8, "bits given where the range is large", FEWER),
    Config("adaptive2-g8", "adaptive2", GRADIENT8, "the same with half of the bits", FEWER, False),
    Config("uniform4", "uniform4(group=tensor)", "same", "4 bits with one range: what goes wrong", FEWER, False),
    Config("uniform4-channel-g8", "uniform4(group=channel)", GRADIENT8, "4 bits, a range a channel", FEWER),
    Config("uniform4-channel-g4", "uniform4(group=channel)", GRADIENT4, "4 bits both ways", FEWER),
    Config("uniform3-channel-g8", "uniform3(group=channel)", GRADIENT8, "3 bits", FEWER),
    Config("uniform3-channel-g4", "uniform3(group=channel)", GRADIENT4, "3 bits, gradients 4", FEWER, False),
    Config("uniform2-channel-g8", "uniform2(group=channel)", GRADIENT8, "2 bits", FEWER),
    Config("uniform2-channel-g4", "uniform2(group=channel)", GRADIENT4, "2 bits, gradients 4", FEWER),
    # Low rank. Matrices are 32 x 1024 at the first cut and 1280 x 16 at the second.
    Config("poweriter-3-7", "poweriter(rank=3); poweriter(rank=7)", "same", "the documents' ranks", RANK),
    Config("poweriter-3-2", "poweriter(rank=3); poweriter(rank=2)", "same", "a tenth at each cut", RANK),
    Config("svd-3-7", "svd(rank=3); svd(rank=7)", "same", "the best factors of the same ranks", RANK),
    Config("svd-3-2", "svd(rank=3); svd(rank=2)", "same", "a tenth at each cut", RANK),
    # The largest elements.
    Config("topk30", "topk(ratio=0.3)", "same", "the largest three tenths, both ways", SPARSE),
    Config("topk10", "topk(ratio=0.1)", "same", "the largest tenth, both ways", SPARSE),
    Config(
        "topk10-feedback",
        "topk(ratio=0.1)",
        "topk(ratio=0.1, feedback=true)",
        "what gradients lost is added to the next",
        SPARSE,
    ),
    # Layers that are trained with the model.
    Config("convinsert25", "convinsert(ratio=0.25)", "none", "as many bytes as 8 bits", LEARNED),
    Config("convinsert10", "convinsert(ratio=0.1)", "none", "about the documents' 0.097", LEARNED),
    Config("convinsert07", "convinsert(ratio=0.07)", "none", "about the documents' 0.070", LEARNED),
    Config("convinsert25-u8", "convinsert(ratio=0.25)+uniform8(group=tensor)", GRADIENT8, "and 8 bits", LEARNED),
    Config(
        "convinsert40-u8",
        "convinsert(ratio=0.4)+uniform8(group=tensor)",
        GRADIENT8,
        "0.1 of the bytes by both",
        LEARNED,
    ),
    Config("convinsert10-u8", "convinsert(ratio=0.1)+uniform8(group=tensor)", GRADIENT8, "and 8 bits", LEARNED),
    Config("convinsert07-u8", "convinsert(ratio=0.07)+uniform8(group=tensor)", GRADIENT8, "and 8 bits", LEARNED),
    Config(
        "insertlinear25",
        "convinsert(ratio=0.25); insertlinear(ratio=0.25)",
        "none",
        "linear layers behind the pooling",
        LEARNED,
        cuts=POOLED,
    ),
    Config(
        "insertlinear10",
        "convinsert(ratio=0.1); insertlinear(ratio=0.1)",
        "none",
        "linear layers behind the pooling",
        LEARNED,
        cuts=POOLED,
    ),
    Config(
        "decaylinear39",
        "convinsert(ratio=0.39); decaylinear(steps=130)",
        "none",
        "square layers behind the pooling that shrink in two thirds of 9 epochs",
        LEARNED,
        cuts=POOLED,
    ),
    Config(
        "decaylinear26",
        "convinsert(ratio=0.25); decaylinear(rate=0.86, steps=130)",
        "none",
        "the same to a quarter",
        LEARNED,
        cuts=POOLED,
    ),
)
"""All configurations, in the order of the table."""

PAIRS: tuple[tuple[str, str, str], ...] = (
    ("sortquant8-channel", "sortquant8", "buckets for each channel, not for the tensor, 8 bits"),
    ("uniform8-channel", "uniform8", "a range for each channel, not for the tensor, 8 bits"),
    ("fastquant8", "sortquant8", "bounds from a sample, not from a sort"),
    ("sortquant4-g8", "sortquant4", "gradients in 8 bits a channel, not in 2 + 2 bits"),
    ("sortquant4-channel-g8", "sortquant4-g8", "buckets for each channel, not for the tensor, 4 bits"),
    ("sortquant4-channel-g4", "sortquant4-channel-g8", "gradients in 4 bits rounded at random, not in 8"),
    ("uniform4-channel-g4", "uniform4-channel-g8", "gradients in 4 bits rounded at random, not in 8"),
    ("uniform2-channel-g4", "uniform2-channel-g8", "gradients in 4 bits rounded at random, not in 8"),
    ("sortquant4-channel-g8", "uniform4-channel-g8", "2 + 2 bits sorted, not 4 bits uniform, a channel"),
    ("kmeans4-g8", "sortquant4-g8", "the best 16 values, not 2 + 2 bits sorted"),
    ("kmeans4-channel-g8", "uniform4-channel-g8", "the best 16 values a channel, not equal steps"),
    ("kmeans2-channel-g8", "uniform2-channel-g8", "the best 4 values a channel, not equal steps"),
    ("adaptive4-g8", "uniform4-channel-g8", "4 bits on average, not 4 bits each"),
    ("svd-3-7", "poweriter-3-7", "the best factors, not those of power iteration"),
    ("topk10-feedback", "topk10", "error feedback on gradients, not without"),
    ("convinsert25-u8", "convinsert25", "8 bits behind the learned layers, not 32"),
    ("convinsert10-u8", "convinsert10", "8 bits behind the learned layers, not 32"),
    ("convinsert07-u8", "convinsert07", "8 bits behind the learned layers, not 32"),
)
"""Comparisons that the report draws: one configuration, the other, and how the first differs."""


def chosen(names: str) -> list[Config]:
    """The configurations that "default", "all" or names with commas between them ask for, in the table's order.

    Raises:
        ValueError: a name that there is not.

    >>> [config.name for config in chosen("uniform8,none")]
    ['none', 'uniform8']
    """
    if names == "all":
        return list(CONFIGS)
    if names == "default":
        return [config for config in CONFIGS if config.is_default]
    wanted = {name.strip() for name in names.split(",")}
    if unknown := wanted - {config.name for config in CONFIGS}:
        known = ", ".join(config.name for config in CONFIGS)
        raise ValueError(f"no configuration {', '.join(sorted(unknown))}; there are {known}")
    return [config for config in CONFIGS if config.name in wanted]


def available(configs: Sequence[Config]) -> tuple[list[Config], dict[str, str]]:
    """Those whose codecs there are, and for the others why not."""
    refusals = {config.name: refusal for config in configs if (refusal := config.refusal()) is not None}
    return [config for config in configs if config.name not in refusals], refusals
