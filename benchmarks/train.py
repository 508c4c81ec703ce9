"""Train a network plainly and with TempBalance, from one seed, and compare them.

    python -m benchmarks.train
    python -m benchmarks.train --dataset cifar10 --data-dir DIRECTORY --validation 5000

The first command takes about a minute on two CPU cores and needs no network. Numbers
that are not given come from the recipe of the data set. The arms are in
`runs/DATASET-MODEL-seedSEED`, each in a directory of its own, which `benchmarks.runs`
describes. Next to them are `table.md`, pictures, and `report.html`, one page that shows
all. `--resume` continues after a kill, on a CPU to the same bits. SIGTERM ends training
after the current epoch: its state is saved, and the exit code is 0.

Faults of arguments, data, or run directory end with exit code 2.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

import tb_optax
from benchmarks import data, plots, report
from benchmarks.commandline import resumable
from benchmarks.configs import RECIPES, Config, DatasetName
from benchmarks.experiments import Experiment, label, train, unfinished

_PROGRAM = "python -m benchmarks.train"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line: the experiment, and what to do with its directory.

    Attributes:
        config: the experiment.
        out: directory; default: runs/DATASET-MODEL-seedSEED.
        resume: continue what is in the directory.
        plots: draw pictures, too.
    """

    config: Config
    out: Path | None = None
    resume: bool = False
    plots: bool = True


@dataclasses.dataclass(frozen=True)
class _Recipe:
    dataset: DatasetName = "digits"


def parse(arguments: Sequence[str]) -> Command:
    """Read the command line; what it leaves out comes from the data set's recipe."""
    recipe, _ = tyro.cli(
        _Recipe, prog=_PROGRAM, args=arguments, return_unknown_args=True, add_help=False
    )
    return tyro.cli(
        Command,
        prog=_PROGRAM,
        description="Train one network plainly, with TempBalance, or otherwise.",
        args=arguments,
        default=Command(RECIPES[recipe.dataset]),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return resumable(lambda stopping: _run(given, stopping))


def _run(arguments: Sequence[str], stopping: Callable[[], bool]) -> None:
    command = parse(arguments)
    config = command.config
    name = f"{config.dataset}-{config.model}-seed{config.seed}"
    out, seeds = command.out or Path("runs", name), (config.seed,)
    asked = Experiment(out, "train", {"base": config}, config.arms, seeds, flat=True)
    known, runs = asked.joined(resume=command.resume), asked.runs()
    datasets = data.load_all(runs)
    if unfinished(runs):
        known.save("benchmarks.train", arguments)
    spectra, trained = {}, train([[run] for run in runs], datasets, stopping)
    for run, (program, [state]) in zip(runs, trained, strict=True):
        names = [label(layer.path) for layer in program.layers]
        eigenvalues = tb_optax.esd(state.params, program.layers)
        spectra[run.arm] = dict(zip(names, eigenvalues, strict=True))
    pictures = plots.write_run(runs, spectra, out) if command.plots else []
    print(report.write_run(runs, pictures, out))
    print(out / "table.md", *pictures, out / "report.html", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
