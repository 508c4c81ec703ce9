"""The numbers of each arm, as published where they are.

The published configurations, for 200 epochs of batches of 128, give learning rates and
coefficients by data set and network. Numbers that they leave out are those of CIFAR-10
with ResNet-18, and for the other optimizers those of CIFAR-100. Departures from the
published runs:

- SNR on SVHN has the learning rate of CAL, and TB + SNR has that of TempBalance. The
  published SNR term did nothing besides weight decay until it was corrected in 2025;
  here it acts.
- SGDR restarts once, at half of the epochs: the published period at 200 epochs.
- LARS adds the weight decay before it takes the norm of the gradient, and clips
  neither gradients nor trust ratios.
- LAMB corrects the bias of its moments.
- AdamW is not among the published runs: learning rate 0.001, and a hundred times the
  weight decay, so that their product is that of SGD.
- The controls have the learning rate of TempBalance, even where CAL has another.

References:
    Zhou et al, `Temperature Balancing, Layer-wise Weight Analysis, and Neural Network
    Training <https://arxiv.org/abs/2312.00359>`_, 2023
"""

from typing import NamedTuple

from benchmarks.configs import Config, DatasetName
from benchmarks.models import Name


class Settings(NamedTuple):
    """The numbers of one arm: fields of `Config`, with a value each."""

    learning_rate: float
    snr: float
    low: float
    high: float


class _Row(NamedTuple):
    cal: float
    tb: float
    snr: float
    snr_coefficient: float
    tb_snr_coefficient: float


_USUAL = _Row(0.1, 0.1, 0.1, 0.001, 0.001)

_ROWS: dict[tuple[DatasetName, Name], _Row] = {
    ("cifar100", "resnet18"): _Row(0.1, 0.1, 0.1, 0.01, 0.001),
    ("cifar100", "resnet34"): _Row(0.05, 0.1, 0.1, 0.015, 0.005),
    ("cifar100", "vgg16"): _Row(0.05, 0.05, 0.05, 0.005, 0.005),
    ("cifar100", "vgg19"): _Row(0.05, 0.05, 0.05, 0.01, 0.01),
    ("cifar10", "resnet18"): _USUAL,
    ("cifar10", "vgg16"): _Row(0.1, 0.05, 0.05, 0.005, 0.005),
    ("svhn", "resnet18"): _Row(0.1, 0.1, 0.1, 0.005, 0.015),
    ("svhn", "vgg16"): _Row(0.05, 0.05, 0.05, 0.01, 0.005),
    ("tiny_imagenet", "resnet18"): _Row(0.1, 0.1, 0.1, 0.01, 0.001),
    ("tiny_imagenet", "resnet34"): _Row(0.1, 0.1, 0.1, 0.01, 0.001),
    ("tiny_imagenet", "wrn16_8"): _Row(0.1, 0.1, 0.1, 1e-4, 1e-4),
    ("tiny_imagenet", "wrn28_6"): _Row(0.05, 0.1, 0.1, 1e-4, 1e-4),
}

PAIRS = tuple(_ROWS)

# On CIFAR-100: of ResNet-18, which stands for all others, and of ResNet-34.
_OTHER_RATES = {
    "sgdr": (0.1, 0.05),
    "lars": (28.0, 32.0),
    "lamb": (0.01, 0.01),
    "lookahead": (0.1, 0.15),
    "sgdp": (0.1, 0.1),
    "tb_sgdp": (0.1, 0.1),
    "adamw": (0.001, 0.001),
}


def settings(config: Config, arm: str) -> Settings:
    """Return all numbers of an arm; those that the config gives take precedence."""
    row = _ROWS.get((config.dataset, config.model), _USUAL)
    narrow = arm == "tb_snr" or config.dataset == "tiny_imagenet"
    low, high = (0.6, 1.4) if narrow else (0.5, 1.5)
    coefficient = row.tb_snr_coefficient if arm == "tb_snr" else row.snr_coefficient
    rate = {"cal": row.cal, "snr": row.snr}.get(arm, row.tb)
    if arm in _OTHER_RATES:
        rate = _OTHER_RATES[arm][config.model == "resnet34"]
    given = {name: getattr(config, name) for name in Settings._fields}
    given = {name: value for name, value in given.items() if value is not None}
    return Settings(rate, coefficient, low, high)._replace(**given)
