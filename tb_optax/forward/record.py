"""The record of a forward pass: which parameter does what, in order of execution."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tb_optax.forward.values import Loop, Pick
from tb_optax.layers import MatrixAxes


class Product(NamedTuple):
    """A product of data with a parameter.

    Attributes:
        number: of the product, ascending in order of execution.
        path: of the parameter.
        roles: of each axis, names of fields of `MatrixAxes`; more than one where the
            parts of an axis have different ones.
        picks: slices of stacked axes.
        outputs: number of outputs, of one slice.
        inputs: numbers of the products whose results enter.
        kernel: False for embeddings and vectors, which are no layers.
    """

    number: int
    path: str
    roles: Mapping[int, frozenset[str]]
    picks: Mapping[int, Pick]
    outputs: int
    inputs: tuple[int, ...]
    kernel: bool = True


class Follower(NamedTuple):
    """A parameter that acts on the output of a product."""

    path: str
    number: int
    norm: bool


class Feed(NamedTuple):
    """A norm parameter whose output enters a product."""

    path: str
    number: int


class Batched(NamedTuple):
    """An output axis of a product that another parameter has for a batch axis."""

    number: int
    axis: int


class Auxiliary(NamedTuple):
    """A product that only serves to compute its own kernel, as in spectral norm."""

    number: int


class Unclear(NamedTuple):
    """A parameter of which the axes cannot be told, and why."""

    path: str
    reason: str


class LoopStart(NamedTuple):
    """From here to the matching end, a loop runs."""

    loop: Loop


class LoopEnd(NamedTuple):
    """End of the innermost loop."""


class Record:
    """Events of a forward pass, in order.

    Attributes:
        events: what happened.
        shapes: of the parameters, by path.
        given: axes of parameters that the user has said: these are never unclear.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        given: Mapping[str, MatrixAxes | None],
    ):
        self.events: list[Any] = []
        self.shapes = dict(shapes)
        self.given = dict(given)
        self.seen: set[str] = set()
        self._products: dict[int, Product] = {}
        self._numbers = 0

    def number(self) -> int:
        """A number that no product and no loop has had."""
        self._numbers += 1
        return self._numbers

    def add(self, event: Any) -> None:
        """Writes an event down."""
        self.events.append(event)
        if isinstance(event, Product):
            self._products[event.number] = event

    def outputs(self, number: int) -> int:
        """Number of outputs of a product."""
        return self._products[number].outputs

    def path(self, number: int) -> str:
        """Path of the parameter of a product."""
        return self._products[number].path

    def unclear(self, leaves: Iterable[str], reason: str) -> None:
        """Writes down that the axes of some parameters cannot be told."""
        for path in sorted(leaves):
            if path not in self.given:
                self.add(Unclear(path, reason))

    def forget(self, mark: int) -> None:
        """Strikes out all events from the mark on: they are to be found anew."""
        del self.events[mark:]

    @contextlib.contextmanager
    def loop(self, length: int, *, reverse: bool = False) -> Iterator[Loop]:
        """Everything recorded inside happens once per iteration."""
        loop = Loop(self.number(), length, reverse)
        self.add(LoopStart(loop))
        yield loop
        self.add(LoopEnd())

    def ancestors(self, numbers: Iterable[int]) -> set[int]:
        """Products that some products depend on, these included."""
        found: set[int] = set()
        rest = list(numbers)
        while rest:
            number = rest.pop()
            if number not in found:
                found.add(number)
                rest += self._products[number].inputs
        return found
