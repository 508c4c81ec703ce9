"""Arrays of a forward pass without their entries: NumPy views that take no memory.

A parameter is an `as_strided` view over one byte.  Its strides tell which axis of the
leaf each dimension runs along, its address tells which slice of the other axes it is.
Axes lie further apart in the imaginary memory than their sizes ask for, so that no two
of them ever look like one: a dimension that a reshape joins from several is kept as
several factors, each a dimension of the view.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided

_BYTE = np.zeros(1, np.int8)
_START = _BYTE.__array_interface__["data"][0]
# An axis has room for this many times its size, as padding may make it longer.
_ROOM = 4


class Unfollowed(Exception):
    """What becomes of the dimensions of an array cannot be followed."""


class Label(NamedTuple):
    """What an axis of data is: an axis of the kernel of an earlier product.

    Attributes:
        number: of the product; or one of the marks below.
        axis: of the kernel's leaf.
        whole: whether it is all of that axis.
        span: where along the axis of the data it is, if kernels lie side by side.
    """

    number: int
    axis: int = 0
    whole: bool = False
    span: tuple[int, int] | None = None


# Axes over which data was normalized; of constants, those along which all entries
# differ, and those along which one entry is 1 and the others are 0.
NORMED, DISTINCT, ONE_HOT = Label(-1), Label(-2), Label(-3)
Labels: TypeAlias = frozenset[Label]


class Source:
    """A leaf, or the array that a computation has put out, with labels of its axes."""

    def __init__(self, shape: Sequence[int], labels: Sequence[Labels] = ()):
        self.shape = tuple(shape)
        self.labels = tuple(labels) or (frozenset(),) * len(self.shape)
        rooms = [max(size, 1) * _ROOM for size in self.shape]
        self.steps = [math.prod(rooms[i + 1 :]) for i in range(len(rooms))]
        self._ascending = self.steps[::-1]

    def axis_of(self, stride: int) -> int:
        """The axis that steps of this length run along."""
        return len(self.steps) - bisect.bisect_right(self._ascending, stride)


class Factor(NamedTuple):
    """A factor of a dimension, which runs along one axis or along none.

    Attributes:
        size: its size.
        axis: of the source; None where the array is constant along the factor.
        whole: whether it covers the axis from end to end.
        labels: of the axis.
    """

    size: int
    axis: int | None = 0
    whole: bool = True
    labels: Labels = frozenset()

    @property
    def varies(self) -> bool:
        """Whether entries may differ along the factor."""
        return self.size > 1 and self.axis is not None


Dimension: TypeAlias = Sequence[Factor]


class Array:
    """A view on a source, with one NumPy dimension for each factor.

    Attributes:
        source: what it is a view on.
        view: a NumPy array without memory.
        cuts: the number of factors in each dimension.
        shape: its shape.
    """

    def __init__(self, source: Source, view: np.ndarray, cuts: Sequence[int]):
        self.source, self.view, self.cuts = source, view, tuple(cuts)
        own = iter(view.shape)
        self.shape = tuple(
            math.prod(next(own) for _ in range(count)) for count in self.cuts
        )

    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.cuts)

    def pairs(self) -> list[list[tuple[int, int]]]:
        """Size and stride of each factor of each dimension."""
        flat = iter(zip(self.view.shape, self.view.strides, strict=True))
        return [[next(flat) for _ in range(count)] for count in self.cuts]

    def dims(self) -> list[list[Factor]]:
        """Factors of each dimension, from major to minor."""
        source = self.source

        def factor(size: int, stride: int) -> Factor:
            if stride == 0:
                return Factor(size, None, False)
            axis = source.axis_of(abs(stride))
            step, full = source.steps[axis], source.shape[axis]
            whole = size == full and abs(stride) == step
            return Factor(size, axis, whole, source.labels[axis])

        return [[factor(*pair) for pair in dim] for dim in self.pairs()]

    def varying(self) -> frozenset[int]:
        """Dimensions along which entries may differ."""
        return frozenset(
            i
            for i, dim in enumerate(self.pairs())
            if any(size > 1 and stride for size, stride in dim)
        )

    def start(self) -> list[int]:
        """Index of the first entry along every axis of the source."""
        low = self.view.__array_interface__["data"][0] - _START
        for size, stride in zip(self.view.shape, self.view.strides, strict=True):
            low += min(stride, 0) * (size - 1)
        found = []
        for step in self.source.steps:
            found.append(low // step)
            low %= step
        return found

    def layout(self) -> Any:
        """Equal for equal views on one source."""
        return self.start(), self.pairs()


def _strided(array: Array, dims: Sequence[Sequence[tuple[int, int]]]) -> Array:
    """The same first entry, with these factors."""
    flat = [pair for dim in dims for pair in dim]
    sizes, strides = [size for size, _ in flat], [stride for _, stride in flat]
    view = as_strided(array.view, sizes, strides, writeable=False)
    return Array(array.source, view, [len(dim) for dim in dims])


def of_factors(dims: Sequence[Dimension]) -> Array:
    """A new array whose dimensions have these factors, with their labels."""
    flat = [factor for dim in dims for factor in dim]
    source = Source([factor.size for factor in flat], [labels_of(f) for f in flat])
    steps = iter(source.steps)
    whole = Array(source, _BYTE.reshape(()), ())
    pairs = [
        [(f.size, step if f.axis is not None else 0) for f, step in zip(dim, steps)]
        for dim in dims
    ]
    return _strided(whole, pairs)


def labels_of(factor: Factor) -> Labels:
    """Labels of an axis, for what a factor covers of it."""
    if factor.whole:
        return factor.labels
    return frozenset(label._replace(whole=False) for label in factor.labels)


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

    def move(array, _):
        pairs = array.pairs()
        return _strided(array, [pairs[i] for i in order])

    return move


def without(gone: Iterable[Any]) -> Move:
    """Take the first entry along some dimensions, which vanish."""
    gone = set(map(int, gone))
    return lambda array, shape: transpose(
        i for i in range(array.rank()) if i not in gone
    )(array, shape)


def reshape(array: Array, shape: Sequence[int]) -> Array:
    """Split and join dimensions; factors are split where they have to be."""
    if 0 in shape:
        return fresh(shape)
    rest = [pair for dim in array.pairs() for pair in dim][::-1]
    dims: list[list[tuple[int, int]]] = []
    for missing in shape:
        dim = [rest.pop()] if missing == 1 and rest and rest[-1][0] == 1 else []
        while missing > 1:
            size, stride = rest.pop() if rest else (0, 0)
            if size == 0 or (missing % size and size % missing):
                raise Unfollowed
            if missing % size:
                line = as_strided(_BYTE, (size,), (stride,))
                parts = np.reshape(line, (missing, size // missing), copy=False)
                rest.append((size // missing, parts.strides[1]))
                size, stride = missing, parts.strides[0]
            dim.append((size, stride))
            missing //= size
        dims.append(dim)
    if dims:
        dims[-1] += reversed(rest)
    return _strided(array, dims)


def broadcast(positions: Iterable[Any]) -> Move:
    """`lax.broadcast_in_dim`: dimension i goes to `positions[i]` of the new shape."""
    positions = list(map(int, positions))

    def move(array, shape):
        dims = [[(size, 0)] for size in shape]
        for dim, own, position in zip(array.pairs(), array.shape, positions):
            if own == shape[position]:
                dims[position] = dim
        return _strided(array, dims)

    return move


def expand(array: Array, shape: Sequence[int]) -> Array:
    """Broadcast dimensions of size 1."""
    return broadcast(range(array.rank()))(array, shape)


def tile(array: Array, shape: Sequence[int]) -> Array:
    """Put copies side by side: a new major factor of a dimension."""
    sized = zip(array.pairs(), array.shape, shape, strict=True)
    return _strided(
        array, [[(n // own, 0), *dim] if n != own else dim for dim, own, n in sized]
    )


def take(index: int) -> Move:
    """Take one entry along the first dimension, which vanishes."""
    return lambda array, _: Array(array.source, array.view[index, ...], array.cuts[1:])


def flip(positions: Iterable[Any]) -> Move:
    """Reverse dimensions."""
    gone = set(positions)

    def move(array, _):
        owners = [i for i, count in enumerate(array.cuts) for _ in range(count)]
        axes = [axis for axis, i in enumerate(owners) if i in gone]
        return Array(array.source, np.flip(array.view, axes), array.cuts)

    return move


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
        return Array(array.source, array.view[(*key, ...)], array.cuts)

    return move


def resize(array: Array, shape: Sequence[int]) -> Array:
    """Make dimensions longer or shorter, as pads and shards do."""
    if len(shape) != array.rank():
        raise Unfollowed
    dims = array.pairs()
    for dim, own, size in zip(dims, array.shape, shape, strict=True):
        inner = math.prod(n for n, _ in dim[1:])
        if own != size:
            if not dim or not inner or size % inner or size > _ROOM * max(own, 1):
                raise Unfollowed
            dim[0] = (size // inner, dim[0][1])
    return _strided(array, dims)


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An array that depends on neither parameters nor inputs; the number it is."""

    array: Array
    literal: int | None = None


class View(NamedTuple):
    """One leaf, seen through a view.

    Attributes:
        path: of the leaf.
        array: the view.
        unknown: axes of which there is one slice, nobody knows which.
    """

    path: str
    array: Array
    unknown: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
    """An array computed from parameters and constants alone.

    Attributes:
        array: its dimensions.
        leaves: paths of all parameters in it.
        views: the leaves that it is entry by entry, but for other parameters and
            constants that act on it elementwise: one; several side by side; none where
            that is not known.
        along: the dimension along which several views lie side by side.
        scaled: whether an array of constants was multiplied in.
        reduced: whether it was summed over some dimension.
        normed: whether statistics of its own were taken out of it.
        looked_up: whether constants have picked its rows.
        through: bits of the products whose scalar results were multiplied in.
    """

    array: Array
    leaves: frozenset[str]
    views: tuple[View, ...] = ()
    along: int | None = None
    scaled: bool = False
    reduced: bool = False
    normed: bool = False
    looked_up: bool = False
    through: int = 0

    @property
    def matrix(self) -> bool:
        """Whether it varies along two dimensions or more."""
        return len(self.array.varying()) > 1

    def lost(self, array: Array, **changes: Any) -> "Parameter":
        """What it is no longer entry by entry."""
        return dataclasses.replace(self, array=array, views=(), along=None, **changes)


class Trail(NamedTuple):
    """What data has gone through.

    Attributes:
        last: numbers of the newest products with parameters that it came through;
            several where their kernels lay side by side.
        through: bits of all products that it depends on.
        rank: 1 + the most axes of an input it depends on; 0 if it depends on none.
        normalized: whether statistics were divided out or subtracted since.
        reduced: whether it is a statistic, summed over some dimension since.
        mixed: whether it is a product of data with data since.
        pending: norm parameters that acted on it since.
        coefficients: parameters that scaled it before it met other data.
        matrices: parameters of two or more axes that were added or multiplied in.
        learned: whether it is a parameter in the place of data.
    """

    last: tuple[int, ...] = ()
    through: int = 0
    rank: int = 0
    normalized: bool = False
    reduced: bool = False
    mixed: bool = False
    pending: frozenset[str] = frozenset()
    coefficients: frozenset[str] = frozenset()
    matrices: frozenset[str] = frozenset()
    learned: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """An array that depends on inputs, or on a product with a parameter."""

    array: Array
    trail: Trail = Trail()


Value: TypeAlias = Constant | Parameter | Data


def leaf(path: str, shape: Sequence[int]) -> Parameter:
    """The value of one leaf."""
    array = fresh(shape)
    return Parameter(array, frozenset([path]), (View(path, array),))


def moved(value: Value, move: Move, shape: Sequence[int]) -> Value:
    """A value with its entries moved; where that cannot be followed, without views."""
    try:
        array = move(value.array, shape)
        if not isinstance(value, Parameter) or not value.views:
            return dataclasses.replace(value, array=array)
        if value.along is None:
            views = (value.views[0]._replace(array=array),)
            return dataclasses.replace(value, array=array, views=views)
        # Of several side by side, the dimension that they share has to stay one.
        own = value.array.dims()[value.along]
        places = [i for i, dim in enumerate(array.dims()) if dim == own]
        along = places[0] if len(places) == 1 else None
        views = []
        for view in value.views if along is not None else ():
            part = list(array.shape)
            part[along] = view.array.shape[value.along]
            views.append(view._replace(array=move(view.array, part)))
        return dataclasses.replace(value, array=array, views=tuple(views), along=along)
    except Unfollowed:
        array = fresh(shape)
        if isinstance(value, Parameter):
            return value.lost(array)
        return dataclasses.replace(value, array=array)
