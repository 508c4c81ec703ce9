"""What is trained together: variants of an experiment, arms, and seeds.

No arm depends on another and no seed on another, so both may be added later.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from benchmarks.arms import ARMS
from benchmarks.commandline import Preempted
from benchmarks.configs import Config
from benchmarks.files import Row, finite, read_record, write_record
from benchmarks.loop import Program, Trained, TrainState, make_program
from benchmarks.runs import LAYERS, METRICS, Run, Session

_RECORD = "experiment.json"

# Seconds from one saved state of a run to the next.
PAUSE = 60

MakeProgram = Callable[[Any, Any, Any], Program]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A directory of runs: every arm of every variant, from every seed.

    Attributes:
        path: the directory.
        name: name in `benchmarks.grids`, or that of a command.
        configs: the experiment of each variant.
        arms: names in `benchmarks.arms`; the others are compared with the first.
        seeds: seeds of the runs.
        flat: whether a run is in `ARM` instead of `VARIANT/seedSEED/ARM`.
        commands: what has trained here: commands, machines, versions.
    """

    path: Path
    name: str
    configs: Mapping[str, Config]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    flat: bool = False
    commands: tuple[Mapping[str, Any], ...] = ()

    def runs(self) -> list[Run]:
        """Return all runs; those of a seed come before those of the next."""
        return [
            Run(
                self.path / ("" if self.flat else f"{variant}/seed{seed}") / arm,
                dataclasses.replace(config, seed=seed),
                arm,
                variant,
            )
            for seed in self.seeds
            for variant, config in self.configs.items()
            for arm in self.arms
        ]

    def joined(self, *, resume: bool) -> "Experiment":
        """Return this experiment together with what its directory already has.

        Raise `UserError` if that is something else, or damaged.
        """
        file, own = self.path / _RECORD, {"name": self.name}
        there = read_record(file, own, resume=resume, arms=list, seeds=list)
        both = dataclasses.replace(
            self,
            arms=tuple(dict.fromkeys([*there.get("arms", ()), *self.arms])),
            seeds=tuple(sorted({*there.get("seeds", ()), *self.seeds})),
            commands=tuple(there["commands"]),
        )
        for run in both.runs():
            run.check()
        return both

    def save(self, program: str, arguments: Sequence[str]) -> "Experiment":
        """Write down what is trained; return it with the command that trains now."""
        fields = ("name", "arms", "seeds", "commands")
        content = {name: getattr(self, name) for name in fields}
        there = write_record(self.path / _RECORD, content, program, arguments)
        return dataclasses.replace(self, commands=tuple(there["commands"]))


def unfinished(runs: Sequence[Run], at_once: int = 1) -> list[tuple[Run, ...]]:
    """Group the unfinished runs; all runs of a group can be trained at once.

    They are `at_once` or fewer, differ in their seeds alone, and have equally many
    epochs done. A kill between two checkpoints leaves some behind the others.
    """
    seeds = list(dict.fromkeys(run.config.seed for run in runs))
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: seeds.index(run.config.seed) // at_once):
        done, part = run.done(), seeds.index(run.config.seed) // at_once
        if done < run.config.epochs:
            groups.setdefault((part, run.variant, run.arm, done), []).append(run)
    return list(map(tuple, groups.values()))


def train(
    groups: Sequence[Sequence[Run]],
    datasets: Mapping[str, Any],
    stopping: Callable[[], bool],
) -> Iterator[tuple[Program, list[TrainState]]]:
    """Train groups of runs, and give the program and the states of each.

    Each arm of a variant is compiled once; the datasets are by variant. Raise
    `Preempted` once `stopping()` is true.
    """
    trainers: dict[tuple[str, str], Trainer] = {}
    total = sum(run.config.epochs - run.done() for group in groups for run in group)
    with tqdm(total=total, unit="epoch") as progress:
        for group in groups:
            first = group[0]
            dataset, place = datasets[first.variant], (first.variant, first.arm)
            if place not in trainers:
                trainers[place] = Trainer(first.config, ARMS[first.arm], dataset)
            states = trainers[place].train(group, progress, stopping)
            yield trainers[place].program, states


class Trainer:
    """Trains runs that differ in seed or learning rate, with one compiled program.

    Args:
        config: what they have in common.
        arm: how they train.
        dataset: what they train on.
        make: makes the program of these three; default: that of images.
        brief: write nothing down of layers: runs are short and many.
    """

    def __init__(
        self,
        config: Any,
        arm: Any,
        dataset: Any,
        make: MakeProgram | None = None,
        *,
        brief: bool = False,
    ):
        self._config, self._arm, self._dataset = config, arm, dataset
        self._brief = brief
        self.program = (make or make_program)(config, arm, dataset)
        rows = dataset.parts["train"]
        # By the number of runs at once.
        self._compiled = functools.cache(lambda n: self.program.epoch(rows, n))

    def train(
        self,
        runs: Sequence[Run],
        progress: tqdm,
        stopping: Callable[[], bool],
        *,
        tested: Container[int] | None = None,
    ) -> list[TrainState]:
        """Train to the last epoch; return the states.

        A state is saved once in `PAUSE` seconds, and in the end.

        Args:
            runs: have equally many epochs done. Several are trained in one vectorized
                program, and each is given the same share of the seconds.
            progress: counts the epochs of all runs.
            stopping: whether to save and raise `Preempted` before the next epoch.
            tested: epochs, from 1 on, after which the test rows are read; default: all.
        """
        epochs, saved_at = self._config.epochs, time.monotonic()
        seeds = "+".join(str(run.config.seed) for run in runs)
        title = f"{runs[0].variant}/{runs[0].arm} seed {seeds}"
        with contextlib.ExitStack() as stack:
            for run in runs:
                run.start(self._dataset)
            sessions = [stack.enter_context(run.session(self.program)) for run in runs]
            saved = done = sessions[0].record["epochs"]
            if done == epochs:
                return [session.state for session in sessions]
            progress.set_description(f"{title}: compiling")
            train_epoch = self._compiled(len(runs))
            progress.set_description(title)
            parts = jax.device_put(dict(self._dataset.parts))
            for epoch in range(done, epochs):
                late = time.monotonic() - saved_at > PAUSE
                if saved < epoch and (late or stopping()):
                    for session in sessions:
                        session.save(epoch)
                    saved, saved_at = epoch, time.monotonic()
                if saved == epoch and stopping():
                    where = f"{epoch} of {epochs} epochs"
                    raise Preempted(f"{title} is saved after {where}")
                read = dict(parts)
                if tested is not None and epoch + 1 not in tested:
                    del read["test"]
                loss = self._epoch(train_epoch, sessions, read, epoch)
                progress.set_postfix_str(f"training loss {loss:.3f}")
                progress.update(len(runs))
            for session in sessions:
                session.save(epochs)
            return [session.state for session in sessions]

    def _epoch(
        self,
        train_epoch: Callable[..., Trained],
        sessions: Sequence[Session],
        parts: Mapping[str, tuple[Array, Array]],
        epoch: int,
    ) -> float:
        """Train all runs for an epoch and write it down; return the mean loss."""
        config, arm, analysis_seconds = self._config, self._arm, [0.0] * len(sessions)
        due = epoch % config.interval == 0 and not (epoch and arm.once)
        if due and (arm.balanced or not self._brief):
            analysis_seconds = [self._analyze(session, epoch) for session in sessions]
        states = [session.state for session in sessions]
        start = time.perf_counter()
        trained = train_epoch(states, parts["train"], epoch)
        states, training = jax.block_until_ready(trained)
        seconds = (time.perf_counter() - start) / len(sessions)
        for place, session in enumerate(sessions):
            session.state = states[place]
            rate = float(arm.schedule(config, 1, session.run.rate)(jnp.int32(epoch)))
            row = {"epoch": epoch + 1, "learning_rate": rate}
            for part, rows in parts.items():
                scores = training[place]
                if part != "train":
                    scores = self.program.evaluate(session.state, *rows)
                row[f"{part}_loss"] = float(scores.loss)
                row[f"{part}_accuracy"] = float(scores.accuracy)
            row["train_seconds"] = seconds
            row["analysis_seconds"] = analysis_seconds[place]
            session.record[METRICS].append(finite(row))
            if epoch + 1 == config.epochs and not self._brief:
                self._analyze(session, epoch + 1)
        return float(np.mean([scores.loss for scores in training]))

    def _analyze(self, session: Session, epochs: int) -> float:
        """Refresh the multipliers of a run and write its layers down; time it."""
        refresh = self.program.refresh  # Compiled ahead of the clock.
        start = time.perf_counter()
        refreshed = jax.block_until_ready(refresh(session.state))
        session.state, analysis = refreshed
        seconds = time.perf_counter() - start
        for row in [] if self._brief else analysis.rows():
            own: Row = {"epoch": epochs, "layer": label(row.pop("layer"))}
            own["multiplier"] = row.pop("multipliers")
            if not self._arm.balanced:
                own["multiplier"] = 1.0
            session.record[LAYERS].append(finite(own | row))
        # For an arm without multipliers, the analysis is for the pictures only.
        return seconds if self._arm.balanced else 0.0


def label(path: str) -> str:
    """Name a layer in tables and pictures: its path without `/kernel`."""
    return path.removesuffix("/kernel")
