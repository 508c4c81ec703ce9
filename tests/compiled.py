"""What a compiled program gathers on every device, read off its HLO text."""

import math
import re

_GATHERED = re.compile(r" = \(?(.*?)\)? all-gather(?:-start)?\(")
_SHAPE = re.compile(r"[a-z]+\d*\[([\d,]*)\]")


def largest_gathered(text: str) -> int:
    """Entries of the largest array that is put together on every device."""
    sizes = [
        math.prod(int(size) for size in shape.split(",") if size)
        for line in text.splitlines()
        for found in _GATHERED.findall(line)
        for shape in _SHAPE.findall(found)
    ]
    return max(sizes, default=0)
