"""What is known of an array in a forward pass: a constant, parameters, or data."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from tb_optax.trace import views


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An array that depends on neither parameters nor inputs."""

    array: views.Array
    literal: int | None = None  # the number that it is


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
    """An array computed from parameters and constants alone.

    `path` is the leaf that it is entry by entry, but for other parameters and constants
    that act on it elementwise: then `array` is a view on that leaf.
    """

    array: views.Array
    leaves: frozenset[str]  # paths of all parameters in it
    path: str | None = None
    unknown: frozenset[int] = (
        frozenset()
    )  # axes of which there is one slice, but which?
    scaled: bool = False  # whether an array of constants was multiplied in
    reduced: bool = False  # whether it was summed over some dimension
    normed: bool = False  # whether statistics of its own were taken out of it
    looked_up: bool = False  # whether constants have picked its rows
    through: int = 0  # bits of the products whose scalar results were multiplied in

    @property
    def matrix(self) -> bool:
        """Whether it varies along two dimensions or more."""
        return len(self.array.varying()) > 1

    def lost(self, array: views.Array, **changes: Any) -> "Parameter":
        """What is no longer its leaf, entry by entry."""
        return dataclasses.replace(self, array=array, path=None, **changes)


class Trail(NamedTuple):
    """What data has gone through."""

    # Numbers of the newest products with parameters that it came through; several where
    # their kernels lay side by side.
    last: tuple[int, ...] = ()
    through: int = 0  # bits of all products that it depends on
    rank: int = 0  # 1 + the most axes of an input it depends on; 0 if on none
    normalized: bool = False  # whether statistics were taken out of it since
    reduced: bool = False  # whether it is a statistic, summed over some dimension since
    mixed: bool = False  # whether it is a product of data with data since
    pending: frozenset[str] = frozenset()  # norm parameters that acted on it since
    coefficients: frozenset[str] = (
        frozenset()
    )  # what scaled it before it met other data
    matrices: frozenset[str] = frozenset()  # those that were added or multiplied in
    learned: bool = False  # whether it is a parameter in the place of data


def joined(trails: Iterable[Trail]) -> Trail:
    """The trail of what comes of several; the newest products are the newest of all."""
    rows = list(trails)
    last, through, rank, normalized, reduced, mixed, *sets, learned = zip(*rows)
    return Trail(
        max(last, key=lambda numbers: max(numbers, default=-1)),
        functools.reduce(int.__or__, through),
        max(rank),
        any(normalized),
        all(reduced),
        any(mixed),
        *(frozenset().union(*column) for column in sets),
        all(learned),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """An array that depends on inputs, or on a product with a parameter."""

    array: views.Array
    trail: Trail = Trail()  # noqa: RUF009


Value: TypeAlias = Constant | Parameter | Data


def moved(value: Value, move: views.Move, shape: Sequence[int]) -> Value:
    """A value with its entries moved; no leaf any more if that cannot be followed."""
    try:
        return dataclasses.replace(value, array=move(value.array, shape))
    except views.Unfollowed:
        array = views.fresh(shape)
    if isinstance(value, Parameter):
        return value.lost(array)
    return dataclasses.replace(value, array=array)
