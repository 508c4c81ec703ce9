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
from collections.abc import Mapping
from typing import Any

from benchmarks.configs import CIFAR10, DIGITS, Config, DatasetName
from benchmarks.models import Name
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


def _comparison(dataset: DatasetName, model: Name) -> Grid:
    return Grid(dataclasses.replace(_PUBLISHED, dataset=dataset, model=model))


def _ablation(variants: Variants) -> Grid:
    """Vary what cosine SGD does not have."""
    return Grid(dataclasses.replace(_CIFAR100, arms=("tb",)), variants)


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
        f"{dataset}-{model}": _comparison(dataset, model)
        for dataset, model in PAIRS
        if (dataset, model) != (_PUBLISHED.dataset, _PUBLISHED.model)
    },
    "learning-rate": Grid(
        _CIFAR100,
        {
            "rate0.05": {"learning_rate": 0.05},
            "rate0.1": {"learning_rate": 0.1},
            "rate0.15": {"learning_rate": 0.15},
        },
    ),
    "width": Grid(
        _CIFAR100,
        {"width0.5": {"width": 0.5}, "width1": {}, "width1.5": {"width": 1.5}},
    ),
    "metric": _ablation(
        {
            "alpha": {},
            "alpha_hat": {"metric": "alpha_hat"},
            "spectral_norm": {"metric": "spectral_norm"},
        }
    ),
    "fit": _ablation(
        {"median": {}, "min_ks": {"fit": "min_ks"}, "peak": {"fit": "peak"}}
    ),
    "bounds": _ablation(
        # As published, wider and narrower, and reversed.
        {
            "low0.1-high1.9": {"low": 0.1, "high": 1.9},
            "low0.3-high1.7": {"low": 0.3, "high": 1.7},
            "low0.5-high1.5": {},
            "low0.6-high1.4": {"low": 0.6, "high": 1.4},
            "low1.5-high0.5": {"low": 1.5, "high": 0.5},
        }
    ),
    "interval": _ablation(
        {
            "interval1": {},
            "interval5": {"interval": 5},
            "interval10": {"interval": 10},
            "interval25": {"interval": 25},
        }
    ),
    "norms": _ablation({"follow": {}, "alone": {"norms": False}}),
    "ends": _ablation(
        # The stem has 27 eigenvalues, too few to be tuned: only the head differs.
        {"left-out": {}, "kept-in": {"ends": True}}
    ),
}
