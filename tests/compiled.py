"""What a compiled program does on each device, read off its HLO text."""

import math
import re
from collections import Counter

_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_CALLS = re.compile(r"(?:calls|to_apply|branch_computations)=\{?((?:%[\w.-]+(?:, )?)+)")
_GATHERED = re.compile(r" = \(?(.*?)\)? all-gather(?:-start)?\(")
_MOVED = re.compile(
    r" = \(?(.*?)\)? (?:all-gather|all-reduce|all-to-all|collective-permute|"
    r"reduce-scatter)(?:-start)?\("
)
_SHAPE = re.compile(r"[a-z]+\d*\[([\d,]*)\]")


def decompositions(text: str) -> Counter[int]:
    """How many matrices of each size one device reduces to tridiagonal form."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        found = _COMPUTATION.match(line)
        if found:
            name = found[1]
            entry = name if line.startswith("ENTRY") else entry
        bodies.setdefault(name, []).append(line)
    counts: Counter[int] = Counter()

    def visit(name: str, times: int) -> None:
        for line in bodies[name]:
            if "lapack_ssytrd" in line:
                *batch, side, _ = _shapes(line)[0]
                counts[side] += times * math.prod(batch)
            elif " while(" in line:
                body = re.search(r"body=%([\w.-]+)", line)
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                assert body is not None
                visit(body[1], times * (int(trips[1]) if trips else 1))
            else:
                for called in _CALLS.findall(line):
                    for one in called.split(", "):
                        visit(one.removeprefix("%"), times)

    visit(entry, 1)
    return counts


def largest_gathered(text: str) -> int:
    """Entries of the largest array that is put together on every device."""
    return _largest(_GATHERED, text)


def largest_moved(text: str) -> int:
    """Entries of the largest array that any communication between devices leaves."""
    return _largest(_MOVED, text)


def _largest(operation: re.Pattern[str], text: str) -> int:
    sizes = [
        math.prod(shape)
        for line in text.splitlines()
        for found in operation.findall(line)
        for shape in _shapes(found)
    ]
    return max(sizes, default=0)


def _shapes(text: str) -> list[list[int]]:
    return [
        [int(size) for size in found.split(",") if size]
        for found in _SHAPE.findall(text)
    ]
