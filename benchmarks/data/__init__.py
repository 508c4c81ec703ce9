"""Image data sets, decoded once to uint8 arrays."""

import dataclasses
import hashlib
import itertools
from pathlib import Path

import numpy as np

from benchmarks.configs import Config
from benchmarks.data.augment import Preparation
from benchmarks.data.sources import SOURCES
from benchmarks.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images (N, H, W, C) in uint8 and labels (N,) in int32, in a fixed order.

    The validation rows are training rows that are held out; there may be none.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    preparation: Preparation

    def parts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the images and labels of each part that there is, by its name."""
        parts = {
            "train": (self.train_images, self.train_labels),
            "test": (self.test_images, self.test_labels),
            "validation": (self.validation_images, self.validation_labels),
        }
        return {name: part for name, part in parts.items() if len(part[1])}

    def digest(self) -> str:
        """Return a SHA-256 over everything a run reads."""
        digest = hashlib.sha256()
        for array in itertools.chain(*self.parts().values()):
            digest.update(repr(array.shape).encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def load(config: Config) -> Dataset:
    """Read the data set of an experiment, and check that it has rows enough.

    `config.data_dir` holds `<split>-*.parquet`, with the splits of
    `benchmarks.data.sources`; without it the Hugging Face hub is read.  The digits come
    with scikit-learn and need neither.
    """
    if config.dataset == "digits":
        pad, flip, num_classes = 1, False, 10
        if config.data_dir is not None:
            msg = f"--data-dir is {config.data_dir!r}, but digits read no directory"
            raise UserError(msg)
        from benchmarks.data import digits  # Each reader needs packages of its own.

        (images, labels), test = digits.read()
    else:
        source = SOURCES[config.dataset]
        pad, flip, num_classes = source.pad, source.flip, source.num_classes
        from benchmarks.data import parquet

        data_dir = None if config.data_dir is None else Path(config.data_dir)
        # Validation rows lie behind the subset: then all are read.
        rows = config.subset if config.validation is None else None
        images, labels = parquet.read(source, source.train, data_dir, rows=rows)
        test = parquet.read(source, source.test, data_dir)
    train, held_out = partition(len(labels), config)
    validation = images[held_out], labels[held_out]
    images, labels = images[train], labels[train]
    preparation = Preparation.of(images, pad=pad, flip=flip)
    return Dataset(images, labels, *validation, *test, num_classes, preparation)


def partition(rows: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Choose the rows to train on and those to hold out, both in their old order.

    A subset trains on the first rows whatever is held out, which then lies behind them.
    The rows held out depend on no seed of a run, and more of them include fewer.
    """
    subset, validation = config.subset, config.validation or 0
    if subset is not None and subset > rows:
        msg = f"--subset is {subset}; allowed: at most the {rows} training rows"
        raise UserError(msg)
    if config.batch_size > (subset or rows):
        msg = (
            f"--batch-size is {config.batch_size}; "
            f"allowed: at most the {subset or rows} rows"
        )
        raise UserError(msg)
    most = rows - (subset or config.batch_size)
    if validation > most:
        left = "--subset" if subset else "--batch-size"
        msg = (
            f"--validation is {validation}; allowed: at most {most}, "
            f"the {rows} training rows less {left}"
        )
        raise UserError(msg)
    first = subset or 0
    order = first + np.random.default_rng(0).permutation(rows - first)
    held_out = np.sort(order[:validation])
    train = np.delete(np.arange(rows), held_out)[:subset]
    return train, held_out
