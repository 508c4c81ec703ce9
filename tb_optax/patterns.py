"""Patterns on paths, by which users say what the library cannot know."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

from tb_optax.leaves import listing

T = TypeVar("T")


def match_paths(
    argument: str, patterns: Mapping[str, T] | None, paths: Iterable[str]
) -> dict[str, T]:
    """What the first matching pattern says of each path that one matches.

    Raises:
        ValueError: if a pattern matches no path.

    >>> match_paths("axes", {"a/*": 1, "*": 2}, ["a/w", "b/w"])
    {'a/w': 1, 'b/w': 2}
    """
    paths = list(paths)
    patterns = dict(patterns or {})
    unused = set(patterns)
    found = {}
    for path in paths:
        matching = [p for p in patterns if fnmatch.fnmatchcase(path, p)]
        unused.difference_update(matching)
        if matching:
            found[path] = patterns[matching[0]]
    if unused:
        msg = (
            f"{argument}: no leaf matches {listing(sorted(unused))}; the paths are "
            f"{listing(paths)}."
        )
        raise ValueError(msg)
    return found
