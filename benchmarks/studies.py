"""Studies by name, and the directory of one: what is done of it survives anything.

    study.json          what all trials have in common, digest of the data, machines
    evaluations.jsonl   a line per evaluation of each finished trial
    timing.json         seconds of all arms in turn, if they were measured
    running/            the trials that are not finished, each with its checkpoint

The first two files are enough to go on with on another machine.
"""

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import arms, data, files, images, language, loop, timing
from benchmarks.configs import CIFAR10, Config, LanguageConfig
from benchmarks.experiments import Trainer
from benchmarks.files import Row
from benchmarks.loop import Rows, Trained, TrainState
from benchmarks.protocol import Study, Trial, plan
from benchmarks.runs import METRICS, Run

STUDY, EVALUATIONS, RUNNING = "study.json", "evaluations.jsonl", "running"
TIMING = "timing.json"


def _language(
    config: LanguageConfig, *left_out: str, rates: tuple[float, ...]
) -> Study:
    named = {k: arm for k, arm in language.ARMS.items() if k not in left_out}
    return Study(
        config,
        named,
        {k: arm.parent for k, arm in named.items() if arm.parent is not None},
        rates,
        sweep_seeds=(1, 2),
        fresh_seeds=tuple(range(11, 17)),
        load=language.load,
        make=language.make_program,
    )


def _images(config: Config, directory: Path | None) -> images.Dataset:
    place = None if directory is None else str(directory)
    return data.load(dataclasses.replace(config, data_dir=place))


_IMAGE_CONTROLS = ("mean", "shuffled", "reversed", "shape_only")

STUDIES: dict[str, Study] = {
    # 0.5 million parameters, 300 updates: 40 s a trial on one core of a CPU.
    "language-small": _language(
        LanguageConfig(), "shuffled", rates=(2e-3, 4e-3, 8e-3, 1.6e-2)
    ),
    # 12 million parameters, 10,000 updates of 16,384 bytes: for an accelerator.
    "language": _language(
        LanguageConfig(
            epochs=20,
            steps=500,
            batch_size=64,
            length=256,
            windows=512,
            width=384,
            depth=6,
            heads=6,
            refresh=100,
            interval=20,
        ),
        rates=(1e-3, 2e-3, 4e-3, 8e-3),
    ),
    # ResNet-18 at half width: for an accelerator.
    "images": Study(
        dataclasses.replace(
            CIFAR10,
            width=0.5,
            epochs=16,
            batch_size=512,
            compute="bfloat16",
            validation=5000,
            warmup=3,
            smoothing=0.1,
            interval=1,
        ),
        {name: arms.ARMS[name] for name in ("cal", "tb", *_IMAGE_CONTROLS)},
        dict.fromkeys(_IMAGE_CONTROLS, "tb"),
        rates=(0.2, 0.4, 0.8),
        sweep_seeds=(1, 2),
        fresh_seeds=tuple(range(11, 19)),
        load=_images,
        make=loop.make_program,
    ),
}
STUDIES["images-check"] = dataclasses.replace(
    # The same on two epochs of 2,000 rows: shows that the harness works.
    STUDIES["images"],
    arms={name: arms.ARMS[name] for name in ("cal", "tb", "mean")},
    parents={"mean": "tb"},
    config=dataclasses.replace(
        STUDIES["images"].config,
        width=0.125,
        epochs=2,
        subset=2000,
        validation=500,
        batch_size=128,
        compute="float32",
        warmup=1,
    ),
    rates=(0.05, 0.1),
    sweep_seeds=(1,),
    fresh_seeds=(11, 12),
)


@dataclasses.dataclass(frozen=True)
class Directory:
    """The directory of a study."""

    path: Path
    name: str

    @property
    def study(self) -> Study:
        """What is compared."""
        return STUDIES[self.name]

    def recorded(self) -> Row:
        """Return what is written down of the study."""
        return files.read_json(self.path / STUDY, config=dict, commands=list)

    def open(
        self, digest: str, program: str, arguments: Sequence[str], resume: bool = True
    ) -> None:
        """Write down what trains now, unless another study or other data did before."""
        left_out = ("arms", "data_dir", "seed", "learning_rate")
        config = dataclasses.asdict(self.study.config)
        config = {name: config[name] for name in config if name not in left_out}
        own = {"name": self.name, "config": config, "data_sha256": digest}
        there = files.read_record(self.path / STUDY, own, resume=resume)
        content = own | {"commands": there["commands"]}
        files.write_record(self.path / STUDY, content, program, arguments)
        for trial in self.evaluations():
            shutil.rmtree(self.run(trial).path, ignore_errors=True)

    def evaluations(self) -> dict[Trial, list[Row]]:
        """Return the lines of each trial that is finished."""
        found: dict[Trial, list[Row]] = {}
        for row in files.read_lines(self.path / EVALUATIONS):
            trial = Trial(*(row[field] for field in Trial._fields))
            found.setdefault(trial, []).append(row)
        last = self.study.config.epochs
        return {trial: rows for trial, rows in found.items() if len(rows) == last}

    def losses(self) -> dict[Trial, float]:
        """Return the last validation loss of each trial that is finished."""
        last = {
            k: rows[-1]["validation_loss"] for k, rows in self.evaluations().items()
        }
        return {k: math.nan if loss is None else loss for k, loss in last.items()}

    def seconds(self) -> dict[str, list[float]]:
        """Return the seconds of each arm that `measure` has written down."""
        file = self.path / TIMING
        return files.read_json(file, seconds=dict)["seconds"] if file.exists() else {}

    def todo(self) -> list[Trial]:
        """Return the trials that can be done now."""
        return plan(self.study, self.losses())

    def run(self, trial: Trial) -> Run:
        """Return a trial as a run in a directory of its own."""
        config = dataclasses.replace(
            self.study.config, learning_rate=trial.rate, seed=trial.seed
        )
        path = self.path / RUNNING / str(trial)
        return Run(path, config, trial.arm, f"{trial.phase} at {trial.rate:g}")

    def keep(self, trial: Trial) -> None:
        """Add a trial that has ended to the evaluations."""
        run, rows = self.run(trial), files.read_lines(self.path / EVALUATIONS)
        head = trial._asdict() | {"command": len(self.recorded()["commands"]) - 1}
        rows += [head | row for row in run.record()[METRICS]]
        files.write_lines(self.path / EVALUATIONS, rows)
        shutil.rmtree(run.path)


def _epoch(train: Callable[..., Trained], states: list[TrainState], rows: Rows) -> None:
    """Train an epoch and wait for it; keep the states for the next."""
    states[:], _ = jax.block_until_ready(train(states, rows, 0))


def measure(directory: Directory, dataset: Any, rounds: int) -> None:
    """Time all arms in turn, from one evaluation to the next; write it down."""
    study = directory.study
    rows = jax.device_put(dataset.parts["train"])
    calls = {}
    for name, arm in study.arms.items():
        program = study.make(study.config, arm, dataset)
        states = [program.start(0, study.rates[0])]
        calls[name] = functools.partial(_epoch, program.epoch(rows, 1), states, rows)
    seconds = timing.interleave(calls, rounds)
    files.write_json(directory.path / TIMING, {"seconds": seconds})


def train(directory: Directory, dataset: Any, stopping: Callable[[], bool]) -> None:
    """Do all trials of a study that has been opened, each arm compiled once.

    Raise `Preempted` once `stopping()` is true.
    """
    study, epochs = directory.study, directory.study.config.epochs

    @functools.cache
    def trainer(name: str) -> Trainer:
        arm = study.arms[name]
        return Trainer(study.config, arm, dataset, study.make, brief=True)

    while todo := directory.todo():
        total = epochs * len(todo)
        with tqdm(total=total, unit="epoch", desc=directory.name) as progress:
            for trial in todo:
                run = directory.run(trial)
                run.check(dataset.digest)
                tested = (epochs,) if trial.phase == "fresh" else ()
                trainer(trial.arm).train([run], progress, stopping, tested=tested)
                directory.keep(trial)
