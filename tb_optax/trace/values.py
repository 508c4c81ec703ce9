"""Arrays of a forward pass without their entries: NumPy views that take no memory.

A parameter is an `as_strided` view over one byte.  Its strides tell which axis of the
leaf each dimension runs along, its address tells which slice of the other axes it is.
Transposing, slicing, flipping and broadcasting are NumPy's own operations on it.  Axes
lie further apart in the imaginary memory than their sizes ask for, so that no two axes
ever look like one: a dimension that a reshape joins from several is kept as several
factors, side by side.
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
        number: of the product; `NORMED` stands for what is no output, but an axis over
            which the data was normalized.
        axis: of the kernel's leaf.
        whole: whether it is all of that axis.
        span: where along the axis of the data it is, if kernels lie side by side.
    """

    number: int
    axis: int = 0
    whole: bool = False
    span: tuple[int, int] | None = None


NORMED = Label(-1)


class Source:
    """A leaf, or the array that a computation has put out.

    Attributes:
        shape: its shape.
        labels: what is known of each axis.
        steps: strides in the imaginary memory.
    """

    def __init__(self, shape: Sequence[int], labels: Sequence[frozenset[Label]] = ()):
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
    axis: int | None
    whole: bool
    labels: frozenset[Label]

    @property
    def varies(self) -> bool:
        """Whether entries may differ along the factor."""
        return self.size > 1 and self.axis is not None


class Array:
    """A view on a source, one NumPy dimension for each factor.

    Attributes:
        source: what it is a view on.
        view: a NumPy array without memory.
        cuts: the number of factors in each dimension.
        shape: its shape.
    """

    __slots__ = ("cuts", "shape", "source", "view")

    def __init__(self, source: Source, view: np.ndarray, cuts: Sequence[int]):
        self.source, self.view, self.cuts = source, view, tuple(cuts)
        if len(self.cuts) == view.ndim and all(cut == 1 for cut in self.cuts):
            self.shape = view.shape
        else:
            own = iter(view.shape)
            self.shape = tuple(
                math.prod(next(own) for _ in range(cut)) for cut in self.cuts
            )

    def factors(self, position: int) -> list[Factor]:
        """Factors of one dimension, from major to minor."""
        start = sum(self.cuts[:position])
        found = []
        for i in range(start, start + self.cuts[position]):
            size, stride = self.view.shape[i], abs(self.view.strides[i])
            if stride == 0:
                found.append(Factor(size, None, False, frozenset()))
                continue
            axis = self.source.axis_of(stride)
            whole = size == self.source.shape[axis]
            whole = whole and stride == self.source.steps[axis]
            found.append(Factor(size, axis, whole, self.source.labels[axis]))
        return found

    def varies(self, position: int) -> bool:
        """Whether entries may differ along a dimension."""
        if self.cuts[position] == 1 and len(self.cuts) == self.view.ndim:
            return self.view.shape[position] > 1 and self.view.strides[position] != 0
        return any(factor.varies for factor in self.factors(position))

    def varying(self) -> tuple[int, ...]:
        """Dimensions along which entries may differ."""
        return tuple(i for i in range(len(self.cuts)) if self.varies(i))

    def start(self) -> tuple[int, ...]:
        """Index of the first entry along every axis of the source."""
        low = self.view.__array_interface__["data"][0] - _START
        for size, stride in zip(self.view.shape, self.view.strides, strict=True):
            low += min(stride, 0) * (size - 1)
        found = []
        for step in self.source.steps:
            found.append(low // step)
            low %= step
        return tuple(found)

    def layout(self) -> Any:
        """Equal for equal views on one source."""
        return self.start(), self.view.shape, self.view.strides, self.cuts


def whole(source: Source) -> Array:
    """All of a source."""
    view = as_strided(_BYTE, source.shape, source.steps, writeable=False)
    return Array(source, view, (1,) * len(source.shape))


def fresh(shape: Sequence[int]) -> Array:
    """An array of which nothing is known but its shape."""
    return whole(Source(shape))


def of_factors(dims: Sequence[Sequence[Factor]]) -> Array:
    """A new array whose dimensions have these factors, with their labels."""
    flat = [factor for dim in dims for factor in dim]
    labels = [
        factor.labels
        if factor.whole
        else frozenset(label._replace(whole=False) for label in factor.labels)
        for factor in flat
    ]
    source = Source([factor.size for factor in flat], labels)
    steps = [
        step if factor.axis is not None else 0
        for step, factor in zip(source.steps, flat, strict=True)
    ]
    view = as_strided(_BYTE, source.shape, steps, writeable=False)
    return Array(source, view, [len(dim) for dim in dims])


def unlabelled(factors: Iterable[Factor]) -> list[Factor]:
    """The same factors, of an array that is none of the earlier ones."""
    return [factor._replace(labels=frozenset()) for factor in factors]


# Each move takes an array and the shape it shall have, and may raise `Unfollowed`.
Move: TypeAlias = Callable[[Array, Sequence[int]], Array]


def _grouped(array: Array) -> list[list[int]]:
    """NumPy dimensions of each dimension."""
    numbers = iter(range(array.view.ndim))
    return [[next(numbers) for _ in range(cut)] for cut in array.cuts]


def same(array: Array, _: Sequence[int]) -> Array:
    """Leave every entry where it is."""
    return array


def transpose(order: Sequence[int]) -> Move:
    """Permute dimensions."""

    def move(array, _):
        groups = _grouped(array)
        view = array.view.transpose([i for axis in order for i in groups[axis]])
        return Array(array.source, view, [array.cuts[axis] for axis in order])

    return move


def reshape(array: Array, shape: Sequence[int]) -> Array:
    """Split and join dimensions; factors are split where they have to be."""
    if 0 in shape:
        return fresh(shape)
    pairs = zip(array.view.shape, array.view.strides, strict=True)
    rest = list(pairs)[::-1]
    taken: list[tuple[int, int]] = []
    cuts = []
    for size in shape:
        before, missing = len(taken), size
        if size == 1 and rest and rest[-1][0] == 1:
            taken.append(rest.pop())
        while missing > 1:
            if not rest:
                raise Unfollowed
            size, stride = rest.pop()
            if size == 0 or (missing % size and size % missing):
                raise Unfollowed
            if missing % size:
                line = as_strided(_BYTE, (size,), (stride,), writeable=False)
                parts = np.reshape(line, (missing, size // missing), copy=False)
                rest.append((size // missing, parts.strides[1]))
                size, stride = missing, parts.strides[0]
            taken.append((size, stride))
            missing //= size
        cuts.append(len(taken) - before)
    if cuts:
        cuts[-1] += len(rest)
        taken += reversed(rest)
    view = as_strided(array.view, *zip(*taken, strict=True)) if taken else array.view
    return Array(array.source, view if taken else view.reshape(()), cuts)


def broadcast(positions: Sequence[int]) -> Move:
    """`lax.broadcast_in_dim`: dimension i goes to `positions[i]` of the new shape."""

    def move(array, shape):
        groups = _grouped(array)
        where = dict(zip(positions, range(len(groups)), strict=True))
        sizes, strides, cuts = [], [], []
        for position, size in enumerate(shape):
            group = groups[where[position]] if position in where else []
            if position in where and array.shape[where[position]] == size:
                sizes += [array.view.shape[i] for i in group]
                strides += [array.view.strides[i] for i in group]
            else:
                group = [0]
                sizes.append(size)
                strides.append(0)
            cuts.append(len(group))
        view = as_strided(array.view, sizes, strides, writeable=False)
        return Array(array.source, view, cuts)

    return move


def tile(array: Array, shape: Sequence[int]) -> Array:
    """Put copies side by side: a new major factor of a dimension."""
    sizes, strides, cuts = [], [], []
    for group, own, size in zip(_grouped(array), array.shape, shape, strict=True):
        if own != size:
            sizes.append(size // own)
            strides.append(0)
        sizes += [array.view.shape[i] for i in group]
        strides += [array.view.strides[i] for i in group]
        cuts.append(len(group) + (own != size))
    return Array(array.source, as_strided(array.view, sizes, strides), cuts)


def without(gone: Iterable[int]) -> Move:
    """Take the first entry along some dimensions, which vanish."""
    gone = set(gone)

    def move(array, _):
        groups = _grouped(array)
        dropped = {i for position in gone for i in groups[position]}
        key = tuple(0 if i in dropped else slice(None) for i in range(array.view.ndim))
        cuts = [cut for i, cut in enumerate(array.cuts) if i not in gone]
        return Array(array.source, array.view[(*key, ...)], cuts)

    return move


def take(index: int) -> Move:
    """Take one entry along the first dimension, which vanishes."""

    def move(array, _):
        return Array(array.source, array.view[index, ...], array.cuts[1:])

    return move


def flip(positions: Iterable[int]) -> Move:
    """Reverse dimensions."""

    def move(array, _):
        groups = _grouped(array)
        axes = [i for position in positions for i in groups[position]]
        return Array(array.source, np.flip(array.view, axes), array.cuts)

    return move


def cut(starts: Sequence[int], steps: Sequence[int] | None = None) -> Move:
    """Take a piece from each dimension; of several factors, the major one is cut."""

    def move(array, shape):
        key: list[slice] = []
        for position, group in enumerate(_grouped(array)):
            size, start = shape[position], starts[position]
            step = 1 if steps is None else steps[position]
            if size == array.shape[position]:
                key += [slice(None)] * len(group)
                continue
            inner = math.prod(array.view.shape[i] for i in group[1:])
            if size % inner or start % inner or (step != 1 and inner != 1):
                raise Unfollowed
            low, count = start // inner, size // inner
            key.append(slice(low, low + (count - 1) * step + 1, step))
            key += [slice(None)] * (len(group) - 1)
        return Array(array.source, array.view[(*key, ...)], array.cuts)

    return move


def resize(array: Array, shape: Sequence[int]) -> Array:
    """Make dimensions longer or shorter, as pads and shards do."""
    if len(shape) != len(array.cuts):
        raise Unfollowed
    sizes = list(array.view.shape)
    for group, own, size in zip(_grouped(array), array.shape, shape, strict=True):
        if own == size:
            continue
        inner = math.prod(sizes[i] for i in group[1:])
        if not group or inner == 0 or size % inner:
            raise Unfollowed
        sizes[group[0]] = size // inner
        if sizes[group[0]] > _ROOM * max(array.view.shape[group[0]], 1):
            raise Unfollowed
    return Array(
        array.source, as_strided(array.view, sizes, array.view.strides), array.cuts
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An array that depends on neither parameters nor inputs.

    Attributes:
        array: its dimensions.
        compute: gives its entries, where these can be had.
    """

    array: Array
    compute: Callable[[], np.ndarray] | None = None


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


class Trail(NamedTuple):
    """What data has gone through.

    Attributes:
        last: numbers of the newest products with parameters that it came through;
            several where their kernels lay side by side.
        through: bits of all products that it depends on.
        rank: the most axes that an input it depends on has.
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
    """An array that depends on the inputs, or on a product with a parameter.

    Attributes:
        array: its dimensions.
        trail: what it has gone through.
    """

    array: Array
    trail: Trail = Trail()


Value: TypeAlias = Constant | Parameter | Data


def leaf(path: str, shape: Sequence[int]) -> Parameter:
    """The value of one leaf."""
    array = whole(Source(shape))
    return Parameter(array, frozenset([path]), (View(path, array),))


def moved(value: Value, move: Move, shape: Sequence[int]) -> Value:
    """A value with its entries moved."""
    try:
        array = move(value.array, shape)
    except Unfollowed:
        array, lost = fresh(shape), True
    else:
        lost = False
    if not isinstance(value, Parameter):
        return dataclasses.replace(value, array=array)
    if not value.views or lost:
        return dataclasses.replace(value, array=array, views=(), along=None)
    if value.along is None:
        view = value.views[0]._replace(array=array)
        return dataclasses.replace(value, array=array, views=(view,))
    return _moved_side_by_side(value, array, move)


def _moved_side_by_side(value: Parameter, array: Array, move: Move) -> Parameter:
    """The same for several views, if the dimension they share stays one."""
    own = value.array.factors(value.along or 0)
    where = [i for i in range(len(array.cuts)) if array.factors(i) == own]
    views = []
    for view in value.views:
        shape = list(array.shape)
        if len(where) == 1:
            shape[where[0]] = view.array.shape[value.along or 0]
        try:
            views.append(view._replace(array=move(view.array, shape)))
        except Unfollowed:
            where = []
    if len(where) != 1:
        return dataclasses.replace(value, array=array, views=(), along=None)
    return dataclasses.replace(value, array=array, views=tuple(views), along=where[0])
