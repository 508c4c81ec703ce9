"""The record of a forward pass: which parameter does what, in order of execution."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tb_optax.layers import MatrixAxes

# Of a parameter that is an activation.
LEARNED = "enters a product in the place of data"
REDUCTION, OUTPUT, POOLED, STACKED = "reduction", "output", "pooled", "stacked"


class Product(NamedTuple):
    """A product of data with a parameter.

    Attributes:
        number: of the product, ascending in order of execution.
        path: of the parameter.
        roles: of each axis, names of fields of `MatrixAxes`; more than one where the
            parts of an axis have different ones.  None where they are out of sight.
        picks: axes of which there is one slice only, and which; None if unknown.
        through: bits of the products that it depends on.
        kernel: False for look-ups, which are no layers.
        assumed: whether it is a product only if the parameter is taken for a kernel.
        data: whether it depends on an input, and not on constants alone.
    """

    number: int
    path: str
    roles: Mapping[int, frozenset[str]] | None
    picks: Mapping[int, int | None]
    through: int = 0
    kernel: bool = True
    assumed: bool = False
    data: bool = True


class Follower(NamedTuple):
    """A parameter that acts on the output of a product."""

    path: str
    number: int
    norm: bool


class Feed(NamedTuple):
    """A norm parameter whose output enters a product."""

    path: str
    number: int


class Apart(NamedTuple):
    """An output axis that another parameter has for a batch axis.

    Attributes:
        number: of the product.
        axis: of its kernel.
        others: axes of the other parameter that it is batched with.
        matrices: whether the other parameter is a matrix for each slice.
    """

    number: int
    axis: int
    others: frozenset[int]
    matrices: bool


class Auxiliary(NamedTuple):
    """A product that only serves to compute its own kernel, as in spectral norm."""

    number: int


class Resampled(NamedTuple):
    """A product of constants whose outputs constants are multiplied with again."""

    number: int


class Pair(NamedTuple):
    """A parameter that may be the kernel of a product of parameters alone."""

    path: str


class Failed(NamedTuple):
    """A use of a parameter that cannot be read, and why."""

    path: str
    reason: str


class Note(NamedTuple):
    """A use of a parameter that makes no layer, and why."""

    path: str
    reason: str


class Record:
    """Events of a forward pass, in order.

    Attributes:
        events: what happened.
        products: the products among them, by number.
        shapes: of the parameters, by path.
        given: axes of parameters that the user has said; None for no kernel.
        assumed: parameters that are taken for kernels in products without data.
        seen: parameters that enter any computation.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        given: Mapping[str, MatrixAxes | None],
        assumed: Iterable[str] = (),
    ):
        self.events: list[Any] = []
        self.products: dict[int, Product] = {}
        self.shapes = dict(shapes)
        self.given = dict(given)
        self.assumed = frozenset(assumed)
        self.seen: set[str] = set()

    def add(self, event: Any) -> None:
        """Write an event down."""
        self.events.append(event)

    def product(self, path: str, roles: Any, picks: Any, **fields: Any) -> int:
        """Write a product down; return its number."""
        number = len(self.products)
        made = Product(number, path, roles, picks, **fields)
        self.products[number] = made
        self.events.append(made)
        return number

    def fail(self, paths: Iterable[str], reason: str) -> None:
        """Write down that a use of some matrices cannot be read."""
        for path in sorted(paths):
            if self.is_matrix(path):
                self.add(Failed(path, reason))

    def note(self, paths: Iterable[str], reason: str) -> None:
        """Write down that a use of some parameters makes no layer."""
        for path in sorted(paths):
            self.add(Note(path, reason))

    def is_matrix(self, path: str) -> bool:
        """Whether a parameter has two or more axes longer than 1."""
        return sum(size > 1 for size in self.shapes[path]) > 1

    def is_kernel(self, path: str) -> bool:
        """Whether a parameter is said or assumed to be a kernel."""
        return self.given.get(path) is not None or path in self.assumed

    def is_left_out(self, path: str) -> bool:
        """Whether a parameter is said to be no kernel."""
        return path in self.given and self.given[path] is None

    def of_type(self, kind: type) -> list[Any]:
        """All events of one type."""
        return [event for event in self.events if isinstance(event, kind)]

    def forget(self, mark: int) -> None:
        """Strike out all events from the mark on: they are to be found again."""
        del self.events[mark:]
