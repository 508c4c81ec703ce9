"""The published data sets, as the Hugging Face hub has them.

The augmentation is that of the published experiments, which mirror the digits of SVHN
as they mirror everything else.
"""

import dataclasses
from typing import NamedTuple


class Split(NamedTuple):
    """A split's name on the hub, and the rows it is published with."""

    name: str
    rows: int


@dataclasses.dataclass(frozen=True)
class Source:
    """Where images and labels are, and what they must be.

    Attributes:
        repository: name on the hub.
        config: name of the repository's part; None where there is one only.
        image: column of the images, a struct of `bytes` and `path`.
        label: column of the labels, integers from 0.
        train: rows to train on.
        test: rows to test on, which have labels.
        size: height and width of every image.
        num_classes: number of labels.
        pad: black pixels added on every side before a random crop.
        flip: whether half of the training images are mirrored.
    """

    repository: str
    image: str
    label: str
    train: Split
    test: Split
    config: str | None = None
    size: int = 32
    num_classes: int = 10
    pad: int = 4
    flip: bool = True


SOURCES = {
    "cifar10": Source(
        repository="uoft-cs/cifar10",
        image="img",
        label="label",
        train=Split("train", 50_000),
        test=Split("test", 10_000),
    ),
    "cifar100": Source(
        repository="uoft-cs/cifar100",
        image="img",
        label="fine_label",
        train=Split("train", 50_000),
        test=Split("test", 10_000),
        num_classes=100,
    ),
    "svhn": Source(
        repository="ufldl-stanford/svhn",
        config="cropped_digits",
        image="image",
        label="label",
        train=Split("train", 73_257),
        test=Split("test", 26_032),
    ),
    "tiny_imagenet": Source(
        repository="zh-plus/tiny-imagenet",
        image="image",
        label="label",
        train=Split("train", 100_000),
        # The test images have no labels; the published accuracies are of these.
        test=Split("valid", 10_000),
        size=64,
        num_classes=200,
    ),
}
