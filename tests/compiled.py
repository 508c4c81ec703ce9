"""What a compiled program sends between devices, read off its HLO text."""

import math
import re

_GATHERED = re.compile(r" = \(?(.*?)\)? all-gather(?:-start)?\(")
_MOVED = re.compile(
    r" = \(?(.*?)\)? (?:all-gather|all-reduce|all-to-all|collective-permute|"
    r"reduce-scatter)(?:-start)?\("
)
_SHAPE = re.compile(r"[a-z]+\d*\[([\d,]*)\]")


def largest_gathered(text: str) -> int:
    """Entries of the largest array that is put together on every device."""
    return _largest(_GATHERED, text)


def largest_moved(text: str) -> int:
    """Entries of the largest array that any communication between devices leaves."""
    return _largest(_MOVED, text)


def _largest(operation: re.Pattern[str], text: str) -> int:
    sizes = [
        math.prod(int(size) for size in shape.split(",") if size)
        for line in text.splitlines()
        for found in operation.findall(line)
        for shape in _SHAPE.findall(found)
    ]
    return max(sizes, default=0)
