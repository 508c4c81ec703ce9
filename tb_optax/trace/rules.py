"""What each primitive does to the values of a forward pass: one table, by name."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tb_optax.trace import views
from tb_optax.trace.record import (
    BETWEEN_DATA,
    COMPUTED,
    OUTPUT,
    POOLED,
    REDUCTION,
    SECOND,
    STACKED,
)
from tb_optax.trace.record import Apart, Feed, Record, Use
from tb_optax.trace.values import (
    Constant,
    Data,
    Parameter,
    Trail,
    Value,
    joined,
    moved,
)
from tb_optax.trace.views import Array, Dimension, Factor, Label
from tb_optax.trace.walk import CONTROL, Fields, Op, Rule, picked

# Elementwise functions by which statistics are taken out of data, and those by which a
# bias or a gain acts.
_NORMALIZING = frozenset({"sub", "mul", "div"})
_ADDING = frozenset({"add", "add_any"})
_AFFINE = _NORMALIZING | _ADDING
# What is added to logits is not multiplied with what their softmax is.
_SOFTMAX = frozenset({"exp", "exp2", "logistic"})

_TABLE = "look-up table: constants pick its rows"
_BY_HAND = "it multiplies data as in a matrix product written with `*`"
Shape = tuple[int, ...]


def _of_type(kind: type, values: Iterable[Value]) -> list[Any]:
    return [value for value in values if isinstance(value, kind)]


def _union(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
    return frozenset().union(*sets)


def _leaves(values: Iterable[Value]) -> frozenset[str]:
    return _union(value.leaves for value in _of_type(Parameter, values))


def _varying(values: Iterable[Value]) -> frozenset[int]:
    return _union(value.array.varying() for value in values)


def _newest(data: Iterable[Data]) -> Data:
    return max(data, key=lambda value: max(value.trail.last, default=-1))


def _computed(values: Iterable[Value], array: Array) -> Parameter:
    """What several parameters are, of which none is to be seen any more."""
    looked_up = any(value.looked_up for value in _of_type(Parameter, values))
    return Parameter(array, _leaves(values), looked_up=looked_up)


# ---- Elementwise functions: activations, biases, norms, kernels that are computed ----


def _elementwise(op: Op) -> list[Value]:
    return [_of_entries(op.record, op.name, op.values, shape) for shape in op.shapes]


def _of_entries(record: Record, name: str, values: Sequence[Value], shape) -> Value:
    """Any function of the entries of some values."""
    parameters, data = _of_type(Parameter, values), _of_type(Data, values)
    constants = _of_type(Constant, values)
    if not parameters and not data:
        return Constant(_of_constants(name, values, shape))
    if not data:
        # Constants are data where they vary and the parameters do not.
        if _varying(constants) <= _varying(parameters):
            return _of_parameters(record, name, parameters, constants, shape)
        data = [Data(value.array) for value in constants if _varying([value])]
    if sum(_is_kernel(record, v) for v in parameters) == 1 and not _varying(data):
        # A number that is computed from data scales a kernel, as in spectral norm.
        scaled = _of_parameters(record, name, parameters, constants, shape)
        through = joined(value.trail for value in data).through
        return dataclasses.replace(scaled, through=scaled.through | through)
    trail, normed = _trail(record, name, data, constants)
    array = _merged(data, shape, normed)
    for value in parameters:
        trail = _meet(record, name, value, data, array, trail)
    return Data(_merged([Data(array), *parameters, *constants], shape), trail)


def _is_kernel(record: Record, value: Parameter) -> bool:
    """Whether a value has the axes of a kernel, be they of size 1."""
    ranks = [len(record.shapes[path]) for path in record.own(value)]
    return max(ranks) > 1 and bool(_varying([value]))


def _merged(values: Iterable[Value], shape: Shape, normed: Any = ()) -> Array:
    """An elementwise result: each dimension has what any operand knows of it."""
    arrays = [v.array for v in values if v.array.rank == len(shape) and _varying([v])]
    if not arrays:
        return views.of_factors([[Factor(size, None)] for size in shape])
    if len(arrays) == 1 and not normed:
        array = arrays[0]
        return array if array.shape == shape else views.expand(array, shape)
    dims = enumerate(zip(*(array.dims() for array in arrays), strict=True))
    marks = {i: frozenset([views.NORMED]) for i in normed}
    return views.of_factors(
        [_one_of(*d, more=marks.get(i, frozenset())) for i, d in dims]
    )


def _one_of(*dims: Dimension, more: frozenset[Label] = frozenset()) -> list[Factor]:
    """One dimension, as several arrays have it."""
    moving = [dim for dim in dims if any(f.varies for f in dim)] or dims
    finest = max(moving, key=lambda dim: (any(f.labels for f in dim), len(dim)))
    alike = [dim for dim in moving if [f.size for f in dim] == [f.size for f in finest]]
    found = []
    for factors in zip(*alike, strict=True):
        axis = next((f.axis for f in factors if f.axis is not None), None)
        labels = more.union(*(factor.own_labels() for factor in factors))
        found.append(Factor(factors[0].size, axis, True, labels))
    return found


def _of_constants(name: str, values: Sequence[Value], shape: Shape) -> Array:
    """Constants combined; comparing something with distinct numbers is one-hot."""
    dims = views.unlabelled(_merged(values, shape)).dims()
    kept = {"eq": views.ONE_HOT, "add": views.DISTINCT, "sub": views.DISTINCT}.get(name)
    full = [value for value in values if value.array.rank == len(shape)] if kept else []
    for value in full:
        own = value.array.dims()
        for i in _varying([value]) - _varying(v for v in full if v is not value):
            if len(dims[i]) == 1 and views.DISTINCT in own[i][0].labels:
                dims[i] = [Factor(shape[i], labels=frozenset([kept]))]
    return views.of_factors(dims)


def _of_parameters(record, name, parameters, constants, shape) -> Parameter:
    """Parameters and constants combined: the one that covers all axes is the kernel."""
    array, varying = _merged(parameters, shape), _varying(parameters)
    covering = [v for v in parameters if v.path and varying <= _varying([v])]
    mains = list({str((v.path, v.array.layout())): v for v in covering[::-1]}.values())
    if len(mains) > 1:
        mains = [value for value in mains if not record.is_left_out(value.path)]
        mains = [value for value in mains if record.is_kernel(value.path)] or mains
    paths = [value.path for value in mains[::-1]]
    if len(set(paths)) > 1:
        record.fail(record.own(mains[0]), f"{SECOND}, {paths[0]!r}: no kernel?")
    main = mains[0] if len(mains) == 1 else parameters[0].lost(array)
    if main.array.shape != shape:
        same_rank = main.array.rank == len(shape)
        expanded = views.expand(main.array, shape) if same_rank else array
        main = dataclasses.replace(main, array=expanded)
    scaled = name in _AFFINE and bool(_varying(constants))
    normed = name in _NORMALIZING and any(value.reduced for value in parameters)
    return dataclasses.replace(
        main,
        leaves=_leaves(parameters),
        scaled=scaled or any(value.scaled for value in parameters),
        reduced=all(value.reduced for value in parameters),
        normed=normed or any(value.normed for value in parameters),
        looked_up=any(value.looked_up for value in parameters),
        through=functools.reduce(int.__or__, (value.through for value in parameters)),
    )


def _joined_trail(record: Record, data: Sequence[Data], name: str = "") -> Trail:
    """What data has gone through that has several sources.

    The newest products come through the main one of them: statistics and what is
    added to all positions alike, as an embedding of time is, stand back.
    """
    trail = joined(value.trail for value in data)

    def mainness(value: Data) -> tuple[Any, ...]:
        own, newest = value.trail, max(value.trail.last, default=-1)
        real = newest >= 0 and record.products[newest].kernel
        extent = len(_varying([value]))
        return (
            newest >= 0,
            not own.reduced,
            extent,
            real,
            own.rank or trail.rank,
            newest,
        )

    main = max(data, key=mainness)
    own, others = main.trail, [v for v in data if v is not main and not v.trail.reduced]
    if name in _ADDING and others:
        # The sum of two branches feeds the next layer, not one branch's norm.
        full = any(len(_varying([v])) >= len(_varying([main])) for v in others)
        pending = frozenset() if full else own.pending
        trail = trail._replace(
            normalized=own.normalized, mixed=own.mixed, pending=pending
        )
    return trail._replace(last=own.last)


def _trail(record, name, data: list[Data], constants) -> tuple[Trail, frozenset[int]]:
    """The trail of several data values combined, and what they are normalized over."""
    trail, normed = _joined_trail(record, data, name), frozenset()
    main = [value for value in data if not value.trail.reduced]
    if name in _NORMALIZING and main:
        statistics = [value for value in data if value.trail.reduced]
        taken_out = bool(statistics) or bool(_varying(constants))
        taken_out |= bool(trail.last) and any(not v.trail.last for v in main)
        trail = trail._replace(normalized=trail.normalized or taken_out)
        normed = _union(_varying(main) - _varying([value]) for value in statistics)
    chosen = [n for n in trail.last if None in (record.products[n].uses or {}).values()]
    for number in [n for value in data for n in value.trail.last if chosen]:
        # A bias of a slice that data has chosen is looked up as the slice is.
        if name in _ADDING and not record.products[number].kernel:
            record.follow([record.products[number].path], chosen, norm=False)
    if name in _SOFTMAX:
        trail = trail._replace(matrices=frozenset())
    if trail.last and trail.coefficients:
        record.follow(trail.coefficients, trail.last, norm=True)
        pending = trail.pending | trail.coefficients
        trail = trail._replace(coefficients=frozenset(), pending=pending)
    return trail, normed


def _meet(record: Record, name, value: Parameter, data, array, old: Trail) -> Trail:
    """A parameter meets data: as a bias, a gain, a norm or a table of positions."""
    if value.reduced and not _varying([value]):
        return old  # A penalty, which is added to a loss.
    own = record.own(value) if value.matrix and not value.looked_up else ()
    matrices = frozenset(filter(record.is_matrix, own))
    kernels = list(filter(record.is_kernel, matrices))
    by_hand = name == "mul" and matrices and _is_outer(value, data)
    if kernels and (by_hand or not value.path):
        return Trail(last=_hidden(record, kernels, ""))
    if by_hand:
        record.fail(matrices, _BY_HAND)
    norm, trail = old.normalized or old.reduced or value.scaled, old
    if not old.last and _is_coefficient(record, value, data):
        trail = old._replace(coefficients=old.coefficients | value.leaves)
        norm = False
    follows = name in _AFFINE and not value.looked_up and (norm or not old.mixed)
    if not (follows and _follow(record, value, array, old, norm)):
        record.say(value.leaves, "acts on no outputs of a layer")
        trail = trail._replace(matrices=trail.matrices | matrices)
    if norm and not value.looked_up:
        return trail._replace(pending=trail.pending | value.leaves)
    return trail


def _is_coefficient(record: Record, value: Parameter, data: Sequence[Data]) -> bool:
    """Whether data has no axes but those of the parameter, as running statistics."""
    rank = -1 if value.looked_up else max(len(record.shapes[p]) for p in value.leaves)
    ranks = [len(item.array.source.shape) for item in data if not item.trail.reduced]
    return len(ranks) == len(data) and max(ranks) <= rank


def _is_outer(value: Parameter, data: Sequence[Data]) -> bool:
    """Whether data varies along some axis of a parameter and not along another."""
    along, rank = _varying([value]), value.array.rank
    own = [v for v in data if not v.trail.reduced and v.array.rank == rank]
    return any(along > along & _varying([v]) > frozenset() for v in own)


def _follow(record, value: Parameter, array: Array, trail: Trail, norm: bool) -> bool:
    """Write a bias, a gain or a norm down; False for what is none."""
    _, parts = record.bundles.get(value.path or "", (0, []))
    if parts and len(parts) == len(trail.last):
        for (_, part), number in zip(parts, trail.last, strict=True):
            record.follow(part.leaves, [number], norm)
        return True
    along, numbers = _varying([value]), list(trail.last)
    if not norm or len(along) > 1:
        reduced = norm and trail.reduced
        numbers = [n for n in numbers if _fits(along, array, n, norm, reduced)]
    record.follow(value.leaves, numbers, norm)
    return bool(numbers)


def _fits(along: Iterable[int], array: Array, number: int, norm, reduced) -> bool:
    """Whether dimensions of data are outputs of a product, or normalized over."""
    starts, dims, varying = array.start(), array.dims(), array.varying()

    def is_output(factor: Factor) -> bool:
        low = starts[factor.axis or 0]
        spans = [label.span for label in factor.labels if label.number == number]
        inside = [s is None or s[0] - factor.size < low < s[1] for s in spans]
        return any(inside) or (norm and views.NORMED in factor.labels)

    outputs = {i for i in varying if all(is_output(f) for f in dims[i] if f.varies)}
    return all(i in outputs or (reduced and i not in varying) for i in along)


# ---- Products -----------------------------------------------------------------------


class _Side(NamedTuple):
    """An operand of a matrix product."""

    value: Any
    contracted: list[int]
    batch: list[int]

    def free(self) -> list[int]:
        """Dimensions that are in the result and not in the other operand."""
        taken = {*self.contracted, *self.batch}
        return [i for i in range(self.value.array.rank) if i not in taken]

    def in_result(self, array: Array, shape: Sequence[int]) -> Array:
        """The dimensions in the order of a result without those of the other side."""
        order = [*self.batch, *self.free()]
        array = views.transpose(order)(array, shape)
        return views.broadcast(range(len(order)))(array, shape)


def _roles(contracted: Any, batch: Any, free: Any) -> dict[int, Use]:
    """Roles of the dimensions of a kernel."""
    groups = ((contracted, REDUCTION), (batch, STACKED), (free, OUTPUT))
    return {int(i): frozenset([role]) for dims, role in groups for i in dims}


def _dot_general(op: Op) -> Value:
    """`dot_general`: a matrix product with batches."""
    record, shape = op.record, op.shapes[0]
    pairs = zip(*op.fields["dimension_numbers"], strict=True)
    dims = [(list(map(int, own)), list(map(int, batch))) for own, batch in pairs]
    sides = [_Side(v, *own) for v, own in zip(op.values, dims, strict=True)]
    parameters = [i for i in (0, 1) if isinstance(op.values[i], Parameter)]
    if not parameters:
        return _of_data(record, sides)
    i = parameters[0] if len(parameters) == 1 else _kernel_of(record, op.values)
    if i is None:
        return _of_two(record, sides)
    kernel, data = op.values[i], op.values[1 - i]
    assert isinstance(kernel, Parameter)
    if isinstance(data, Parameter):
        data = _in_place_of_data(record, data)
    if isinstance(data, Constant):
        if kernel.looked_up or _picks_rows(sides[1 - i]):
            record.say(filter(record.is_matrix, kernel.leaves), _TABLE)
            return kernel.lost(views.fresh(shape), looked_up=True)
        # An initial state is one for each row, though all start alike.
        data = Data(views.fresh(data.array.shape))
    sides[1 - i] = sides[1 - i]._replace(value=data)
    if not sides[i].contracted and not sides[i].free():
        pair = [moved(side.value, side.in_result, shape) for side in sides]
        return _of_entries(record, "mul", pair, shape)
    return _with_kernel(record, sides, i, data)


def _with_kernel(record: Record, sides: list[_Side], i: int, data: Data) -> Value:
    """Data by a parameter, which is on side i."""
    side, dims, kernel = sides[i], data.array.dims(), sides[i].value
    if kernel.looked_up:
        record.fail(kernel.leaves, "constants pick its rows, which multiply data")
        return Data(_result(sides), data.trail._replace(mixed=True))
    matrices = bool(side.contracted and side.free())
    own = kernel.array.dims() if kernel.path else []
    for mine, its in zip(side.batch, sides[1 - i].batch, strict=True) if own else ():
        axes = [factor.axis for factor in own[mine] if factor.varies]
        _are_apart(record, dims[its], axes, matrices)
    roles = _roles(side.contracted, side.batch, side.free())
    last = _apply(record, kernel, roles, data)
    known = [_outputs(record, kernel, last), dims]
    return Data(_result(sides, known if i == 0 else known[::-1]), _after(last, data))


def _after(last: tuple[int, ...], data: Data) -> Trail:
    """The trail of the result of a product."""
    through = data.trail.through | sum(1 << number for number in last)
    return Trail(last=last, through=through, rank=data.trail.rank)


def _result(sides: Sequence[_Side], dims: Sequence[Any] = ()) -> Array:
    """Dimensions of a matrix product: batches, then what is free on each side."""
    left, right = sides
    one, two = dims or [side.value.array.dims() for side in sides]
    pairs = zip(left.batch, right.batch, strict=True)
    free = [one[i] for i in left.free()] + [two[j] for j in right.free()]
    return views.of_factors([*(_one_of(one[i], two[j]) for i, j in pairs), *free])


def _outputs(
    record: Record, kernel: Parameter, numbers: Sequence[int]
) -> list[list[Factor]]:
    """Dimensions of a kernel as they are in the outputs of its products."""
    dimension, parts = record.bundles.get(kernel.path or "", (None, []))
    spans = [(start, start + part.array.shape[dimension]) for start, part in parts]
    starts = kernel.array.start()

    def output(factor: Factor) -> Factor:
        if factor.axis is None or not kernel.path:
            return Factor(factor.size, factor.axis)
        labels = [Label(n, factor.axis, factor.whole) for n in numbers]
        if factor.axis == dimension and len(spans) == len(numbers):
            low = starts[factor.axis]
            own = [(start - low, stop - low) for start, stop in spans]
            pairs = zip(numbers, own, strict=True)
            labels = [Label(n, span=span) for n, span in pairs]
        return Factor(factor.size, labels=frozenset(labels))

    return [[output(factor) for factor in dim] for dim in kernel.array.dims()]


def _are_apart(
    record: Record, dim: Dimension, axes: Iterable[Any], matrices: bool
) -> None:
    """Data meets a batch axis of a kernel: outputs along it may be apart."""
    others = frozenset(axes)
    for label in [label for f in dim if f.whole for label in f.labels]:
        if others and label.whole:
            event = Apart(label.axis, others, matrices)
            record.apart.setdefault(label.number, []).append(event)


def _apply(
    record: Record,
    kernel: Parameter,
    roles: dict[int, Use],
    data: Data,
    groups: int = 1,
) -> tuple[int, ...]:
    """Write a product of data with a parameter down; return its numbers."""
    if not kernel.path:
        return _hidden(record, kernel.leaves, COMPUTED)
    more = {"learned": data.trail.learned, "data": data.trail.rank > 0}
    found = _uses(record, kernel, roles, groups)
    numbers = tuple(record.product(path, uses, **more) for path, uses in found)
    paths = {path for path, _ in found}
    record.follow(kernel.leaves - paths, numbers, norm=False)
    for number, made in record.products.items() if kernel.through else ():
        if kernel.through >> number & 1 and made.path in paths:
            record.auxiliary.add(number)
    record.events += [Feed(path, numbers[0]) for path in sorted(data.trail.pending)]
    return numbers


def _uses(
    record: Record, kernel: Parameter, of_dims: Mapping[int, Use], groups: int = 1
) -> list[tuple[str, dict[int, Use]]]:
    """What becomes of the axes of a leaf, from the uses of the dimensions of its view.

    Of what was put side by side, this is asked of each part by itself.
    """
    assert kernel.path is not None
    starts, dims, uses = kernel.array.start(), kernel.array.dims(), dict[int, Use]()
    for position, use in of_dims.items():
        shared = _shared(kernel.array, position, groups) if groups > 1 else ()
        for factor in dims[position]:
            axis = factor.axis
            # One slice of a longer axis is a pick, no role.
            if axis is None or (factor.size == 1 and not factor.whole):
                continue
            if isinstance(use, frozenset):
                before = uses.get(axis, frozenset())
                own = frozenset([STACKED]) if axis in shared else use
                uses[axis] = own | before if isinstance(before, frozenset) else own
            else:
                uses[axis] = use if factor.whole and len(dims[position]) == 1 else None
    for axis, size in enumerate(kernel.array.source.shape):
        if size > 1 and axis not in uses:
            uses[axis] = None if axis in kernel.unknown else starts[axis]
    if kernel.path not in record.bundles:
        return [(kernel.path, uses)]
    dimension, parts = record.bundles[kernel.path]
    found = []
    for start, part in parts:
        own, use = dict(uses), uses.get(dimension, frozenset())
        if isinstance(use, int):
            if not start <= use < start + part.array.shape[dimension]:
                continue
            own[dimension] = use - start
        found += _uses(record, part, own)
    return found


def _shared(array: Array, position: int, groups: int) -> frozenset[int]:
    """Axes of a dimension along which there is one slice for each of some groups."""
    first, rest = _grouped(array, position, groups)
    axes = frozenset(f.axis for f in first if f.axis is not None)
    return axes - {factor.axis for factor in rest}


def _grouped(array: Array, position: int, groups: int) -> tuple[Dimension, Dimension]:
    """The first factors of a dimension, of this size together, and the others."""
    shape, size = list(array.shape), array.shape[position]
    shape[position : position + 1] = [groups, size // groups]
    try:
        dims = views.reshape(array, shape).dims() if 1 < groups < size else []
    except views.Unfollowed:
        dims = []
    return (dims[position], dims[position + 1]) if dims else ([], [])


def _hidden(record: Record, leaves: Iterable[str], reason: str) -> tuple[int, ...]:
    """Write a product down in which the axes of its parameters are out of sight."""
    kernels = sorted(filter(record.is_kernel, leaves))
    record.fail(set(leaves) - set(kernels), reason)
    return tuple(record.product(path, None) for path in kernels)


def _of_data(record: Record, sides: Sequence[_Side]) -> Value:
    """Data by data, as in attention, or by constants."""
    array = _result(sides)
    data = _of_type(Data, [side.value for side in sides])
    if not data:
        return Constant(views.unlabelled(array))
    trail = _joined_trail(record, data)
    if len(data) == 1:
        (side,) = [side for side in sides if side.value is data[0]]
        factors = [f for i in side.contracted for f in side.value.array.dims()[i]]
        record.resampled |= {label.number for f in factors for label in f.labels}
        return Data(array, trail)
    kernels = list(filter(record.is_kernel, trail.matrices))
    record.fail(trail.matrices - set(kernels), BETWEEN_DATA)
    last = _hidden(record, kernels, "") or _newest(data).trail.last
    return Data(array, _after(last, Data(array, trail))._replace(mixed=not kernels))


def _kernel_of(record: Record, values: Sequence[Any]) -> int | None:
    """Which of two parameters is a kernel, if the other stands in the place of data."""

    def stands_for_data(value: Parameter) -> bool:
        matrices = list(filter(record.is_matrix, record.own(value)))
        left_out = bool(matrices) and all(map(record.is_left_out, matrices))
        return not value.matrix or value.looked_up or left_out

    said = [any(map(record.is_kernel, record.own(value))) for value in values]
    if any(said):
        return None if all(said) else said.index(True)
    able = [value.path and not stands_for_data(value) for value in values]
    fed = [i for i in (0, 1) if able[i] and stands_for_data(values[1 - i])]
    return fed[0] if len(fed) == 1 else None


def _in_place_of_data(record: Record, value: Parameter) -> Data:
    """A learned query, or another activation that is computed from parameters."""
    record.say(value.leaves, "enters a product in the place of data")
    vectors = {path for path in value.leaves if not record.is_matrix(path)}
    pending = frozenset(vectors if value.normed else ()) - record.own(value)
    return Data(views.unlabelled(value.array), Trail(pending=pending, learned=True))


def _of_two(record: Record, sides: Sequence[_Side]) -> Value:
    """A product of parameters alone: of factors of a kernel, or of learned queries."""
    left, right = (side.value for side in sides)
    found = _computed([left, right], _result(sides))
    if any(map(record.is_kernel, found.leaves)):
        last = _hidden(record, found.leaves, COMPUTED)
        return Data(found.array, _after(last, Data(found.array)))
    kernel = right if sides[1].contracted == [0] or not left.path else left
    if kernel.path and left.leaves != right.leaves:
        record.likely |= set(filter(record.is_matrix, record.own(kernel)))
    for value, other in ((left, right), (right, left)):
        names = ", ".join(map(repr, sorted(other.leaves)))
        reason = (
            f"its product with {names} holds no data: learned queries and their "
            f"kernel, or factors of one kernel?"
        )
        record.fail(value.leaves, reason)
    return found


def _picks_rows(side: _Side) -> bool:
    """Whether a constant picks one row of what it is multiplied with: one-hot.

    A permutation, as the features of nodes that have no others, is data.
    """
    dims = [(i, dim) for i, dim in enumerate(side.value.array.dims())]
    long = [(i, dim) for i, dim in dims if side.value.array.shape[i] > 1]
    hot = {i for i, dim in long if len(dim) == 1 and views.ONE_HOT in dim[0].labels}
    contracted = {i for i, _ in long} & set(side.contracted)
    return len(contracted) == 1 and contracted <= hot and len(hot) < max(len(long), 2)


def _convolution(op: Op) -> Value:
    """`conv_general_dilated`, of any layout and any number of groups."""
    record, (data, kernel) = op.record, op.values
    numbers, groups = op.fields["dimension_numbers"], op.fields["feature_group_count"]
    outputs, inputs, *positions = numbers.rhs_spec
    if isinstance(data, Constant) and isinstance(kernel, Parameter):
        data = Data(views.fresh(data.array.shape))
    if not isinstance(kernel, Parameter) or not isinstance(data, Data):
        if isinstance(data, Parameter) and not isinstance(kernel, Constant):
            reason = "it is convolved with no data, or as in gradients only"
            record.fail(_leaves(op.values), reason)
        return _together(op, mixed=True)[0]
    dims = [[Factor(size)] for size in op.shapes[0]]
    dims[numbers.out_spec[0]] = data.array.dims()[numbers.lhs_spec[0]]
    groups = groups if kernel.array.shape[inputs] > 1 and kernel.path else 1
    first, _ = _grouped(data.array, numbers.lhs_spec[1], groups)
    _are_apart(record, first, _shared(kernel.array, outputs, groups), matrices=True)
    pooled = dict.fromkeys(positions, frozenset([POOLED]))
    roles = {**_roles([inputs], [], [outputs]), **pooled}
    last = _apply(record, kernel, roles, data, groups)
    dims[numbers.out_spec[1]] = _outputs(record, kernel, last)[outputs]
    return Data(views.of_factors(dims), _after(last, data))


def _ragged_dot(op: Op) -> Value:
    """`ragged_dot_general`: rows of each group meet their own kernel."""
    data, kernel, *_ = op.values
    numbers = op.fields["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    if not isinstance(data, Data) or not isinstance(kernel, Parameter):
        return _together(op, mixed=True)[0]
    stacked = {*batch, *numbers.rhs_group_dimensions}
    free = set(range(kernel.array.rank)) - stacked - set(contracted)
    last = _apply(op.record, kernel, _roles(contracted, stacked, free), data)
    dims = [[Factor(size)] for size in op.shapes[0]]
    dims[-1] = _outputs(op.record, kernel, last)[max(free)]
    return Data(views.of_factors(dims), _after(last, data))


# ---- Moves and look-ups -------------------------------------------------------------


def _by(move_of: Callable[[Fields], views.Move]) -> Rule:
    """A rule that moves the entries of each operand."""
    return lambda op: [
        moved(value, move_of(op.fields), shape)
        for value, shape in zip(op.values, op.shapes, strict=False)
    ]


def _reshape(fields: Fields) -> views.Move:
    """`reshape`, which may permute its dimensions first."""
    order = fields["dimensions"]
    if order is None:
        return views.reshape
    return lambda array, shape: views.reshape(views.transpose(order)(array, ()), shape)


def _split(op: Op) -> list[Value]:
    """`split`: one value for each piece."""
    axis, start, found = op.fields["axis"], 0, []
    for shape in op.shapes:
        starts = [start if i == axis else 0 for i in range(len(shape))]
        found.append(moved(op.values[0], views.cut(starts), shape))
        start += shape[axis]
    return found


def _concatenate(op: Op) -> Value:
    """`concatenate`: parameters side by side stay known."""
    return _side_by_side(op, op.values, int(op.fields["dimension"]))


def _stack(op: Op) -> Value:
    """`stack`: the same along a new dimension."""
    axis, shape = int(op.fields["axis"]), op.shapes[0]
    thin = [1 if i == axis else size for i, size in enumerate(shape)]
    move = views.broadcast([i for i in range(len(shape)) if i != axis])
    return _side_by_side(op, [moved(value, move, thin) for value in op.values], axis)


def _side_by_side(op: Op, values: Sequence[Value], along: int) -> Value:
    shape = op.shapes[0]
    parameters, data = _of_type(Parameter, values), _of_type(Data, values)
    if data:
        op.record.say(_leaves(parameters), "lies next to data in one array")
        dims = _newest(data).array.dims()
        dims[along] = [Factor(shape[along])]
        return Data(views.of_factors(dims), _joined_trail(op.record, data))
    found = _computed(parameters, views.fresh(shape))
    if len(parameters) < len(values) or not all(p.path for p in parameters):
        return found if parameters else Constant(found.array)
    path = op.record.bundle(along, parameters)
    scaled = any(value.scaled for value in parameters)
    return dataclasses.replace(found, path=path, scaled=scaled)


def _unstack(op: Op) -> list[Value]:
    """`unstack`: one value for each entry along a dimension."""
    axis, found = int(op.fields["axis"]), []
    for i, shape in enumerate(op.shapes):
        starts = [i if j == axis else 0 for j in range(len(shape) + 1)]
        thin = [*shape[:axis], 1, *shape[axis:]]
        piece = moved(op.values[0], views.cut(starts), thin)
        found.append(moved(piece, views.without([axis]), shape))
    return found


def _dynamic_slice(op: Op) -> Value:
    """`dynamic_slice`; a start that the program does not say is unknown."""
    (value, *starts), shape = op.values, op.shapes[0]
    chosen = [i for i, size in enumerate(shape) if size != value.array.shape[i]]
    known = [s.literal if isinstance(s, Constant) else None for s in starts]
    begin = [known[i] or 0 if i in chosen else 0 for i in range(len(shape))]
    gone = [i for i in chosen if known[i] is None and shape[i] == 1]
    found = picked(moved(value, views.cut(begin), shape), value, gone)
    data = _of_type(Data, starts)
    if data and isinstance(value, Parameter) and sum(n > 1 for n in shape) < 2:
        return _embedded(op.record, value, data[0], found.array)
    return found


def _embedded(record: Record, value: Parameter, index: Data, array: Array) -> Data:
    """Rows that data looks up."""
    last = tuple(record.product(p, {}, kernel=False) for p in sorted(value.leaves))
    return Data(views.unlabelled(array), _after(last, index))


def _gather(op: Op) -> Value:
    """`gather`: rows of a table, or slices of a stack."""
    operand, indices = op.values
    numbers, sizes = op.fields["dimension_numbers"], op.fields["slice_sizes"]
    if isinstance(operand, Constant):
        return _together(op)[0]

    def move(array: Array, shape: Sequence[int]) -> Array:
        if numbers.operand_batching_dims:
            raise views.Unfollowed
        array = views.cut([0] * len(sizes))(array, sizes)
        array = views.without(numbers.collapsed_slice_dims)(array, sizes)
        return views.broadcast(numbers.offset_dims)(array, shape)

    found = moved(operand, move, op.shapes[0])
    if isinstance(found, Data):
        dims = [[f._replace(axis=0) for f in dim] for dim in found.array.dims()]
        return Data(views.of_factors(dims), found.trail)
    chosen = [i for i, size in enumerate(operand.array.shape) if size != sizes[i]]
    assert isinstance(operand, Parameter)
    assert isinstance(found, Parameter)
    if sum(size > 1 for size in sizes) > 1 and found.path:
        return picked(found, operand, chosen)
    array = views.fresh(op.shapes[0])
    if isinstance(indices, Data):
        return _embedded(op.record, operand, indices, array)
    op.record.say(operand.leaves, _TABLE)
    return operand.lost(array, looked_up=True)


def _reduce(op: Op) -> Value | list[Value]:
    """A sum or an extremum over some axes."""
    if len(op.values) > 1:
        return _together(op)
    value, axes = op.values[0], op.fields["axes"]
    found = moved(value, views.without(axes), op.shapes[0])
    if all(value.array.shape[axis] == 1 for axis in axes):
        return found
    if isinstance(found, Parameter):
        return found.lost(found.array, reduced=True)
    if isinstance(found, Data):
        return Data(found.array, found.trail._replace(reduced=True))
    return Constant(views.unlabelled(found.array))


# ---- Everything else ----------------------------------------------------------------


def _together(op: Op, mixed: bool = False) -> list[Value]:
    """Sorts, cumulative sums, scatters: the entries of all operands in one array."""
    parameters, data = _of_type(Parameter, op.values), _of_type(Data, op.values)
    known = [v.array for v in (data or op.values) if v.array.shape in op.shapes]
    arrays = [
        known[0] if data and known and known[0].shape == shape else views.fresh(shape)
        for shape in op.shapes
    ]
    if not data:
        if not parameters:
            return [Constant(array) for array in arrays]
        return [_computed(parameters, array) for array in arrays]
    leaves = _leaves(parameters)
    op.record.say(leaves, "is written into an array of data")
    trail = _joined_trail(op.record, data)
    matrices = trail.matrices.union(filter(op.record.is_matrix, leaves))
    mixed = trail.mixed or (mixed and len(data) > 1)
    trail = trail._replace(matrices=matrices, mixed=mixed)
    return [Data(array, trail) for array in arrays]


def _constants(op: Op) -> list[Value]:
    """What does not depend on entries, and random numbers."""
    return [Constant(views.fresh(shape)) for shape in op.shapes]


def _iota(op: Op) -> Value:
    """`iota`: distinct numbers along one dimension."""
    dims = [[Factor(size, None)] for size in op.shapes[0]]
    i = int(op.fields["dimension"])
    dims[i] = [Factor(op.shapes[0][i], labels=frozenset([views.DISTINCT]))]
    return Constant(views.of_factors(dims))


def _unknown(op: Op) -> list[Value]:
    """A primitive that is not in the table: it may do anything to its operands."""
    parameters, data = _of_type(Parameter, op.values), _of_type(Data, op.values)
    if not parameters:
        return _together(op)
    leaves = _leaves(parameters)
    reason = f"it enters {op.name!r}, a primitive that trace_layers does not know"
    if not data:
        op.record.fail(leaves, reason)
        return [_computed(parameters, views.fresh(shape)) for shape in op.shapes]
    trail = _joined_trail(op.record, data)
    last = _hidden(op.record, leaves, reason) or trail.last
    trail = _after(last, Data(views.fresh(()), trail))
    return [Data(views.fresh(shape), trail) for shape in op.shapes]


_NAMES: Mapping[str, Rule] = {
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt
    ceil clamp clz complex conj cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2
    expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p log2
    logistic lt lt_to max min mul mulhi ne neg nextafter not one_minus_square or polygamma population_count pow real
    regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh sqrt square sub tan tanh xor zeta
    """: _elementwise,
    """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
    reduce_xor
    """: _reduce,
    """
    all_gather all_gather_invariant all_to_all pad reduce_scatter reduce_window
    reduce_window_max reduce_window_min reduce_window_sum
    """: _by(lambda _: views.resize),
    # Each entry remains one entry: casts, copies, sharding, identities.
    """
    bitcast_convert_type convert_element_type copy copy_p device_put layout_constraint
    mesh_cast name optimization_barrier pbroadcast pcast pmax pmin ppermute psum psum2
    psum_invariant pvary reduce_precision reshard sharding_constraint stop_gradient
    """: _by(lambda _: views.same),
    """
    approx_top_k cumlogsumexp cummax cummin cumprod cumsum dynamic_update_slice scatter
    scatter-add scatter-max scatter-min scatter-mul scatter-sub scatter_add sort top_k
    """: _together,
    """
    axis_index empty empty2 random_bits random_clone random_fold_in random_gamma
    random_seed random_split random_unwrap random_wrap rng_bit_generator rng_uniform
    threefry2x32 zeros_like
    """: _constants,
}

RULES: Mapping[str, Rule] = {
    **CONTROL,
    **{name: rule for names, rule in _NAMES.items() for name in names.split()},
    "broadcast_in_dim": _by(lambda p: views.broadcast(p["broadcast_dimensions"])),
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "iota": _iota,
    "ragged_dot_general": _ragged_dot,
    "reshape": _by(_reshape),
    "rev": _by(lambda p: views.flip(p["dimensions"])),
    "slice": _by(lambda p: views.cut(p["start_indices"], p["strides"])),
    "split": _split,
    "stack": _stack,
    "unstack": _unstack,
    "squeeze": _by(lambda p: views.without(p["dimensions"])),
    "tile": _by(lambda _: views.tile),
    "transpose": _by(lambda p: views.transpose(p["permutation"])),
    "unknown": _unknown,
}
