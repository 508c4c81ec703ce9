"""A run: one arm of an experiment from one seed, in a directory of its own.

    run.json        everything that the numbers depend on, the digest of the data, the
                    epochs done, a row per epoch, and a row per layer and analysis, of
                    which epoch 0 is before training
    checkpoints/    the state after these epochs, written by Orbax

`run.json` is replaced last and at once, and has digests of its own content and of the
state: what a kill leaves after them is forgotten, and what is damaged is found.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Generator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from benchmarks.configs import LanguageConfig, option
from benchmarks.errors import UserError, first_line
from benchmarks.files import Row, digest, is_empty, read_json, write_json
from benchmarks.loop import Program, TrainState
from benchmarks.published import settings

RECORD, METRICS, LAYERS = "run.json", "metrics", "layers"

# Where the data lie may change; what they are may not, and has a digest.
_FREE = ("arms", "data_dir")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run and its files.

    Attributes:
        path: its directory.
        config: its experiment and seed, a `Config` or a `LanguageConfig`.
        arm: name in `benchmarks.arms`.
        variant: name of the experiment in a grid.
    """

    path: Path
    config: Any
    arm: str
    variant: str = "base"

    @property
    def rate(self) -> float:
        """The learning rate that the schedule starts from."""
        if isinstance(self.config, LanguageConfig):
            return self.config.learning_rate
        return settings(self.config, self.arm).learning_rate

    def done(self) -> int:
        """Return the number of epochs that are saved."""
        return self.record()["epochs"]

    def record(self) -> Row:
        """Return what is saved, or raise `UserError` if it is damaged."""
        file = self.path / RECORD
        if not file.exists():
            return {"epochs": 0, METRICS: [], LAYERS: []}
        kinds = {METRICS: list, LAYERS: list, "data_sha256": str, "sha256": str}
        record = read_json(file, config=dict, epochs=int, **kinds)
        if record["sha256"] != _own_digest(record):
            raise UserError(f"{file} is damaged: not what was saved; restore it")
        return record

    def rows(self, name: str) -> list[Row]:
        """Return the rows of `METRICS` or `LAYERS`, and which run they are of."""
        own = {"variant": self.variant, "arm": self.arm, "seed": self.config.seed}
        return [own | row for row in self.record()[name]]

    def check(self, data_sha256: str | None = None) -> None:
        """Raise `UserError` if its directory holds another run or a damaged one.

        Args:
            data_sha256: digest of the data, if they are read already.
        """
        if is_empty(self.path):
            return
        file, other = self.path / RECORD, "give another --out"
        if not file.exists():
            raise UserError(f"{self.path} holds no run: no {RECORD}; {other}")
        record = self.record()
        for name, value in self._recorded().items():
            if name not in record["config"]:
                raise UserError(f"{file} has no field {name!r}; {other}")
            if (there := record["config"][name]) != value:
                raise UserError(
                    f"{option(name)} is {value!r}, but the run in {self.path} has "
                    f"{there!r}; give that, or another --out"
                )
        if data_sha256 not in (None, record["data_sha256"]):
            raise UserError(
                f"the data are not those of the run in {self.path}; {other}"
            )

    def start(self, data: Any) -> None:
        """Write down what is trained on what, unless that is there."""
        if not is_empty(self.path):
            return
        self.path.mkdir(parents=True, exist_ok=True)
        packages = ("jax", "jaxlib", "optax", "flax")
        own = {
            "config": self._recorded(),
            "data_sha256": data.digest,
            "train_rows": len(data.parts["train"][-1]),
            "device": jax.devices()[0].device_kind,
            "versions": {name: version(name) for name in packages},
        }
        self.write(own | self.record())

    @contextlib.contextmanager
    def session(self, program: Program) -> Generator["Session"]:
        """Give the state that is saved, or the first one."""
        record, directory = self.record(), self.path / "checkpoints"
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        if done := record["epochs"]:
            # Before Orbax reads it, which reports damage in many ways.
            place = directory / str(done)
            if digest(place) != record["checkpoint_sha256"]:
                raise UserError(f"{place} is damaged or gone; give another --out")
        with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
            _forget_others(manager, done)
            if done:
                state = _restore(manager, done, program.abstract)
            else:
                state = program.start(self.config.seed, self.rate)
            yield Session(self, manager, record, state)

    def _recorded(self) -> Row:
        """Return what the numbers depend on, as JSON gives it back."""
        content = dataclasses.asdict(self.config) | {"arm": self.arm}
        return {name: content[name] for name in content if name not in _FREE}

    def write(self, record: Row) -> None:
        """Replace what is written down."""
        write_json(self.path / RECORD, record | {"sha256": _own_digest(record)})


@dataclasses.dataclass
class Session:
    """A run that is trained: what is written down of it, and its state."""

    run: Run
    manager: ocp.CheckpointManager
    record: Row
    state: TrainState

    def save(self, epochs: int) -> None:
        """Write the state and the record down."""
        self.manager.save(epochs, args=ocp.args.StandardSave(self.state))
        sha256 = digest(self.run.path / "checkpoints" / str(epochs))
        self.record |= {"epochs": epochs, "checkpoint_sha256": sha256}
        self.run.write(self.record)
        _forget_others(self.manager, epochs)


def _own_digest(record: Mapping[str, Any]) -> str:
    content = {name: record[name] for name in record if name != "sha256"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _forget_others(manager: ocp.CheckpointManager, epochs: int) -> None:
    for other in set(manager.all_steps()) - {epochs}:
        manager.delete(other)


def _restore(manager: ocp.CheckpointManager, epochs: int, abstract: TrainState) -> Any:
    try:
        return manager.restore(epochs, args=ocp.args.StandardRestore(abstract))
    except Exception as error:  # Orbax and its storage raise many types.
        raise UserError(
            f"the checkpoint {manager.directory / str(epochs)} cannot be restored "
            f"({first_line(error)}); give another --out"
        ) from error
