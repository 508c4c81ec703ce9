"""Where the dimensions of an array come from.

A dimension is a tuple of factors, from major to minor, whose sizes multiply to its
own; a reshape splits and joins them.  A factor knows the axes it runs along: of a
parameter, by path, and of the outputs of earlier products, by number.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

Origin: TypeAlias = tuple[str | int, int]


class Factor(NamedTuple):
    """A factor of a dimension.

    Attributes:
        size: its size.
        origins: `(path, axis)` of a parameter, `(number, axis)` of the outputs of a
            product; empty where it is neither.
        broadcast: whether the array is constant along it.
    """

    size: int
    origins: frozenset[Origin] = frozenset()
    broadcast: bool = False


Dimensions: TypeAlias = tuple[tuple[Factor, ...], ...]


def fresh(shape: Sequence[int]) -> Dimensions:
    """Dimensions that come from nowhere known."""
    return tuple((Factor(size),) for size in shape)


def axes_of(path: str, shape: Sequence[int]) -> Dimensions:
    """Dimensions of a parameter itself."""
    return tuple(
        (Factor(size, frozenset([(path, axis)])),) for axis, size in enumerate(shape)
    )


def size_of(dimension: Sequence[Factor]) -> int:
    """Size of one dimension."""
    return math.prod(factor.size for factor in dimension)


def shape_of(dims: Dimensions) -> tuple[int, ...]:
    """Shape of an array."""
    return tuple(map(size_of, dims))


def varies(dimension: Sequence[Factor]) -> bool:
    """Whether the array differs along a dimension."""
    return any(factor.size > 1 and not factor.broadcast for factor in dimension)


def varying_size(dims: Dimensions) -> int:
    """Number of entries that may differ."""
    return math.prod(
        factor.size for dim in dims for factor in dim if not factor.broadcast
    )


def origins_of(dimension: Sequence[Factor]) -> frozenset[Origin]:
    """All axes that a dimension runs along."""
    return frozenset().union(*(factor.origins for factor in dimension))


def broadcast(
    dims: Dimensions, shape: Sequence[int], positions: Sequence[int]
) -> Dimensions:
    """`lax.broadcast_in_dim`: dimension i goes to `positions[i]` of the new shape."""
    result: list[tuple[Factor, ...]] = [
        (Factor(size, broadcast=True),) for size in shape
    ]
    for dim, position in zip(dims, positions, strict=True):
        if size_of(dim) == shape[position]:
            result[position] = dim
    return tuple(result)


def tile(dims: Dimensions, shape: Sequence[int]) -> Dimensions:
    """`lax.tile`: copies along a dimension are its slowest factor."""
    return tuple(
        dim
        if size_of(dim) == size
        else (Factor(size // size_of(dim), broadcast=True), *dim)
        for dim, size in zip(dims, shape, strict=True)
    )


def reshape(dims: Dimensions, shape: Sequence[int]) -> Dimensions | None:
    """Splits and joins dimensions; None where a factor would be cut unevenly."""
    if 0 in shape:
        return fresh(shape)
    rest = [factor for dim in reversed(dims) for factor in reversed(dim)]
    result = []
    for size in shape:
        dim, missing = [], size
        if size == 1 and rest and rest[-1].size == 1:
            dim.append(rest.pop())
        while missing > 1:
            if not rest:
                return None
            factor = rest.pop()
            if missing % factor.size == 0:
                dim.append(factor)
                missing //= factor.size
            elif factor.size % missing == 0:
                dim.append(factor._replace(size=missing))
                rest.append(factor._replace(size=factor.size // missing))
                missing = 1
            else:
                return None
        result.append(tuple(dim))
    # A trailing axis of size 1 stays with the last dimension.
    if result:
        result[-1] += tuple(reversed(rest))
    return tuple(result)


def resize(dims: Dimensions, shape: Sequence[int]) -> Dimensions | None:
    """The same dimensions with other sizes, as slices, pads and shards have them."""
    result = []
    for dim, size in zip(dims, shape, strict=True):
        if size_of(dim) == size:
            result.append(dim)
            continue
        known = [factor for factor in dim if factor.size > 1] or list(dim[:1])
        inner = math.prod(factor.size for factor in known[1:])
        if not known:
            result.append((Factor(size),))
        elif inner and size % inner == 0:
            result.append((known[0]._replace(size=size // inner), *known[1:]))
        else:
            return None
    return tuple(result)


def merge(several: Sequence[Dimensions], shape: Sequence[int]) -> Dimensions:
    """Dimensions of an elementwise result: what any operand knows of each."""
    full = [dims for dims in several if len(dims) == len(shape)]
    if not full:
        return tuple((Factor(size, broadcast=True),) for size in shape)
    return tuple(
        _merge([dims[position] for dims in full], size)
        for position, size in enumerate(shape)
    )


def _merge(candidates: list[tuple[Factor, ...]], size: int) -> tuple[Factor, ...]:
    candidates = [dim for dim in candidates if size_of(dim) == size]
    if not candidates:
        return (Factor(size),)
    known = [dim for dim in candidates if origins_of(dim)]
    finest = max(known or candidates, key=len)
    sizes = [factor.size for factor in finest]
    alike = [dim for dim in candidates if [f.size for f in dim] == sizes]
    constant = not any(varies(dim) for dim in candidates)
    return tuple(
        Factor(
            size,
            frozenset().union(*(dim[i].origins for dim in alike)),
            constant,
        )
        for i, size in enumerate(sizes)
    )


def anonymous(dims: Dimensions) -> Dimensions:
    """The same dimensions without their origins."""
    return tuple(
        tuple(factor._replace(origins=frozenset()) for factor in dim) for dim in dims
    )
