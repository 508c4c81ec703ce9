"""The record of a forward pass: which parameter does what, in order of execution."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from tb_optax.layers import MatrixAxes
from tb_optax.trace.values import Parameter

REDUCTION, OUTPUT, POOLED, STACKED = "reduction", "output", "pooled", "stacked"
# Why a matrix that is likely a kernel cannot be read.
COMPUTED = "it is computed with before it enters a product: its axes are lost"
BETWEEN_DATA = (
    "it is added to or multiplied with data and then enters a product of data with data"
)
SECOND = "it is combined with another of the same axes"  # and is likely none
# What a product does with an axis of a kernel: names of fields of `MatrixAxes`, more
# than one where its parts differ; or the only slice it has of it, None if unknown.
Use = frozenset[str] | int | None
T = TypeVar("T")


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
    """What else a parameter does."""

    path: str
    reason: str
    failed: bool  # whether it is a use that cannot be read


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
        assumed: Iterable[str] = (),
        unreal: Iterable[str] = (),
    ):
        self.shapes, self.given = dict(shapes), dict(given)
        self.unreal = frozenset(unreal)  # complex parameters
        # Parameters that are taken for kernels in products of parameters alone, and
        # those that may be.
        self.assumed, self.likely = frozenset(assumed), set[str]()
        self.events: list[Any] = []
        self.products: dict[int, Product] = {}
        self.apart: dict[int, list[Apart]] = {}
        # Products that only compute their own kernel, as in spectral norm; and those
        # of constants, whose outputs constants are multiplied with again.
        self.auxiliary, self.resampled = set[int](), set[int]()
        self.seen = set[str]()
        # Parameters that were put side by side: the dimension, and where each begins.
        self.bundles: dict[str, tuple[int, list[tuple[int, Parameter]]]] = {}

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

    def bundle(self, dimension: int, parts: Sequence[Parameter]) -> str:
        """Give parameters that lie side by side a name; there are bundles of these."""
        path, start = f"<{len(self.bundles)}>", 0
        self.bundles[path] = dimension, []
        for part in parts:
            self.bundles[path][1].append((start, part))
            start += part.array.shape[dimension]
        return path

    def own(self, value: Parameter) -> frozenset[str]:
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
        said = path in self.given and self.given[path] is None
        return said or path in self.unreal

    def of_type(self, kind: type[T]) -> list[T]:
        """All events of one type."""
        return [event for event in self.events if isinstance(event, kind)]
