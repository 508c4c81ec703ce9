"""Train a grid of experiments, each with several arms and from several seeds.

    python -m benchmarks.compare digits
    python -m benchmarks.compare cifar10-check --seeds 3 --data-dir DIRECTORY

CONFIG is a name in `benchmarks.grids`.  The seeds are consecutive, from that of its
base on: 43, 44, 45, ...  All arms of a seed come before the next seed, and have its
initial weights, order of the rows and augmentation.  What a run leaves in
`DIR/VARIANT/seedSEED` is described in `benchmarks.train`; behind every run the
comparison so far is written to `DIR/report.md`, `DIR/summary.json` and pictures.

`--resume` continues after a kill, on a CPU to the same bits, and leaves alone what is
finished; more seeds and more arms may be asked for then.  SIGTERM ends the command
behind the epoch that runs.  Each arm of a variant is compiled once for all seeds.

`--at-once K` trains K seeds in one vectorised program: as one at a time up to rounding,
and each with the K-th part of the seconds.  It pays where one seed does not fill an
accelerator, that is for small networks; on a CPU it is slower than one at a time.

With its files copied to `compare_NAME.json` and `compare_NAME_*.png` in
`benchmarks/results`, a comparison is a section of `benchmarks/README.md`.

Faults of arguments, data or directory are one line on stderr and exit code 2.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import commandline
from benchmarks.preemption import resumable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return resumable(lambda stopping: _run(given, stopping))


def _run(arguments: Sequence[str], stopping: Callable[[], bool]) -> None:
    # Imported here, so that a package that is not installed is one clear line.
    from benchmarks import outcomes, schedule
    from benchmarks.comparison import Comparison
    from benchmarks.grids import GRIDS

    given = vars(_parser().parse_args(arguments))
    name, count, at_once = given.pop("config"), given.pop("seeds"), given.pop("at_once")
    out, resume = given.pop("out", Path("runs", name)), given.pop("resume")
    draw = None
    if given.pop("plots"):
        from benchmarks.curves import write as draw
    grid = GRIDS[name]
    if "arms" not in given:
        given["arms"] = grid.base.arms
    asked = Comparison(
        out,
        name,
        {
            variant: dataclasses.replace(config, **given)
            for variant, config in grid.configs().items()
        },
        tuple(given["arms"]),
        tuple(range(grid.base.seed, grid.base.seed + count)),
    )
    known = asked.joined(resume=resume)
    groups = schedule.groups(asked, at_once)
    datasets = schedule.load(asked, groups)
    known.rewind()
    known = known.save(arguments) if groups else known

    def report() -> None:
        if draw is not None:
            draw(known)
        outcomes.write(known)

    if groups:
        schedule.train(asked, groups, datasets, stopping, report)
    else:
        report()
    print((known.path / outcomes.REPORT).read_text(encoding="utf-8"))
    print(known.path)


def _parser() -> commandline.Parser:
    # Heavy imports, not for the import of this module.
    from benchmarks.arms import ARMS
    from benchmarks.configs import COMPUTE
    from benchmarks.grids import GRIDS

    parser = commandline.Parser(
        prog="python -m benchmarks.compare",
        description="Train a grid of experiments from several seeds.",
        epilog="Numbers that are not given come from the grid.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add, number = parser.add_argument, commandline.whole_number
    add("config", metavar="CONFIG", choices=tuple(GRIDS), help=", ".join(GRIDS))
    add("--seeds", type=number, metavar="N", default=5, help="how many; default: 5")
    add("--arms", nargs="+", choices=tuple(ARMS), help="compared with the first")
    add("--data-dir", help="the hub's SPLIT-*.parquet files; default: the hub")
    add("--validation", type=int, help="hold out VALIDATION training rows")
    add("--epochs", type=int, help="passes over the training rows")
    add("--compute", choices=COMPUTE, help="type that training computes in")
    add("--at-once", type=number, metavar="K", default=1, help="seeds at once")
    add("--out", type=Path, metavar="DIR", help="default: runs/CONFIG")
    add("--resume", action="store_true", default=False, help="continue, or add to it")
    add("--no-plots", dest="plots", action="store_false", default=True, help="no PNGs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
