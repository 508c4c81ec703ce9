"""What TempBalance costs an epoch of `benchmarks.compare`.

    python -m benchmarks.epoch_cost cifar10-check --data-dir DIRECTORY

CONFIG is a name in `benchmarks.grids`. The compiled loop of cosine SGD and that of
TempBalance, which is refreshed ahead of its epochs, train epochs in turn: between the
runs of a comparison lie minutes, in which a machine changes by more than they differ.

Faults of the arguments or the data are one line on stderr and exit code 2.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import commandline, machine

if TYPE_CHECKING:  # What is imported here would fix its number of threads.
    from benchmarks.configs import Config
    from benchmarks.data import Dataset
    from benchmarks.loop import Program

ARMS = ("cal", "tb")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return commandline.guarded(lambda: _run(arguments), extras="train")


def _run(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    commandline.check_output(options.out, force=options.force)
    machine.fix_threads(options.threads, options.blas_threads)

    from benchmarks import data, timing
    from benchmarks.arms import ARMS as BY_NAME
    from benchmarks.grids import GRIDS
    from benchmarks.loop import make_program

    commandline.check_names("CONFIG", [options.config], list(GRIDS))
    config = dataclasses.replace(
        GRIDS[options.config].base, data_dir=options.data_dir, arms=ARMS
    )
    dataset = data.load(config)
    runs = {}
    for name in ARMS:
        commandline.say(f"{name}: compiling")
        program = make_program(config, BY_NAME[name], dataset).compiled(dataset, 1)
        runs[name] = _Run(program, config, dataset, balanced=BY_NAME[name].balanced)
    given = sys.argv[1:] if arguments is None else list(arguments)
    results = machine.describe("benchmarks.epoch_cost", given)
    results["command"] = commandline.without_places(results["command"], "data-dir")
    rows = len(dataset.train_images)
    results["task"] = {
        "config": options.config,
        "model": config.model,
        "width": config.width,
        "batch": config.batch_size,
        "images": rows // config.batch_size * config.batch_size,
        "compute": config.compute,
    }
    commandline.say(f"measuring: {options.repeats} epochs of each")
    results["epoch"] = timing.interleave(runs, options.repeats)
    commandline.write_results(options.out, results)
    print(options.out)


def _parser() -> argparse.ArgumentParser:
    parser = commandline.Parser(
        prog="python -m benchmarks.epoch_cost",
        description="Measure what TempBalance costs an epoch.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a name of benchmarks.grids")
    add("--data-dir", help="the hub's SPLIT-*.parquet files; default: the hub")
    repeats = commandline.whole_number
    add("--repeats", type=repeats, default=12, help="epochs of each arm (12)")
    commandline.add_output(parser, "epoch_cost.json")
    return parser


class _Run:
    """The loop of an arm with its state, which each call moves on by an epoch."""

    def __init__(
        self,
        program: "Program",
        config: "Config",
        dataset: "Dataset",
        *,
        balanced: bool,
    ):
        import jax

        self._program, self._balanced = program, balanced
        self._state: Any = program.start(config.seed)
        self._data = jax.device_put(dataset.parts()["train"])
        self._epoch = 0

    def __call__(self) -> None:
        import jax
        import jax.numpy as jnp

        if self._balanced:
            self._state, _ = self._program.refresh(self._state)
        epoch = jnp.int32(self._epoch)
        (following,) = self._program.train((self._state,), *self._data, epoch)
        self._state, _ = jax.block_until_ready(following)
        self._epoch += 1


if __name__ == "__main__":
    sys.exit(main())
