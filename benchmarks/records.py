"""The files of a run: `config.json`, `metrics.jsonl`, `layers.jsonl`.

A line of `metrics.jsonl` is an arm after so many epochs; a line of `layers.jsonl` is
one layer of an arm whose weights have seen so many epochs, 0 being the initial ones.
Lines are written before the checkpoint of their epoch, so that after a kill the files
hold what the checkpoint knows of, and perhaps a rest that `rewind` takes off.
"""

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from benchmarks.configs import Config, option
from benchmarks.data import Dataset
from benchmarks.errors import UserError, first_line

Row = dict[str, Any]

_CONFIG = "config.json"
_TEMPORARY = ".tmp"
# Where the data lie may change; what they are may not, and has a digest.
_FREE = {"data_dir"}
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Config)
    if field.default is not dataclasses.MISSING
}


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """A directory that one run has to itself."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One line per arm and epoch."""
        return self.path / "metrics.jsonl"

    @property
    def layers(self) -> Path:
        """One line per arm, refresh and layer."""
        return self.path / "layers.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One directory per arm."""
        return self.path / "checkpoints"

    def check(self, config: Config, *, resume: bool) -> None:
        """Raise `UserError` if the run cannot start or continue here."""
        if check_place(self.path, _CONFIG, resume=resume):
            return
        recorded = self._recorded()["config"]
        # A run that is older than a field was made with what is its default now.
        recorded = _DEFAULTS | recorded
        for name, value in plain(config).items():
            if name not in recorded:
                msg = f"{self.path / _CONFIG} has no field {name!r}; give another --out"
                raise UserError(msg)
            if name not in _FREE and recorded[name] != value:
                msg = (
                    f"{option(name)} is {value!r}, but the run in {self.path} has "
                    f"{recorded[name]!r}; give that, or another --out"
                )
                raise UserError(msg)

    def train_rows(self) -> int:
        """Return how many rows the run trains on."""
        return read_object(self.path, _CONFIG, {"train_rows": int})["train_rows"]

    def arms(self) -> tuple[str, ...]:
        """Return the arms that the run has been opened with; none before that."""
        if is_fresh(self.path, _CONFIG):
            return ()
        return tuple(self._recorded()["config"].get("arms", ()))

    def open(self, config: Config, data: Dataset) -> None:
        """Create the directory with its `config.json`, or compare the data's digest."""
        digest = data.digest()
        if is_fresh(self.path, _CONFIG):
            self.path.mkdir(parents=True, exist_ok=True)
            packages = ("jax", "jaxlib", "optax", "flax")
            content = {
                "config": plain(config),
                "data_sha256": digest,
                "train_rows": len(data.train_labels),
                "device": jax.devices()[0].device_kind,
                "versions": {name: version(name) for name in packages},
            }
            replace(self.path / _CONFIG, json.dumps(content, indent=2) + "\n")
        self.check_data(digest)

    def check_data(self, digest: str) -> None:
        """Raise `UserError` if the run has been opened with other data."""
        if is_fresh(self.path, _CONFIG) or self._recorded()["data_sha256"] == digest:
            return
        msg = f"the data are not those of the run in {self.path}; give another --out"
        raise UserError(msg)

    def rewind(self, done: Mapping[str, int], config: Config) -> None:
        """Keep the lines that the checkpoints know of.

        Args:
            done: epochs behind the checkpoint of each arm, 0 without one.
            config: the experiment, which says what lines there must be.
        """
        expected_metrics, expected_layers = set(), set()
        for arm, epochs in done.items():
            expected_metrics |= {(arm, epoch) for epoch in range(1, epochs + 1)}
            # A table stands before the epoch that it steers; the last steers none.
            expected_layers |= {
                (arm, epoch) for epoch in range(0, epochs, config.interval)
            }
            if epochs == config.epochs:
                expected_layers.add((arm, epochs))
        metrics = _select(self.metrics, expected_metrics)
        layers = _select(self.layers, expected_layers)
        replace(self.metrics, _lines(metrics))
        replace(self.layers, _lines(layers))

    def add_arms(self, arms: Sequence[str]) -> None:
        """Write down that the run has other arms too; none depends on the others."""
        content = self._recorded()
        content["config"]["arms"] = [*content["config"]["arms"], *arms]
        replace(self.path / _CONFIG, json.dumps(content, indent=2) + "\n")

    def _recorded(self) -> dict[str, Any]:
        return read_object(self.path, _CONFIG, {"config": dict, "data_sha256": str})


def check_place(path: Path, first: str, *, resume: bool) -> bool:
    """Raise `UserError` if nothing can start or continue in a directory.

    Args:
        path: the directory.
        first: name of the file that is written before any other.
        resume: whether something may be there.

    Returns:
        Whether it is fresh.
    """
    if path.exists() and not path.is_dir():
        msg = f"{path} is no directory; give another --out"
        raise UserError(msg)
    fresh = is_fresh(path, first)
    if not fresh and not resume:
        msg = f"{path} is not empty; give --resume or another --out"
        raise UserError(msg)
    return fresh


def is_fresh(path: Path, first: str) -> bool:
    """Whether nothing is here, but for what a kill may leave of the first file."""
    if not path.exists():
        return True
    return {entry.name for entry in path.iterdir()} <= {first + _TEMPORARY}


def read_object(path: Path, name: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """Read the JSON file that says what a directory holds, by fields of these types."""
    file = path / name
    if not file.exists():
        msg = f"{path} holds no run: no {name}; give another --out"
        raise UserError(msg)
    try:
        content = json.loads(file.read_bytes())
        for field, kind in fields.items():
            if not isinstance(content[field], kind):
                msg = f"{field} is no {kind.__name__}"
                raise TypeError(msg)
    except (ValueError, TypeError, KeyError) as error:
        msg = f"{file} is damaged ({first_line(error)}); give another --out"
        raise UserError(msg) from error
    return content


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add lines to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(rows))


def read(path: Path) -> list[Row]:
    """Read the lines of a file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    del rest  # Behind the last newline: nothing, or a line without its end.
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row["arm"], str) or not isinstance(row["epoch"], int):
                msg = "arm or epoch has a wrong type"
                raise TypeError(msg)
        except (ValueError, TypeError, KeyError) as error:
            msg = f"{path} is damaged in line {number} ({first_line(error)})"
            raise UserError(msg) from error
        rows.append(row)
    return rows


def _select(path: Path, expected: Set[tuple[str, int]]) -> list[Row]:
    """Return the rows of the expected arms and epochs, all of which must be there.

    Each has as many rows as any other: a table that a cut left shorter is not there.
    """
    rows = read(path)
    counts = collections.Counter((row["arm"], row["epoch"]) for row in rows)
    most = max(counts.values(), default=1)
    missing = {key for key in expected if counts[key] < most}
    if missing:
        arm, epoch = min(missing)
        msg = (
            f"{path} lacks epoch {epoch} of {arm}, which its checkpoint has; "
            "give another --out"
        )
        raise UserError(msg)
    return [row for row in rows if (row["arm"], row["epoch"]) in expected]


def plain(config: Config) -> dict[str, Any]:
    """Return a config as JSON would give it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)


def _finite(row: Row) -> Row:
    """JSON has no word for infinity or not-a-number: null stands for both."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def replace(path: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old one or the new one."""
    temporary = path.with_name(path.name + _TEMPORARY)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
