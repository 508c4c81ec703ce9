"""Experiments as records: what is trained, on what, with which numbers."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from benchmarks.errors import UserError
from benchmarks.models import Compute, Init, Name

DatasetName = Literal["digits", "cifar10", "cifar100", "svhn", "tiny_imagenet"]
_Optimizer = Literal["cal", "tb", "snr", "tb_snr", "sgdr", "lars", "lamb", "lookahead"]
_Other = Literal["sgdp", "tb_sgdp", "adamw", "mean", "shuffled", "reversed"]
_Form = Literal["shape_only", "farms", "farms_mean", "relative", "relative_mean"]
ArmName = Literal[_Optimizer, _Other, _Form, "sigmoid", "sigmoid_mean"]
Metric = Literal["alpha", "alpha_hat", "spectral_norm"]
Fit = Literal["median", "min_ks", "peak"]

_Limit = tuple[str, Callable[[Any], bool]]
_WHOLE: _Limit = "a whole number, at least 1", lambda n: n >= 1
_COUNT: _Limit = "at least 1, at most 1000000", lambda n: 1 <= n <= 1_000_000
_POSITIVE: _Limit = "a finite number above 0", lambda x: 0 < x < math.inf
_NOT_NEGATIVE: _Limit = "a finite number, at least 0", lambda x: 0 <= x < math.inf

_LIMITS: dict[str, _Limit] = {
    "subset": _WHOLE,
    "validation": _WHOLE,
    "width": ("above 0, at most 16", lambda width: 0 < width <= 16),
    "epochs": _COUNT,
    "batch_size": _WHOLE,
    "learning_rate": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "momentum": ("at least 0, below 1", lambda momentum: 0 <= momentum < 1),
    "snr": _NOT_NEGATIVE,
    "low": _NOT_NEGATIVE,
    "high": _NOT_NEGATIVE,
    "interval": _COUNT,
    "warmup": _NOT_NEGATIVE,
    "smoothing": ("at least 0, below 1", lambda share: 0 <= share < 1),
    "arms": ("each arm once", lambda arms: 0 < len(arms) == len(set(arms))),
    "seed": ("0 to 4294967295", lambda seed: 0 <= seed < 2**32),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the numbers of a run depend on.

    Attributes:
        dataset: the images.
        model: the network.
        epochs: passes over the training rows.
        batch_size: rows of a step; rows that do not fill a batch are dropped, other
            ones in every epoch.
        learning_rate: rate of the first epoch, of all arms; a cosine takes it to 0,
            epoch by epoch. None, here and below: the number in benchmarks/published.py.
        data_dir: directory of the hub's SPLIT-*.parquet files. None: read the hub.
        subset: train on the first SUBSET rows. None: train on all.
        validation: hold out VALIDATION training rows, after the subset if there is
            one, the same rows for every seed.
        width: factor on the channels of the network.
        weight_decay: coefficient of w in the gradient, of all parameters.
        momentum: momentum of SGD, without Nesterov's correction.
        snr: coefficient of spectral norm regularization.
        low: smallest multiplier of TempBalance.
        high: largest multiplier of TempBalance.
        metric: what the multipliers are read off.
        fit: how the power law is fitted.
        norms: whether the parameters of a norm have the multiplier of their layer.
        ends: whether the first and the last layer are balanced too.
        init: whose default initialization the weights have.
        interval: epochs from one analysis of the weights to the next.
        compute: type that training computes in.
        warmup: epochs in which the rate rises, step by step, before it falls to 0 in
            a straight line; 0 is the cosine of `learning_rate`.
        smoothing: share of the label that is spread over all classes in training.
        arms: what is compared; see README.md.
        seed: seed of the initial weights, of the order of the rows and of their
            augmentation.
    """

    dataset: DatasetName
    model: Name
    epochs: int
    batch_size: int
    learning_rate: float | None = None
    data_dir: str | None = None
    subset: int | None = None
    validation: int | None = None
    width: float = 1.0
    weight_decay: float = 5e-4
    momentum: float = 0.9
    snr: float | None = None
    low: float | None = None
    high: float | None = None
    metric: Metric = "alpha"
    fit: Fit = "median"
    norms: bool = True
    ends: bool = False
    init: Init = "flax"
    interval: int = 1
    compute: Compute = "float32"
    warmup: int = 0
    smoothing: float = 0.0
    arms: tuple[ArmName, ...] = ("cal", "tb")
    seed: int = 43

    def __post_init__(self):
        for name, (allowed, holds) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UserError(f"{option(name)} is {value!r}; allowed: {allowed}")


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Everything that the numbers of a language model's run depend on.

    Attributes:
        epochs: evaluations; the last is after the last update.
        steps: updates from one evaluation to the next.
        batch_size: windows of a step.
        length: bytes of a window that are predicted.
        windows: windows that an evaluation reads of the validation or test files.
        width: features of a position.
        depth: number of blocks.
        heads: attention heads of a block.
        tied: whether the logits are products with the embedding.
        learning_rate: largest rate; it rises to it in the first tenth of the updates,
            and a cosine takes it to a tenth.
        weight_decay: coefficient of w next to the update of Adam, of kernels alone.
        refresh: updates from one analysis to the next, for all methods but LLR.
        interval: evaluations from one analysis that is written down to the next.
        seed: seed of the initial weights and of the windows of all steps.
    """

    epochs: int = 6
    steps: int = 50
    batch_size: int = 12
    length: int = 128
    windows: int = 192
    width: int = 96
    depth: int = 4
    heads: int = 4
    tied: bool = False
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    refresh: int = 30
    interval: int = 6
    seed: int = 1

    @property
    def updates(self) -> int:
        """Number of updates of a run."""
        return self.epochs * self.steps


DIGITS = Config(
    # python -m benchmarks.train: about a minute on two CPU cores, 98 to 99 %.
    dataset="digits",
    model="resnet14",
    epochs=20,
    batch_size=64,
)

CIFAR10 = Config(
    # python -m benchmarks.train --dataset cifar10: the published recipe, for a GPU.
    # Two CPU cores: --width 0.25 --subset 5000 --epochs 10, in about 15 minutes.
    dataset="cifar10",
    model="resnet18",
    epochs=200,
    batch_size=128,
)

RECIPES: dict[str, Config] = {
    "digits": DIGITS,
    "cifar10": CIFAR10,
    "cifar100": dataclasses.replace(CIFAR10, dataset="cifar100"),
    "svhn": dataclasses.replace(CIFAR10, dataset="svhn"),
    "tiny_imagenet": dataclasses.replace(CIFAR10, dataset="tiny_imagenet"),
}


def option(field: str) -> str:
    """Return the name of a field on the command line."""
    return "--" + field.replace("_", "-")
