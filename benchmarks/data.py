"""Image data sets: the digits of scikit-learn, and those of the Hugging Face hub.

A data set of the hub is read from there or from a directory with its parquet files. An
image is a struct of `bytes` (a PNG or JPEG file, gray or in color) and `path`; a label
is an integer. Local files are read batch by batch: nothing is cached, so a changed file
is never mistaken for an older one, and nothing is written next to the data.

The hub must have exactly the published rows. A directory may have fewer, as a part of a
data set is one too; more are a mistake, such as two downloads in one place.
"""

import contextlib
import dataclasses
import io
import itertools
import logging
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import sklearn.datasets
from PIL import Image
from pyarrow import parquet

from benchmarks.configs import Config
from benchmarks.errors import UserError, first_line
from benchmarks.images import Dataset, Preparation
from benchmarks.runs import Run

Rows = tuple[np.ndarray, np.ndarray]


class Split(NamedTuple):
    """A split's name on the hub, and the number of rows it is published with."""

    name: str
    rows: int


@dataclasses.dataclass(frozen=True)
class Source:
    """Where images and labels are, and what they must be.

    The augmentation is that of the published experiments, which mirror the digits of
    SVHN as they mirror everything else.

    Attributes:
        repository: name on the hub.
        image: column of the images, a struct of `bytes` and `path`.
        label: column of the labels, integers from 0.
        train: rows to train on.
        test: rows to test on, which have labels.
        config: name of the repository's part; None where there is only one.
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


_CIFAR = Split("train", 50_000), Split("test", 10_000)

SOURCES = {
    "cifar10": Source("uoft-cs/cifar10", "img", "label", *_CIFAR),
    "cifar100": Source(
        "uoft-cs/cifar100", "img", "fine_label", *_CIFAR, num_classes=100
    ),
    "svhn": Source(
        "ufldl-stanford/svhn",
        "image",
        "label",
        Split("train", 73_257),
        Split("test", 26_032),
        config="cropped_digits",
    ),
    "tiny_imagenet": Source(
        "zh-plus/tiny-imagenet",
        "image",
        "label",
        Split("train", 100_000),
        # The test images have no labels; the published accuracies are of these.
        Split("valid", 10_000),
        size=64,
        num_classes=200,
    ),
}


def load(config: Config) -> Dataset:
    """Read the data set of an experiment, and check that it has enough rows.

    `config.data_dir` holds `SPLIT-*.parquet`, with the splits of `SOURCES`; without it,
    the hub is read. The digits need neither.
    """
    if config.dataset == "digits":
        pad, flip, num_classes = 1, False, 10
        if config.data_dir is not None:
            msg = f"--data-dir is {config.data_dir!r}, but digits read no directory"
            raise UserError(msg)
        (images, labels), test = _digits()
    else:
        source = SOURCES[config.dataset]
        pad, flip, num_classes = source.pad, source.flip, source.num_classes
        data_dir = None if config.data_dir is None else Path(config.data_dir)
        # Validation rows come after the subset: then all rows are read.
        rows = config.subset if config.validation is None else None
        images, labels = read(source, source.train, data_dir, rows=rows)
        test = read(source, source.test, data_dir)
    train, held_out = partition(len(labels), config)
    validation = images[held_out], labels[held_out]
    images, labels = images[train], labels[train]
    preparation = Preparation.of(images, pad=pad, flip=flip)
    return Dataset(images, labels, *validation, *test, num_classes, preparation)


def load_all(runs: Sequence[Run]) -> dict[str, Dataset]:
    """Return the data of each variant, read once where they are the same.

    Raises:
        UserError: if a run has been opened with other data.
    """
    fields = ("dataset", "data_dir", "subset", "validation", "batch_size")
    loaded, found = {}, {}
    for run in runs:
        what = tuple(getattr(run.config, field) for field in fields)
        if what not in loaded:
            dataset = load(run.config)
            loaded[what] = dataset, dataset.digest()
        found[run.variant], digest = loaded[what]
        run.check(digest)
    return found


def partition(rows: int, config: Config) -> Rows:
    """Choose the rows to train on and those to hold out, both in their old order.

    A subset is the first rows, whatever is held out: that comes after them. The rows
    that are held out depend on no seed of a run, and more of them include fewer.
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


def _digits() -> tuple[Rows, Rows]:
    """Return 1,437 rows to train on and 360 to test on, images of 8 x 8 pixels.

    The file is in the order of its writers, so one fixed shuffle, the same for every
    seed of a run, comes before the split.
    """
    pixels: Any = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(pixels["target"]))
    # Gray levels are whole numbers from 0 to 16.
    images = np.asarray(pixels["images"], np.uint8)[order, :, :, None]
    labels = np.asarray(pixels["target"], np.int32)[order]
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:])


def read(
    source: Source, split: Split, data_dir: Path | None, *, rows: int | None = None
) -> Rows:
    """Read one split.

    Args:
        source: the data set.
        split: `source.train` or `source.test`; its files are `SPLIT-*.parquet`.
        data_dir: a local directory; None reads the hub.
        rows: stop after this many rows; None reads all.

    Returns:
        Images (N, size, size, 3) in uint8 and labels (N,) in int32.
    """
    place = source.repository if data_dir is None else str(data_dir)
    found = _hub(source, split) if data_dir is None else _local(source, split, data_dir)
    images, labels = [], []
    with contextlib.closing(found):
        for number, row in enumerate(itertools.islice(found, rows)):
            where = f"{place}: {split.name} row {number}"
            if number == split.rows:
                msg = f"{where} is one too many; published: {split.rows} rows"
                raise UserError(msg)
            images.append(_pixels(row[source.image], source, where))
            labels.append(_label(row[source.label], source, where))
    if not images:
        msg = f"{place}: the {split.name} split has no rows"
        raise UserError(msg)
    return np.stack(images), np.array(labels, np.int32)


def _hub(source: Source, split: Split) -> Generator[dict[str, Any], None, None]:
    """Yield rows from the hub, through its own cache."""
    import datasets  # Not needed, and often not there, where the files are local.

    for reader in ("datasets", "huggingface_hub"):  # What goes wrong is raised, too.
        logging.getLogger(reader).setLevel(logging.CRITICAL)
    name = source.repository
    try:
        rows = datasets.load_dataset(
            name, source.config, split=split.name, verification_mode="basic_checks"
        )
        if len(rows) != split.rows:
            msg = (
                f"the hub's {name} has {len(rows)} rows in {split.name}; "
                f"published: {split.rows}; give --data-dir"
            )
            raise UserError(msg)
        rows = rows.cast_column(source.image, datasets.Image(decode=False))
        yield from _rows(rows, source, name)
    except UserError:
        raise
    except Exception as error:  # Whatever the network and the hub's client raise.
        files = f"{source.train.name}-*.parquet and {source.test.name}-*.parquet"
        msg = (
            f"the hub's {name} cannot be read ({first_line(error)}); "
            f"give --data-dir with {files}"
        )
        raise UserError(msg) from error


def _local(
    source: Source, split: Split, data_dir: Path
) -> Generator[dict[str, Any], None, None]:
    """Yield rows from the parquet files of a directory."""
    if not data_dir.is_dir():
        msg = f"--data-dir is {str(data_dir)!r}, which is not a directory"
        raise UserError(msg)
    files = sorted(map(str, data_dir.glob(f"{split.name}-*.parquet")))
    if not files:
        msg = f"{data_dir}: no file {split.name}-*.parquet"
        raise UserError(msg)
    for file in files:
        try:
            with parquet.ParquetFile(file) as content:
                for batch in content.iter_batches(batch_size=1000):
                    yield from _rows(batch.to_pylist(), source, file)
        except (pyarrow.ArrowException, OSError) as error:
            msg = f"{file} cannot be read as parquet ({first_line(error)})"
            raise UserError(msg) from error


def _rows(rows: Any, source: Source, place: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        if missing := {source.image, source.label} - set(row):
            msg = (
                f"{place}: no column {', '.join(sorted(missing))}; "
                f"it has {', '.join(sorted(row))}"
            )
            raise UserError(msg)
        yield row


def _pixels(image: Any, source: Source, where: str) -> np.ndarray:
    content = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(content, bytes):
        msg = f"{where}: {source.image} holds no image bytes"
        raise UserError(msg)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise many types on damaged files.
        msg = f"{where}: the image cannot be decoded ({first_line(error)})"
        raise UserError(msg) from error
    height, width, _ = pixels.shape
    if (height, width) != (source.size, source.size):
        allowed = f"{source.size}x{source.size}"
        msg = f"{where}: the image is {width}x{height}; allowed: {allowed}"
        raise UserError(msg)
    return pixels


def _label(label: Any, source: Source, where: str) -> int:
    last = source.num_classes - 1
    if not isinstance(label, int) or not 0 <= label <= last:
        msg = f"{where}: {source.label} is {label!r}; allowed: 0 to {last}"
        raise UserError(msg)
    return label
