"""An arm from its first epoch to its last, with records and checkpoints."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

import tb_optax
from benchmarks import records
from benchmarks.arms import ARMS
from benchmarks.checkpoints import Checkpoints, newest, open_checkpoints
from benchmarks.configs import Config
from benchmarks.data import Dataset
from benchmarks.loop import Program, Scores, TrainState, make_program
from benchmarks.preemption import Preempted
from benchmarks.records import Row, RunDirectory


class Spectrum(NamedTuple):
    """The eigenvalues of a trained layer."""

    layer: str
    eigenvalues: np.ndarray  # shape (N,), ascending


class Trained(NamedTuple):
    """What is left of an arm behind its last epoch."""

    layers: tuple[tb_optax.Layer, ...]
    params: Any

    def spectra(self) -> list[Spectrum]:
        """Return the eigenvalues of all layers, in the order of execution."""
        names = [label(layer.path) for layer in self.layers]
        return list(map(Spectrum, names, tb_optax.esd(self.params, self.layers)))


def newest_epochs(config: Config, directory: RunDirectory) -> Mapping[str, int]:
    """Return the epochs that the checkpoints of each arm have behind them."""
    return {name: newest(directory.checkpoints / name) for name in config.arms}


class Training:
    """An arm of an experiment, compiled once for all of its seeds."""

    def __init__(self, name: str, config: Config, data: Dataset):
        self._name = name
        self._config = config
        self._data = data
        self._program = make_program(config, ARMS[name], data)
        self._compiled: dict[int, Program] = {}  # By the number of seeds at once.

    def run(
        self,
        title: str,
        directories: Mapping[int, RunDirectory],
        progress: tqdm,
        stopping: Callable[[], bool],
    ) -> list[Trained]:
        """Train from the newest checkpoints on; raise `Preempted` between epochs.

        Args:
            title: names the run to the person at the terminal.
            directories: of each seed.  Several seeds are trained at once, in one
                vectorised program; they have equally many epochs behind them, and
                each is written the same share of the seconds.
            progress: counts the epochs of all seeds.
            stopping: whether to stop behind the epoch that runs.
        """
        name, epochs = self._name, self._config.epochs
        done = newest(next(iter(directories.values())).checkpoints / name)
        with contextlib.ExitStack() as stack:
            runs = [
                stack.enter_context(_opened(name, self._program, seed, directory))
                for seed, directory in directories.items()
            ]
            program = self._program
            if done < epochs:
                progress.set_description(f"{title}: compiling")
                program = self._compile(len(runs))
            progress.set_description(title)
            data = jax.device_put(self._data.parts())
            for epoch in range(done, epochs):
                if stopping():
                    msg = f"{title} is saved behind {epoch} of {epochs} epochs"
                    raise Preempted(msg)
                rows = self._epoch(program, runs, data, epoch)
                if epoch + 1 == epochs:
                    for run in runs:
                        run.analyse(program, epochs)
                for run, row in zip(runs, rows, strict=True):
                    run.save(epoch + 1, row)
                accuracy = np.mean([row["test_accuracy"] for row in rows])
                progress.set_postfix_str(f"test accuracy {accuracy:.1%}")
                progress.update(len(runs))
            return [Trained(program.layers, run.state.params) for run in runs]

    def _epoch(
        self,
        program: Program,
        runs: Sequence["_Run"],
        data: Mapping[str, tuple[Array, Array]],
        epoch: int,
    ) -> list[Row]:
        """Train all runs for an epoch; return what there is to say of each."""
        analysis_seconds = [0.0] * len(runs)
        if epoch % self._config.interval == 0:
            analysis_seconds = [run.analyse(program, epoch) for run in runs]
        start = time.perf_counter()
        states = tuple(run.state for run in runs)
        trained = program.train(states, *data["train"], jnp.int32(epoch))
        jax.block_until_ready(trained)
        train_seconds = (time.perf_counter() - start) / len(runs)
        rate = ARMS[self._name].schedule(self._config, 1)(epoch)
        rows: list[Row] = []
        for run, (state, scores) in zip(runs, trained, strict=True):
            run.state = state
            rate_column = {"learning_rate": float(jnp.asarray(rate))}
            rows.append(rate_column | _columns("train", scores))
        states = tuple(run.state for run in runs)
        for part in [part for part in data if part != "train"]:
            tested = program.evaluate(states, *data[part])
            for row, scores in zip(rows, tested, strict=True):
                row |= _columns(part, scores)
        for row, seconds in zip(rows, analysis_seconds, strict=True):
            row["train_seconds"], row["analysis_seconds"] = train_seconds, seconds
        return rows

    def _compile(self, count: int) -> Program:
        if count not in self._compiled:
            self._compiled[count] = self._program.compiled(self._data, count)
        return self._compiled[count]


@dataclasses.dataclass
class _Run:
    """One seed of an arm: its state, and where it is written down."""

    name: str
    directory: RunDirectory
    checkpoints: Checkpoints
    state: TrainState

    def analyse(self, program: Program, epochs: int) -> float:
        """Refresh the multipliers, write the table down, return the seconds it took."""
        start = time.perf_counter()
        refreshed = program.refresh(self.state)
        self.state, analysis = jax.block_until_ready(refreshed)
        seconds = time.perf_counter() - start
        rows = [_layer_row(self.name, epochs, row) for row in analysis.rows()]
        records.append(self.directory.layers, rows)
        # Of an arm without multipliers it is for the pictures only.
        return seconds if ARMS[self.name].balanced else 0.0

    def save(self, epochs: int, row: Row) -> None:
        """Write down the state and how it was reached."""
        row = {"arm": self.name, "epoch": epochs, **row}
        records.append(self.directory.metrics, [row])
        self.checkpoints.save(epochs, self.state)


@contextlib.contextmanager
def _opened(
    name: str, program: Program, seed: int, directory: RunDirectory
) -> Generator[_Run, None, None]:
    """Open the checkpoints of a run; it has the newest state, or that of its start."""
    path = directory.checkpoints / name
    with open_checkpoints(path) as checkpoints:
        restored = newest(path) > 0
        state = (
            checkpoints.restore(program.abstract) if restored else program.start(seed)
        )
        yield _Run(name, directory, checkpoints, state)


def label(path: str) -> str:
    """Name a layer in tables and pictures: `blocks/0/conv1/kernel` without its end."""
    return path.removesuffix("/kernel")


def _columns(part: str, scores: Scores) -> Row:
    return {
        f"{part}_loss": float(scores.loss),
        f"{part}_accuracy": float(scores.accuracy),
    }


def _layer_row(name: str, epochs: int, row: Mapping[str, Any]) -> Row:
    columns = dict(row)
    layer, multiplier = label(columns.pop("layer")), columns.pop("multipliers")
    if not ARMS[name].balanced:
        multiplier = 1.0
    return {
        "arm": name,
        "epoch": epochs,
        "layer": layer,
        "multiplier": multiplier,
        **columns,
    }
