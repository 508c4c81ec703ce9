"""Train a grid of experiments, each with several arms and from several seeds.

    python -m benchmarks.compare digits
    python -m benchmarks.compare cifar10-check --seeds 3 --data-dir DIRECTORY

The name is one of `benchmarks.grids`; one of `benchmarks.studies` runs that study
instead, see `benchmarks.protocol`. Seeds are consecutive: 43, 44, 45, ... All arms of a
seed come before the next seed, and have the same initial weights, order of the rows,
and augmentation. `benchmarks.runs` describes the directory of a run,
`runs/NAME/VARIANT/seedSEED/ARM`. After each run, `report.md`, `summary.json`, and the
pictures of the comparison are regenerated.

`--resume` continues after a kill, on a CPU to the same bits, and leaves finished runs
alone; more seeds and more arms may be asked for then. SIGTERM ends the command after
the current epoch.

`--at-once K` trains K seeds in one vectorized program: as one at a time up to rounding,
and with one K-th of the seconds each. It pays for small networks on an accelerator.

A comparison becomes a section of `benchmarks/README.md` once its files are copied to
`compare_NAME.json` and `compare_NAME_*.png` in `benchmarks/results`.

Faults of arguments, data, or directory end with exit code 2.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks import data, experiments, findings, machine, plots, report, studies
from benchmarks.commandline import check_names, resumable
from benchmarks.configs import ArmName
from benchmarks.errors import UserError
from benchmarks.experiments import Experiment
from benchmarks.grids import GRIDS
from benchmarks.models import Compute


@dataclasses.dataclass(frozen=True)
class Command:
    """Train a grid of experiments from several seeds.

    Numbers that are not given come from the grid.

    Attributes:
        config: name in benchmarks/grids.py.
        seeds: how many.
        arms: what is compared with the first of them.
        data_dir: directory of the hub's SPLIT-*.parquet files; default: the hub.
        validation: hold out VALIDATION training rows.
        epochs: passes over the training rows.
        compute: type that training computes in.
        at_once: seeds that are trained at once.
        out: directory; default: runs/CONFIG.
        resume: continue what is in the directory, or add to it.
        plots: draw pictures, too.
    """

    config: tyro.conf.Positional[str]
    seeds: int = 5
    arms: tuple[ArmName, ...] | None = None
    data_dir: str | None = None
    validation: int | None = None
    epochs: int | None = None
    compute: Compute | None = None
    at_once: int = 1
    out: Path | None = None
    resume: bool = False
    plots: bool = True

    def __post_init__(self):
        check_names("CONFIG", [self.config], list(GRIDS))
        for name, value in (("--seeds", self.seeds), ("--at-once", self.at_once)):
            if value < 1:
                raise UserError(f"{name} is {value}; allowed: at least 1")

    def experiment(self) -> Experiment:
        """Return what is asked for."""
        grid = GRIDS[self.config]
        fields = ("arms", "data_dir", "validation", "epochs", "compute")
        given = {name: getattr(self, name) for name in fields}
        given = {name: value for name, value in given.items() if value is not None}
        configs = {
            variant: dataclasses.replace(config, **given)
            for variant, config in grid.configs().items()
        }
        out, first = self.out or Path("runs", self.config), grid.base.seed
        seeds = tuple(range(first, first + self.seeds))
        arms = given.get("arms", grid.base.arms)
        return Experiment(out, self.config, configs, arms, seeds)


@dataclasses.dataclass(frozen=True)
class StudyCommand:
    """Tune the rate of each arm, and compare fresh seeds.

    Attributes:
        study: name in benchmarks/studies.py, which says what arms and seeds it has.
        data_dir: where the data are; default: the standard library, or the hub.
        out: directory; default: runs/STUDY.
        resume: continue what is in the directory.
        cores: cores to use; default: all there are.
        timing: rounds in which all arms are timed in turn, once the study is finished.
        plots: draw pictures, too.
    """

    study: tyro.conf.Positional[str]
    data_dir: Path | None = None
    out: Path | None = None
    resume: bool = False
    cores: int | None = None
    timing: int = 0
    plots: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    kind, run = Command, _run
    if given and given[0] in studies.STUDIES:
        kind, run = StudyCommand, _run_study

    def parsed(stopping: Callable[[], bool]) -> None:
        command: Any = tyro.cli(kind, prog="python -m benchmarks.compare", args=given)
        run(command, given, stopping)

    return resumable(parsed)


def _run_study(
    command: StudyCommand, arguments: Sequence[str], stopping: Callable[[], bool]
) -> None:
    machine.bind_cores(command.cores)
    out = command.out or Path("runs", command.study)
    directory = studies.Directory(out, command.study)
    dataset = directory.study.load(directory.study.config, command.data_dir)
    program = "benchmarks.compare"
    directory.open(dataset.digest, program, arguments, command.resume)
    try:
        studies.train(directory, dataset, stopping)
        if command.timing:
            studies.measure(directory, dataset, command.timing)
    finally:
        if command.plots:
            print(findings.write(directory))
    print(out)


def _run(
    command: Command, arguments: Sequence[str], stopping: Callable[[], bool]
) -> None:
    asked = command.experiment()
    known = asked.joined(resume=command.resume)
    groups = experiments.unfinished(asked.runs(), command.at_once)
    datasets = data.load_all([run for group in groups for run in group])
    if groups:
        known = known.save("benchmarks.compare", arguments)
    for _ in [None] if not groups else experiments.train(groups, datasets, stopping):
        if command.plots:
            plots.write_comparison(known)
        report.write(known)
    print((known.path / report.REPORT).read_text(encoding="utf-8"))
    print(known.path)


if __name__ == "__main__":
    sys.exit(main())
