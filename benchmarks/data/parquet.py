"""CIFAR images from parquet files in the schema of the Hugging Face hub.

Columns: `img`, a struct of `bytes` (a PNG or JPEG file) and `path`; `label`, an
integer.  Local files are streamed: nothing is cached, so a changed file is never
mistaken for an older one, and nothing is written next to the data.
"""

import contextlib
import io
import itertools
import logging
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from benchmarks.errors import UserError, first_line

SIZE = 32
NUM_CLASSES = 10
ROWS_AT_ONCE = 1000

Batch = dict[str, Any]


def read(
    repository: str, split: str, data_dir: Path | None, *, rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read one split.

    Args:
        repository: name on the hub, read where `data_dir` is None.
        split: "train" or "test"; the files are `<data_dir>/<split>-*.parquet`.
        data_dir: a local directory.
        rows: stop after so many rows; None reads all.

    Returns:
        Images (N, 32, 32, 3) in uint8 and labels (N,) in int32.
    """
    source = repository if data_dir is None else str(data_dir)
    batches = _hub(repository, split) if data_dir is None else _local(data_dir, split)
    images, labels = [], []
    with contextlib.closing(batches):
        pairs = (pair for batch in batches for pair in _pairs(batch))
        for row, (image, label) in enumerate(itertools.islice(pairs, rows)):
            where = f"{source}: {split} row {row}"
            images.append(_decode(image, where))
            labels.append(_check(label, where))
    if not images:
        msg = f"{source}: the {split} split has no rows"
        raise UserError(msg)
    return np.stack(images), np.array(labels, np.int32)


def _pairs(batch: Batch) -> Iterator[tuple[Any, Any]]:
    return zip(batch["img"], batch["label"], strict=True)


def _hub(repository: str, split: str) -> Generator[Batch, None, None]:
    """Yield batches of rows from the hub, through its own cache."""
    try:
        with _quiet():
            rows = datasets.load_dataset(repository, split=split)
        rows = rows.cast_column("img", datasets.Image(decode=False))
        yield from _batches(rows, repository)
    except UserError:
        raise
    except Exception as error:  # Whatever the network and the hub's client raise.
        msg = (
            f"the hub's {repository} cannot be read ({first_line(error)}); "
            "give --data-dir with train-*.parquet and test-*.parquet"
        )
        raise UserError(msg) from error


def _local(data_dir: Path, split: str) -> Generator[Batch, None, None]:
    """Yield batches of rows from the parquet files of a directory."""
    if not data_dir.is_dir():
        msg = f"--data-dir is {str(data_dir)!r}, which is not a directory"
        raise UserError(msg)
    files = sorted(map(str, data_dir.glob(f"{split}-*.parquet")))
    if not files:
        msg = f"{data_dir}: no file {split}-*.parquet"
        raise UserError(msg)
    with tempfile.TemporaryDirectory() as cache, _quiet():
        for file in files:
            try:
                rows = datasets.load_dataset(
                    "parquet",
                    data_files={split: [file]},
                    split=split,
                    streaming=True,
                    cache_dir=cache,
                )
                yield from _batches(rows.decode(False), file)
            except UserError:
                raise
            except Exception as error:  # Each layer below has errors of its own.
                msg = f"{file} cannot be read as parquet ({first_line(error)})"
                raise UserError(msg) from error


def _batches(rows: Any, source: str) -> Iterator[Batch]:
    for batch in rows.iter(batch_size=ROWS_AT_ONCE):
        missing = {"img", "label"} - set(batch)
        if missing:
            msg = (
                f"{source}: no column {', '.join(sorted(missing))}; "
                f"it has {', '.join(sorted(batch))}"
            )
            raise UserError(msg)
        yield batch


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Silence the readers' logs: what goes wrong is raised as well."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _decode(image: Any, where: str) -> np.ndarray:
    content = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(content, bytes):
        msg = f"{where}: img holds no image bytes"
        raise UserError(msg)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            size = picture.size
            pixels = (
                np.asarray(picture.convert("RGB")) if size == (SIZE, SIZE) else None
            )
    except Exception as error:  # Pillow's decoders raise many types on damaged files.
        msg = f"{where}: the image cannot be decoded ({first_line(error)})"
        raise UserError(msg) from error
    if pixels is None:
        msg = f"{where}: the image is {size[0]}x{size[1]}; allowed: {SIZE}x{SIZE}"
        raise UserError(msg)
    return pixels


def _check(label: Any, where: str) -> int:
    if not isinstance(label, int) or not 0 <= label < NUM_CLASSES:
        msg = f"{where}: label is {label!r}; allowed: 0 to {NUM_CLASSES - 1}"
        raise UserError(msg)
    return label
