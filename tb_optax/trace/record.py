"""The record of a forward pass: which parameter does what, in order of execution."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from tb_optax.layers import MatrixAxes

REDUCTION, OUTPUT, POOLED, STACKED = "reduction", "output", "pooled", "stacked"
Roles = Mapping[int, frozenset[str]]
T = TypeVar("T")


class Product(NamedTuple):
    """A product of data with a parameter.

    Attributes:
        number: of the product, ascending in order of execution.
        path: of the parameter.
        roles: of each axis, names of fields of `MatrixAxes`; more than one where the
            parts of an axis have different ones.  None where they are out of sight.
        picks: axes of which there is one slice only, and which; None if unknown.
        kernel: False for look-ups, which are no layers.
        learned: whether a parameter stands in the place of the data.
        data: whether the data depends on an input, and not on constants alone.
    """

    number: int
    path: str
    roles: Roles | None
    picks: Mapping[int, int | None]
    kernel: bool = True
    learned: bool = False
    data: bool = True


class Follower(NamedTuple):
    """A parameter that acts on the output of a product, perhaps as that of a norm."""

    path: str
    number: int
    norm: bool = False


class Feed(NamedTuple):
    """A norm parameter whose output enters a product."""

    path: str
    number: int


class Said(NamedTuple):
    """What else a parameter does, and whether it is a use that cannot be read."""

    path: str
    reason: str
    failed: bool


class Apart(NamedTuple):
    """An output axis that another parameter has for a batch axis.

    Attributes:
        axis: of the kernel whose output it is.
        others: axes of the other parameter that it is batched with.
        matrices: whether the other parameter is a matrix for each slice.
    """

    axis: int
    others: frozenset[int]
    matrices: bool


class Record:
    """Events of a forward pass, in order.

    Attributes:
        shapes: of the parameters, by path.
        given: axes of parameters that the user has said; None for no kernel.
        assumed: parameters that are taken for kernels in products without data.
        events: what happened.
        products: the products among them, by number.
        apart: output axes that are apart, by the number of their product.
        auxiliary: products that only compute their own kernel, as in spectral norm.
        resampled: products whose outputs constants are multiplied with again.
        likely: parameters that may be the kernels of products of parameters alone.
        seen: parameters that enter any computation.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        given: Mapping[str, MatrixAxes | None],
        assumed: Iterable[str] = (),
    ):
        self.shapes, self.given = dict(shapes), dict(given)
        self.assumed = frozenset(assumed)
        self.events: list[Any] = []
        self.products: dict[int, Product] = {}
        self.apart: dict[int, list[Apart]] = {}
        self.auxiliary: set[int] = set()
        self.resampled: set[int] = set()
        self.likely: set[str] = set()
        self.seen: set[str] = set()

    def product(self, path: str, roles: Roles | None, picks: Any, **more: Any) -> int:
        """Write a product down; return its number."""
        number = len(self.products)
        self.products[number] = Product(number, path, roles, picks, **more)
        self.events.append(self.products[number])
        return number

    def follow(self, paths: Iterable[str], numbers: Iterable[int], norm: bool) -> None:
        """Write down that parameters act on the outputs of products."""
        self.events += [Follower(p, n, norm) for n in numbers for p in sorted(paths)]

    def say(self, paths: Iterable[str], reason: str, failed: bool = False) -> None:
        """Write down what some parameters do; only matrices need to be read."""
        for path in sorted(paths):
            if not failed or self.is_matrix(path):
                self.events.append(Said(path, reason, failed))

    def fail(self, paths: Iterable[str], reason: str) -> None:
        """Write down that a use of some matrices cannot be read."""
        self.say(paths, reason, failed=True)

    def is_matrix(self, path: str) -> bool:
        """Whether a parameter has two or more axes longer than 1."""
        return sum(size > 1 for size in self.shapes[path]) > 1

    def is_kernel(self, path: str) -> bool:
        """Whether a parameter is said or assumed to be a kernel."""
        return self.given.get(path) is not None or path in self.assumed

    def is_left_out(self, path: str) -> bool:
        """Whether a parameter is said to be no kernel."""
        return path in self.given and self.given[path] is None

    def of_type(self, kind: type[T]) -> list[T]:
        """All events of one type."""
        return [event for event in self.events if isinstance(event, kind)]
