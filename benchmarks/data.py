"""Image data sets: the digits of scikit-learn, and those of the Hugging Face hub.

A data set of the hub is read from there or from a directory with its parquet files. An
image is a struct of `bytes` (a PNG or JPEG file, gray or in color) and `path`; a label
is an integer. Local files are never cached, so a changed file is not mistaken for an
older one, and nothing is written next to the data.

The hub must have exactly the published rows. A directory may have fewer, as a part of a
data set is one too; more are a mistake, such as two downloads in one place.
"""

import dataclasses
import io
import itertools
import logging
from collections.abc import Iterator, Sequence
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
Pairs = Iterator[tuple[Any, Any]]  # Of an image and a label, as they are stored.


class Split(NamedTuple):
    """A split's name on the hub, and the number of rows it is published with."""

    name: str
    rows: int


@dataclasses.dataclass(frozen=True)
class Source:
    """Where images and labels are, and what they must be.

    Attributes:
        repository: name on the hub.
        image: column of the images, a struct of `bytes` and `path`.
        label: column of the labels, integers from 0.
        train: rows to train on.
        test: rows to test on, which have labels.
        config: name of the repository's part; None where there is only one.
        size: height and width of every image.
        num_classes: number of labels.
    """

    repository: str
    image: str
    label: str
    train: Split
    test: Split
    config: str | None = None
    size: int = 32
    num_classes: int = 10


_CIFAR = Split("train", 50_000), Split("test", 10_000)
_SVHN = Split("train", 73_257), Split("test", 26_032)
# The test images of TinyImageNet have no labels; the published accuracies are of these.
_TINY = Split("train", 100_000), Split("valid", 10_000)

SOURCES = {
    "cifar10": Source("uoft-cs/cifar10", "img", "label", *_CIFAR),
    "cifar100": Source(
        "uoft-cs/cifar100", "img", "fine_label", *_CIFAR, num_classes=100
    ),
    "svhn": Source(
        "ufldl-stanford/svhn", "image", "label", *_SVHN, config="cropped_digits"
    ),
    "tiny_imagenet": Source(
        "zh-plus/tiny-imagenet", "image", "label", *_TINY, size=64, num_classes=200
    ),
}


def load(config: Config) -> Dataset:
    """Read the data set of an experiment, and check that it has enough rows.

    `config.data_dir` holds `SPLIT-*.parquet`, with the splits of `SOURCES`; without it,
    the hub is read. The digits need neither. The augmentation is that of the published
    experiments, which mirror the digits of SVHN as they mirror everything else.
    """
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    if config.dataset == "digits":
        pad, flip, num_classes = 1, False, 10
        if data_dir is not None:
            given = f"--data-dir is {config.data_dir!r}"
            raise UserError(f"{given}, but digits read no directory")
        (images, labels), test = _digits()
    else:
        source = SOURCES[config.dataset]
        pad, flip, num_classes = 4, True, source.num_classes
        # Validation rows come after the subset: then all rows are read.
        rows = config.subset if config.validation is None else None
        images, labels = read(source, source.train, data_dir, rows=rows)
        test = read(source, source.test, data_dir)
    train, held_out = partition(len(labels), config)
    parts = {"train": (images[train], labels[train]), "test": test}
    if len(held_out):
        parts["validation"] = images[held_out], labels[held_out]
    preparation = Preparation.of(images[train], pad=pad, flip=flip)
    return Dataset(parts, num_classes, preparation)


def load_all(runs: Sequence[Run]) -> dict[str, Dataset]:
    """Return the data of each variant, read once where they are the same."""
    fields = ("dataset", "data_dir", "subset", "validation", "batch_size")
    loaded, found = {}, {}
    for run in runs:
        what = tuple(getattr(run.config, field) for field in fields)
        if what not in loaded:
            loaded[what] = load(run.config)
        found[run.variant] = loaded[what]
        run.check(loaded[what].digest)
    return found


def partition(rows: int, config: Config) -> Rows:
    """Choose the rows to train on and those to hold out, both in their old order.

    A subset is the first rows, whatever is held out: that comes after them. The rows
    that are held out depend on no seed of a run, and more of them include fewer.
    """
    subset, validation = config.subset or 0, config.validation or 0
    usable = subset or rows
    most = rows - (subset or config.batch_size)
    left = "--subset" if subset else "--batch-size"
    for option, value, limit, words in (
        ("--subset", subset, rows, f"the {rows} training rows"),
        ("--batch-size", config.batch_size, usable, f"the {usable} rows"),
        ("--validation", validation, most, f"{most}, the {rows} rows less {left}"),
    ):
        if value > limit:
            raise UserError(f"{option} is {value}; allowed: at most {words}")
    order = subset + np.random.default_rng(0).permutation(rows - subset)
    held_out = np.sort(order[:validation])
    train = np.delete(np.arange(rows), held_out)[: subset or None]
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
    """Read a split, from `SPLIT-*.parquet` in a directory or from the hub.

    Returns:
        Images (N, size, size, 3) in uint8 and labels (N,) in int32, of the first rows.
    """
    place = source.repository if data_dir is None else str(data_dir)
    found = _hub(source, split) if data_dir is None else _local(source, split, data_dir)
    images, labels = [], []
    for number, (image, label) in enumerate(itertools.islice(found, rows)):
        where = f"{place}: {split.name} row {number}"
        if number == split.rows:
            raise UserError(f"{where} is one too many; published: {split.rows} rows")
        images.append(_pixels(image, source, where))
        last = source.num_classes - 1
        if not isinstance(label, int) or not 0 <= label <= last:
            allowed = f"allowed: 0 to {last}"
            raise UserError(f"{where}: {source.label} is {label!r}; {allowed}")
        labels.append(label)
    if not images:
        raise UserError(f"{place}: the {split.name} split has no rows")
    return np.stack(images), np.array(labels, np.int32)


def _hub(source: Source, split: Split) -> Pairs:
    """Read rows from the hub, through its own cache."""
    import datasets  # Not needed, and often not there, where the files are local.

    for reader in ("datasets", "huggingface_hub"):  # What goes wrong is raised, too.
        logging.getLogger(reader).setLevel(logging.CRITICAL)
    name, options = f"the hub's {source.repository}", {"split": split.name}
    options["verification_mode"] = "basic_checks"
    try:
        rows = datasets.load_dataset(source.repository, source.config, **options)
        _check_columns(rows.column_names, source, name)
        rows = rows.cast_column(source.image, datasets.Image(decode=False))
    except UserError:
        raise
    except Exception as error:  # Whatever the network and the hub's client raise.
        files = f"{source.train.name}-*.parquet and {source.test.name}-*.parquet"
        why = f"({first_line(error)}); give --data-dir with {files}"
        raise UserError(f"{name} cannot be read {why}") from error
    if len(rows) != split.rows:
        there = f"{len(rows)} rows in {split.name}; published: {split.rows}"
        raise UserError(f"{name} has {there}; give --data-dir")
    return ((row[source.image], row[source.label]) for row in rows)


def _local(source: Source, split: Split, data_dir: Path) -> Pairs:
    """Yield rows from the parquet files of a directory."""
    if not data_dir.is_dir():
        given = f"--data-dir is {str(data_dir)!r}"
        raise UserError(f"{given}, which is not a directory")
    files = sorted(map(str, data_dir.glob(f"{split.name}-*.parquet")))
    if not files:
        raise UserError(f"{data_dir}: no file {split.name}-*.parquet")
    for file in files:
        try:
            with parquet.ParquetFile(file) as content:
                table = content.read()
            _check_columns(table.column_names, source, file)
            columns = [table[k].to_pylist() for k in (source.image, source.label)]
        except (pyarrow.ArrowException, OSError) as error:
            why = first_line(error)
            raise UserError(f"{file} cannot be read as parquet ({why})") from error
        yield from zip(*columns, strict=True)


def _check_columns(names: Sequence[str], source: Source, place: str) -> None:
    if missing := {source.image, source.label} - set(names):
        there = f"it has {', '.join(sorted(names))}"
        raise UserError(f"{place}: no column {', '.join(sorted(missing))}; {there}")


def _pixels(image: Any, source: Source, where: str) -> np.ndarray:
    content = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(content, bytes):
        raise UserError(f"{where}: {source.image} holds no image bytes")
    try:
        with Image.open(io.BytesIO(content)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise many types on damaged files.
        why = first_line(error)
        raise UserError(f"{where}: the image cannot be decoded ({why})") from error
    height, width, _ = pixels.shape
    if (height, width) != (source.size, source.size):
        allowed = f"{source.size}x{source.size}"
        raise UserError(f"{where}: the image is {width}x{height}; allowed: {allowed}")
    return pixels
