"""What is known of an array in a forward pass, and the record of what happens to it."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from tb_optax.layers import MatrixAxes
from tb_optax.trace.views import Array

T = TypeVar("T")
Paths = frozenset[str]
CONSTANT, PARAMETER, DATA = range(3)
REDUCTION, OUTPUT, POOLED, STACKED = "reduction", "output", "pooled", "stacked"
# What a product does with an axis of a kernel: names of fields of `MatrixAxes`, more
# than one where its parts differ; or the only slice it has of it, None if unknown.
Use = frozenset[str] | int | None
# What a leaf does: it enters a product, acts on the outputs of one, perhaps as a norm,
# or is the norm whose output enters one, each with the number of the product; or, with
# a reason, something that makes no layer or that cannot be read.
ENTERS, FOLLOWS, NORM, FEEDS, SAID, FAILED = range(6)
# Why a matrix that is likely a kernel cannot be read, or is likely none.
COMPUTED = "it is computed with before it enters a product: its axes are lost"
BETWEEN_DATA = (
    "it is added to or multiplied with data and then enters a product of data with data"
)
LOOKED_UP = "embedding: data looks up its rows"
PRODUCT = "its product with"
SECOND = "it is combined with another of the same axes"


def union(sets: Iterable[frozenset[T]]) -> frozenset[T]:
    """Return the elements of all sets."""
    return frozenset().union(*sets)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array: a constant, computed from parameters alone, or data.

    Data depends on an input, or on a product with a parameter; "since" is since the
    newest product that it came through.
    """

    array: Array  # of a parameter that is a leaf, a view on it
    kind: int = CONSTANT
    literal: int | None = None  # the number that a constant is
    path: str | None = None  # the leaf, but for what acts on it entry by entry
    unknown: frozenset[int] = frozenset()  # its axes with one slice, nobody knows which
    leaves: Paths = frozenset()  # all in a parameter; what acts on data but not follows
    # What data is, entry by entry, if data has only changed a parameter, as masks do.
    kernels: tuple["Value", ...] = ()
    looked_up: bool = False  # whether constants have picked the rows of a parameter
    chosen: bool = False  # whether data has: slices of a stack, or rows of a table
    last: tuple[int, ...] = ()  # newest products; several of kernels side by side
    through: int = 0  # bits of all products that it depends on
    normalized: bool = False  # whether statistics, or constants, were taken out since
    reduced: bool = False  # whether it is a statistic, summed over a dimension since
    mixed: bool = False  # whether it is a product of data with data since
    pending: Paths = frozenset()  # parameters of norms that acted on it since
    coefficients: Paths = frozenset()  # what scaled it before it met a layer

    def but(self, **changes: Any) -> "Value":
        """Return the same value with changes."""
        return dataclasses.replace(self, **changes)

    def lost(self, array: Array, **changes: Any) -> "Value":
        """Return a value that is no longer its leaf, entry by entry, nor its number."""
        return self.but(array=array, path=None, literal=None, kernels=(), **changes)


def joined(values: Iterable[Value], array: Array) -> Value:
    """Combine values into one, which is data if any of them is."""
    values = list(values)
    kind = max((value.kind for value in values), default=CONSTANT)
    own = [value for value in values if value.kind == kind != CONSTANT]
    if not own:
        return Value(array)
    return Value(
        array,
        kind,
        leaves=union(value.leaves for value in own),
        looked_up=any(value.looked_up for value in own),
        chosen=any(value.chosen for value in own),
        last=newest(own).last,
        through=functools.reduce(int.__or__, (value.through for value in own)),
        normalized=any(value.normalized for value in own),
        reduced=all(value.reduced for value in own),
        mixed=any(value.mixed for value in own),
        pending=union(value.pending for value in own),
        coefficients=union(value.coefficients for value in own),
    )


def changed(values: Iterable[Value]) -> tuple[Value, ...]:
    """Return the parameters that values are, but for what data did to their entries."""
    found = {}
    for value in values:
        own = (value,) if value.kind == PARAMETER else value.kernels
        found.update({(kernel.path, kernel.array): kernel for kernel in own})
    return tuple(
        kernel
        for kernel in found.values()
        if kernel.path is not None and len(kernel.array.axes()) > 1
    )


def newest(values: Iterable[Value]) -> Value:
    """Return the value that came through the newest product."""
    return max(values, key=lambda value: max(value.last, default=-1))


class Product(NamedTuple):
    """A product of data with a parameter."""

    path: str  # of the parameter
    uses: Mapping[int, Use] | None  # of each axis; None where they are out of sight
    kernel: bool = True  # False for look-ups, which are no layers


class Record:
    """Events of a forward pass, in order, and what the user has said."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        given: Mapping[str, MatrixAxes | None],
        assumed: Paths,
        unreal: Paths,
    ):
        self.shapes, self.given, self.unreal = shapes, given, unreal
        # Parameters that are taken for kernels in products of parameters alone, those
        # among them that had to be, and those that may be kernels.
        self.assumed, self.needed, self.likely = assumed, set[str](), set[str]()
        # Leaves, what each does, and the product or the reason.
        self.events: list[tuple[str, int, Any]] = []
        self.products: list[Product] = []
        # Axes of the kernel of each product that another parameter has for batch axes,
        # and whether that is a matrix for each slice along the same axis.
        self.apart: dict[int, list[tuple[int, bool]]] = {}
        # Products that only compute their own kernel, as in spectral norm.
        self.auxiliary = set[int]()
        # Axes of a follower, each with the axis of its kernel that it runs along.
        self.aligned: dict[str, set[tuple[int | None, int]]] = {}
        # Parameters that meet any equation, and those that are added to data.
        self.seen, self.added = set[str](), set[str]()
        # Parameters that were put side by side: the dimension, and where each begins.
        self.bundles: dict[str | None, tuple[int, list[tuple[int, Value]]]] = {}

    def note(self, paths: Iterable[str], does: int, what: Any) -> None:
        """Write down what some parameters do."""
        self.events += [(path, does, what) for path in sorted(paths)]

    def noted(self, *does: int) -> dict[str, list[Any]]:
        """Return what is written down of each leaf that does this, in order, once."""
        found: dict[str, dict[Any, None]] = {}
        for path, own, what in self.events:
            if own in does:
                found.setdefault(path, {})[what] = None
        return {path: list(own) for path, own in found.items()}

    def product(self, path: str, uses: Mapping[int, Use] | None, **more: Any) -> int:
        """Write a product down; return its number, which ascends in execution."""
        self.products.append(Product(path, uses, **more))
        self.note([path], ENTERS, len(self.products) - 1)
        return len(self.products) - 1

    def chosen(self, numbers: Iterable[int]) -> list[int]:
        """Return the products with slices that data chooses."""
        uses = ((number, self.products[number].uses or {}) for number in numbers)
        return [number for number, own in uses if None in own.values()]

    def follow(self, paths: Iterable[str], numbers: Iterable[int], norm: bool) -> None:
        """Write down that parameters act on the outputs of products."""
        for number in numbers:
            self.note(paths, NORM if norm else FOLLOWS, number)

    def fail(self, paths: Iterable[str], reason: str) -> None:
        """Write down that a use of some matrices cannot be read."""
        self.note(filter(self.is_matrix, paths), FAILED, reason)

    def bundle(self, dimension: int, parts: Sequence[Value]) -> str:
        """Give parameters that lie side by side a name; there are bundles of these."""
        path = f"<{len(self.bundles)}>"
        sizes = [part.array.shape[dimension] for part in parts]
        starts = itertools.accumulate([0, *sizes[:-1]])
        self.bundles[path] = dimension, list(zip(starts, parts, strict=True))
        return path

    def own(self, value: Value) -> frozenset[str]:
        """Return the leaf that a value is, or else all that are in it."""
        return frozenset([value.path]) if value.path in self.shapes else value.leaves

    def is_matrix(self, path: str) -> bool:
        """Say whether a parameter has two or more axes longer than 1."""
        return sum(size > 1 for size in self.shapes[path]) > 1

    def is_kernel(self, path: str) -> bool:
        """Say whether a parameter is given or assumed to be a kernel."""
        return self.given.get(path) is not None or path in self.assumed

    def is_said(self, value: Value) -> bool:
        """Note that a parameter is likely a kernel; say whether it is taken for one."""
        own = self.own(value)
        self.likely |= own
        return all(map(self.is_kernel, own))

    def is_left_out(self, path: str) -> bool:
        """Say whether a parameter is given as no kernel, or cannot be one."""
        return path in self.unreal or self.given.get(path, self) is None
