"""Image data sets, decoded once to uint8 arrays."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from benchmarks.configs import Config
from benchmarks.data.augment import Preparation
from benchmarks.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images (N, H, W, C) in uint8 and labels (N,) in int32, in a fixed order."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    preparation: Preparation

    def digest(self) -> str:
        """Return a SHA-256 over everything a run reads."""
        digest = hashlib.sha256()
        for array in (
            self.train_images,
            self.train_labels,
            self.test_images,
            self.test_labels,
        ):
            digest.update(repr(array.shape).encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def load(config: Config) -> Dataset:
    """Read the data set of an experiment, and check that it has rows enough.

    `config.data_dir` holds `train-*.parquet` and `test-*.parquet`; without it the
    Hugging Face hub is read.  The digits come with scikit-learn and need neither.
    """
    subset = config.subset
    if config.dataset == "digits":
        pad, flip = 1, False
        if config.data_dir is not None:
            msg = f"--data-dir is {config.data_dir!r}, but digits read no directory"
            raise UserError(msg)
        from benchmarks.data import digits  # Each reader needs packages of its own.

        train, test = digits.read()
    else:
        pad, flip = 4, True
        from benchmarks.data import parquet

        data_dir = None if config.data_dir is None else Path(config.data_dir)
        train = parquet.read("uoft-cs/cifar10", "train", data_dir, rows=subset)
        test = parquet.read("uoft-cs/cifar10", "test", data_dir)
    rows = len(train[1])
    if subset is not None and subset > rows:
        msg = f"--subset is {subset}; allowed: at most the {rows} training rows"
        raise UserError(msg)
    rows = subset or rows
    if config.batch_size > rows:
        msg = f"--batch-size is {config.batch_size}; allowed: at most the {rows} rows"
        raise UserError(msg)
    images, labels = train[0][:subset], train[1][:subset]
    return Dataset(
        images,
        labels,
        *test,
        num_classes=10,
        preparation=Preparation.of(images, pad=pad, flip=flip),
    )
