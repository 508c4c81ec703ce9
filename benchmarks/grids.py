"""Grids of experiments by name: what `python -m benchmarks.compare` runs.

`digits` and `cifar10-check` are quick, and show that everything works. `cifar10` and
the names of a data set with a model are the published comparisons. `cifar10-60` is the
first of them in 60 epochs, with the control that tells a larger rate from a better one.

The others are ablations, each of one choice of the method, with ResNet-18 on CIFAR-100
as published. Choices that only TempBalance makes do not change cosine SGD, so their
variants train TempBalance alone.

References:
    Zhou et al, `Temperature Balancing, Layer-wise Weight Analysis, and Neural Network
    Training <https://arxiv.org/abs/2312.00359>`_, 2023
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from benchmarks.configs import CIFAR10, DIGITS, Config, Fit, Metric
from benchmarks.published import PAIRS

Variants = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A base experiment and what is varied in it.

    Attributes:
        base: the experiment that the others are compared with.
        variants: for each name of a variant, which is also that of its directory, the
            fields of `base` that it sets otherwise.
    """

    base: Config
    variants: Variants = dataclasses.field(default_factory=lambda: {"base": {}})

    def configs(self) -> dict[str, Config]:
        """Return the experiment of each variant."""
        return {
            name: dataclasses.replace(self.base, **fields)
            for name, fields in self.variants.items()
        }


# The published weights have PyTorch's initialization.
_PUBLISHED = dataclasses.replace(
    CIFAR10, init="torch", arms=("cal", "tb", "snr", "tb_snr")
)
_CIFAR100 = dataclasses.replace(_PUBLISHED, dataset="cifar100", arms=("cal", "tb"))


def _each(field: str, values: Iterable[Any], prefix: str) -> Variants:
    """Return a variant for each value of a field."""
    base = getattr(_CIFAR100, field)
    return {
        f"{prefix}{value}": {} if value == base else {field: value} for value in values
    }


def _ablation(variants: Variants) -> Grid:
    """Vary what cosine SGD does not have."""
    return Grid(dataclasses.replace(_CIFAR100, arms=("tb",)), variants)


# As published, wider and narrower, and reversed.
_BOUNDS = ((0.1, 1.9), (0.3, 1.7), (0.5, 1.5), (0.6, 1.4), (1.5, 0.5))

GRIDS: dict[str, Grid] = {
    "digits": Grid(DIGITS),
    "cifar10-check": Grid(
        # About 15 minutes per seed on two CPU cores.
        dataclasses.replace(CIFAR10, width=0.25, subset=5000, epochs=10)
    ),
    "cifar10-60": Grid(
        dataclasses.replace(_PUBLISHED, epochs=60, arms=("cal", "tb", "mean"))
    ),
    "cifar10": Grid(_PUBLISHED),
    **{
        f"{dataset}-{model}": Grid(
            dataclasses.replace(_PUBLISHED, dataset=dataset, model=model)
        )
        for dataset, model in PAIRS
        if (dataset, model) != (_PUBLISHED.dataset, _PUBLISHED.model)
    },
    "learning-rate": Grid(_CIFAR100, _each("learning_rate", (0.05, 0.1, 0.15), "rate")),
    "width": Grid(_CIFAR100, _each("width", (0.5, 1, 1.5), "width")),
    "metric": _ablation(_each("metric", get_args(Metric), "")),
    "fit": _ablation(_each("fit", get_args(Fit), "")),
    "bounds": _ablation(
        {
            f"low{low}-high{high}": {"low": low, "high": high} if low != 0.5 else {}
            for low, high in _BOUNDS
        }
    ),
    "interval": _ablation(_each("interval", (1, 5, 10, 25), "interval")),
    "norms": _ablation({"follow": {}, "alone": {"norms": False}}),
    # The stem has 27 eigenvalues, too few to be tuned: only the head differs.
    "ends": _ablation({"left-out": {}, "kept-in": {"ends": True}}),
}
