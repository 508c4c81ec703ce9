"""What each primitive does to the values of a forward pass: one table, by name."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tb_optax.trace.record import (
    OUTPUT,
    POOLED,
    REDUCTION,
    STACKED,
    Apart,
    Feed,
    Record,
)
from tb_optax.trace.values import (
    DISTINCT,
    NORMED,
    ONE_HOT,
    Array,
    Constant,
    Data,
    Dimension,
    Factor,
    Label,
    Labels,
    Move,
    Parameter,
    Trail,
    Unfollowed,
    Value,
    broadcast,
    cut,
    expand,
    flip,
    fresh,
    labels_of,
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
from tb_optax.trace.walk import CONTROL, Fields, Op, Rule, picked

# Elementwise functions by which statistics are taken out of data, and those by which a
# bias or a gain acts.
_NORMALIZING = frozenset({"sub", "mul", "div"})
_ADDING = frozenset({"add", "add_any"})
_AFFINE = _NORMALIZING | _ADDING
# What is added to logits is not multiplied with what their softmax is.
_SOFTMAX = frozenset({"exp", "exp2", "logistic"})

_TABLE = "look-up table: constants pick its rows"
_LEARNED = "enters a product in the place of data"
_NO_AXES = "it is computed with before it enters a product: its axes are lost"
_BY_HAND = (
    "it multiplies data that is constant along one of its axes: a matrix product "
    "written with `*`?"
)
_BETWEEN_DATA = (
    "it is added to or multiplied with data and then enters a product of data with data"
)


def _of_type(kind: type, values: Iterable[Value]) -> list[Any]:
    return [value for value in values if isinstance(value, kind)]


def _union(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
    return frozenset().union(*sets)


def _leaves(values: Iterable[Parameter]) -> frozenset[str]:
    return _union(value.leaves for value in values)


def _bits(masks: Iterable[int]) -> int:
    return functools.reduce(int.__or__, masks, 0)


# ---- Elementwise functions: activations, biases, norms, kernels that are computed ----


def _elementwise(op: Op) -> list[Value]:
    return [_of_entries(op.record, op.name, op.values, shape) for shape in op.shapes]


def _of_entries(
    record: Record, name: str, values: Sequence[Value], shape: tuple[int, ...]
) -> Value:
    """Any function of the entries of some values."""
    parameters, data = _of_type(Parameter, values), _of_type(Data, values)
    constants = _of_type(Constant, values)
    if not parameters and not data:
        return Constant(_of_constants(name, [v.array for v in values], shape))
    if not data:
        along = _union(value.array.varying() for value in parameters)
        # Constants are data where they vary and the parameters do not.
        if all(value.array.varying() <= along for value in constants):
            return _of_parameters(record, name, parameters, constants, shape)
        data = [Data(c.array) for c in constants if c.array.varying()]
    kernels = [
        v for v in parameters if v.matrix and any(map(record.is_matrix, v.leaves))
    ]
    if len(kernels) == 1 and not any(value.array.varying() for value in data):
        # A number that is computed from data scales a kernel, as in spectral norm.
        scaled = _of_parameters(record, name, parameters, constants, shape)
        through = _bits(value.trail.through for value in data)
        return dataclasses.replace(scaled, through=scaled.through | through)
    trail, normed = _trail(record, name, data, constants)
    array = _merged([value.array for value in data], shape, normed)
    for value in parameters:
        trail = _meet(record, name, value, data, array, trail)
    more = [value.array for value in (*parameters, *constants)]
    return Data(_merged([array, *more], shape), trail)


def _merged(
    arrays: Sequence[Array], shape: tuple[int, ...], normed: Collection[int] = ()
) -> Array:
    """An elementwise result: each dimension has what any operand knows of it."""
    full = [array for array in arrays if array.rank() == len(shape)]
    known = [array for array in full if array.varying()]
    if not known:
        return of_factors([[Factor(size, None, False)] for size in shape])
    if len(known) == 1 and not normed:
        return known[0] if known[0].shape == shape else expand(known[0], shape)
    dims = [array.dims() for array in known]
    marks = [frozenset([NORMED] if i in normed else ()) for i in range(len(shape))]
    return of_factors([_either(*d, marks[i]) for i, d in enumerate(zip(*dims))])


def _either(*candidates: Any) -> list[Factor]:
    """One dimension, as several arrays have it; the last operand are more labels."""
    *dims, more = candidates
    moving = [dim for dim in dims if any(f.varies for f in dim)] or dims
    finest = max(moving, key=lambda dim: (any(f.labels for f in dim), len(dim)))
    alike = [dim for dim in moving if [f.size for f in dim] == [f.size for f in finest]]
    found = []
    for factors in zip(*alike, strict=True):
        axis = next((f.axis for f in factors if f.axis is not None), None)
        labels: Labels = frozenset().union(more, *map(labels_of, factors))
        found.append(Factor(factors[0].size, axis, True, labels))
    return found


def _of_constants(name: str, arrays: list[Array], shape: tuple[int, ...]) -> Array:
    """Constants combined; comparing something with distinct numbers is one-hot."""
    array = unlabelled(_merged(arrays, shape))
    full = [one for one in arrays if one.rank() == len(shape)]
    if name != "eq" or len(full) != 2:
        return array
    dims = array.dims()
    for one, other in (full, full[::-1]):
        for i in one.varying() - other.varying():
            if len(dims[i]) == 1 and DISTINCT in one.dims()[i][0].labels:
                dims[i] = [dims[i][0]._replace(labels=frozenset([ONE_HOT]))]
    return of_factors(dims)


def _of_parameters(
    record: Record,
    name: str,
    parameters: Sequence[Parameter],
    constants: Sequence[Constant],
    shape: tuple[int, ...],
) -> Parameter:
    """Parameters and constants combined: the one that covers all axes is the kernel."""
    array = _merged([value.array for value in parameters], shape)
    covering = {
        str([(view.path, view.array.layout()) for view in value.views]): value
        for value in reversed(parameters)
        if value.views and array.varying() <= value.array.varying()
    }
    mains = list(covering.values())
    if len(mains) > 1:
        mains = [v for v in mains if not record.is_left_out(v.views[0].path)]
        mains = [v for v in mains if record.is_kernel(v.views[0].path)] or mains
    main = parameters[0].lost(array)
    if len(mains) == 1:
        main = mains[0]
        if main.array.rank() != len(shape):
            main = dataclasses.replace(main, array=array)
        elif main.array.shape != shape:
            main = moved(main, expand, shape)
    scaled = name in _AFFINE and any(value.array.varying() for value in constants)
    normed = name in _NORMALIZING and any(value.reduced for value in parameters)
    return dataclasses.replace(
        main,
        leaves=_leaves(parameters),
        scaled=scaled or any(value.scaled for value in parameters),
        reduced=all(value.reduced for value in parameters),
        normed=normed or any(value.normed for value in parameters),
        looked_up=any(value.looked_up for value in parameters),
        through=_bits(value.through for value in parameters),
    )


def _joined_trail(record: Record, data: Sequence[Data], name: str = "") -> Trail:
    """What data has gone through that has several sources.

    The newest products come through the main one of them: statistics and what is
    added to all positions alike, as an embedding of time is, stand back.
    """
    rank = max(value.trail.rank for value in data)
    extent = {id(value): len(value.array.varying()) for value in data}

    def mainness(value: Data) -> tuple[Any, ...]:
        newest = max(value.trail.last, default=-1)
        real = newest >= 0 and record.products[newest].kernel
        trail = value.trail
        sizes = (extent[id(value)], real, trail.rank or rank, newest)
        return newest >= 0, not trail.reduced, *sizes

    main = max(data, key=mainness)
    trails = [value.trail for value in data]
    pending = _union(trail.pending for trail in trails)
    others = [v for v in data if v is not main and not v.trail.reduced]
    if name in _ADDING and others:
        # The sum of two branches feeds the next layer, not one branch's norm.
        full = any(extent[id(value)] >= extent[id(main)] for value in others)
        pending = frozenset() if full else main.trail.pending
        trails = [main.trail]
    return Trail(
        last=main.trail.last,
        through=_bits(value.trail.through for value in data),
        rank=rank,
        normalized=any(trail.normalized for trail in trails),
        reduced=all(value.trail.reduced for value in data),
        mixed=any(trail.mixed for trail in trails),
        pending=pending,
        coefficients=_union(value.trail.coefficients for value in data),
        matrices=_union(value.trail.matrices for value in data),
    )


def _trail(
    record: Record, name: str, data: Sequence[Data], constants: Sequence[Constant]
) -> tuple[Trail, set[int]]:
    """The trail of several data values combined, and what they are normalized over."""
    trail = _joined_trail(record, data, name)
    main = [value for value in data if not value.trail.reduced]
    normed: set[int] = set()
    if name in _NORMALIZING and main:
        statistics = [value.array for value in data if value.trail.reduced]
        taken_out = bool(statistics)
        taken_out |= any(value.array.varying() for value in constants)
        taken_out |= bool(trail.last) and any(not v.trail.last for v in main)
        trail = trail._replace(normalized=trail.normalized or taken_out)
        along = _union(value.array.varying() for value in main)
        normed = {i for array in statistics for i in along - array.varying()}
    if name in _SOFTMAX:
        trail = trail._replace(matrices=frozenset())
    if trail.last and trail.coefficients:
        record.follow(trail.coefficients, trail.last, norm=True)
        pending = trail.pending | trail.coefficients
        trail = trail._replace(coefficients=frozenset(), pending=pending)
    return trail, normed


def _meet(
    record: Record,
    name: str,
    value: Parameter,
    data: Sequence[Data],
    array: Array,
    trail: Trail,
) -> Trail:
    """A parameter meets data: as a bias, a gain, a norm or a table of positions."""
    if value.reduced and not value.array.varying():
        return trail  # A penalty, which is added to a loss.
    matrices: frozenset[str] = frozenset()
    if value.matrix and not value.looked_up:
        matrices = frozenset(filter(record.is_matrix, _paths(value)))
    kernels = frozenset(filter(record.is_kernel, matrices))
    outer = name == "mul" and matrices and _is_outer(value, data)
    if kernels and (outer or not value.views):
        return Trail(last=_hidden(record, kernels, ""))
    if outer:
        record.fail(matrices, _BY_HAND)
    norm = trail.normalized or trail.reduced or value.scaled
    reason = "acts along axes that are no outputs, as a table of positions does"
    if value.looked_up:
        reason = _TABLE
    elif trail.mixed:
        reason = "acts on a product of data with data"
    elif not trail.last:
        reason = "acts on inputs, after no layer"
        if _is_coefficient(record, value, data):
            norm = False
            coefficients = trail.coefficients | value.leaves
            trail = trail._replace(coefficients=coefficients)
    follows = name in _AFFINE and not value.looked_up and (norm or not trail.mixed)
    if not (follows and _follow(record, value, array, trail, norm)):
        record.say(value.leaves, reason)
        trail = trail._replace(matrices=trail.matrices | matrices)
    return trail._replace(pending=trail.pending | value.leaves) if norm else trail


def _paths(value: Parameter) -> frozenset[str]:
    """The leaves that a value is, or else all that are in it."""
    return frozenset(view.path for view in value.views) or value.leaves


def _is_coefficient(record: Record, value: Parameter, data: Sequence[Data]) -> bool:
    """Whether data has no axes but those of the parameter, as running statistics."""
    rank = max(len(record.shapes[path]) for path in value.leaves)
    return all(
        len(item.array.source.shape) <= rank and not item.trail.reduced for item in data
    )


def _is_outer(value: Parameter, data: Sequence[Data]) -> bool:
    """Whether data varies along some axis of a parameter and not along another."""
    along = value.array.varying()
    shared = [
        along & item.array.varying()
        for item in data
        if item.array.rank() == value.array.rank() and not item.trail.reduced
    ]
    return any(own and own != along for own in shared)


def _follow(
    record: Record, value: Parameter, array: Array, trail: Trail, norm: bool
) -> bool:
    """Write a bias, a gain or a norm down; False for what is none."""
    if value.along is not None and len(value.views) == len(trail.last):
        for view, number in zip(value.views, trail.last, strict=True):
            record.follow([view.path], [number], norm)
        return True
    along = value.array.varying()
    numbers = list(trail.last)
    if not norm or len(along) > 1:
        reduced = norm and trail.reduced
        numbers = [n for n in numbers if _fits(along, array, n, norm, reduced)]
    record.follow(value.leaves, numbers, norm)
    return bool(numbers)


def _fits(
    along: Iterable[int], array: Array, number: int, norm: bool, reduced: bool
) -> bool:
    """Whether dimensions of data are outputs of a product, or normalized over."""
    starts, dims, varying = array.start(), array.dims(), array.varying()
    for position in along:
        if position not in varying:
            if not reduced:
                return False
            continue
        for factor in dims[position]:
            if not factor.varies:
                continue
            low = starts[factor.axis or 0]
            spans = [label.span for label in factor.labels if label.number == number]
            inside = any(
                span is None or span[0] < low + factor.size and low < span[1]
                for span in spans
            )
            if not inside and not (norm and NORMED in factor.labels):
                return False
    return True


# ---- Products -----------------------------------------------------------------------


class _Side(NamedTuple):
    """An operand of a matrix product."""

    value: Any
    contracted: Sequence[int]
    batch: Sequence[int]

    @property
    def free(self) -> list[int]:
        """Dimensions that are in the result and not in the other operand."""
        taken = {*self.contracted, *self.batch}
        return [i for i in range(self.value.array.rank()) if i not in taken]


def _roles(
    contracted: Iterable[int], batch: Iterable[int], free: Iterable[int]
) -> dict[int, str]:
    """Roles of the dimensions of a kernel."""
    groups = ((contracted, REDUCTION), (batch, STACKED), (free, OUTPUT))
    return {i: role for dims, role in groups for i in dims}


def _dot_general(op: Op) -> Value:
    """`dot_general`: a matrix product with batches."""
    record, shape = op.record, op.shapes[0]
    contracting, batch = op.fields["dimension_numbers"]
    sides = [
        _Side(value, list(map(int, contracted)), list(map(int, batched)))
        for value, contracted, batched in zip(
            op.values, contracting, batch, strict=True
        )
    ]
    parameters = [i for i in (0, 1) if isinstance(op.values[i], Parameter)]
    if not parameters:
        return _of_data(record, sides)
    i = parameters[0]
    if len(parameters) == 2:
        chosen = _kernel_of(record, op.values)
        if chosen is None:
            return _of_two(record, sides)
        i = chosen
        data: Value = _in_place_of_data(record, op.values[1 - i])
    else:
        data = op.values[1 - i]
    kernel = op.values[i]
    assert isinstance(kernel, Parameter)
    if isinstance(data, Constant):
        if kernel.looked_up or _picks_rows(sides[1 - i]):
            record.say(kernel.leaves, _TABLE)
            return kernel.lost(fresh(shape), looked_up=True)
        # An initial state is one for each row, though all start alike.
        data = Data(fresh(data.array.shape))
    sides[1 - i] = sides[1 - i]._replace(value=data)
    if not sides[i].contracted and not sides[i].free:
        pair = [moved(s.value, _to_result(s), shape) for s in sides]
        return _of_entries(record, "mul", pair, shape)
    assert isinstance(data, Data)
    return _with_kernel(record, sides, i, data)


def _to_result(side: _Side) -> Move:
    """The dimensions of a side in the order of the result, and those that it lacks."""
    return lambda array, shape: broadcast(range(len(side.batch) + len(side.free)))(
        transpose([*side.batch, *side.free])(array, shape), shape
    )


def _with_kernel(record: Record, sides: list[_Side], i: int, data: Data) -> Value:
    """Data by a parameter, which is on side i."""
    side, other = sides[i], sides[1 - i]
    kernel, dims = side.value, data.array.dims()
    if kernel.looked_up:
        record.fail(
            kernel.leaves, "constants pick its rows, and then it multiplies data"
        )
        return Data(_result(sides), data.trail._replace(mixed=True))
    matrices = bool(side.contracted and side.free)
    for mine, its in zip(side.batch, other.batch, strict=True):
        others = [d for v in kernel.views for d in v.array.dims()[mine] if d.varies]
        _are_apart(record, dims[its], others, matrices)
    roles = _roles(side.contracted, side.batch, side.free)
    last = _apply(record, kernel, roles, data)
    known = [_outputs(kernel, last), dims]
    return Data(_result(sides, known if i == 0 else known[::-1]), _after(last, data))


def _after(last: tuple[int, ...], data: Data) -> Trail:
    """The trail of the result of a product."""
    through = data.trail.through | _bits(1 << number for number in last)
    return Trail(last=last, through=through, rank=data.trail.rank)


def _result(sides: Sequence[_Side], dims: Sequence[Any] = ()) -> Array:
    """Dimensions of a matrix product: batches, then what is free on each side."""
    left, right = sides
    one, two = dims or [side.value.array.dims() for side in sides]
    pairs = zip(left.batch, right.batch, strict=True)
    batch = [_either(one[i], two[j], frozenset()) for i, j in pairs]
    free = [one[i] for i in left.free] + [two[j] for j in right.free]
    return of_factors([*batch, *free])


def _outputs(kernel: Parameter, numbers: Sequence[int]) -> list[list[Factor]]:
    """Dimensions of a kernel as they are in the outputs of its products."""
    if not kernel.views or len(kernel.views) != len(numbers):
        return unlabelled(kernel.array).dims()
    found = []
    for position, dim in enumerate(kernel.views[0].array.dims()):
        if position != kernel.along:
            found.append([_output(factor, numbers) for factor in dim])
            continue
        start, labels = 0, []
        for number, view in zip(numbers, kernel.views, strict=True):
            axes = [f.axis for f in view.array.dims()[position] if f.axis is not None]
            stop = start + view.array.shape[position]
            labels.append(Label(number, axes[0] if axes else 0, False, (start, stop)))
            start = stop
        found.append([Factor(start, labels=frozenset(labels))])
    return found


def _output(factor: Factor, numbers: Iterable[int]) -> Factor:
    if factor.axis is None:
        return factor
    labels = frozenset(Label(n, factor.axis, factor.whole) for n in numbers)
    return Factor(factor.size, labels=labels)


def _are_apart(
    record: Record, dim: Dimension, others: Iterable[Factor], matrices: bool
) -> None:
    """Data meets a batch axis of a kernel: outputs along it may be apart."""
    axes = frozenset(f.axis for f in others if f.axis is not None)
    for label in [label for f in dim if f.whole for label in f.labels]:
        if axes and label.whole:
            event = Apart(label.axis, axes, matrices)
            record.apart.setdefault(label.number, []).append(event)


def _apply(
    record: Record,
    kernel: Parameter,
    roles: Mapping[int, str],
    data: Data,
    groups: int = 1,
) -> tuple[int, ...]:
    """Write a product of data with a parameter down; return its numbers."""
    if not kernel.views:
        return _hidden(record, kernel.leaves, _NO_AXES)
    numbers: list[int] = []
    paths = _paths(kernel)
    for view in kernel.views:
        found = _roles_of_axes(view.array, roles, groups)
        starts = view.array.start()
        picks = {
            axis: None if axis in view.unknown else starts[axis]
            for axis, size in enumerate(record.shapes[view.path])
            if size > 1 and axis not in found
        }
        more = {"learned": data.trail.learned, "data": data.trail.rank > 0}
        numbers.append(record.product(view.path, found, picks, **more))
    record.follow(kernel.leaves - paths, numbers, norm=False)
    for number, made in record.products.items() if kernel.through else ():
        if kernel.through >> number & 1 and made.path in paths:
            record.auxiliary.add(number)
    record.events += [Feed(path, numbers[0]) for path in sorted(data.trail.pending)]
    return tuple(numbers)


def _roles_of_axes(
    array: Array, roles: Mapping[int, str], groups: int
) -> dict[int, frozenset[str]]:
    """Roles of the axes of a leaf, from those of the dimensions of its view."""
    found: dict[int, set[str]] = {}
    dims = array.dims()
    for position, role in roles.items():
        shared = _shared(array, position, groups) if role == OUTPUT else []
        for factor in dims[position]:
            # One slice of a longer axis is a pick, no role.
            if factor.axis is not None and (factor.size > 1 or factor.whole):
                own = STACKED if factor.axis in shared else role
                found.setdefault(factor.axis, set()).add(own)
    return {axis: frozenset(names) for axis, names in found.items()}


def _shared(array: Array, position: int, groups: int) -> frozenset[int]:
    """Axes of a dimension along which there is one slice for each of some groups."""
    first, rest = _grouped(array, position, groups)
    axes = frozenset(f.axis for f in first if f.axis is not None)
    return axes - {factor.axis for factor in rest}


def _grouped(array: Array, position: int, groups: int) -> tuple[Dimension, Dimension]:
    """The first factors of a dimension, of this size together, and the others."""
    shape, size = list(array.shape), array.shape[position]
    shape[position : position + 1] = [groups, size // groups]
    if 1 < groups < size:
        try:
            dims = reshape(array, shape).dims()
        except Unfollowed:
            return [], []
        return dims[position], dims[position + 1]
    return [], []


def _hidden(record: Record, leaves: Iterable[str], reason: str) -> tuple[int, ...]:
    """Write a product down in which the axes of its parameters are out of sight."""
    kernels = sorted(filter(record.is_kernel, leaves))
    record.fail(set(leaves) - set(kernels), reason)
    return tuple(record.product(path, None, {}) for path in kernels)


def _of_data(record: Record, sides: Sequence[_Side]) -> Value:
    """Data by data, as in attention, or by constants."""
    array = _result(sides)
    data = _of_type(Data, [side.value for side in sides])
    if not data:
        return Constant(unlabelled(array))
    trail = _joined_trail(record, data)
    if len(data) == 1:
        (side,) = [side for side in sides if side.value is data[0]]
        dims = side.value.array.dims()
        factors = [factor for i in side.contracted for factor in dims[i]]
        record.resampled |= {label.number for f in factors for label in f.labels}
        return Data(array, trail)
    kernels = frozenset(filter(record.is_kernel, trail.matrices))
    record.fail(trail.matrices - kernels, _BETWEEN_DATA)
    newest = max((v.trail.last for v in data), key=lambda n: max(n, default=-1))
    last = _hidden(record, kernels, "") or newest
    return Data(array, _after(last, Data(array, trail))._replace(mixed=not kernels))


def _kernel_of(record: Record, values: Sequence[Any]) -> int | None:
    """Which of two parameters is a kernel, if the other stands in the place of data."""

    def is_left_out(value: Parameter) -> bool:
        paths = list(filter(record.is_matrix, _paths(value)))
        return bool(paths) and all(map(record.is_left_out, paths))

    def stands_for_data(value: Parameter) -> bool:
        return not value.matrix or value.looked_up or is_left_out(value)

    said = [any(map(record.is_kernel, _paths(value))) for value in values]
    if any(said):
        return None if all(said) else said.index(True)
    able = [
        i
        for i in (0, 1)
        if values[i].views
        and not stands_for_data(values[i])
        and stands_for_data(values[1 - i])
    ]
    return able[0] if len(able) == 1 else None


def _in_place_of_data(record: Record, value: Any) -> Data:
    """A learned query, or another activation that is computed from parameters."""
    record.say(value.leaves, _LEARNED)
    vectors = {path for path in value.leaves if not record.is_matrix(path)}
    pending = frozenset(vectors if value.normed else ()) - _paths(value)
    return Data(unlabelled(value.array), Trail(pending=pending, learned=True))


def _of_two(record: Record, sides: Sequence[_Side]) -> Value:
    """A product of parameters alone: of factors of a kernel, or of learned queries."""
    left, right = (side.value for side in sides)
    array = _result(sides)
    if any(map(record.is_kernel, left.leaves | right.leaves)):
        last = _hidden(record, left.leaves | right.leaves, _NO_AXES)
        return Data(array, _after(last, Data(array)))
    on_the_right = sides[1].contracted == [0] or not left.views
    kernel = right if on_the_right else left
    if kernel.views and left.leaves != right.leaves:
        record.likely |= set(filter(record.is_matrix, _paths(kernel)))
    for value, other in ((left, right), (right, left)):
        names = ", ".join(map(repr, sorted(other.leaves)))
        reason = (
            f"its product with {names} holds no data: learned queries and their "
            f"kernel, or factors of one kernel?"
        )
        record.fail(value.leaves, reason)
    looked_up = left.looked_up or right.looked_up
    return Parameter(array, left.leaves | right.leaves, looked_up=looked_up)


def _picks_rows(side: _Side) -> bool:
    """Whether a constant picks one row of what it is multiplied with: one-hot."""
    dims = side.value.array.dims()
    long = [dims[i] for i in side.contracted if side.value.array.shape[i] > 1]
    return len(long) == 1 == len(long[0]) and ONE_HOT in long[0][0].labels


def _convolution(op: Op) -> Value:
    """`conv_general_dilated`, of any layout and any number of groups."""
    record, shape = op.record, op.shapes[0]
    data, kernel = op.values
    numbers, groups = op.fields["dimension_numbers"], op.fields["feature_group_count"]
    outputs, inputs, *positions = numbers.rhs_spec
    if isinstance(data, Constant) and isinstance(kernel, Parameter):
        data = Data(fresh(data.array.shape))
    if not isinstance(kernel, Parameter) or not isinstance(data, Data):
        if isinstance(data, Parameter) and not isinstance(kernel, Constant):
            record.fail(
                _leaves(_of_type(Parameter, op.values)),
                "it is convolved with no data, or as only gradients are",
            )
        return _together(op, mixed=True)[0]
    dims = [[Factor(size)] for size in shape]
    dims[numbers.out_spec[0]] = data.array.dims()[numbers.lhs_spec[0]]
    several = kernel.array.shape[inputs] > 1 and kernel.views
    if groups > 1 and several:
        axes = _shared(kernel.views[0].array, outputs, groups)
        first, _ = _grouped(data.array, numbers.lhs_spec[1], groups)
        _are_apart(record, first, [Factor(2, axis) for axis in axes], matrices=True)
    roles = {**_roles([inputs], [], [outputs]), **dict.fromkeys(positions, POOLED)}
    last = _apply(record, kernel, roles, data, groups if several else 1)
    dims[numbers.out_spec[1]] = _outputs(kernel, last)[outputs]
    return Data(of_factors(dims), _after(last, data))


def _ragged_dot(op: Op) -> Value:
    """`ragged_dot_general`: rows of each group meet their own kernel."""
    data, kernel = op.values[:2]
    numbers = op.fields["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    stacked = {*batch, *numbers.rhs_group_dimensions}
    if not isinstance(data, Data) or not isinstance(kernel, Parameter):
        return _together(op, mixed=True)[0]
    free = set(range(kernel.array.rank())) - stacked - set(contracted)
    last = _apply(op.record, kernel, _roles(contracted, stacked, free), data)
    dims = [[Factor(size)] for size in op.shapes[0]]
    dims[-1] = _outputs(kernel, last)[max(free)]
    return Data(of_factors(dims), _after(last, data))


# ---- Moves and look-ups -------------------------------------------------------------


def _by(move_of: Callable[[Fields], Move]) -> Rule:
    """A rule that moves the entries of each operand."""
    return lambda op: [
        moved(value, move_of(op.fields), shape)
        for value, shape in zip(op.values, op.shapes, strict=False)
    ]


def _reshape(fields: Fields) -> Move:
    """`reshape`, which may permute its dimensions first."""
    order = fields["dimensions"]
    if order is None:
        return reshape
    return lambda array, shape: reshape(transpose(order)(array, shape), shape)


def _split(op: Op) -> list[Value]:
    """`split`: one value for each piece."""
    axis, start, found = op.fields["axis"], 0, []
    for shape in op.shapes:
        starts = [start if i == axis else 0 for i in range(len(shape))]
        found.append(_cut(op.values[0], starts, shape))
        start += shape[axis]
    return found


def _slice(op: Op) -> Value:
    starts, steps = op.fields["start_indices"], op.fields["strides"]
    return _cut(op.values[0], starts, op.shapes[0], steps)


def _cut(value: Value, starts: Sequence[int], shape: Any, steps: Any = None) -> Value:
    """A piece of a value; of parameters side by side, those that lie in it."""
    along = value.along if isinstance(value, Parameter) else None
    if along is None or shape[along] == value.array.shape[along]:
        return moved(value, cut(starts, steps), shape)
    assert isinstance(value, Parameter)
    offset, pieces = 0, []
    for view in value.views:
        size = view.array.shape[along]
        low = max(starts[along] - offset, 0)
        high = min(starts[along] + shape[along] - offset, size)
        offset += size
        if low < high:
            own = [high - low if i == along else n for i, n in enumerate(shape)]
            begin = [low if i == along else n for i, n in enumerate(starts)]
            alone = {"array": view.array, "views": (view,), "along": None}
            piece = dataclasses.replace(value, **alone)
            pieces.append(moved(piece, cut(begin, steps), own))
    return _side_by_side(pieces, along, shape)


def _side_by_side(values: Sequence[Any], along: int, shape: Sequence[int]) -> Value:
    """Parameters next to each other, each by itself."""
    if len(values) == 1:
        return values[0]
    leaves = _leaves(values)
    looked_up = any(value.looked_up for value in values)
    if not all(v.views and v.along in (None, along) for v in values):
        return Parameter(fresh(shape), leaves, looked_up=looked_up)
    dims = [list(dim) for dim in unlabelled(values[0].array).dims()]
    dims[along] = [Factor(shape[along])]
    return Parameter(
        of_factors(dims),
        leaves,
        views=tuple(view for value in values for view in value.views),
        along=along,
        scaled=any(value.scaled for value in values),
    )


def _concatenate(op: Op) -> Value:
    """`concatenate`: parameters side by side stay known."""
    along, shape = int(op.fields["dimension"]), op.shapes[0]
    parameters, data = _of_type(Parameter, op.values), _of_type(Data, op.values)
    if not data:
        if not parameters:
            return Constant(fresh(shape))
        return _side_by_side(parameters, along, shape)
    op.record.say(_leaves(parameters), "lies next to data in one array")
    trail = _joined_trail(op.record, data)
    newest = max(data, key=lambda value: max(value.trail.last, default=-1))
    dims = newest.array.dims()
    dims[along] = [Factor(shape[along])]
    return Data(of_factors(dims), trail)


def _dynamic_slice(op: Op) -> Value:
    """`dynamic_slice`; a start that the program does not say is unknown."""
    (value, *starts), shape = op.values, op.shapes[0]
    chosen = [i for i, size in enumerate(shape) if size != value.array.shape[i]]
    known = [s.literal if isinstance(s, Constant) else None for s in starts]
    begin = [known[i] or 0 if i in chosen else 0 for i in range(len(shape))]
    found = picked(
        _cut(value, begin, shape),
        value,
        [i for i in chosen if known[i] is None and shape[i] == 1],
    )
    data = _of_type(Data, starts)
    if data and isinstance(value, Parameter) and sum(n > 1 for n in shape) < 2:
        return _embedded(op.record, value, data[0], found.array)
    return found


def _embedded(record: Record, value: Parameter, index: Data, array: Array) -> Data:
    """Rows that data looks up."""
    last = tuple(record.product(p, {}, {}, kernel=False) for p in sorted(value.leaves))
    return Data(unlabelled(array), _after(last, index))


def _gather(op: Op) -> Value:
    """`gather`: rows of a table, or slices of a stack."""
    operand, indices = op.values
    numbers, sizes = op.fields["dimension_numbers"], op.fields["slice_sizes"]
    if isinstance(operand, Constant):
        return _together(op)[0]

    def move(array: Array, shape: Sequence[int]) -> Array:
        if numbers.operand_batching_dims:
            raise Unfollowed
        array = cut([0] * len(sizes))(array, sizes)
        array = without(numbers.collapsed_slice_dims)(array, sizes)
        return broadcast(numbers.offset_dims)(array, shape)

    found = moved(operand, move, op.shapes[0])
    if isinstance(operand, Data):
        dims = [[f._replace(axis=0) for f in dim] for dim in found.array.dims()]
        return Data(of_factors(dims), operand.trail)
    chosen = [i for i, size in enumerate(operand.array.shape) if size != sizes[i]]
    assert isinstance(found, Parameter)
    if sum(size > 1 for size in sizes) > 1 and found.views and operand.along is None:
        return picked(found, operand, chosen)
    if isinstance(indices, Data):
        return _embedded(op.record, operand, indices, fresh(op.shapes[0]))
    op.record.say(operand.leaves, _TABLE)
    return operand.lost(fresh(op.shapes[0]), looked_up=True)


def _reduce(op: Op) -> Value | list[Value]:
    """A sum or an extremum over some axes."""
    if len(op.values) > 1:
        return _together(op)
    value, axes = op.values[0], op.fields["axes"]
    found = moved(value, without(axes), op.shapes[0])
    if all(value.array.shape[axis] == 1 for axis in axes):
        return found
    if isinstance(found, Parameter):
        return found.lost(found.array, reduced=True)
    if isinstance(found, Data):
        return Data(found.array, found.trail._replace(reduced=True))
    return Constant(unlabelled(found.array))


# ---- Everything else ----------------------------------------------------------------


def _together(op: Op, mixed: bool = False) -> list[Value]:
    """Sorts, cumulative sums, scatters: the entries of all operands in one array."""
    parameters, data = _of_type(Parameter, op.values), _of_type(Data, op.values)
    leaves = _leaves(parameters)
    if not data:
        if not parameters:
            return [Constant(fresh(shape)) for shape in op.shapes]
        looked_up = any(value.looked_up for value in parameters)
        return [
            Parameter(fresh(shape), leaves, looked_up=looked_up) for shape in op.shapes
        ]
    op.record.say(leaves, "is written into an array of data")
    trail = _joined_trail(op.record, data)
    trail = trail._replace(
        matrices=trail.matrices | frozenset(filter(op.record.is_matrix, leaves)),
        mixed=trail.mixed or (mixed and len(data) > 1),
    )
    first = data[0].array
    return [
        Data(first if first.shape == shape else fresh(shape), trail)
        for shape in op.shapes
    ]


def _random(op: Op) -> list[Value]:
    """Random numbers are constants."""
    return [Constant(fresh(shape)) for shape in op.shapes]


def _iota(op: Op) -> Value:
    """`iota`: distinct numbers along one dimension."""
    dims = [[Factor(size, None, False)] for size in op.shapes[0]]
    i = int(op.fields["dimension"])
    dims[i] = [Factor(op.shapes[0][i], labels=frozenset([DISTINCT]))]
    return Constant(of_factors(dims))


def _unknown(op: Op) -> list[Value]:
    """A primitive that is not in the table: it may do anything to its operands."""
    parameters, data = _of_type(Parameter, op.values), _of_type(Data, op.values)
    if not parameters:
        return _together(op)
    leaves = _leaves(parameters)
    reason = f"it enters {op.name!r}, a primitive that trace_layers does not know"
    if not data:
        op.record.fail(leaves, reason)
        return [Parameter(fresh(shape), leaves) for shape in op.shapes]
    trail = _joined_trail(op.record, data)
    last = _hidden(op.record, leaves, reason) or trail.last
    return [
        Data(fresh(shape), _after(last, Data(fresh(shape), trail)))
        for shape in op.shapes
    ]


_NAMES: Mapping[str, Rule] = {
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt
    ceil clamp clz complex conj cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2
    expm1 floor ge gt igamma igammac imag integer_pow is_finite le le_to lgamma log log1p
    logistic lt lt_to max min mul ne neg nextafter not or polygamma population_count pow
    real rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh sqrt square sub tan tanh xor zeta
    """: _elementwise,
    """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
    reduce_xor
    """: _reduce,
    """
    all_gather all_gather_invariant all_to_all pad reduce_scatter reduce_window
    reduce_window_max reduce_window_min reduce_window_sum
    """: _by(lambda _: resize),
    # Each entry remains one entry: casts, copies, sharding, identities.
    """
    bitcast_convert_type convert_element_type copy copy_p device_put layout_constraint
    mesh_cast name optimization_barrier pbroadcast pcast pmax pmin ppermute psum psum2
    psum_invariant pvary reduce_precision reshard sharding_constraint stop_gradient
    """: _by(lambda _: same),
    """
    approx_top_k cumlogsumexp cummax cummin cumprod cumsum dynamic_update_slice scatter
    scatter-add scatter-max scatter-min scatter-mul scatter-sub scatter_add sort top_k
    """: _together,
    """
    random_bits random_clone random_fold_in random_seed random_split random_unwrap
    random_wrap rng_bit_generator rng_uniform threefry2x32
    """: _random,
}

RULES: Mapping[str, Rule] = {
    **CONTROL,
    **{name: rule for names, rule in _NAMES.items() for name in names.split()},
    "broadcast_in_dim": _by(lambda p: broadcast(p["broadcast_dimensions"])),
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "iota": _iota,
    "ragged_dot_general": _ragged_dot,
    "reshape": _by(_reshape),
    "rev": _by(lambda p: flip(p["dimensions"])),
    "slice": _slice,
    "split": _split,
    "squeeze": _by(lambda p: without(p["dimensions"])),
    "tile": _by(lambda _: tile),
    "transpose": _by(lambda p: transpose(p["permutation"])),
    "unknown": _unknown,
}
