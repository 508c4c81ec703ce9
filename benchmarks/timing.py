"""Interleaved measurements: A B C A B C ..., so that a busy moment hits all alike."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Samples = dict[str, list[float]]


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    before: Callable[[str], Any] = lambda _: None,
    budget: float = math.inf,
) -> Samples:
    """Time functions in turn, after one call of each that is not counted.

    Args:
        functions: what to call, by name; each returns when its work is done.
        repeats: rounds, each of which gives one number of seconds per function.
        before: called with the name ahead of every call, outside of the time.
        budget: seconds; after the first round, none starts that would pass them.
    """

    def one_round() -> list[float]:
        seconds = []
        for name, function in functions.items():
            before(name)
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return seconds

    one_round()
    start, rounds = time.perf_counter(), [one_round()]
    while len(rounds) < repeats:
        spent = time.perf_counter() - start
        if spent + spent / len(rounds) > budget:
            break
        rounds.append(one_round())
    return dict(zip(functions, map(list, zip(*rounds, strict=True)), strict=True))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Return the ratio of each round: its two samples stand side by side in time."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Return what a program allocates besides its arguments and results."""
    memory = compiled.memory_analysis()
    if memory is None:
        backend = jax.default_backend()
        raise RuntimeError(f"{backend} does not tell what memory a program takes")
    return memory.temp_size_in_bytes
