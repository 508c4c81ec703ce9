"""Images from parquet files in the schema of the Hugging Face hub.

An image is a struct of `bytes` (a PNG or JPEG file, grey or in colour) and `path`; a
label is an integer.  Local files are streamed: nothing is cached, so a changed file is
never mistaken for an older one, and nothing is written next to the data.

The hub has exactly the published rows.  A directory may have fewer, as a part of a
data set is one too; more are a mistake, such as two downloads side by side.
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

from benchmarks.data.sources import Source, Split
from benchmarks.errors import UserError, first_line

ROWS_AT_ONCE = 1000

Batch = dict[str, Any]


def read(
    source: Source, split: Split, data_dir: Path | None, *, rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read one split.

    Args:
        source: the data set.
        split: `source.train` or `source.test`; the files are
            `<data_dir>/<split.name>-*.parquet`.
        data_dir: a local directory; None reads the hub.
        rows: stop after so many rows; None reads all.

    Returns:
        Images (N, size, size, 3) in uint8 and labels (N,) in int32.
    """
    place = source.repository if data_dir is None else str(data_dir)
    batches = (
        _hub(source, split) if data_dir is None else _local(source, split, data_dir)
    )
    images, labels = [], []
    with contextlib.closing(batches):
        pairs = (
            pair
            for batch in batches
            for pair in zip(batch[source.image], batch[source.label], strict=True)
        )
        for row, (image, label) in enumerate(itertools.islice(pairs, rows)):
            where = f"{place}: {split.name} row {row}"
            if row == split.rows:
                msg = f"{where} is one too many; published: {split.rows} rows"
                raise UserError(msg)
            images.append(_decode(image, source, where))
            labels.append(_check(label, source, where))
    if not images:
        msg = f"{place}: the {split.name} split has no rows"
        raise UserError(msg)
    return np.stack(images), np.array(labels, np.int32)


def _hub(source: Source, split: Split) -> Generator[Batch, None, None]:
    """Yield batches of rows from the hub, through its own cache."""
    repository = source.repository
    try:
        with _quiet():
            rows = datasets.load_dataset(
                repository,
                source.config,
                split=split.name,
                verification_mode="basic_checks",
            )
        if len(rows) != split.rows:
            msg = (
                f"the hub's {repository} has {len(rows)} rows in {split.name}; "
                f"published: {split.rows}; give --data-dir"
            )
            raise UserError(msg)
        rows = rows.cast_column(source.image, datasets.Image(decode=False))
        yield from _batches(rows, source, repository)
    except UserError:
        raise
    except Exception as error:  # Whatever the network and the hub's client raise.
        files = " and ".join(
            f"{part.name}-*.parquet" for part in (source.train, source.test)
        )
        msg = (
            f"the hub's {repository} cannot be read ({first_line(error)}); "
            f"give --data-dir with {files}"
        )
        raise UserError(msg) from error


def _local(
    source: Source, split: Split, data_dir: Path
) -> Generator[Batch, None, None]:
    """Yield batches of rows from the parquet files of a directory."""
    if not data_dir.is_dir():
        msg = f"--data-dir is {str(data_dir)!r}, which is not a directory"
        raise UserError(msg)
    files = sorted(map(str, data_dir.glob(f"{split.name}-*.parquet")))
    if not files:
        msg = f"{data_dir}: no file {split.name}-*.parquet"
        raise UserError(msg)
    with tempfile.TemporaryDirectory() as cache, _quiet():
        for file in files:
            try:
                rows = datasets.load_dataset(
                    "parquet",
                    data_files={split.name: [file]},
                    split=split.name,
                    streaming=True,
                    cache_dir=cache,
                )
                yield from _batches(rows.decode(False), source, file)
            except UserError:
                raise
            except Exception as error:  # Each layer below has errors of its own.
                msg = f"{file} cannot be read as parquet ({first_line(error)})"
                raise UserError(msg) from error


def _batches(rows: Any, source: Source, place: str) -> Iterator[Batch]:
    for batch in rows.iter(batch_size=ROWS_AT_ONCE):
        missing = {source.image, source.label} - set(batch)
        if missing:
            msg = (
                f"{place}: no column {', '.join(sorted(missing))}; "
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


def _decode(image: Any, source: Source, where: str) -> np.ndarray:
    content = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(content, bytes):
        msg = f"{where}: {source.image} holds no image bytes"
        raise UserError(msg)
    side = source.size
    try:
        with Image.open(io.BytesIO(content)) as picture:
            size = picture.size
            pixels = (
                np.asarray(picture.convert("RGB")) if size == (side, side) else None
            )
    except Exception as error:  # Pillow's decoders raise many types on damaged files.
        msg = f"{where}: the image cannot be decoded ({first_line(error)})"
        raise UserError(msg) from error
    if pixels is None:
        msg = f"{where}: the image is {size[0]}x{size[1]}; allowed: {side}x{side}"
        raise UserError(msg)
    return pixels


def _check(label: Any, source: Source, where: str) -> int:
    last = source.num_classes - 1
    if not isinstance(label, int) or not 0 <= label <= last:
        msg = f"{where}: {source.label} is {label!r}; allowed: 0 to {last}"
        raise UserError(msg)
    return label
