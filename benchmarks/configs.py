"""Experiments as records: what is trained, on what, with which numbers.

Digits, two arms of 20 epochs: see `DIGITS`.  CIFAR-10 as published: see `CIFAR10`; the
other published data sets differ in the rates of `benchmarks.published`.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.commandline import Parser
from benchmarks.errors import UserError


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _countable(value: int) -> bool:
    return 1 <= value <= 1_000_000


COMPUTE = ("float32", "bfloat16")

_LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "subset": ("a whole number, at least 1", lambda n: n >= 1),
    "validation": ("a whole number, at least 1", lambda n: n >= 1),
    "width": ("above 0, at most 16", lambda w: 0 < w <= 16),
    "epochs": ("at least 1, at most 1000000", _countable),
    "batch_size": ("a whole number, at least 1", lambda n: n >= 1),
    "learning_rate": ("a finite number above 0", _positive),
    "weight_decay": ("a finite number, at least 0", _not_negative),
    "momentum": ("at least 0, below 1", lambda m: 0 <= m < 1),
    "snr": ("a finite number, at least 0", _not_negative),
    "low": ("a finite number, at least 0", _not_negative),
    "high": ("a finite number, at least 0", _not_negative),
    "interval": ("at least 1, at most 1000000", _countable),
    "compute": (" or ".join(COMPUTE), lambda name: name in COMPUTE),
    "arms": ("each arm once", lambda arms: 0 < len(arms) == len(set(arms))),
    "seed": ("0 to 4294967295", lambda n: 0 <= n < 2**32),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the numbers of a run depend on.

    Attributes:
        dataset: name in `benchmarks.data`.
        data_dir: directory of parquet files; None reads the hub.
        subset: train on the first so many rows; None trains on all.
        validation: hold out so many training rows, behind the subset if there is one,
            the same ones for every seed; None holds out none.
        model: name in `benchmarks.models`.
        width: factor on the channels of the model.
        epochs: passes over the training rows.
        batch_size: rows of a step; what is left of an epoch behind the last whole
            batch is dropped, other rows in every epoch.
        learning_rate: rate of the first epoch, of all arms; a cosine takes it to 0,
            by epochs.  Here and below, None is the number in `benchmarks.published`.
        weight_decay: added to the gradient, of all parameters, as lambda * w.
        momentum: of SGD, without Nesterov's correction.
        snr: coefficient of spectral norm regularisation.
        low: smallest multiplier of TempBalance.
        high: largest multiplier of TempBalance.
        metric: name in `benchmarks.arms.METRICS`, what the multipliers are read off.
        fit: name in `benchmarks.arms.FITS`, how the power law is fitted.
        norms: whether the parameters of a norm have the multiplier of their layer.
        ends: whether the first and the last layer are balanced too.
        init: whose default initialisation the weights have, "flax" or "torch".
        interval: epochs from one analysis of the weights to the next.
        compute: type that training computes in; see `benchmarks.models.build`.
        arms: names in `benchmarks.arms`, trained one after the other.
        seed: of the initial weights, the order of the rows and their augmentation.
    """

    dataset: str
    model: str
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
    metric: str = "alpha"
    fit: str = "median"
    norms: bool = True
    ends: bool = False
    init: str = "flax"
    interval: int = 1
    compute: str = "float32"
    arms: tuple[str, ...] = ("cal", "tb")
    seed: int = 43

    def __post_init__(self):
        for name, (allowed, holds) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                msg = f"{option(name)} is {value!r}; allowed: {allowed}"
                raise UserError(msg)


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

CIFAR100 = dataclasses.replace(CIFAR10, dataset="cifar100")
SVHN = dataclasses.replace(CIFAR10, dataset="svhn")
TINY_IMAGENET = dataclasses.replace(CIFAR10, dataset="tiny_imagenet")

RECIPES = {
    recipe.dataset: recipe
    for recipe in (DIGITS, CIFAR10, CIFAR100, SVHN, TINY_IMAGENET)
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line: the experiment, and what to do with its run directory."""

    config: Config
    out: Path
    resume: bool
    plots: bool


def parse(arguments: Sequence[str] | None = None) -> Command:
    """Read the command line; what it leaves out comes from the data set's recipe."""
    given = vars(_parser().parse_args(arguments))
    out, resume, plots = given.pop("out", None), given.pop("resume"), given.pop("plots")
    if "arms" in given:
        given["arms"] = tuple(given["arms"])
    config = dataclasses.replace(RECIPES[given.get("dataset", "digits")], **given)
    name = f"{config.dataset}-{config.model}-seed{config.seed}"
    return Command(config, Path(out or Path("runs", name)), resume, plots)


def option(field: str) -> str:
    """Return the name of a field on the command line."""
    return "--" + field.replace("_", "-")


def _parser() -> Parser:
    # Heavy imports, not for the import of Config.
    from benchmarks import arms, models
    from benchmarks.models.initialisation import INITIALISATIONS

    parser = Parser(
        prog="python -m benchmarks.train",
        description="Train the same network plainly, with TempBalance, or otherwise.",
        epilog="Numbers that are not given come from the recipe of the data set.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--dataset", choices=tuple(RECIPES), help="digits by default")
    add("--data-dir", help="the hub's SPLIT-*.parquet files; default: the hub")
    add("--subset", type=int, help="train on the first SUBSET rows")
    add("--validation", type=int, help="hold out VALIDATION training rows")
    add("--model", choices=models.NAMES, help="a network")
    add("--width", type=float, help="factor on its channels")
    add("--epochs", type=int, help="passes over the training rows")
    add("--batch-size", type=int, help="rows of a step")
    add("--learning-rate", type=float, help="rate of the first epoch, of all arms")
    add("--weight-decay", type=float, help="L2 coefficient, of all parameters")
    add("--momentum", type=float, help="momentum of SGD")
    add("--snr", type=float, help="coefficient of spectral norm regularisation")
    add("--low", type=float, help="smallest multiplier")
    add("--high", type=float, help="largest multiplier")
    add("--metric", choices=tuple(arms.METRICS), help="what multipliers are read off")
    add("--fit", choices=tuple(arms.FITS), help="where the tail of a spectrum starts")
    add("--norms", action=switch, help="whether norms have their layer's multiplier")
    add("--ends", action=switch, help="whether the first and last layer are balanced")
    add("--init", choices=tuple(INITIALISATIONS), help="initial weights as in these")
    add("--interval", type=int, help="epochs from one analysis to the next")
    add("--compute", choices=COMPUTE, help="type that training computes in")
    add("--arms", nargs="+", choices=tuple(arms.ARMS), help="what to compare")
    add("--seed", type=int, help="seed of weights, row order and augmentation")
    add("--out", help="run directory; default: runs/DATASET-MODEL-seedSEED")
    add("--resume", action="store_true", default=False, help="continue a run")
    add("--no-plots", dest="plots", action="store_false", default=True, help="no PNGs")
    return parser
