"""What the commands share: arguments, output files, faults in one line, SIGTERM."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import machine
from benchmarks.errors import UserError, first_line
from benchmarks.files import write_json

# Where the figures of this directory's README come from.
RESULTS = Path(__file__).parent / "results"


class Preempted(Exception):
    """Training has stopped early; what it did is saved."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(message)


def guarded(
    run: Callable[[], None],
    *,
    extras: str = "bench",
    remedy: str = "what was finished is written",
) -> int:
    """Run a command; return its exit code, 2 with one line for a fault of the user.

    It needs these extras of this package; the remedy is for who interrupts it.
    """
    try:
        run()
        return 0
    except UserError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        install = f'pip install ".[{extras}]"'
        message = f"the package {error.name} is not installed; {install}"
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        message = place + (error.strerror or first_line(error))
    except KeyboardInterrupt:
        say(f"interrupted; {remedy}")
        return 130
    say(f"error: {message}")
    return 2


def resumable(run: Callable[[Callable[[], bool]], None]) -> int:
    """Run a command that SIGTERM stops early and `--resume` continues.

    Schedulers send SIGTERM before they kill. The command is given a function that says
    whether it has come; the exit code is 0 then, too.
    """
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    remedy = "continue with --resume"
    try:
        return guarded(
            lambda: run(lambda: bool(received)), extras="train,plot", remedy=remedy
        )
    except Preempted as stopped:
        print(f"stopped by SIGTERM: {stopped}; {remedy}")
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def measured(
    name: str,
    description: str,
    options: Mapping[str, Mapping[str, Any]],
    measure: Callable[[argparse.Namespace], Iterator[Mapping[str, Any]]],
    arguments: Sequence[str] | None,
) -> int:
    """Run a command that measures, and writes its results part by part.

    Args:
        name: of its module and of its file of results.
        description: what it does.
        options: arguments of `add_argument` by option, next to `--out` and `--force`.
        measure: checks the options, and returns an iterator of parts of the results.
        arguments: the command line; None reads that of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(
        prog=f"python -m benchmarks.{name}", description=description, allow_abbrev=False
    )
    for option, keywords in options.items():
        parser.add_argument(option, **keywords)
    add, file = parser.add_argument, f"{name}.json"
    what = f"JSON file; default: benchmarks/results/{file}"
    add("--out", type=Path, default=RESULTS / file, metavar="FILE", help=what)
    add("--force", action="store_true", help="overwrite that file")

    def run() -> None:
        chosen = parser.parse_args(given)
        if chosen.out.is_dir():
            raise UserError(f"{chosen.out} is a directory; give a file as --out")
        if chosen.out.exists() and not chosen.force:
            raise UserError(f"{chosen.out} exists; give --force or another --out")
        machine.leave_memory()
        parts = measure(chosen)
        results = machine.describe(f"benchmarks.{name}", given)
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        for part in parts:
            results |= part
            write_json(chosen.out, results)
        print(chosen.out)

    return guarded(run)


def whole_number(text: str) -> int:
    """Read a whole number, at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def positive_number(text: str) -> float:
    """Read a finite number above 0."""
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return number


def check_names(option: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise `UserError` if a name is not allowed, or stands twice."""
    for name in names:
        if name not in allowed:
            raise UserError(f"{option} is {name!r}; allowed: {', '.join(allowed)}")
    if len(set(names)) < len(names):
        raise UserError(f"{option} names one twice: {' '.join(names)}")


def say(message: str) -> None:
    """Tell the person at the terminal how far the command is, or what is wrong."""
    print(message, file=sys.stderr, flush=True)
