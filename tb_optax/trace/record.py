"""What is known of an array in a forward pass, and the record of what happens to it."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from tb_optax.layers import MatrixAxes
from tb_optax.trace.views import Array

T = TypeVar("T")
CONSTANT, PARAMETER, DATA = range(3)
REDUCTION, OUTPUT, POOLED, STACKED = "reduction", "output", "pooled", "stacked"
# What a product does with an axis of a kernel: names of fields of `MatrixAxes`, more
# than one where its parts differ; or the only slice it has of it, None if unknown.
Use = frozenset[str] | int | None
# Why a matrix that is likely a kernel cannot be read, or is likely none.
COMPUTED = "it is computed with before it enters a product: its axes are lost"
BETWEEN_DATA = (
    "it is added to or multiplied with data and then enters a product of data with data"
)
PRODUCT = "its product with"
SECOND = "it is combined with another of the same axes"


def union(sets: Iterable[frozenset[T]]) -> frozenset[T]:
    """All elements of several sets."""
    return frozenset().union(*sets)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array: a constant, computed from parameters alone, or data.

    Data depends on an input, or on a product with a parameter.
    """

    array: Array
    kind: int = CONSTANT
    literal: int | None = None  # the number that a constant is
    # The leaf that a parameter is entry by entry, but for what acts on it elementwise:
    # then `array` is a view on that leaf.
    path: str | None = None
    unknown: frozenset[int] = (
        frozenset()
    )  # axes of which there is one slice, but which?
    # All parameters in a parameter; those that were added to data or multiplied in.
    leaves: frozenset[str] = frozenset()
    looked_up: bool = False  # whether constants have picked the rows of a parameter
    scaled: bool = (
        False  # whether a parameter was multiplied with an array of constants
    )
    # Numbers of the newest products that data came through; several where their kernels
    # lay side by side.
    last: tuple[int, ...] = ()
    through: int = 0  # bits of all products that it depends on
    rank: int = 0  # 1 + the most axes of an input it depends on; 0 if on none
    normalized: bool = False  # whether statistics were taken out of it since
    reduced: bool = False  # whether it is a statistic, summed over some dimension since
    mixed: bool = False  # whether it is a product of data with data since
    learned: bool = False  # whether it is a parameter in the place of data
    pending: frozenset[str] = frozenset()  # norm parameters that acted on it since
    coefficients: frozenset[str] = frozenset()  # what scaled it before it met a layer

    def but(self, **changes: Any) -> "Value":
        """The same with changes."""
        return dataclasses.replace(self, **changes)

    def lost(self, array: Array, **changes: Any) -> "Value":
        """What is no longer its leaf, entry by entry, nor its number."""
        return self.but(array=array, path=None, literal=None, **changes)


def joined(values: Iterable[Value], array: Array) -> Value:
    """What comes of several values: data, if any is data."""
    values = list(values)
    kind = max((value.kind for value in values), default=CONSTANT)
    own = [value for value in values if value.kind == kind != CONSTANT]
    return Value(
        array,
        kind,
        leaves=union(value.leaves for value in own),
        looked_up=any(value.looked_up for value in own),
        scaled=any(value.scaled for value in own),
        last=newest(own).last if own else (),
        through=functools.reduce(int.__or__, (value.through for value in own), 0),
        rank=max((value.rank for value in own), default=0),
        normalized=any(value.normalized for value in own),
        reduced=bool(own) and all(value.reduced for value in own),
        mixed=any(value.mixed for value in own),
        pending=union(value.pending for value in own),
        coefficients=union(value.coefficients for value in own),
    )


def newest(values: Iterable[Value]) -> Value:
    """The value that came through the newest product."""
    return max(values, key=lambda value: max(value.last, default=-1))


class Product(NamedTuple):
    """A product of data with a parameter."""

    number: int  # ascending in order of execution
    path: str  # of the parameter
    uses: Mapping[int, Use] | None  # of each axis; None where they are out of sight
    kernel: bool = True  # False for look-ups, which are no layers
    learned: bool = False  # whether a parameter stands in the place of the data
    data: bool = True  # whether the data depends on an input, not on constants alone


class Follower(NamedTuple):
    """A parameter that acts on the output of a product, perhaps as that of a norm."""

    path: str
    number: int
    norm: bool


class Feed(NamedTuple):
    """A norm parameter whose output enters a product."""

    path: str
    number: int


class Said(NamedTuple):
    """What else a parameter does, and whether that is a use that cannot be read."""

    path: str
    reason: str
    failed: bool


class Apart(NamedTuple):
    """An output axis that another parameter has for a batch axis."""

    axis: int  # of the kernel whose output it is
    others: frozenset[int]  # axes of the other parameter that it is batched with
    matrices: bool  # whether the other parameter is a matrix for each slice


class Record:
    """Events of a forward pass, in order, and what the user has said."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        given: Mapping[str, MatrixAxes | None],
        assumed: frozenset[str] = frozenset(),
        unreal: frozenset[str] = frozenset(),
    ):
        self.shapes, self.given, self.unreal = dict(shapes), dict(given), unreal
        # Parameters that are taken for kernels in products of parameters alone, and
        # those that may be.
        self.assumed, self.likely = assumed, set[str]()
        self.events, self.seen = list[Any](), set[str]()
        self.products: dict[int, Product] = {}
        self.apart: dict[int, list[Apart]] = {}
        # Products that only compute their own kernel, as in spectral norm; and those
        # of constants, whose outputs constants are multiplied with again.
        self.auxiliary, self.resampled = set[int](), set[int]()
        # Parameters that were put side by side: the dimension, and where each begins.
        self.bundles: dict[str | None, tuple[int, list[tuple[int, Value]]]] = {}

    def product(self, path: str, uses: Mapping[int, Use] | None, **more: Any) -> int:
        """Write a product down; return its number."""
        number = len(self.products)
        self.products[number] = Product(number, path, uses, **more)
        self.events.append(self.products[number])
        return number

    def follow(self, paths: Iterable[str], numbers: Iterable[int], norm: bool) -> None:
        """Write down that parameters act on the outputs of products."""
        self.events += [Follower(p, n, norm) for n in numbers for p in sorted(paths)]

    def say(self, paths: Iterable[str], reason: str) -> None:
        """Write down what some parameters do that makes no layer."""
        self.events += [Said(path, reason, False) for path in sorted(paths)]

    def fail(self, paths: Iterable[str], reason: str) -> None:
        """Write down that a use of some matrices cannot be read."""
        paths = sorted(filter(self.is_matrix, paths))
        self.events += [Said(path, reason, True) for path in paths]

    def bundle(self, dimension: int, parts: Sequence[Value]) -> str:
        """Give parameters that lie side by side a name; there are bundles of these."""
        path, start = f"<{len(self.bundles)}>", 0
        self.bundles[path] = dimension, []
        for part in parts:
            self.bundles[path][1].append((start, part))
            start += part.array.shape[dimension]
        return path

    def own(self, value: Value) -> frozenset[str]:
        """The leaf that a value is, or else all that are in it."""
        return frozenset([value.path]) if value.path in self.shapes else value.leaves

    def is_matrix(self, path: str) -> bool:
        """Whether a parameter has two or more axes longer than 1."""
        return sum(size > 1 for size in self.shapes[path]) > 1

    def is_kernel(self, path: str) -> bool:
        """Whether a parameter is said or assumed to be a kernel."""
        return self.given.get(path) is not None or path in self.assumed

    def is_left_out(self, path: str) -> bool:
        """Whether a parameter is said to be no kernel, or cannot be one."""
        return path in self.unreal or self.given.get(path, self) is None

    def of_type(self, kind: type[T]) -> list[T]:
        """All events of one type."""
        return [event for event in self.events if isinstance(event, kind)]
