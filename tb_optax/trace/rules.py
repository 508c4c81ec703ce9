"""What each primitive does to the values of a forward pass: one table, by name."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tb_optax.trace.record import (
    LEARNED,
    OUTPUT,
    POOLED,
    REDUCTION,
    STACKED,
    Apart,
    Auxiliary,
    Feed,
    Follower,
    Pair,
    Record,
    Resampled,
)
from tb_optax.trace.values import (
    NORMED,
    Array,
    Constant,
    Data,
    Factor,
    Label,
    Move,
    Parameter,
    Trail,
    Unfollowed,
    Value,
    View,
    broadcast,
    cut,
    flip,
    fresh,
    moved,
    of_factors,
    reshape,
    resize,
    same,
    tile,
    transpose,
    unlabelled,
    without,
)
from tb_optax.trace.walk import Fields, Rule, Shapes, Walk, picked

# Elementwise functions by which statistics are taken out of data, and those by which
# a bias or a gain acts.
_NORMALIZING = frozenset({"sub", "mul", "div"})
_ADDING = frozenset({"add", "add_any"})
_AFFINE = _NORMALIZING | _ADDING
# What was added to logits is not multiplied with what their softmax is.
_SOFTMAX = frozenset({"exp", "exp2", "logistic"})
# Entries of constants are computed up to this many.
_MOST_ENTRIES = 1 << 26

_NO_AXES = "it is computed with before it enters a product: its axes are lost"
_BY_HAND = (
    "it multiplies data that is constant along one of its axes: a matrix product "
    "written with `*`?"
)
_BETWEEN_DATA = (
    "it is added to or multiplied with data and then enters a product of data with data"
)


# ---- Elementwise functions: activations, biases, norms, kernels that are computed ----


def _elementwise(
    walk: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """Any function of entries."""
    return [_of_entries(walk.record, p, values, shape) for shape in shapes]


def _of_entries(
    record: Record, p: Fields, values: Sequence[Value], shape: tuple[int, ...]
) -> Value:
    data = [value for value in values if isinstance(value, Data)]
    parameters = [value for value in values if isinstance(value, Parameter)]
    constants = [value for value in values if isinstance(value, Constant)]
    if not parameters and not data:
        array = merged([value.array for value in values], shape)
        return Constant(array, _computed(p, values, shape))
    if not data:
        along = {i for value in parameters for i in value.array.varying()}
        # Constants are data where they vary and the parameters do not.
        if along.issuperset(i for c in constants for i in c.array.varying()):
            return _of_parameters(record, p.primitive, parameters, values, shape)
        data = [Data(c.array) for c in constants if c.array.varying()]
    if sum(map(_is_kernel(record), parameters)) == 1 and not any(
        value.array.varying() for value in data
    ):
        # A number that is computed from data scales a kernel, as in spectral norm.
        scaled = _of_parameters(record, p.primitive, parameters, values, shape)
        through = functools.reduce(int.__or__, (d.trail.through for d in data))
        return dataclasses.replace(scaled, through=scaled.through | through)
    trail, normed = _trail(p.primitive, data, constants, record)
    arrays = [value.array for value in data]
    array = merged(arrays, shape, normed=normed)
    for value in parameters:
        trail = _meet(p.primitive, value, data, array, trail, record)
    arrays += [value.array for value in (*parameters, *constants)]
    return Data(merged([array, *arrays[len(data) :]], shape), trail)


def _is_kernel(record: Record) -> Callable[[Parameter], bool]:
    return lambda value: value.matrix and any(map(record.is_matrix, value.leaves))


def merged(
    arrays: Sequence[Array], shape: Sequence[int], normed: Iterable[int] = ()
) -> Array:
    """An elementwise result: each dimension has what any operand knows of it."""
    full = [array for array in arrays if len(array.cuts) == len(shape)]
    if not full:
        return of_factors([[Factor(size, None, False, frozenset())] for size in shape])
    known = [array for array in full if array.varying()]
    if len(known) < 2 and not normed:
        array = (known or full)[0]
        same_shape = array.shape == tuple(shape)
        return array if same_shape else broadcast(range(len(shape)))(array, shape)
    return of_factors(
        [
            _merged_dimension(
                [array.factors(i) for array in full],
                frozenset([NORMED]) if i in normed else frozenset(),
            )
            for i in range(len(shape))
        ]
    )


def _merged_dimension(
    candidates: list[list[Factor]], more: frozenset[Label]
) -> list[Factor]:
    moving = [c for c in candidates if any(f.varies for f in c)] or candidates
    finest = max(moving, key=lambda c: (any(f.labels for f in c), len(c)))
    sizes = [factor.size for factor in finest]
    alike = [c for c in moving if [factor.size for factor in c] == sizes]
    found = []
    for factors in zip(*alike, strict=True):
        labels = frozenset().union(more, *map(_labels, factors))
        axis = next((f.axis for f in factors if f.axis is not None), None)
        found.append(Factor(factors[0].size, axis, True, labels))
    return found


def _labels(factor: Factor) -> frozenset[Label]:
    """Labels of an axis for a factor of it."""
    if factor.whole:
        return factor.labels
    return frozenset(label._replace(whole=False) for label in factor.labels)


def _of_parameters(
    record: Record,
    name: str,
    parameters: Sequence[Parameter],
    values: Sequence[Value],
    shape: tuple[int, ...],
) -> Parameter:
    """Parameters and constants combined: the one that covers all axes is the kernel."""
    array = merged([value.array for value in parameters], shape)
    varying = set(array.varying())
    covering = {}
    for value in reversed(parameters):
        if value.views and varying <= set(value.array.varying()):
            layout = [(view.path, view.array.layout()) for view in value.views]
            covering[str(layout)] = value
    mains = list(covering.values())
    if len(mains) > 1:
        mains = [v for v in mains if not record.is_left_out(v.views[0].path)]
        said = [v for v in mains if record.is_kernel(v.views[0].path)]
        mains = said or mains
    main = mains[0] if len(mains) == 1 else None
    if main is not None and len(main.array.cuts) != len(shape):
        main = dataclasses.replace(main, array=array)
    elif main is not None and main.array.shape != shape:
        main = moved(main, broadcast(range(len(shape))), shape)
    others = [value for value in values if not isinstance(value, Parameter)]
    scaled = name in _AFFINE and any(value.array.varying() for value in others)
    normed = name in _NORMALIZING and any(value.reduced for value in parameters)
    return Parameter(
        array=main.array if main else array,
        leaves=frozenset().union(*(value.leaves for value in parameters)),
        views=main.views if main else (),
        along=main.along if main else None,
        scaled=scaled or any(value.scaled for value in parameters),
        reduced=all(value.reduced for value in parameters),
        normed=normed or any(value.normed for value in parameters),
        looked_up=any(value.looked_up for value in parameters),
        through=functools.reduce(int.__or__, (v.through for v in parameters)),
    )


def joined_trail(
    data: Sequence[Data], record: Record, summed: bool = False
) -> Trail:
    """What data has gone through that has several sources.

    The newest products come through the main one of them: statistics and what is
    added to all positions alike, as an embedding of time is, stand back.
    """

    top = max(value.trail.rank for value in data)

    def mainness(value: Data) -> tuple[Any, ...]:
        last = value.trail.last
        return (
            bool(last),
            not value.trail.reduced,
            len(value.array.varying()),
            bool(last) and record.products[max(last)].kernel,
            value.trail.rank or top,
            max(last, default=-1),
        )

    trails = [value.trail for value in data]
    main = max(data, key=mainness)
    pending = frozenset().union(*(trail.pending for trail in trails))
    others = [v for v in data if v is not main and not v.trail.reduced]
    if summed and others:
        # The sum of two branches feeds the next layer, not one branch's norm.
        least = len(main.array.varying())
        full = any(len(value.array.varying()) >= least for value in others)
        pending = frozenset() if full else main.trail.pending
        trails = [main.trail]
    return Trail(
        last=main.trail.last,
        through=functools.reduce(int.__or__, (v.trail.through for v in data)),
        rank=top,
        normalized=any(trail.normalized for trail in trails),
        reduced=all(value.trail.reduced for value in data),
        mixed=any(trail.mixed for trail in trails),
        pending=pending,
        coefficients=frozenset().union(*(v.trail.coefficients for v in data)),
        matrices=frozenset().union(*(v.trail.matrices for v in data)),
    )


def _trail(
    name: str, data: Sequence[Data], constants: Sequence[Constant], record: Record
) -> tuple[Trail, set[int]]:
    """The trail of several data values combined, and what they are normalized over."""
    trail = joined_trail(data, record, summed=name in _ADDING)
    main = [value for value in data if not value.trail.reduced]
    normed: set[int] = set()
    if name in _NORMALIZING and main:
        statistics = [value for value in data if value.trail.reduced]
        taken_out = bool(statistics)
        taken_out |= any(value.array.varying() for value in constants)
        taken_out |= bool(trail.last) and any(not v.trail.last for v in main)
        trail = trail._replace(normalized=trail.normalized or taken_out)
        for value in statistics:
            along = set().union(*(v.array.varying() for v in main))
            normed |= along - set(value.array.varying())
    if name in _SOFTMAX:
        trail = trail._replace(matrices=frozenset())
    if trail.last and trail.coefficients:
        for path, number in itertools.product(sorted(trail.coefficients), trail.last):
            record.add(Follower(path, number, norm=True))
        trail = trail._replace(
            coefficients=frozenset(), pending=trail.pending | trail.coefficients
        )
    return trail, normed


def _meet(
    name: str,
    value: Parameter,
    data: Sequence[Data],
    array: Array,
    trail: Trail,
    record: Record,
) -> Trail:
    """A parameter meets data: as a bias, a gain, a norm or a table of positions."""
    if value.reduced and not value.array.varying():
        return trail  # A penalty, which is added to a loss.
    matrices = frozenset(filter(record.is_matrix, value.leaves))
    if value.looked_up or not value.matrix:
        matrices = frozenset()
    elif value.views:
        matrices &= {view.path for view in value.views}
    outer = name == "mul" and matrices and _is_outer(value, data)
    kernels = frozenset(filter(record.is_kernel, matrices))
    if kernels and (outer or not value.views):
        return Trail(last=hidden(kernels, trail, "", record))
    if outer:
        record.fail(matrices, _BY_HAND)
    norm = trail.normalized or trail.reduced or value.scaled
    if not trail.last and not value.looked_up and _is_coefficient(value, data, record):
        record.note(value.leaves, "acts on inputs, after no layer")
        return trail._replace(
            coefficients=trail.coefficients | value.leaves,
            matrices=trail.matrices | matrices,
        )
    followed = (
        name in _AFFINE
        and (norm or not trail.mixed)
        and _follow(value, trail, array, norm, record)
    )
    if not followed:
        record.note(value.leaves, _why_none(value, trail))
        trail = trail._replace(matrices=trail.matrices | matrices)
    return trail._replace(pending=trail.pending | value.leaves) if norm else trail


def _why_none(value: Parameter, trail: Trail) -> str:
    if value.looked_up:
        return "look-up table: constants pick its rows"
    if not trail.last:
        return "acts on inputs, after no layer"
    if trail.mixed:
        return "acts on a product of data with data"
    return "acts along axes that are no outputs, as a table of positions does"


def _is_coefficient(value: Parameter, data: Sequence[Data], record: Record) -> bool:
    """Whether data has no axes but those of the parameter, as running statistics."""
    rank = max(len(record.shapes[path]) for path in value.leaves)
    return all(
        len(item.array.source.shape) <= rank and not item.trail.reduced for item in data
    )


def _is_outer(value: Parameter, data: Sequence[Data]) -> bool:
    """Whether data varies along some axis of a parameter and not along another."""
    along = value.array.varying()
    for item in data:
        if len(item.array.cuts) == len(value.array.cuts) and not item.trail.reduced:
            own = [item.array.varies(i) for i in along]
            if any(own) and not all(own):
                return True
    return False


def _follow(
    value: Parameter, trail: Trail, array: Array, norm: bool, record: Record
) -> bool:
    """Write a bias, a gain or a norm down; False for what is none."""
    if value.looked_up:
        return False
    if value.along is not None and len(value.views) == len(trail.last):
        for view, number in zip(value.views, trail.last, strict=True):
            record.add(Follower(view.path, number, norm))
        return True
    along = value.array.varying()
    fitting = list(trail.last)
    if not norm or len(along) > 1:
        fitting = [n for n in trail.last if _fits(along, array, n, norm, trail)]
    for path, number in itertools.product(sorted(value.leaves), fitting):
        record.add(Follower(path, number, norm))
    return bool(fitting)


def _fits(
    along: Iterable[int], array: Array, number: int, norm: bool, trail: Trail
) -> bool:
    """Whether dimensions of data are outputs of a product, or normalized over."""
    starts = array.start()
    for position in along:
        if position >= len(array.cuts) or not array.varies(position):
            if not (norm and trail.reduced):
                return False
            continue
        for factor in array.factors(position):
            if factor.axis is None:
                continue
            low, high = starts[factor.axis], starts[factor.axis] + factor.size
            labels = [
                label
                for label in factor.labels
                if label.number == number
                and (label.span is None or (label.span[0] < high > low < label.span[1]))
            ]
            if (
                factor.size > 1
                and not labels
                and not (norm and NORMED in factor.labels)
            ):
                return False
    return True


# ---- Products -----------------------------------------------------------------------


class _Side(NamedTuple):
    """An operand of a matrix product."""

    value: Value
    contracted: Sequence[int]
    batch: Sequence[int]

    def free(self) -> list[int]:
        """Dimensions that are in the result and not in the other operand."""
        taken = {*self.contracted, *self.batch}
        return [i for i in range(len(self.value.array.cuts)) if i not in taken]

    def roles(self) -> dict[int, str]:
        """Roles of the dimensions of a kernel."""
        return (
            dict.fromkeys(self.contracted, REDUCTION)
            | dict.fromkeys(self.batch, STACKED)
            | dict.fromkeys(self.free(), OUTPUT)
        )


def _dot_general(
    walk: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """`dot_general`: a matrix product with batches."""
    record = walk.record
    contracting, batch = p["dimension_numbers"]
    sides = [
        _Side(value, list(contracted), list(batched))
        for value, contracted, batched in zip(values, contracting, batch, strict=True)
    ]
    kinds = [type(value) for value in values]
    if Parameter not in kinds:
        return [_of_data(sides, shapes[0], record)]
    if kinds == [Parameter, Parameter]:
        chosen = _kernel_of(sides, record)
        if chosen is None:
            return [_of_two(sides, shapes[0], record)]
        sides[1 - chosen] = sides[1 - chosen]._replace(
            value=_in_place_of_data(sides[1 - chosen].value, record)
        )
    side, other = sides if isinstance(sides[0].value, Parameter) else sides[::-1]
    if isinstance(other.value, Constant):
        if side.value.looked_up or _picks_rows(other):
            return [_looked_up(side.value, shapes[0], record)]
        # An initial state is one for each row, though all start alike.
        other = other._replace(value=Data(fresh(other.value.array.shape)))
    sides = [side, other] if side is sides[0] else [other, side]
    if not side.contracted and not side.free():
        pair = [s.value for s in sides]
        order = [moved(v, _to_batch(s), shapes[0]) for v, s in zip(pair, sides)]
        return [_of_entries(record, Fields("mul", {}), order, shapes[0])]
    return [_with_kernel(side, other, sides, record)]


def _to_batch(side: _Side) -> Move:
    """The dimensions in the order of the result, those it lacks being broadcast."""

    def move(array, shape):
        array = transpose([*side.batch, *side.free()])(array, shape)
        return broadcast(range(len(array.cuts)))(array, shape)

    return move


def _with_kernel(
    side: _Side, other: _Side, sides: Sequence[_Side], record: Record
) -> Value:
    """Data by a parameter."""
    kernel, data = side.value, other.value
    assert isinstance(kernel, Parameter)
    assert isinstance(data, Data)
    if kernel.looked_up:
        record.note(kernel.leaves, "look-up table: constants pick its rows")
        trail = data.trail._replace(mixed=True)
        return Data(_result(sides, {}), trail)
    for i, j in zip(side.batch, other.batch, strict=True):
        matrices = bool(side.contracted and side.free())
        _batched(kernel, i, data.array.factors(j), matrices, record)
    last = apply_kernel(kernel, side.roles(), data, record)
    outputs = _outputs(kernel, last)
    trail = _after(last, data.trail)
    return Data(_result(sides, {id(kernel): outputs}), trail)


def _after(last: tuple[int, ...], trail: Trail) -> Trail:
    """The trail of the result of a product."""
    through = trail.through | sum(1 << number for number in last)
    return Trail(last=last, through=through, rank=trail.rank)


def _result(sides: Sequence[_Side], outputs: Mapping[int, list[list[Factor]]]) -> Array:
    """Dimensions of a matrix product: batches, then what is free on each side."""
    dims = []
    for side in sides:
        own = outputs.get(id(side.value))
        if own is None:
            array = side.value.array
            own = [array.factors(i) for i in range(len(array.cuts))]
            if isinstance(side.value, Parameter):
                own = [unlabelled(factors) for factors in own]
        dims.append(own)
    left, right = sides
    batch = [
        _merged_dimension([dims[0][i], dims[1][j]], frozenset())
        for i, j in zip(left.batch, right.batch, strict=True)
    ]
    free = [dims[0][i] for i in left.free()] + [dims[1][i] for i in right.free()]
    return of_factors(batch + free)


def _outputs(kernel: Parameter, numbers: Sequence[int]) -> list[list[Factor]]:
    """Dimensions of a kernel as they are in the outputs of its products."""
    if not kernel.views or len(kernel.views) != len(numbers):
        array = kernel.array
        return [unlabelled(array.factors(i)) for i in range(len(array.cuts))]
    dims = []
    for position in range(len(kernel.array.cuts)):
        if position == kernel.along:
            start, labels = 0, set()
            for number, view in zip(numbers, kernel.views, strict=True):
                stop = start + view.array.shape[position]
                own = [f.axis for f in view.array.factors(position)]
                axis = next((a for a in own if a is not None), 0)
                labels.add(Label(number, axis, False, (start, stop)))
                start = stop
            dims.append([Factor(start, 0, True, frozenset(labels))])
            continue
        factors = []
        for factor in kernel.views[0].array.factors(position):
            labels = frozenset(
                Label(number, factor.axis, factor.whole)
                for number in numbers
                if factor.axis is not None
            )
            factors.append(factor._replace(whole=True, labels=labels))
        dims.append(factors)
    return dims


def _batched(
    kernel: Parameter,
    position: int,
    factors: Iterable[Factor],
    matrices: bool,
    record: Record,
) -> None:
    """Data meets a kernel's batch axis: outputs along it may be apart."""
    others = {
        factor.axis
        for view in kernel.views
        for factor in view.array.factors(position)
        if factor.varies
    }
    for label in [label for f in factors if f.whole for label in f.labels]:
        if others and label.whole:
            record.add(Apart(label.number, label.axis, frozenset(others), matrices))


def apply_kernel(
    kernel: Parameter,
    roles: Mapping[int, str],
    data: Data,
    record: Record,
    groups: int = 1,
) -> tuple[int, ...]:
    """Write a product of data with a parameter down; return its numbers."""
    if not kernel.views:
        return hidden(kernel.leaves, data.trail, _NO_AXES, record)
    numbers = []
    paths = {view.path for view in kernel.views}
    for view in kernel.views:
        found = _roles_of_axes(view.array, roles, groups)
        starts, shape = view.array.start(), record.shapes[view.path]
        picks = {
            axis: None if axis in view.unknown else starts[axis]
            for axis, size in enumerate(shape)
            if size > 1 and axis not in found
        }
        assumed = view.path in record.assumed and data.trail.learned
        number = record.product(
            view.path,
            found,
            picks,
            through=data.trail.through,
            assumed=assumed,
            data=data.trail.rank > 0,
        )
        numbers.append(number)
        for path in sorted(kernel.leaves - paths):
            record.add(Follower(path, number, norm=False))
    for number, made in record.products.items() if kernel.through else ():
        if kernel.through >> number & 1 and made.path in paths:
            record.add(Auxiliary(number))
    for path in sorted(data.trail.pending):
        record.add(Feed(path, numbers[0]))
    return tuple(numbers)


def _roles_of_axes(
    array: Array, roles: Mapping[int, str], groups: int
) -> dict[int, frozenset[str]]:
    """Roles of the axes of a leaf, from those of the dimensions of its view."""
    found: dict[int, set[str]] = {}
    several = any(array.shape[i] > 1 for i, role in roles.items() if role == REDUCTION)
    for position, role in roles.items():
        factors = array.factors(position)
        if role == OUTPUT and groups > 1 and several:
            shared, rest = _grouped(array, position, groups)
            if shared and {f.axis for f in shared}.isdisjoint(f.axis for f in rest):
                factors = rest
                for factor in shared:
                    found.setdefault(factor.axis or 0, set()).add(STACKED)
        for factor in factors:
            # One slice of a longer axis is a pick, no role.
            picked = factor.size == 1 and not factor.whole
            if factor.axis is not None and not picked:
                found.setdefault(factor.axis, set()).add(role)
    return {axis: frozenset(names) for axis, names in found.items()}


def _grouped(
    array: Array, position: int, groups: int
) -> tuple[list[Factor], list[Factor]]:
    """The first factors of a dimension, of this size together, and the others."""
    shape = list(array.shape)
    size = shape[position]
    if size == groups:
        return [], array.factors(position)
    shape[position : position + 1] = [groups, size // groups]
    try:
        parts = reshape(array, shape)
    except Unfollowed:
        return [], array.factors(position)
    return parts.factors(position), parts.factors(position + 1)


def hidden(
    leaves: Iterable[str], trail: Trail, reason: str, record: Record
) -> tuple[int, ...]:
    """Write a product down in which the axes of its parameters are out of sight."""
    kernels = sorted(filter(record.is_kernel, leaves))
    record.fail(set(leaves) - set(kernels), reason)
    return tuple(
        record.product(path, None, {}, through=trail.through) for path in kernels
    )


def _of_data(sides: Sequence[_Side], shape: tuple[int, ...], record: Record) -> Value:
    """Data by data, as in attention, or by constants."""
    values = [side.value for side in sides]
    data = [value for value in values if isinstance(value, Data)]
    if not data:
        return Constant(fresh(shape))
    array = _result(sides, {})
    trail = joined_trail(data, record)
    if len(data) == 1:
        side = next(side for side in sides if side.value is data[0])
        for position in side.contracted:
            for factor in data[0].array.factors(position):
                for label in factor.labels:
                    record.add(Resampled(label.number))
        return Data(array, trail)
    kernels = frozenset(filter(record.is_kernel, trail.matrices))
    record.fail(trail.matrices - kernels, _BETWEEN_DATA)
    if kernels:
        last = hidden(kernels, trail, "", record)
        return Data(array, _after(last, trail))
    newest = max((value.trail.last for value in data), key=lambda n: max(n, default=-1))
    return Data(array, _after(newest, trail)._replace(mixed=True))


def _kernel_of(sides: Sequence[_Side], record: Record) -> int | None:
    """Which of two parameters is a kernel, if the other stands in the place of data."""
    values = [side.value for side in sides]
    said = [any(map(record.is_kernel, _paths(value))) for value in values]
    if said[0] != said[1]:
        return said.index(True)
    able = [
        i
        for i in (0, 1)
        if values[i].views
        and values[i].matrix
        and not values[i].looked_up
        and not all(map(record.is_left_out, _paths(values[i])))
        and _stands_for_data(values[1 - i], record)
    ]
    return able[0] if len(able) == 1 and not all(said) else None


def _paths(value: Parameter) -> set[str]:
    return {view.path for view in value.views} or set(value.leaves)


def _stands_for_data(value: Parameter, record: Record) -> bool:
    """Vectors, rows of tables and what is said to be no kernel."""
    left_out = all(map(record.is_left_out, filter(record.is_matrix, _paths(value))))
    return not value.matrix or value.looked_up or left_out


def _in_place_of_data(value: Parameter, record: Record) -> Data:
    """A learned query, or another activation that is computed from parameters."""
    record.note(value.leaves, LEARNED)
    vectors = [path for path in value.leaves if not record.is_matrix(path)]
    pending = frozenset(vectors if value.normed else ()) - _paths(value)
    array = value.array
    dims = [unlabelled(array.factors(i)) for i in range(len(array.cuts))]
    return Data(of_factors(dims), Trail(pending=pending, learned=True))


def _of_two(sides: Sequence[_Side], shape: tuple[int, ...], record: Record) -> Value:
    """A product of parameters alone: of factors of a kernel, or of learned queries."""
    left, right = (side.value for side in sides)
    leaves = left.leaves | right.leaves
    kernels = frozenset(filter(record.is_kernel, leaves))
    if kernels:
        last = hidden(kernels, Trail(), "", record)
        return Data(fresh(shape), _after(last, Trail()))
    likely = 1 if list(sides[1].contracted) == [0] or not left.views else 0
    kernel, other = (right, left) if likely else (left, right)
    if kernel.views and kernel.leaves != other.leaves:
        for path in sorted(filter(record.is_matrix, _paths(kernel))):
            record.add(Pair(path))
    for value, partner in ((left, right), (right, left)):
        names = ", ".join(map(repr, sorted(partner.leaves)))
        record.fail(
            value.leaves,
            f"its product with {names} holds no data: learned queries and their "
            f"kernel, or factors of one kernel?",
        )
    looked_up = left.looked_up or right.looked_up
    array = _result(sides, {})
    return Parameter(array, leaves, looked_up=looked_up)


def _looked_up(value: Parameter, shape: tuple[int, ...], record: Record) -> Parameter:
    """Rows of a table that constants pick."""
    record.note(value.leaves, "look-up table: constants pick its rows")
    return Parameter(fresh(shape), value.leaves, looked_up=True)


def _picks_rows(side: _Side) -> bool:
    """Whether a constant picks one row of what it is multiplied with: one-hot."""
    size = math.prod(side.value.array.shape[i] for i in side.contracted)
    entries = entries_of(side.value) if size > 1 else None
    if entries is None or not side.contracted:
        return False
    ones = entries == 1
    if not (ones | (entries == 0)).all():
        return False
    counts = ones.sum(tuple(side.contracted))
    return bool(counts.max(initial=0) == 1)


def _convolution(
    walk: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """`conv_general_dilated`, of any layout and any number of groups."""
    record, shape = walk.record, shapes[0]
    data, kernel = values
    numbers, groups = p["dimension_numbers"], int(p["feature_group_count"])
    outputs, inputs, *positions = numbers.rhs_spec
    parameters = [value for value in values if isinstance(value, Parameter)]
    if not parameters:
        return [_joined(values, shape, record, mixed=True)]
    if isinstance(kernel, Constant) and isinstance(data, Parameter):
        return [Parameter(fresh(shape), data.leaves, looked_up=data.looked_up)]
    if isinstance(data, Parameter) and isinstance(kernel, Parameter):
        if not _stands_for_data(data, record):
            record.fail(kernel.leaves | data.leaves, "it is convolved with no data")
            return [Parameter(fresh(shape), kernel.leaves | data.leaves)]
        data = _in_place_of_data(data, record)
    if not isinstance(kernel, Parameter) or p["batch_group_count"] > 1:
        leaves = frozenset().union(*(value.leaves for value in parameters))
        record.fail(leaves, "it is convolved in a way that only gradients have")
        return [_joined(values, shape, record)]
    if isinstance(data, Constant):
        data = Data(data.array)
    assert isinstance(data, Data)
    roles = {outputs: OUTPUT, inputs: REDUCTION} | dict.fromkeys(positions, POOLED)
    features = numbers.lhs_spec[1]
    if groups > 1 and kernel.array.shape[inputs] > 1 and kernel.views:
        shared, rest = _grouped(kernel.views[0].array, outputs, groups)
        if shared and {f.axis for f in shared}.isdisjoint(f.axis for f in rest):
            others = frozenset(f.axis for f in shared if f.axis is not None)
            for factor in _grouped(data.array, features, groups)[0]:
                for label in factor.labels if factor.whole else ():
                    if label.whole:
                        record.add(Apart(label.number, label.axis, others, True))
    last = apply_kernel(kernel, roles, data, record, groups)
    dims = [[Factor(size, 0, True, frozenset())] for size in shape]
    dims[numbers.out_spec[0]] = data.array.factors(numbers.lhs_spec[0])
    dims[numbers.out_spec[1]] = _outputs(kernel, last)[outputs]
    return [Data(of_factors(dims), _after(last, data.trail))]


def _ragged_dot(
    walk: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """`ragged_dot_general`: rows of each group meet their own kernel."""
    data, kernel = values[:2]
    numbers = p["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    stacked = {*batch, *numbers.rhs_group_dimensions}
    if not isinstance(data, Data) or not isinstance(kernel, Parameter):
        return [_joined(values, shapes[0], walk.record, mixed=True)]
    free = set(range(len(kernel.array.cuts))) - stacked - set(contracted)
    roles = (
        dict.fromkeys(contracted, REDUCTION)
        | dict.fromkeys(stacked, STACKED)
        | dict.fromkeys(free, OUTPUT)
    )
    last = apply_kernel(kernel, roles, data, walk.record)
    dims = [[Factor(size, 0, True, frozenset())] for size in shapes[0]]
    if len(free) == 1:
        dims[-1] = _outputs(kernel, last)[free.pop()]
    return [Data(of_factors(dims), _after(last, data.trail))]


# ---- Moves and look-ups -------------------------------------------------------------


def _by(move_of: Callable[[Fields], Move]) -> Rule:
    """A rule that moves the entries of its first operand."""

    def rule(
        _: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
    ) -> list[Value]:
        move = move_of(p)
        if len(shapes) > 1:
            return [moved(v, move, s) for v, s in zip(values, shapes, strict=True)]
        value = moved(values[0], move, shapes[0])
        if isinstance(value, Constant):
            compute = _computed(p, values, shapes[0])
            return [dataclasses.replace(value, compute=compute)]
        return [value]

    return rule


def _reshape(p: Fields) -> Move:
    """`reshape`, which may permute its dimensions first."""
    order = p["dimensions"]
    if order is None:
        return reshape
    return lambda array, shape: reshape(transpose(order)(array, shape), shape)


def _slice(p: Fields) -> Move:
    return cut(p["start_indices"], p["strides"])


def _split(_: Walk, p: Fields, values: Sequence[Value], shapes: Shapes) -> list[Value]:
    """`split`: one value for each piece."""
    axis, start, found = p["axis"], 0, []
    for shape in shapes:
        starts = [0] * len(shape)
        starts[axis] = start
        found.append(_cut_value(values[0], starts, shape))
        start += shape[axis]
    return found


def _cut_value(
    value: Value,
    starts: Sequence[int],
    shape: Sequence[int],
    steps: Sequence[int] | None = None,
) -> Value:
    """A piece of a value; of parameters side by side, those that lie in it."""
    along = value.along if isinstance(value, Parameter) else None
    if along is None or shape[along] == value.array.shape[along]:
        return moved(value, cut(starts, steps), shape)
    assert isinstance(value, Parameter)
    start, stop, offset, views = starts[along], starts[along] + shape[along], 0, []
    for view in value.views:
        size = view.array.shape[along]
        low, high = max(start, offset), min(stop, offset + size)
        own, begin = list(shape), list(starts)
        own[along], begin[along] = high - low, low - offset
        offset += size
        if low < high:
            try:
                views.append(view._replace(array=cut(begin, steps)(view.array, own)))
            except Unfollowed:
                return Parameter(fresh(shape), value.leaves)
    array = views[0].array if len(views) == 1 else fresh(shape)
    return dataclasses.replace(
        value,
        array=array,
        views=tuple(views),
        along=along if len(views) > 1 else None,
    )


def _slice_value(
    _: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    value = values[0]
    if isinstance(value, Parameter) and value.along is not None:
        steps = p["strides"]
        return [_cut_value(value, p["start_indices"], shapes[0], steps)]
    return _by(_slice)(_, p, values, shapes)


def _dynamic_slice(
    walk: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """`dynamic_slice`; a start that the program does not say is unknown."""
    value, starts, shape = values[0], values[1:], shapes[0]
    chosen = [i for i, n in enumerate(shape) if n != value.array.shape[i]]
    known = [
        int(entries.reshape(-1)[0])
        if isinstance(start, Constant) and (entries := entries_of(start)) is not None
        else None
        for start in starts
    ]
    begin = [known[i] or 0 if i in chosen else 0 for i in range(len(shape))]
    begin = [
        max(0, min(start, value.array.shape[i] - shape[i]))
        for i, start in enumerate(begin)
    ]
    found = _cut_value(value, begin, shape)
    gone = [i for i in chosen if known[i] is None and shape[i] == 1]
    found = picked(found, value, gone)
    data = [start for start in starts if isinstance(start, Data)]
    if data and isinstance(value, Parameter) and sum(n > 1 for n in shape) < 2:
        return [_embedded(value, data[0], found.array, walk.record)]
    return [found]


def _embedded(value: Parameter, index: Data, array: Array, record: Record) -> Data:
    """Rows that data looks up."""
    through = index.trail.through
    last = tuple(
        record.product(path, {}, {}, through=through, kernel=False)
        for path in sorted(value.leaves)
    )
    dims = [unlabelled(array.factors(i)) for i in range(len(array.cuts))]
    return Data(of_factors(dims), _after(last, index.trail))


def _gather(
    walk: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """`gather`: rows of a table, or slices of a stack."""
    operand, indices = values
    numbers, sizes, shape = p["dimension_numbers"], p["slice_sizes"], shapes[0]
    if isinstance(operand, Constant):
        return [_joined(values, shape, walk.record)]
    chosen = [i for i, n in enumerate(operand.array.shape) if n != sizes[i]]

    def move(array, shape):
        if numbers.operand_batching_dims:
            raise Unfollowed
        array = cut([0] * len(sizes))(array, sizes)
        array = without(numbers.collapsed_slice_dims)(array, sizes)
        return broadcast(numbers.offset_dims)(array, shape)

    found = moved(operand, move, shape)
    if isinstance(operand, Data):
        dims = [found.array.factors(i) for i in range(len(shape))]
        dims = [
            [f._replace(axis=0) if f.size > 1 else f for f in factors]
            for factors in dims
        ]
        return [Data(of_factors(dims), operand.trail)]
    matrices = sum(size > 1 for size in sizes) > 1
    if matrices and found.views and len(operand.views) == 1:
        return [picked(found, operand, chosen)]
    if isinstance(indices, Data):
        array = fresh(shape)
        return [_embedded(operand, indices, array, walk.record)]
    if _is_permutation(indices, operand, chosen, numbers, shape):
        order = [i for i in range(len(shape)) if i not in numbers.offset_dims]
        rows = order + list(numbers.offset_dims)
        order = [chosen[0], *(i for i in range(len(shape)) if i not in chosen)]
        where = [rows.index(i) for i in range(len(shape))]
        return [moved(operand, transpose([order[i] for i in where]), shape)]
    return [_looked_up(operand, shape, walk.record)]


def _is_permutation(indices, operand, chosen, numbers, shape) -> bool:
    """Whether constants pick every row of a matrix once."""
    if len(chosen) != 1 or len(shape) != len(operand.array.shape):
        return False
    size = operand.array.shape[chosen[0]]
    if tuple(numbers.collapsed_slice_dims) != tuple(chosen):
        return False
    if indices.array.shape != (size, 1):
        return False
    entries = entries_of(indices)
    return entries is not None and sorted(entries.reshape(-1)) == list(range(size))


def _concatenate(
    walk: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """`concatenate`: parameters side by side stay known, each by itself."""
    along, shape = int(p["dimension"]), shapes[0]
    parameters = [value for value in values if isinstance(value, Parameter)]
    data = [value for value in values if isinstance(value, Data)]
    if data:
        for value in parameters:
            walk.record.note(value.leaves, "lies next to data in one array")
        trail = joined_trail(data, walk.record)
        main = max(data, key=lambda value: max(value.trail.last, default=-1))
        dims = [main.array.factors(i) for i in range(len(shape))]
        dims[along] = [Factor(shape[along], 0, True, frozenset())]
        return [Data(of_factors(dims), trail)]
    if not parameters:
        return [Constant(fresh(shape), _computed(p, values, shape))]
    leaves = frozenset().union(*(value.leaves for value in parameters))
    if not all(v.views and v.along in (None, along) for v in parameters):
        looked_up = any(value.looked_up for value in parameters)
        return [Parameter(fresh(shape), leaves, looked_up=looked_up)]
    views = tuple(view for value in parameters for view in value.views)
    if len(views) == 1:
        return [dataclasses.replace(parameters[0], array=views[0].array)]
    dims = [parameters[0].array.factors(i) for i in range(len(shape))]
    dims[along] = [Factor(shape[along], 0, True, frozenset())]
    return [
        dataclasses.replace(
            parameters[0],
            array=of_factors(dims),
            leaves=leaves,
            views=views,
            along=along,
            scaled=any(value.scaled for value in parameters),
        )
    ]


def _reduce(
    walk: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """A sum or an extremum over some axes."""
    value, axes = values[0], [int(axis) for axis in p["axes"]]
    if len(values) > 1:
        return [_joined(values, shape, walk.record) for shape in shapes]
    found = moved(value, without(axes), shapes[0])
    if isinstance(found, Constant):
        return [Constant(found.array)]
    if all(value.array.shape[axis] == 1 for axis in axes):
        return [found]
    if isinstance(found, Data):
        return [Data(found.array, found.trail._replace(reduced=True))]
    return [dataclasses.replace(found, views=(), along=None, reduced=True)]


# ---- Everything else ----------------------------------------------------------------


def _joined(
    values: Sequence[Value],
    shape: tuple[int, ...],
    record: Record,
    mixed: bool = False,
) -> Value:
    """All of several values in one array, of which no dimension is known."""
    data = [value for value in values if isinstance(value, Data)]
    parameters = [value for value in values if isinstance(value, Parameter)]
    leaves = frozenset().union(*(value.leaves for value in parameters))
    if not data and not parameters:
        return Constant(fresh(shape))
    if not data:
        looked_up = any(value.looked_up for value in parameters)
        return Parameter(fresh(shape), leaves, looked_up=looked_up)
    array = fresh(shape)
    if data[0].array.shape == shape:
        array = data[0].array
    trail = joined_trail(data, record)
    matrices = trail.matrices
    for value in parameters:
        record.note(value.leaves, "is written into an array of data")
        matrices |= frozenset(filter(record.is_matrix, value.leaves))
    mixed = trail.mixed or (mixed and len(data) > 1)
    return Data(array, trail._replace(matrices=matrices, mixed=mixed))


def _together(
    walk: Walk, _: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """Sorts, cumulative sums, scatters: the entries of all operands in one array."""
    return [_joined(values, shape, walk.record) for shape in shapes]


def _random(_: Walk, __: Fields, ___: Any, shapes: Shapes) -> list[Value]:
    """Random numbers are constants that nobody knows."""
    return [Constant(fresh(shape)) for shape in shapes]


def _iota(_: Walk, p: Fields, __: Any, shapes: Shapes) -> list[Value]:
    shape, dimension = shapes[0], p["dimension"]

    def compute():
        line = [1] * len(shape)
        line[dimension] = shape[dimension]
        return np.broadcast_to(np.arange(shape[dimension]).reshape(line), shape)

    positions = [Factor(n, 0, True, frozenset()) for n in shape]
    array = of_factors(
        [
            [f if i == dimension else f._replace(axis=None)]
            for i, f in enumerate(positions)
        ]
    )
    return [Constant(array, compute)]


def _unknown(
    walk: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """A primitive that is not in the table: it may do anything to its operands."""
    record = walk.record
    parameters = [value for value in values if isinstance(value, Parameter)]
    data = [value for value in values if isinstance(value, Data)]
    if not parameters:
        return [_joined(values, shape, record) for shape in shapes]
    leaves = frozenset().union(*(value.leaves for value in parameters))
    reason = f"it enters {p.primitive!r}, a primitive that trace_layers does not know"
    if not data:
        record.fail(leaves, reason)
        return [Parameter(fresh(shape), leaves) for shape in shapes]
    trail = joined_trail(data, record)
    last = hidden(leaves, trail, reason, record)
    return [Data(fresh(shape), _after(last or trail.last, trail)) for shape in shapes]


# ---- Entries of constants -----------------------------------------------------------


def entries_of(value: Constant) -> np.ndarray | None:
    """The entries of a constant, if they can be had at little cost."""
    if value.compute is None or math.prod(value.array.shape) > _MOST_ENTRIES:
        return None
    try:
        return np.asarray(value.compute())
    except (RecursionError, TypeError, _UnknownEntries):
        return None


class _UnknownEntries(Exception):
    """The entries of some constant are not known."""


def _known(value: Value) -> np.ndarray:
    entries = entries_of(value) if isinstance(value, Constant) else None
    if entries is None:
        raise _UnknownEntries
    return entries


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "convert_element_type": lambda x: x,
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "mul": np.multiply,
    "ne": np.not_equal,
    "or": np.bitwise_or,
    "rem": np.fmod,
    "select_n": lambda which, *cases: np.choose(which.astype(int), cases),
    "sub": np.subtract,
}


def _computed(
    p: Fields, values: Sequence[Value], shape: tuple[int, ...]
) -> Callable[[], np.ndarray] | None:
    """How to compute the entries of a constant, from those of its operands."""
    name, function = p.primitive, _FUNCTIONS.get(p.primitive)
    if function is not None:
        return lambda: np.asarray(function(*map(_known, values)))

    def move(entries: np.ndarray) -> np.ndarray:
        if name == "broadcast_in_dim":
            full = [1] * len(shape)
            for i, position in enumerate(p["broadcast_dimensions"]):
                full[position] = entries.shape[i]
            return np.broadcast_to(entries.reshape(full), shape)
        if name == "transpose":
            return entries.transpose(p["permutation"])
        if name in ("reshape", "squeeze"):
            return entries.reshape(shape)
        raise _UnknownEntries

    return (lambda: move(_known(values[0]))) if len(values) == 1 else None


# ---- The table ----------------------------------------------------------------------


def _named(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = {
    **_named(
        """
        abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
        cbrt ceil clamp clz complex conj cos cosh digamma div eq eq_to erf erf_inv erfc
        exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le le_to
        lgamma log log1p logistic lt lt_to max min mul ne neg nextafter not or polygamma
        population_count pow real rem round rsqrt select_n shift_left
        shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan
        tanh xor zeta
        """,
        _elementwise,
    ),
    **_named(
        """
        argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
        reduce_xor
        """,
        _reduce,
    ),
    **_named(
        """
        all_gather all_gather_invariant all_to_all pad reduce_scatter reduce_window
        reduce_window_max reduce_window_min reduce_window_sum
        """,
        _by(lambda _: resize),
    ),
    # Each entry remains one entry: casts, copies, sharding, identities.
    **_named(
        """
        bitcast_convert_type convert_element_type copy copy_p device_put
        layout_constraint mesh_cast name optimization_barrier pbroadcast pcast pmax pmin
        ppermute psum psum2 psum_invariant pvary reduce_precision reshard
        sharding_constraint stop_gradient
        """,
        _by(lambda _: same),
    ),
    **_named(
        """
        approx_top_k cumlogsumexp cummax cummin cumprod cumsum dynamic_update_slice
        scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub scatter_add
        sort top_k
        """,
        _together,
    ),
    **_named(
        """
        random_bits random_clone random_fold_in random_seed random_split random_unwrap
        random_wrap rng_bit_generator rng_uniform threefry2x32
        """,
        _random,
    ),
    "broadcast_in_dim": _by(
        lambda p: broadcast(tuple(map(int, p["broadcast_dimensions"])))
    ),
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "iota": _iota,
    "ragged_dot_general": _ragged_dot,
    "reshape": _by(_reshape),
    "rev": _by(lambda p: flip(p["dimensions"])),
    "slice": _slice_value,
    "split": _split,
    "squeeze": _by(lambda p: without(map(int, p["dimensions"]))),
    "tile": _by(lambda _: tile),
    "transpose": _by(lambda p: transpose(p["permutation"])),
    "unknown": _unknown,
}
