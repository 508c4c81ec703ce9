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
from jax import Array
from tqdm import tqdm

from benchmarks.arms import ARMS
from benchmarks.commandline import Preempted
from benchmarks.configs import Config
from benchmarks.files import Row, append_lines, read_record, write_record
from benchmarks.loop import Program, TrainState, make_program
from benchmarks.runs import LAYERS, METRICS, Run

_RECORD = "experiment.json"

# Seconds from one saved state of a short run to the next.
_PAUSE = 60

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
    epochs done. A kill between two checkpoints leaves some an epoch behind the others.
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
            for run in group:
                run.open(dataset)
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
        brief: for runs that are short and many: nothing is written down of layers, and
            a state is saved once a minute instead of after each epoch.
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
        rows = dataset.parts()["train"]
        # By the number of runs at once.
        self._compiled = functools.cache(lambda n: self.program.compiled(rows, n))

    def train(
        self,
        runs: Sequence[Run],
        progress: tqdm,
        stopping: Callable[[], bool],
        *,
        tested: Container[int] | None = None,
    ) -> list[TrainState]:
        """Train to the last epoch; return the states.

        Args:
            runs: have equally many epochs done. Several are trained in one vectorized
                program, and each is given the same share of the seconds.
            progress: counts the epochs of all runs.
            stopping: whether to raise `Preempted` after the epoch that runs.
            tested: epochs, from 1 on, after which the test rows are read; default: all.
        """
        done, epochs, title = runs[0].done(), self._config.epochs, _title(runs)
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(run.states(self.program)) for run in runs]
            states, saves = [pair[0] for pair in opened], [pair[1] for pair in opened]
            if done == epochs:
                return states
            progress.set_description(f"{title}: compiling")
            program = self._compiled(len(runs))
            progress.set_description(title)
            parts = jax.device_put(self._dataset.parts())
            untested = {name: parts[name] for name in parts if name != "test"}
            saved, saved_at = done, time.monotonic()

            def save(epochs: int) -> None:
                for run_save, state in zip(saves, states, strict=True):
                    run_save(epochs, state)

            for epoch in range(done, epochs):
                if stopping():
                    if saved < epoch:
                        save(epoch)
                    where = f"{epoch} of {epochs} epochs"
                    raise Preempted(f"{title} is saved after {where}")
                read = parts if tested is None or epoch + 1 in tested else untested
                states, loss = self._epoch(program, runs, states, read, epoch)
                late = time.monotonic() - saved_at > _PAUSE
                if epoch + 1 == epochs or late or not self._brief:
                    save(epoch + 1)
                    saved, saved_at = epoch + 1, time.monotonic()
                progress.set_postfix_str(f"training loss {loss:.3f}")
                progress.update(len(runs))
            return states

    def _epoch(
        self,
        program: Program,
        runs: Sequence[Run],
        states: list[TrainState],
        parts: Mapping[str, tuple[Array, Array]],
        epoch: int,
    ) -> tuple[list[TrainState], float]:
        """Train and write down an epoch of all runs; return states and mean loss."""
        analysis_seconds = [0.0] * len(runs)
        due = epoch % self._config.interval == 0 and not (epoch and self._arm.once)
        if due and (self._arm.balanced or not self._brief):
            states, analysis_seconds = self._analyze(program, runs, states, epoch)
        start = time.perf_counter()
        trained = program.train(tuple(states), *parts["train"], jnp.int32(epoch))
        jax.block_until_ready(trained)
        seconds = (time.perf_counter() - start) / len(runs)
        states = [state for state, _ in trained]
        scores = {
            part: [scores for _, scores in trained]
            if part == "train"
            else program.evaluate(tuple(states), *rows)
            for part, rows in parts.items()
        }
        if epoch + 1 == self._config.epochs and not self._brief:
            states, _ = self._analyze(program, runs, states, epoch + 1)
        for place, run in enumerate(runs):
            schedule = self._arm.schedule(self._config, 1, run.rate)
            rate = float(jnp.asarray(schedule(epoch)))
            row: Row = {"epoch": epoch + 1, "learning_rate": rate}
            for part in parts:
                row[f"{part}_loss"] = float(scores[part][place].loss)
                row[f"{part}_accuracy"] = float(scores[part][place].accuracy)
            row["train_seconds"] = seconds
            row["analysis_seconds"] = analysis_seconds[place]
            append_lines(run.path / METRICS, [row])
        losses = [float(own.loss) for own in scores["train"]]
        return states, sum(losses) / len(losses)

    def _analyze(
        self,
        program: Program,
        runs: Sequence[Run],
        states: list[TrainState],
        epochs: int,
    ) -> tuple[list[TrainState], list[float]]:
        """Refresh the multipliers of each run; write its layers down and time it."""
        refreshed, seconds = [], []
        for run, state in zip(runs, states, strict=True):
            start = time.perf_counter()
            state, analysis = jax.block_until_ready(program.refresh(state))
            # For an arm without multipliers, the analysis is for the pictures only.
            taken = time.perf_counter() - start
            seconds.append(taken if self._arm.balanced else 0.0)
            refreshed.append(state)
            if self._brief:
                continue
            rows = []
            for row in analysis.rows():
                own: Row = {"epoch": epochs, "layer": label(row.pop("layer"))}
                own["multiplier"] = row.pop("multipliers")
                if not self._arm.balanced:
                    own["multiplier"] = 1.0
                rows.append(own | row)
            append_lines(run.path / LAYERS, rows)
        return refreshed, seconds


def label(path: str) -> str:
    """Name a layer in tables and pictures: its path without `/kernel`."""
    return path.removesuffix("/kernel")


def _title(runs: Sequence[Run]) -> str:
    seeds = "+".join(str(run.config.seed) for run in runs)
    return f"{runs[0].variant}/{runs[0].arm} seed {seeds}"
