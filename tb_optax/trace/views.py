"""Arrays of a forward pass without their entries: NumPy views that take no memory.

A parameter is an `as_strided` view over one byte.  Its strides tell which axis of the
leaf each dimension runs along, its address tells which slice of the other axes it is.
Axes lie further apart in the imaginary memory than their sizes ask for, so that no two
of them ever look like one: a dimension that a reshape joins from several is kept as
several factors, each a dimension of the view.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided

_BYTE = np.zeros((), np.int8)
_START = _BYTE.__array_interface__["data"][0]
# An axis has room for this many times its size, as padding may make it longer.
_ROOM = 4


class Unfollowed(Exception):
    """What becomes of the dimensions of an array cannot be followed."""


class Label(NamedTuple):
    """What an axis of data is: an axis of the kernel of an earlier product."""

    number: int  # of the product, or one of the marks below
    axis: int = 0  # of the kernel's leaf
    whole: bool = False  # whether it is all of that axis
    span: tuple[int, int] | None = None  # where it is, if kernels lie side by side


# Axes over which data was normalized; of constants, those along which all entries
# differ, and those along which one entry is 1 and the others are 0.
NORMED, DISTINCT, ONE_HOT = Label(-1), Label(-2), Label(-3)
Labels: TypeAlias = frozenset[Label]


class Factor(NamedTuple):
    """A factor of a dimension, which runs along one axis or along none."""

    size: int
    axis: int | None = 0  # of the source; None if all entries along it are equal
    whole: bool = True  # whether it covers the axis from end to end
    labels: Labels = frozenset()  # of what it covers

    @property
    def varies(self) -> bool:
        """Whether entries may differ along the factor."""
        return self.size > 1 and self.axis is not None


Dimension: TypeAlias = Sequence[Factor]
Pairs: TypeAlias = Sequence[Sequence[tuple[int, int]]]


class Source:
    """A leaf, or the array that a computation has put out, with labels of its axes."""

    def __init__(self, shape: Sequence[int], labels: Sequence[Labels]):
        self.shape, self.labels = tuple(shape), tuple(labels)
        rooms = [max(size, 1) * _ROOM for size in self.shape]
        self.steps = [math.prod(rooms[i + 1 :]) for i in range(len(rooms))]
        self._ascending = self.steps[::-1]

    def factor(self, size: int, stride: int) -> Factor:
        """What a dimension with this stride runs along."""
        if stride == 0:
            return Factor(size, None, False)
        axis = len(self.steps) - bisect.bisect_right(self._ascending, abs(stride))
        whole = (size, abs(stride)) == (self.shape[axis], self.steps[axis])
        labels = self.labels[axis]
        if labels and not whole:
            labels = frozenset(label._replace(whole=False) for label in labels)
        return Factor(size, axis, whole, labels)


class Array:
    """A view on a source, with one NumPy dimension for each factor."""

    def __init__(self, source: Source, view: np.ndarray, cuts: Sequence[int]):
        self.source, self.view = source, view
        self.cuts = tuple(cuts)  # the number of factors in each dimension
        own = iter(view.shape)
        self.shape = tuple(math.prod(next(own) for _ in range(n)) for n in self.cuts)
        self.rank = len(self.cuts)

    def pairs(self) -> list[list[tuple[int, int]]]:
        """Size and stride of each factor of each dimension."""
        flat = iter(zip(self.view.shape, self.view.strides, strict=True))
        return [[next(flat) for _ in range(n)] for n in self.cuts]

    def dims(self) -> list[list[Factor]]:
        """Factors of each dimension, from major to minor."""
        return [[self.source.factor(*pair) for pair in dim] for dim in self.pairs()]

    def varying(self) -> frozenset[int]:
        """Dimensions along which entries may differ."""
        pairs = enumerate(self.pairs())
        return frozenset(i for i, dim in pairs if any(n > 1 and s for n, s in dim))

    def start(self) -> list[int]:
        """Index of the first entry along every axis of the source."""
        low = self.view.__array_interface__["data"][0] - _START
        for size, stride in zip(self.view.shape, self.view.strides, strict=True):
            low += min(stride, 0) * (size - 1)
        steps = self.source.steps
        return [
            low % (steps[i - 1] if i else low + 1) // n for i, n in enumerate(steps)
        ]

    def layout(self) -> Any:
        """Equal for equal views on one source."""
        return self.start(), self.pairs()

    def strided(self, dims: Pairs) -> "Array":
        """The same first entry, with these factors."""
        flat = [pair for dim in dims for pair in dim]
        sizes, strides = [size for size, _ in flat], [stride for _, stride in flat]
        view = as_strided(self.view, sizes, strides, writeable=False)
        return Array(self.source, view, [len(dim) for dim in dims])

    def indexed(self, key: Sequence[Any], gone: int = 0) -> "Array":
        """NumPy's indexing; integers make the first dimensions vanish."""
        return Array(self.source, self.view[(*key, ...)], self.cuts[gone:])


def of_factors(dims: Sequence[Dimension]) -> Array:
    """A new array whose dimensions have these factors, with their labels."""
    flat = [factor for dim in dims for factor in dim]
    source = Source([f.size for f in flat], [f.labels for f in flat])
    step = iter(source.steps)
    pairs = [[(f.size, next(step) * (f.axis is not None)) for f in d] for d in dims]
    return Array(source, _BYTE, ()).strided(pairs)


def fresh(shape: Iterable[int]) -> Array:
    """An array of which nothing is known but its shape."""
    return of_factors([[Factor(size)] for size in shape])


def unlabelled(array: Array) -> Array:
    """The dimensions of an array, as those of one that has gone through nothing."""
    return of_factors([[Factor(f.size, f.axis) for f in dim] for dim in array.dims()])


# Each move takes an array and the shape it shall have, and may raise `Unfollowed`.
Move: TypeAlias = Callable[[Array, Sequence[int]], Array]


def same(array: Array, _: Sequence[int]) -> Array:
    """Leave every entry where it is."""
    return array


def transpose(order: Iterable[Any]) -> Move:
    """Permute dimensions; those that are not named vanish, their first entry stays."""
    order = list(map(int, order))
    return lambda array, _: array.strided([array.pairs()[i] for i in order])


def without(gone: Iterable[Any]) -> Move:
    """Take the first entry along some dimensions, which vanish."""
    gone = set(map(int, gone))
    return lambda array, _: transpose(set(range(array.rank)) - gone)(array, ())


def reshape(array: Array, shape: Sequence[int]) -> Array:
    """Split and join dimensions; factors are split where they have to be."""
    if 0 in shape:
        return fresh(shape)
    rest = [pair for dim in array.pairs() for pair in dim][::-1]
    dims: list[list[tuple[int, int]]] = []
    for missing in shape:
        dims.append([rest.pop()] if missing == 1 and rest and rest[-1][0] == 1 else [])
        while missing > 1:
            size, stride = rest.pop() if rest else (0, 0)
            if size == 0 or (missing % size and size % missing):
                raise Unfollowed
            if missing % size:
                line = as_strided(_BYTE, (size,), (stride,))
                parts = np.reshape(line, (missing, size // missing), copy=False)
                rest.append((size // missing, parts.strides[1]))
                size, stride = missing, parts.strides[0]
            dims[-1].append((size, stride))
            missing //= size
    if dims:
        dims[-1] += reversed(rest)
    return array.strided(dims)


def broadcast(positions: Iterable[Any]) -> Move:
    """`lax.broadcast_in_dim`: dimension i goes to `positions[i]` of the new shape."""
    positions = list(map(int, positions))

    def move(array, shape):
        dims = [[(size, 0)] for size in shape]
        for dim, own, i in zip(array.pairs(), array.shape, positions, strict=True):
            dims[i] = dim if own == shape[i] else dims[i]
        return array.strided(dims)

    return move


def expand(array: Array, shape: Sequence[int]) -> Array:
    """Broadcast dimensions of size 1."""
    return broadcast(range(array.rank))(array, shape)


def tile(array: Array, shape: Sequence[int]) -> Array:
    """Put copies side by side: a new major factor of a dimension."""
    sized = zip(array.pairs(), array.shape, shape, strict=True)
    more = [([] if n == own else [(n // own, 0)], dim) for dim, own, n in sized]
    return array.strided([[*copies, *dim] for copies, dim in more])


def take(index: int) -> Move:
    """Take one entry along the first dimension, which vanishes."""
    return lambda array, _: array.indexed([index], gone=1)


def flip(positions: Iterable[int]) -> Move:
    """Reverse dimensions."""
    backwards = {True: slice(None, None, -1), False: slice(None)}
    return lambda array, _: array.indexed(
        [backwards[i in positions] for i, n in enumerate(array.cuts) for _ in range(n)]
    )


def cut(starts: Sequence[int], steps: Sequence[int] | None = None) -> Move:
    """Take a piece from each dimension; of several factors, the major one is cut."""

    def move(array, shape):
        key: list[Any] = []
        for i, dim in enumerate(array.pairs()):
            inner = math.prod(size for size, _ in dim[1:])
            step = steps[i] if steps else 1
            if shape[i] != array.shape[i]:
                if shape[i] % inner or starts[i] % inner or (step > 1 and inner > 1):
                    raise Unfollowed
                low, count = starts[i] // inner, shape[i] // inner
                key.append(slice(low, low + (count - 1) * step + 1, step))
                dim = dim[1:]
            key += [slice(None)] * len(dim)
        return array.indexed(key)

    return move


def resize(array: Array, shape: Sequence[int]) -> Array:
    """Make dimensions longer or shorter, as pads and shards do."""
    dims = array.pairs()
    if len(shape) != array.rank:
        raise Unfollowed
    for dim, own, size in zip(dims, array.shape, shape, strict=True):
        inner = math.prod(n for n, _ in dim[1:])
        if own != size:
            if not dim or not inner or size % inner or size > _ROOM * max(own, 1):
                raise Unfollowed
            dim[0] = (size // inner, dim[0][1])
    return array.strided(dims)
