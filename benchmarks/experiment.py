"""An arm from its first epoch to its last, with records and checkpoints."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import tb_optax
from benchmarks import records
from benchmarks.arms import ARMS
from benchmarks.checkpoints import newest, open_checkpoints
from benchmarks.configs import Config
from benchmarks.data import Dataset
from benchmarks.loop import Program, TrainState, make_program
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


def run_arm(
    name: str,
    config: Config,
    data: Dataset,
    directory: RunDirectory,
    progress: tqdm,
    stopping: Callable[[], bool],
) -> Trained:
    """Train an arm from its newest checkpoint on; raise `Preempted` between epochs."""
    arm = ARMS[name]
    program = make_program(config, arm, data)
    validate = program.evaluate  # Not yet compiled for the shape of the test rows.
    rate = arm.schedule(config, 1)
    done = newest(directory.checkpoints / name)
    with open_checkpoints(directory.checkpoints / name) as checkpoints:
        state = checkpoints.restore(program.abstract) if done else program.start()
        progress.update(done)
        if done < config.epochs:
            progress.set_description(f"{arm.title}: compiling")
            program = program.compiled(data)
        progress.set_description(arm.title)
        train = jax.device_put((data.train_images, data.train_labels))
        test = jax.device_put((data.test_images, data.test_labels))
        validation = jax.device_put((data.validation_images, data.validation_labels))
        for epoch in range(done, config.epochs):
            if stopping():
                msg = f"{name} is saved behind {epoch} of {config.epochs} epochs"
                raise Preempted(msg)
            analysis_seconds = 0.0
            if epoch % config.interval == 0:
                state, seconds = _analyse(name, epoch, program, state, directory)
                # Of an arm without multipliers it is for the pictures only.
                analysis_seconds = seconds if arm.balanced else 0.0
            start = time.perf_counter()
            state, scores = program.train(state, *train, jnp.int32(epoch))
            jax.block_until_ready((state, scores))
            train_seconds = time.perf_counter() - start
            test_scores = program.evaluate(state, *test)
            held_out = {}
            if len(data.validation_labels):
                validation_scores = validate(state, *validation)
                held_out = {
                    "validation_loss": float(validation_scores.loss),
                    "validation_accuracy": float(validation_scores.accuracy),
                }
            if epoch + 1 == config.epochs:
                state, _ = _analyse(name, config.epochs, program, state, directory)
            row = {
                "arm": name,
                "epoch": epoch + 1,
                "learning_rate": float(jnp.asarray(rate(epoch))),
                "train_loss": float(scores.loss),
                "train_accuracy": float(scores.accuracy),
                "test_loss": float(test_scores.loss),
                "test_accuracy": float(test_scores.accuracy),
                **held_out,
                "train_seconds": train_seconds,
                "analysis_seconds": analysis_seconds,
            }
            records.append(directory.metrics, [row])
            checkpoints.save(epoch + 1, state)
            progress.set_postfix_str(f"test accuracy {row['test_accuracy']:.1%}")
            progress.update()
    return Trained(program.layers, state.params)


def label(path: str) -> str:
    """Name a layer in tables and pictures: `blocks/0/conv1/kernel` without its end."""
    return path.removesuffix("/kernel")


def _analyse(
    name: str, epochs: int, program: Program, state: TrainState, directory: RunDirectory
) -> tuple[TrainState, float]:
    """Refresh the multipliers, write the table down, return the seconds it took."""
    start = time.perf_counter()
    state, analysis = jax.block_until_ready(program.refresh(state))
    seconds = time.perf_counter() - start
    rows = [_layer_row(name, epochs, row) for row in analysis.rows()]
    records.append(directory.layers, rows)
    return state, seconds


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
