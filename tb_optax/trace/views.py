"""Arrays of a forward pass without their entries: where each dimension runs.

An array is a view on a source: a leaf, or what a computation has put out.  A dimension
is a list of factors, each of which runs along one axis of the source, so that one that
a reshape joins from several remains known.  Moves change factors and take no memory.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, TypeAlias


class Unfollowed(Exception):
    """What becomes of the dimensions of an array cannot be followed."""


class Label(NamedTuple):
    """What an axis of data is: an axis of the kernel of an earlier product."""

    number: int  # of the product, or one of the marks below
    axis: int = 0  # of the kernel's leaf
    whole: bool = False  # whether it is all of that axis
    span: tuple[int, int] | None = None  # where it is, if kernels lie side by side


# Axes over which data was normalized; of constants, those along which all entries
# differ, those along which one entry is 1 and the others are 0, and those whose places
# are compared with the places along another; of parameters, those along which data that
# they multiply varies too.
NORMED, DISTINCT, ONE_HOT, PLACES, SHARED = map(Label, (-1, -2, -3, -4, -5))
Labels: TypeAlias = frozenset[Label]


class Factor(NamedTuple):
    """A factor of a dimension, which runs along one axis or along none."""

    size: int
    axis: int | None = 0  # of the source; None if all entries along it are equal
    of_axis: Labels = frozenset()  # labels of that axis
    step: int = 1  # from entry to entry
    length: int | None = None  # of the axis; None if the factor has as many entries

    @property
    def varies(self) -> bool:
        """Say whether entries may differ along the factor."""
        return self.size > 1 and self.axis is not None

    @property
    def whole(self) -> bool:
        """Say whether it covers its axis from end to end."""
        return self.length in (None, self.size) and abs(self.step) == 1

    @property
    def labels(self) -> Labels:
        """Return the labels of what it covers."""
        if not self.of_axis or self.whole:
            return self.of_axis
        return frozenset(label._replace(whole=False) for label in self.of_axis)

    def part(self, size: int, step: int = 1) -> "Factor":
        """Take every `step`-th entry, of which there are so many."""
        length = self.length or self.size
        return self._replace(size=size, step=self.step * step, length=length)


Dimension: TypeAlias = Sequence[Factor]
Dims: TypeAlias = Sequence[Dimension]
Shape: TypeAlias = Sequence[int]


class Array(NamedTuple):
    """A view on a source."""

    source: tuple[int, ...]  # its shape
    start: tuple[int, ...]  # the index of the first entry along each of its axes
    dims: tuple[Dimension, ...]  # factors of each dimension, from major to minor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the sizes of the dimensions."""
        return tuple(math.prod(f.size for f in dim) for dim in self.dims)

    def varying(self) -> frozenset[int]:
        """Return the dimensions along which entries may differ."""
        dims = enumerate(self.dims)
        return frozenset(i for i, dim in dims if any(f.varies for f in dim))

    def axes(self) -> frozenset[int]:
        """Return the axes of the source along which entries may differ."""
        factors = [factor for dim in self.dims for factor in dim if factor.varies]
        return frozenset(f.axis for f in factors if f.axis is not None)

    def marked(self, label: Label, dimensions: Collection[int]) -> "Array":
        """Put a label on some dimensions, and take it off the others."""

        def own(factor: Factor, i: int) -> Factor:
            if (label in factor.of_axis) == (i in dimensions):
                return factor
            return factor._replace(of_axis=factor.of_axis ^ {label})

        dims = enumerate(self.dims)
        return self._replace(dims=tuple(tuple(own(f, i) for f in d) for i, d in dims))

    def along(self, label: Label) -> frozenset[int]:
        """Return the dimensions that are one factor with this label."""
        single = [(i, dim[0]) for i, dim in enumerate(self.dims) if len(dim) == 1]
        return frozenset(i for i, factor in single if label in factor.labels)

    def low(self) -> list[int]:
        """Return the smallest index along each axis of the source."""
        low = list(self.start)
        for factor in [factor for dim in self.dims for factor in dim]:
            if factor.axis is not None:
                low[factor.axis] += min(factor.step, 0) * (factor.size - 1)
        return low

    def on(
        self, dims: Iterable[Dimension], shift: Iterable[tuple[Factor, int]] = ()
    ) -> "Array":
        """Put other factors on the same source, starting so far along some of them.

        One entry of a longer axis is no factor: nothing runs along it.
        """
        start = list(self.start)
        for factor, entries in shift:
            if factor.axis is not None:
                start[factor.axis] += entries * factor.step
        kept = [[f for f in dim if f.size != 1 or f.whole] for dim in dims]
        return Array(self.source, tuple(start), tuple(map(tuple, kept)))


def of_factors(dims: Dims) -> Array:
    """Make a new array whose dimensions have these factors, with their labels."""
    source = [factor.size for dim in dims for factor in dim]
    axes = iter(range(len(source)))

    def own(factor: Factor) -> Factor:
        axis = next(axes)
        return Factor(factor.size, None if factor.axis is None else axis, factor.labels)

    new = tuple(tuple(own(factor) for factor in dim) for dim in dims)
    return Array(tuple(source), (0,) * len(source), new)


def fresh(shape: Iterable[int]) -> Array:
    """Make an array of which nothing is known but its shape."""
    return of_factors([[Factor(size)] for size in shape])


def unlabelled(array: Array) -> Array:
    """Make an array of the same dimensions that has gone through nothing."""
    return of_factors([[Factor(f.size, f.axis) for f in dim] for dim in array.dims])


# Moves: each takes an array and the shape it shall have, and may raise `Unfollowed`.


def arrange(array: Array, shape: Shape, places: Iterable[int | None]) -> Array:
    """Take each dimension from a place, or repeat entries along it if there is none.

    Dimensions that are not named vanish; their first entry stays.
    """
    return array.on(
        [Factor(size, None)] if i is None or array.shape[i] != size else array.dims[i]
        for i, size in zip(places, shape, strict=True)
    )


def without(array: Array, shape: Shape, gone: Iterable[int]) -> Array:
    """Take the first entry along some dimensions, which vanish."""
    gone = set(gone)
    return arrange(array, shape, [i for i in range(len(array.dims)) if i not in gone])


def broadcast(array: Array, shape: Shape, positions: Sequence[int]) -> Array:
    """Move dimension i to `positions[i]` of a new shape; repeat along the others."""
    places = {place: i for i, place in enumerate(positions)}
    return arrange(array, shape, [places.get(i) for i in range(len(shape))])


def reshape(array: Array, shape: Shape, order: Sequence[int] | None = None) -> Array:
    """Split and join dimensions; factors are split where they have to be."""
    if 0 in shape:
        raise Unfollowed
    dims = array.dims if order is None else [array.dims[i] for i in order]
    rest = [factor for dim in dims for factor in dim][::-1]
    found: list[list[Factor]] = []
    for missing in shape:
        alone = missing == 1 and rest and rest[-1].size == 1
        found.append([rest.pop()] if alone else [])
        while missing > 1:
            factor = rest.pop() if rest else Factor(0)
            if not factor.size or (missing % factor.size and factor.size % missing):
                raise Unfollowed
            if missing % factor.size:
                inner = factor.size // missing
                rest.append(factor.part(inner))
                factor = factor.part(missing, inner)
            found[-1].append(factor)
            missing //= factor.size
    if found:
        found[-1] += reversed(rest)
    return array.on(found)


def tile(array: Array, shape: Shape) -> Array:
    """Put copies side by side, as a new major factor of a dimension."""
    sized = zip(array.dims, array.shape, shape, strict=True)
    return array.on([Factor(n // own, None), *dim] for dim, own, n in sized)


def flip(array: Array, _: Shape, positions: Iterable[int]) -> Array:
    """Reverse dimensions."""
    dims: list[Dimension] = list(array.dims)
    turned = [factor for i in positions for factor in dims[i]]
    for i in positions:
        dims[i] = [factor.part(factor.size, -1) for factor in dims[i]]
    return array.on(dims, [(factor, factor.size - 1) for factor in turned])


def cut(
    array: Array,
    shape: Shape,
    starts: Sequence[int],
    steps: Sequence[int] | None = None,
) -> Array:
    """Take a piece from each dimension: one entry, or some of its major factor."""
    if 0 in (*shape, *array.shape):
        raise Unfollowed
    shift, dims = [], list(array.dims)
    for i in [i for i, size in enumerate(array.shape) if size != shape[i]]:
        start, step = starts[i], steps[i] if steps else 1
        inner = math.prod(factor.size for factor in dims[i][1:])
        if shape[i] == 1:
            for factor in dims[i][::-1]:
                shift.append((factor, start % factor.size))
                start //= factor.size
            dims[i] = []
        elif shape[i] % inner or start % inner or step > 1 < inner:
            raise Unfollowed
        else:
            major, *minor = dims[i]
            shift.append((major, start // inner))
            dims[i] = [major.part(shape[i] // inner, step), *minor]
    return array.on(dims, shift)


def take(array: Array, shape: Shape, index: int, dimension: int = 0) -> Array:
    """Take one entry along a dimension, which vanishes."""
    one = [*shape[:dimension], 1, *shape[dimension:]]
    starts = [index if i == dimension else 0 for i in range(len(one))]
    return without(cut(array, one, starts), shape, [dimension])


def resize(array: Array, shape: Shape) -> Array:
    """Make dimensions longer or shorter, as pads and shards do, or leave them."""
    if len(shape) != len(array.dims):
        raise Unfollowed
    dims = list(array.dims)
    for i in [i for i, size in enumerate(array.shape) if size != shape[i]]:
        inner = math.prod(factor.size for factor in dims[i][1:])
        if not dims[i] or not inner or shape[i] % inner:
            raise Unfollowed
        dims[i] = [dims[i][0].part(shape[i] // inner), *dims[i][1:]]
    return array.on(dims)
