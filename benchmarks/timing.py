"""Interleaved measurements: A B C A B C ..., so that a busy moment hits all alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Samples = dict[str, list[float]]


class Summary(NamedTuple):
    """What a list of samples is reported as."""

    median: float
    low: float
    high: float
    count: int


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    before: Callable[[str], Any] | None = None,
    budget: float = math.inf,
) -> Samples:
    """Time functions in turn, after one call of each that is not counted.

    Args:
        functions: what to call, by name; each returns when its work is done.
        repeats: rounds, each of which gives one number of seconds per function.
        before: called with the name ahead of every call, outside of the time.
        budget: seconds; after the first round, none starts that would pass them.
    """
    samples: Samples = {name: [] for name in functions}

    def round_of_calls() -> None:
        for name, function in functions.items():
            if before is not None:
                before(name)
            start = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - start)

    round_of_calls()
    for values in samples.values():
        values.clear()
    start = time.perf_counter()
    for done in range(repeats):
        spent = time.perf_counter() - start
        if done and spent * (done + 1) / done > budget:
            break
        round_of_calls()
    return samples


def rest(name: str) -> None:
    """Wait until the threads of the library that was called before no longer spin."""
    del name
    time.sleep(0.2)


def summary(samples: Sequence[float]) -> Summary:
    """Return median and extremes."""
    return Summary(statistics.median(samples), min(samples), max(samples), len(samples))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Return the ratio of each round: its two samples stand side by side in time."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]
