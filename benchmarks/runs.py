"""A run: one arm of an experiment from one seed, in a directory of its own.

    config.json     everything that the numbers depend on, and the digest of the data
    metrics.jsonl   a line per epoch
    layers.jsonl    a line per layer and analysis; epoch 0 is before training
    checkpoints/    the newest state, written by Orbax
    progress.json   epochs done, with the sizes and digests of the other files

`progress.json` is replaced last and at once. What a kill leaves after the state that it
names is cut off on resuming, and a file that does not have its digest is damaged.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from benchmarks.configs import LanguageConfig, option
from benchmarks.errors import UserError, first_line
from benchmarks.files import Row, digest, is_empty, read_json, read_lines, write_json
from benchmarks.loop import Program, TrainState
from benchmarks.published import settings

METRICS, LAYERS = "metrics.jsonl", "layers.jsonl"

# Where the data lie may change; what they are may not, and has a digest.
_FREE = ("arms", "data_dir")

Save = Callable[[int, TrainState], None]


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
        return self._progress()["epochs"]

    def train_rows(self) -> int:
        """Return the number of rows that the run trains on."""
        return read_json(self.path / "config.json", train_rows=int)["train_rows"]

    def rows(self, name: str) -> list[Row]:
        """Return the rows of `METRICS` or `LAYERS`, and which run they are of."""
        own = {"variant": self.variant, "arm": self.arm, "seed": self.config.seed}
        return [own | row for row in read_lines(self.path / name)]

    def check(self, data_sha256: str | None = None) -> None:
        """Raise `UserError` if its directory holds another run or a damaged one.

        Args:
            data_sha256: digest of the data, if they are read already.
        """
        if is_empty(self.path):
            return
        file, other = self.path / "config.json", "give another --out"
        if not file.exists():
            raise UserError(f"{self.path} holds no run: no {file.name}; {other}")
        content = read_json(file, config=dict, data_sha256=str)
        for name, value in self._recorded().items():
            if name not in content["config"]:
                raise UserError(f"{file} has no field {name!r}; {other}")
            if (there := content["config"][name]) != value:
                raise UserError(
                    f"{option(name)} is {value!r}, but the run in {self.path} has "
                    f"{there!r}; give that, or another --out"
                )
        if data_sha256 not in (None, content["data_sha256"]):
            raise UserError(
                f"the data are not those of the run in {self.path}; {other}"
            )
        for name, (size, expected) in self._progress()["files"].items():
            self._check_digest(name, expected, size)

    def open(self, data: Any) -> None:
        """Start the run, or cut off what a kill has left after its saved state."""
        if is_empty(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            packages = ("jax", "jaxlib", "optax", "flax")
            content = {
                "config": self._recorded(),
                "data_sha256": data.digest(),
                "train_rows": len(data.parts()["train"][-1]),
                "device": jax.devices()[0].device_kind,
                "versions": {name: version(name) for name in packages},
            }
            write_json(self.path / "config.json", content)
        sizes = self._progress()["files"]
        for name in (METRICS, LAYERS):
            (self.path / name).touch()
            os.truncate(self.path / name, sizes.get(name, [0])[0])

    @contextlib.contextmanager
    def states(self, program: Program) -> Generator[tuple[TrainState, Save]]:
        """Give the state that is saved, or the first one, and `save(epochs, state)`."""
        progress, directory = self._progress(), self.path / "checkpoints"
        if done := progress["epochs"]:
            # Before Orbax reads it, which reports damage in many ways.
            self._check_digest(f"checkpoints/{done}", progress["checkpoint_sha256"])
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        with ocp.CheckpointManager(directory.absolute(), options=options) as manager:

            def forget_others(epochs: int) -> None:
                for other in set(manager.all_steps()) - {epochs}:
                    manager.delete(other)

            def save(epochs: int, state: TrainState) -> None:
                manager.save(epochs, args=ocp.args.StandardSave(state))
                files = {
                    name: [(self.path / name).stat().st_size, digest(self.path / name)]
                    for name in (METRICS, LAYERS)
                }
                content = {
                    "epochs": epochs,
                    "files": files,
                    "checkpoint_sha256": digest(directory / str(epochs)),
                }
                write_json(self.path / "progress.json", content)
                forget_others(epochs)

            forget_others(done)
            if done:
                state = _restore(manager, done, program.abstract)
            else:
                state = program.start(self.config.seed, self.rate)
            yield state, save

    def _recorded(self) -> dict[str, Any]:
        """Return what the numbers depend on, as JSON gives it back."""
        content = dataclasses.asdict(self.config) | {"arm": self.arm}
        return {name: content[name] for name in content if name not in _FREE}

    def _progress(self) -> dict[str, Any]:
        file = self.path / "progress.json"
        if not file.exists():
            return {"epochs": 0, "files": {}}
        return read_json(file, epochs=int, files=dict, checkpoint_sha256=str)

    def _check_digest(self, name: str, expected: str, size: int | None = None) -> None:
        path, remedy = self.path / name, "give another --out"
        try:
            found = digest(path, size)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); {remedy}"
            ) from error
        if found != expected:
            raise UserError(f"{path} is damaged: it is not what was saved; {remedy}")


def _restore(manager: ocp.CheckpointManager, epochs: int, abstract: TrainState) -> Any:
    try:
        return manager.restore(epochs, args=ocp.args.StandardRestore(abstract))
    except Exception as error:  # Orbax and its storage raise many types.
        raise UserError(
            f"the checkpoint {manager.directory / str(epochs)} cannot be restored "
            f"({first_line(error)}); give another --out"
        ) from error
