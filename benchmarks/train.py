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

from benchmarks.errors import UserError, first_line
from benchmarks.preemption import Preempted, watched

EXTRAS = 'pip install ".[train,plot]"'


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        with watched() as stopping:
            _run(arguments, stopping)
    except Preempted as stopped:
        print(f"stopped by SIGTERM: {stopped}; continue with --resume")
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"the package {error.name} is not installed; {EXTRAS}")
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        return _fail(place + (error.strerror or first_line(error)))
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


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
    directory.open(config, dataset.digest())
    done = experiment.newest_epochs(config, directory)
    directory.rewind(done, config)
    trained = {}
    with tqdm(total=len(config.arms) * config.epochs, unit="epoch") as progress:
        for arm in config.arms:
            trained[arm] = experiment.run_arm(
                arm, config, dataset, directory, progress, stopping
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
