"""Abstract values: what is known of an array in a forward pass."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from tb_optax.forward.dimensions import Dimensions, Factor, fresh, shape_of

# The slice of an axis: its number, the loop whose iteration it is, None if unknown.
Pick: TypeAlias = "int | Loop | None"


class Loop(NamedTuple):
    """A loop of known length that takes one slice of a stack at a time."""

    number: int
    length: int
    reverse: bool


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array that depends on neither parameters nor inputs."""

    dims: Dimensions
    literal: int | None = None


class View(NamedTuple):
    """One parameter, its axes rearranged.

    Attributes:
        path: which parameter.
        dims: its dimensions.
        picks: axes of which there is one slice only, and which slice.
    """

    path: str
    dims: Dimensions
    picks: tuple[tuple[int, Pick], ...] = ()

    def picked(self, axis: int, pick: Pick) -> "View":
        """The same with one slice of an axis; unknown where it was sliced before."""
        known = dict(self.picks)
        known[axis] = None if axis in known else pick
        return self._replace(picks=tuple(sorted(known.items(), key=lambda p: p[0])))


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An array computed from parameters and constants alone.

    Attributes:
        dims: its dimensions.
        leaves: paths of all parameters in it.
        views: the parameters that it is entry by entry, but for other parameters and
            constants that act on it elementwise: one; several side by side; none where
            that is not known.
        along: the dimension along which several views lie side by side.
        scaled: whether an array of constants was multiplied in or added.
        products: numbers of the products whose scalar results were multiplied in.
    """

    dims: Dimensions
    leaves: frozenset[str]
    views: tuple[View, ...] = ()
    along: int | None = None
    scaled: bool = False
    products: frozenset[int] = frozenset()


class Trail(NamedTuple):
    """What data has gone through.

    Attributes:
        last: numbers of the newest products with parameters that it came through;
            several where their kernels lay side by side.
        normalized: whether statistics were divided out or subtracted since.
        reduced: whether it is a statistic, summed over some dimension since.
        mixed: whether it is a product of data with data since.
        pending: norm parameters that acted on it since.
        coefficients: parameters that scaled it before it met other data.
        matrices: parameters of two or more axes that were added or multiplied in.
    """

    last: tuple[int, ...] = ()
    normalized: bool = False
    reduced: bool = False
    mixed: bool = False
    pending: frozenset[str] = frozenset()
    coefficients: frozenset[str] = frozenset()
    matrices: frozenset[str] = frozenset()


# Of the inputs.
START = Trail()


@dataclasses.dataclass(frozen=True)
class Data:
    """An array that depends on the inputs."""

    dims: Dimensions
    trail: Trail = START


Value: TypeAlias = Constant | Parameter | Data


def parameter(view: View) -> Parameter:
    """The value of one parameter."""
    return Parameter(view.dims, frozenset([view.path]), (view,))


def computed(leaves: frozenset[str], shape: Sequence[int]) -> Parameter:
    """A value computed from parameters in a way that hides their axes."""
    return Parameter(fresh(shape), leaves)


def rearranged(
    value: Value,
    shape: Sequence[int],
    move: Callable[[Dimensions, Sequence[int]], Dimensions | None],
) -> Value:
    """A value with its entries moved.

    Args:
        value: what is moved.
        shape: the new shape.
        move: from dimensions and their new shape to new dimensions, or None where
            these cannot be known.
    """
    dims = move(value.dims, shape)
    if dims is None:
        if isinstance(value, Parameter):
            return computed(value.leaves, shape)
        return dataclasses.replace(value, dims=fresh(shape))
    if not isinstance(value, Parameter) or not value.views:
        return dataclasses.replace(value, dims=dims)
    if value.along is None:
        (view,) = value.views
        return dataclasses.replace(value, dims=dims, views=(view._replace(dims=dims),))
    return _rearranged_side_by_side(value, shape, move)


_MARK = frozenset([("", 0)])


def _rearranged_side_by_side(value, shape, move):
    sizes = shape_of(value.dims)
    marked = list(fresh(sizes))
    marked[value.along] = (Factor(sizes[value.along], _MARK),)
    moved = move(tuple(marked), shape)
    whole = marked[value.along]
    where = [] if moved is None else [i for i, dim in enumerate(moved) if dim == whole]
    if len(where) != 1:
        return computed(value.leaves, shape)
    views = []
    for view in value.views:
        part = list(shape)
        part[where[0]] = shape_of(view.dims)[value.along]
        dims = move(view.dims, part)
        if dims is None:
            return computed(value.leaves, shape)
        views.append(view._replace(dims=dims))
    return dataclasses.replace(value, dims=moved, views=tuple(views), along=where[0])
