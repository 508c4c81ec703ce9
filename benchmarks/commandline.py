"""What the commands share: arguments, output files, faults in one line."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.errors import UserError, first_line

# Where the figures of this directory's README come from.
RESULTS = Path(__file__).parent / "results"


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

    Args:
        run: the command.
        extras: of this package, which it needs.
        remedy: what to tell who interrupts it.
    """
    try:
        run()
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        install = f'pip install ".[{extras}]"'
        return _fail(f"the package {error.name} is not installed; {install}")
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        return _fail(place + (error.strerror or first_line(error)))
    except KeyboardInterrupt:
        print(f"interrupted; {remedy}", file=sys.stderr)
        return 130
    return 0


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options that say where results go, and on how many cores they arise."""
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / name,
        metavar="FILE",
        help=f"JSON file; default: benchmarks/results/{name}",
    )
    parser.add_argument("--force", action="store_true", help="overwrite that file")
    parser.add_argument(
        "--cores",
        type=whole_number,
        metavar="N",
        help="cores to use; default: all there are",
    )


def whole_number(text: str) -> int:
    """Read a whole number, at least 1."""
    number = int(text)
    if number < 1:
        msg = f"{text} is below 1"
        raise argparse.ArgumentTypeError(msg)
    return number


def positive_number(text: str) -> float:
    """Read a finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        msg = f"{text} is not a finite number above 0"
        raise argparse.ArgumentTypeError(msg)
    return number


def check_output(out: Path, *, force: bool) -> None:
    """Raise `UserError` if the file cannot be written, or is there already."""
    if out.is_dir():
        msg = f"{out} is a directory; give a file as --out"
        raise UserError(msg)
    if out.exists() and not force:
        msg = f"{out} exists; give --force or another --out"
        raise UserError(msg)
    out.parent.mkdir(parents=True, exist_ok=True)


def check_names(option: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise `UserError` if a name is not allowed, or stands twice."""
    for name in names:
        if name not in allowed:
            msg = f"{option} is {name!r}; allowed: {', '.join(allowed)}"
            raise UserError(msg)
    if len(set(names)) < len(names):
        msg = f"{option} names one twice: {' '.join(names)}"
        raise UserError(msg)


def write_results(out: Path, results: Mapping[str, Any]) -> None:
    """Write a JSON file so that a kill leaves either the old one or the new one."""
    temporary = out.with_name(out.name + ".tmp")
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, out)


def without_places(command: str, *options: str) -> str:
    """Return a command line without the paths of these options: they are private."""
    pattern = rf"--({'|'.join(options)})[ =]\S+"
    return re.sub(pattern, r"--\1 DIRECTORY", command)


def say(message: str) -> None:
    """Tell the person at the terminal how far the command is."""
    print(message, file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
