"""Train a network plainly and with TempBalance, from one seed, and compare them.

    python -m benchmarks.train
    python -m benchmarks.train --dataset cifar10 --data-dir DIRECTORY --validation 5000

The first takes about a minute on two CPU cores and needs no network.  A run has a
directory of its own, `runs/DATASET-MODEL-seedSEED`, with `config.json`,
`metrics.jsonl`, `layers.jsonl`, checkpoints, `table.md` and pictures.  `--resume`
continues it after a kill, on a CPU to the same bits.  SIGTERM ends it behind the epoch
that runs, with its checkpoint written, one line and exit code 0.

Faults of arguments, data or run directory are one line on stderr and exit code 2.
"""

import sys
from collections.abc import Callable, Sequence

from benchmarks.preemption import resumable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return resumable(lambda stopping: _run(arguments, stopping))


def _run(arguments: Sequence[str] | None, stopping: Callable[[], bool]) -> None:
    # Imported here, so that a package that is not installed is one clear line.
    from tqdm import tqdm

    from benchmarks import configs, data, experiment, records, report

    command = configs.parse(arguments)
    config = command.config
    draw = None
    if command.plots:
        from benchmarks.plots import write as draw
    directory = records.RunDirectory(command.out)
    directory.check(config, resume=command.resume)
    dataset = data.load(config)
    directory.open(config, dataset)
    done = experiment.newest_epochs(config, directory)
    directory.rewind(done, config)
    trained = {}
    total, behind = len(config.arms) * config.epochs, sum(done.values())
    with tqdm(total=total, initial=behind, unit="epoch") as progress:
        for arm in config.arms:
            training = experiment.Training(arm, config, dataset)
            [trained[arm]] = training.run(
                arm, {config.seed: directory}, progress, stopping
            )
    metrics, layers = records.read(directory.metrics), records.read(directory.layers)
    tables = report.write(metrics, layers)
    table = directory.path / "table.md"
    records.replace(table, tables)
    print(tables)
    print(table)
    if draw is not None:
        spectra = {arm: result.spectra() for arm, result in trained.items()}
        for path in draw(layers, spectra, directory.path):
            print(path)


if __name__ == "__main__":
    sys.exit(main())
