"""What each primitive does to the values of a forward pass: one table, by name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tb_optax.trace import record as records
from tb_optax.trace import views
from tb_optax.trace.record import (
    CONSTANT,
    DATA,
    PARAMETER,
    Record,
    Use,
    Value,
    joined,
    newest,
    union,
)
from tb_optax.trace.views import Array, Factor, Label
from tb_optax.trace.walk import CONTROL, Fields, Op, Rule, moved, picked

# Elementwise functions by which statistics are taken out of data, and those by which a
# bias or a gain acts.
_NORMALIZING = frozenset({"sub", "mul", "div"})
_ADDING = frozenset({"add", "add_any"})
_AFFINE = _NORMALIZING | _ADDING
# What is added to logits is not multiplied with what their softmax is.
_SOFTMAX = frozenset({"exp", "exp2", "logistic"})
_TABLE = "look-up table: constants pick its rows"

Shape = tuple[int, ...]
Dims = Sequence[Sequence[Factor]]


def _of_kind(kind: int, values: Iterable[Value]) -> list[Value]:
    return [value for value in values if value.kind == kind]


def _varying(*values: Value) -> frozenset[int]:
    return union(value.array.varying() for value in values)


# ---- Elementwise functions: activations, biases, norms, kernels that are computed ----


def _elementwise(op: Op) -> list[Value]:
    return [_of_entries(op.record, op.name, op.values, shape) for shape in op.shapes]


def _of_entries(record: Record, name: str, values: Sequence[Value], shape) -> Value:
    """Any function of the entries of some values."""
    constants, parameters, data = (_of_kind(kind, values) for kind in range(3))
    if not parameters and not data:
        return Value(_of_constants(name, values, shape))
    if not data:
        # Constants are data where they vary and the parameters do not.
        if _varying(*constants) <= _varying(*parameters):
            return _of_parameters(record, name, parameters, constants, shape)
        data = [value.but(kind=DATA) for value in constants if _varying(value)]
    kernels = [v for v in parameters if _varying(v) and _rank(record, v) > 1]
    if len(kernels) == 1 and not _varying(*data):
        # A number that is computed from data scales a kernel, as in spectral norm.
        scaled = _of_parameters(record, name, parameters, constants, shape)
        return scaled.but(through=scaled.through | joined(data, scaled.array).through)
    found = _of_data(record, name, data, constants, shape)
    for value in parameters:
        found = _meet(record, name, value, data, found)
    array = _merged([found, *parameters, *constants], shape)
    return found.but(array=array)


def _rank(record: Record, value: Value) -> int:
    """The most axes that a leaf of a parameter has."""
    return max(len(record.shapes[path]) for path in record.own(value))


def _merged(values: Iterable[Value], shape: Shape, normed: Any = ()) -> Array:
    """An elementwise result: each dimension has what any operand knows of it."""
    arrays = [v.array for v in values if v.array.rank == len(shape) and _varying(v)]
    if not arrays:
        return views.of_factors([[Factor(size, None)] for size in shape])
    if len(arrays) == 1 and not normed:
        array = arrays[0]
        return array if array.shape == shape else views.expand(array, shape)
    dims = zip(*(array.dims() for array in arrays), strict=True)
    normal, marked = frozenset[Label](), frozenset([views.NORMED])
    marks = [marked if i in normed else normal for i in range(len(shape))]
    return views.of_factors([_one_of(marks[i], *own) for i, own in enumerate(dims)])


def _one_of(labels: views.Labels, *dims: Sequence[Factor]) -> list[Factor]:
    """One dimension, as several arrays have it, with more labels."""
    moving = [dim for dim in dims if any(f.varies for f in dim)] or dims
    finest = max(moving, key=lambda dim: (any(f.labels for f in dim), len(dim)))
    alike = [dim for dim in moving if [f.size for f in dim] == [f.size for f in finest]]
    found = []
    for factors in zip(*alike, strict=True):
        axis = next((f.axis for f in factors if f.axis is not None), None)
        own = labels.union(*(factor.labels for factor in factors))
        found.append(Factor(factors[0].size, axis, True, own))
    return found


def _of_constants(name: str, values: Sequence[Value], shape: Shape) -> Array:
    """Constants combined; comparing something with distinct numbers is one-hot."""
    dims = views.unlabelled(_merged(values, shape)).dims()
    kept = {"eq": views.ONE_HOT, "add": views.DISTINCT, "sub": views.DISTINCT}.get(name)
    if kept is None:
        return views.of_factors(dims)
    full = [value for value in values if value.array.rank == len(shape)]
    for value in full:
        own = value.array.dims()
        for i in _varying(value) - _varying(*(v for v in full if v is not value)):
            if kept and len(dims[i]) == 1 and views.DISTINCT in own[i][0].labels:
                dims[i] = [Factor(shape[i], labels=frozenset([kept]))]
    return views.of_factors(dims)


def _of_parameters(record, name, parameters, constants, shape) -> Value:
    """Parameters and constants combined: the one that covers all axes is the kernel."""
    found = joined(parameters, _merged(parameters, shape))
    covering = [v for v in parameters if v.path and _varying(found) <= _varying(v)]
    mains = list({str((v.path, v.array.layout())): v for v in covering[::-1]}.values())
    if len(mains) > 1:
        mains = [value for value in mains if not record.is_left_out(value.path)]
        mains = [value for value in mains if record.is_kernel(value.path)] or mains
    first = mains[-1].path if mains else None
    if any(value.path != first for value in mains):
        record.fail(record.own(mains[0]), f"{records.SECOND}, {first!r}: no kernel?")
    if len(mains) == 1:
        array = mains[0].array
        if array.shape != shape:
            same = array.rank == len(shape)
            array = views.expand(array, shape) if same else found.array
        found = found.but(array=array, path=first, unknown=mains[0].unknown)
    scaled = name in _AFFINE and bool(_varying(*constants))
    normalized = name in _NORMALIZING and any(value.reduced for value in parameters)
    return found.but(
        scaled=found.scaled or scaled, normalized=found.normalized or normalized
    )


def _main(record: Record, data: Sequence[Value]) -> Value:
    """The value of which the newest products are those of several.

    Statistics and what is added to all positions alike, as an embedding of time is,
    stand back.
    """
    rank = max(value.rank for value in data)

    def mainness(value: Value) -> tuple[Any, ...]:
        number = max(value.last, default=-1)
        real, size = (
            number >= 0 and record.products[number].kernel,
            len(_varying(value)),
        )
        return number >= 0, not value.reduced, size, real, value.rank or rank, number

    return max(data, key=mainness)


def _of_data(record, name, data: Sequence[Value], constants, shape) -> Value:
    """Data combined, and what statistics were taken out of it."""
    main, full = _main(record, data), [value for value in data if not value.reduced]
    found = joined(data, data[0].array).but(last=main.last)
    normed = frozenset()
    if name in _ADDING and len(full) > 1:
        # The sum of two branches feeds the next layer, not one branch's norm.
        least = len(_varying(main))
        alike = any(len(_varying(v)) >= least for v in full if v is not main)
        pending = frozenset() if alike else main.pending
        found = found.but(normalized=main.normalized, mixed=main.mixed, pending=pending)
    if name in _NORMALIZING and full:
        statistics = [value for value in data if value.reduced]
        taken_out = bool(statistics or _varying(*constants))
        taken_out |= bool(found.last) and not all(value.last for value in full)
        found = found.but(normalized=found.normalized or taken_out)
        normed = union(_varying(*full) - _varying(value) for value in statistics)
    chosen = [n for n in found.last if None in (record.products[n].uses or {}).values()]
    for number in [n for v in data for n in v.last if chosen and name in _ADDING]:
        # A bias of a slice that data has chosen is looked up as the slice is.
        if not record.products[number].kernel:
            record.follow([record.products[number].path], chosen, norm=False)
    if name in _SOFTMAX:
        found = found.but(leaves=frozenset())
    if found.last and found.coefficients:
        record.follow(found.coefficients, found.last, norm=True)
        pending = found.pending | found.coefficients
        found = found.but(coefficients=frozenset(), pending=pending)
    return found.but(array=_merged(data, shape, normed))


def _meet(record: Record, name: str, value: Value, data, old: Value) -> Value:
    """A parameter meets data: as a bias, a gain, a norm or a table of positions."""
    if value.reduced and not _varying(value):
        return old  # A penalty, which is added to a loss.
    whole = len(_varying(value)) > 1 and not value.looked_up
    matrices = frozenset(filter(record.is_matrix, record.own(value) if whole else ()))
    kernels = list(filter(record.is_kernel, matrices))
    by_hand = name == "mul" and matrices and _is_outer(value, data)
    if kernels and (by_hand or not value.path):
        return Value(old.array, DATA, last=_hidden(record, kernels, ""))
    if by_hand:
        record.fail(matrices, "it multiplies data: a matrix product written with `*`?")
    norm, found = old.normalized or old.reduced or value.scaled, old
    if not old.last and not value.looked_up and _is_coefficient(record, value, data):
        found = old.but(coefficients=old.coefficients | value.leaves)
        norm = False
    follows = name in _AFFINE and not value.looked_up and (norm or not old.mixed)
    follows = follows and _follow(record, value, old, norm)
    if not follows:
        record.say(value.leaves, "acts on no outputs of a layer")
        found = found.but(leaves=found.leaves | matrices)
    # A table that is added to normalized data is no part of the norm.
    of_norm = norm and (follows or not whole or _fits(_varying(value), old, -1, norm))
    more = value.leaves if of_norm and not value.looked_up else frozenset()
    return found.but(pending=found.pending | more)


def _is_coefficient(record: Record, value: Value, data: Sequence[Value]) -> bool:
    """Whether data has no axes but those of the parameter, as running statistics."""
    rank = max(len(record.shapes[path]) for path in value.leaves)
    ranks = [len(v.array.source.shape) for v in data if not v.reduced]
    return len(ranks) == len(data) and max(ranks) <= rank


def _is_outer(value: Value, data: Sequence[Value]) -> bool:
    """Whether data varies along some axis of a parameter and not along another."""
    along, rank = _varying(value), value.array.rank
    own = [along & _varying(v) for v in data if not v.reduced and v.array.rank == rank]
    return any(some and some != along for some in own)


def _follow(record: Record, value: Value, data: Value, norm: bool) -> bool:
    """Write a bias, a gain or a norm down; False for what is none."""
    _, parts = record.bundles.get(value.path, (0, []))
    if parts and len(parts) == len(data.last):
        for (_, part), number in zip(parts, data.last, strict=True):
            record.follow(part.leaves, [number], norm)
        return True
    along, numbers = _varying(value), list(data.last)
    if not norm or len(along) > 1:
        numbers = [number for number in numbers if _fits(along, data, number, norm)]
    record.follow(value.leaves, numbers, norm)
    return bool(numbers)


def _fits(along: Iterable[int], data: Value, number: int, norm: bool) -> bool:
    """Whether dimensions of data are outputs of a product, or normalized over."""
    starts, dims, varying = data.array.start(), data.array.dims(), _varying(data)

    def is_output(factor: Factor) -> bool:
        low = starts[factor.axis or 0]
        spans = [label.span for label in factor.labels if label.number == number]
        inside = [s is None or s[0] - factor.size < low < s[1] for s in spans]
        return any(inside) or (norm and views.NORMED in factor.labels)

    outputs = {i for i in varying if all(is_output(f) for f in dims[i] if f.varies)}
    statistic = norm and data.reduced
    return all(i in outputs or (statistic and i not in varying) for i in along)


# ---- Products -----------------------------------------------------------------------


class _Side(NamedTuple):
    """An operand of a matrix product."""

    value: Value
    contracted: list[int]
    batch: list[int]

    def free(self) -> list[int]:
        """Dimensions that are in the result and not in the other operand."""
        taken = {*self.contracted, *self.batch}
        return [i for i in range(self.value.array.rank) if i not in taken]

    def in_result(self, array: Array, shape: Sequence[int]) -> Array:
        """The dimensions in the order of a result without those of the other side."""
        array = views.transpose([*self.batch, *self.free()])(array, shape)
        return views.broadcast(range(array.rank))(array, shape)


def _roles(contracted: Any, batch: Any, free: Any) -> dict[int, Use]:
    """Roles of the dimensions of a kernel."""
    groups = {
        records.REDUCTION: contracted,
        records.STACKED: batch,
        records.OUTPUT: free,
    }
    return {int(i): frozenset([role]) for role, dims in groups.items() for i in dims}


def _dot_general(op: Op) -> Value:
    """`dot_general`: a matrix product with batches."""
    record, values, shape = op.record, op.values, op.shapes[0]
    pairs = zip(*op.fields["dimension_numbers"], strict=True)
    dims = [(list(map(int, own)), list(map(int, batch))) for own, batch in pairs]
    sides = [_Side(v, *own) for v, own in zip(values, dims, strict=True)]
    parameters = [i for i in (0, 1) if values[i].kind == PARAMETER]
    if not parameters:
        return _without_kernel(record, sides)
    i = parameters[0] if len(parameters) == 1 else _kernel_of(record, values)
    if i is None:
        return _of_two(record, sides)
    kernel, data = values[i], values[1 - i]
    if data.kind == PARAMETER:
        data = _in_place_of_data(record, data)
    if data.kind == CONSTANT:
        if kernel.looked_up or _picks_rows(sides[1 - i]):
            record.say(filter(record.is_matrix, kernel.leaves), _TABLE)
            return kernel.lost(views.fresh(shape), looked_up=True)
        # An initial state is one for each row, though all start alike.
        data = Value(views.fresh(data.array.shape), DATA)
    sides[1 - i] = sides[1 - i]._replace(value=data)
    if not sides[i].contracted and not sides[i].free():
        pair = [moved(side.value, side.in_result, shape) for side in sides]
        return _of_entries(record, "mul", pair, shape)
    return _with_kernel(record, sides, i)


def _with_kernel(record: Record, sides: list[_Side], i: int) -> Value:
    """Data by a parameter, which is on side i."""
    side, kernel, data = sides[i], sides[i].value, sides[1 - i].value
    if kernel.looked_up:
        record.fail(kernel.leaves, "constants pick its rows, which multiply data")
        return data.but(array=_result(sides), mixed=True)
    matrices = bool(side.contracted and side.free())
    dims, own = data.array.dims(), kernel.array.dims()
    for mine, its in zip(side.batch, sides[1 - i].batch, strict=True):
        axes = [f.axis for f in own[mine] if f.varies and kernel.path]
        _are_apart(record, dims[its], axes, matrices)
    roles = _roles(side.contracted, side.batch, side.free())
    last = _apply(record, kernel, roles, data)
    known = [_outputs(record, kernel, last), dims]
    return _after(last, data, _result(sides, known if i == 0 else known[::-1]))


def _after(last: tuple[int, ...], data: Value, array: Array) -> Value:
    """The result of a product."""
    through = data.through | sum(1 << number for number in last)
    return Value(array, DATA, last=last, through=through, rank=data.rank)


def _result(sides: Sequence[_Side], dims: Sequence[Dims] = ()) -> Array:
    """Dimensions of a matrix product: batches, then what is free on each side."""
    left, right = sides
    one, two = dims or [side.value.array.dims() for side in sides]
    pairs = zip(left.batch, right.batch, strict=True)
    batch = [_one_of(frozenset(), one[i], two[j]) for i, j in pairs]
    free = [one[i] for i in left.free()] + [two[j] for j in right.free()]
    return views.of_factors([*batch, *free])


def _outputs(record: Record, kernel: Value, numbers: Sequence[int]) -> Dims:
    """Dimensions of a kernel as they are in the outputs of its products."""
    dimension, parts = record.bundles.get(kernel.path, (0, []))
    starts = kernel.array.start()

    def output(factor: Factor) -> Factor:
        if factor.axis is None or not kernel.path:
            return Factor(factor.size, factor.axis)
        labels = [Label(n, factor.axis, factor.whole) for n in numbers]
        if factor.axis == dimension and len(parts) == len(numbers):
            low = [start - starts[dimension] for start, _ in parts]
            spans = [
                (start, start + part.array.shape[dimension])
                for start, (_, part) in zip(low, parts, strict=True)
            ]
            pairs = zip(numbers, spans, strict=True)
            labels = [Label(number, span=span) for number, span in pairs]
        return Factor(factor.size, labels=frozenset(labels))

    return [[output(factor) for factor in dim] for dim in kernel.array.dims()]


def _are_apart(record: Record, dim: Sequence[Factor], axes, matrices: bool) -> None:
    """Data meets a batch axis of a kernel: outputs along it may be apart."""
    others = frozenset(axes)
    for label in [label for f in dim for label in f.labels if others and label.whole]:
        event = records.Apart(label.axis, others, matrices)
        record.apart.setdefault(label.number, []).append(event)


def _apply(
    record: Record, kernel: Value, roles: dict[int, Use], data: Value, groups: int = 1
) -> tuple[int, ...]:
    """Write a product of data with a parameter down; return its numbers."""
    if not kernel.path:
        return _hidden(record, kernel.leaves, records.COMPUTED)
    more = {"learned": data.learned, "data": data.rank > 0}
    found = _uses(record, kernel, roles, groups)
    numbers = tuple(record.product(path, uses, **more) for path, uses in found)
    paths = {path for path, _ in found}
    record.follow(kernel.leaves - paths, numbers, norm=False)
    for number, made in record.products.items() if kernel.through else ():
        if kernel.through >> number & 1 and made.path in paths:
            record.auxiliary.add(number)
    record.events += [records.Feed(p, numbers[0]) for p in sorted(data.pending)]
    return numbers


def _uses(
    record: Record, kernel: Value, of_dims: Mapping[int, Use], groups: int = 1
) -> list[tuple[str, dict[int, Use]]]:
    """What becomes of the axes of a leaf, from the uses of the dimensions of its view.

    Of what was put side by side, this is asked of each part by itself.
    """
    starts, dims, uses = kernel.array.start(), kernel.array.dims(), dict[int, Use]()
    for position, use in of_dims.items():
        shared = _shared(kernel.array, position, groups)
        for factor in dims[position]:
            axis, alone = factor.axis, factor.whole and len(dims[position]) == 1
            # One slice of a longer axis is a pick, no role.
            if axis is None or (factor.size == 1 and not factor.whole):
                continue
            if not isinstance(use, frozenset):
                uses[axis] = use if alone else None
            elif isinstance(before := uses.get(axis, frozenset()), frozenset):
                own = frozenset([records.STACKED]) if axis in shared else use
                uses[axis] = before | own
    for axis, size in enumerate(kernel.array.source.shape):
        if size > 1 and axis not in uses:
            uses[axis] = None if axis in kernel.unknown else starts[axis]
    if kernel.path not in record.bundles:
        return [(str(kernel.path), uses)]
    dimension, parts = record.bundles[kernel.path]
    found = []
    for start, part in parts:
        own, use = dict(uses), uses.get(dimension, frozenset())
        if isinstance(use, int):
            own[dimension] = use - start
        if not isinstance(use, int) or 0 <= use - start < part.array.shape[dimension]:
            found += _uses(record, part, own)
    return found


def _shared(array: Array, position: int, groups: int) -> frozenset[int]:
    """Axes of a dimension along which there is one slice for each of some groups."""
    first, rest = _grouped(array, position, groups)
    axes = frozenset(factor.axis for factor in first if factor.axis is not None)
    return axes - {factor.axis for factor in rest}


def _grouped(array: Array, position: int, groups: int) -> Dims:
    """The first factors of a dimension, of this size together, and the others."""
    shape, size = list(array.shape), array.shape[position]
    shape[position : position + 1] = [groups, size // groups]
    if not 1 < groups < size:
        return [], []
    try:
        return views.reshape(array, shape).dims()[position : position + 2]
    except views.Unfollowed:
        return [], []


def _hidden(record: Record, leaves: Iterable[str], reason: str) -> tuple[int, ...]:
    """Write a product down in which the axes of its parameters are out of sight."""
    kernels = sorted(filter(record.is_kernel, leaves))
    record.fail(set(leaves) - set(kernels), reason)
    return tuple(record.product(path, None) for path in kernels)


def _without_kernel(record: Record, sides: Sequence[_Side]) -> Value:
    """Data by data, as in attention, or by constants."""
    array = _result(sides)
    data = [side for side in sides if side.value.kind == DATA]
    if not data:
        return Value(views.unlabelled(array))
    found = joined((side.value for side in data), array)
    if len(data) == 1:
        dims = found.but(array=data[0].value.array).array.dims()
        factors = [factor for i in data[0].contracted for factor in dims[i]]
        record.resampled |= {label.number for f in factors for label in f.labels}
        return found
    last = _hidden(record, found.leaves, records.BETWEEN_DATA)
    return _after(last or found.last, found, array).but(mixed=not last)


def _kernel_of(record: Record, values: Sequence[Value]) -> int | None:
    """Which of two parameters is a kernel, if the other stands in the place of data."""

    def stands_for_data(value: Value) -> bool:
        matrices = list(filter(record.is_matrix, record.own(value)))
        left_out = bool(matrices) and all(map(record.is_left_out, matrices))
        return len(_varying(value)) < 2 or value.looked_up or left_out

    said = [any(map(record.is_kernel, record.own(value))) for value in values]
    if any(said):
        return None if all(said) else said.index(True)
    able = [value.path and not stands_for_data(value) for value in values]
    fed = [i for i in (0, 1) if able[i] and stands_for_data(values[1 - i])]
    return fed[0] if len(fed) == 1 else None


def _in_place_of_data(record: Record, value: Value) -> Value:
    """A learned query, or another activation that is computed from parameters."""
    record.say(value.leaves, "enters a product in the place of data")
    vectors = [path for path in value.leaves if not record.is_matrix(path)]
    pending = frozenset(vectors if value.normalized else ()) - record.own(value)
    return Value(views.unlabelled(value.array), DATA, pending=pending, learned=True)


def _of_two(record: Record, sides: Sequence[_Side]) -> Value:
    """A product of parameters alone: of factors of a kernel, or of learned queries."""
    left, right = (side.value for side in sides)
    found = joined([left, right], _result(sides))
    if any(map(record.is_kernel, found.leaves)):
        last = _hidden(record, found.leaves, records.COMPUTED)
        return _after(last, Value(found.array), found.array)
    kernel = right if sides[1].contracted == [0] or not left.path else left
    if kernel.path and left.leaves != right.leaves:
        record.likely |= set(filter(record.is_matrix, record.own(kernel)))
    for value, other in ((left, right), (right, left)):
        names = ", ".join(map(repr, sorted(other.leaves)))
        reason = (
            f"{records.PRODUCT} {names} holds no data: learned queries and their "
            f"kernel, or factors of one kernel?"
        )
        record.fail(value.leaves, reason)
    return found


def _picks_rows(side: _Side) -> bool:
    """Whether a constant picks one row of what it is multiplied with: one-hot.

    A permutation, as the features of nodes that have no others, is data.
    """
    array = side.value.array
    long = {i: dim for i, dim in enumerate(array.dims()) if array.shape[i] > 1}
    hot = {i for i, d in long.items() if len(d) == 1 and views.ONE_HOT in d[0].labels}
    contracted = long.keys() & set(side.contracted)
    return len(contracted) == 1 and contracted <= hot and len(hot) < max(len(long), 2)


def _convolution(op: Op) -> Value:
    """`conv_general_dilated`, of any layout and any number of groups."""
    record, (data, kernel) = op.record, op.values
    numbers, groups = op.fields["dimension_numbers"], op.fields["feature_group_count"]
    outputs, inputs, *positions = numbers.rhs_spec
    if data.kind == CONSTANT and kernel.kind == PARAMETER:
        data = Value(views.fresh(data.array.shape), DATA)
    if (data.kind, kernel.kind) != (DATA, PARAMETER):
        if data.kind == PARAMETER and kernel.kind != CONSTANT:
            reason = "it is convolved with no data, or as in gradients only"
            record.fail(data.leaves | kernel.leaves, reason)
        return _together(op, mixed=True)[0]
    dims: list[Any] = [[Factor(size)] for size in op.shapes[0]]
    dims[numbers.out_spec[0]] = data.array.dims()[numbers.lhs_spec[0]]
    groups = groups if kernel.array.shape[inputs] > 1 and kernel.path else 1
    first, _ = _grouped(data.array, numbers.lhs_spec[1], groups)
    _are_apart(record, first, _shared(kernel.array, outputs, groups), matrices=True)
    pooled = dict.fromkeys(positions, frozenset([records.POOLED]))
    roles = {**_roles([inputs], [], [outputs]), **pooled}
    last = _apply(record, kernel, roles, data, groups)
    dims[numbers.out_spec[1]] = _outputs(record, kernel, last)[outputs]
    return _after(last, data, views.of_factors(dims))


def _ragged_dot(op: Op) -> Value:
    """`ragged_dot_general`: rows of each group meet their own kernel."""
    data, kernel, *_ = op.values
    numbers = op.fields["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    if (data.kind, kernel.kind) != (DATA, PARAMETER):
        return _together(op, mixed=True)[0]
    stacked = {*batch, *numbers.rhs_group_dimensions}
    free = set(range(kernel.array.rank)) - stacked - set(contracted)
    last = _apply(op.record, kernel, _roles(contracted, stacked, free), data)
    dims: list[Any] = [[Factor(size)] for size in op.shapes[0]]
    dims[-1] = _outputs(op.record, kernel, last)[max(free)]
    return _after(last, data, views.of_factors(dims))


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


def _unstack(op: Op) -> list[Value]:
    """`unstack`: one value for each entry along a dimension."""
    axis, value = int(op.fields["axis"]), op.values[0]
    order = [axis, *(i for i in range(value.array.rank) if i != axis)]
    value = moved(value, views.transpose(order), ())
    return [moved(value, views.take(i), shape) for i, shape in enumerate(op.shapes)]


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
    found = joined(values, views.fresh(op.shapes[0]))
    if found.kind == DATA:
        leaves = union(value.leaves for value in _of_kind(PARAMETER, values))
        op.record.say(leaves, "lies next to data in one array")
        data = _of_kind(DATA, values)
        dims = newest(data).array.dims()
        dims[along] = [Factor(op.shapes[0][along])]
        last = _main(op.record, data).last
        return found.but(array=views.of_factors(dims), last=last)
    if all(value.path for value in values):
        return found.but(path=op.record.bundle(along, values))
    return found


def _dynamic_slice(op: Op) -> Value:
    """`dynamic_slice`; a start that the program does not say is unknown."""
    (value, *starts), shape = op.values, op.shapes[0]
    chosen = [i for i, size in enumerate(shape) if size != value.array.shape[i]]
    begin = [starts[i].literal or 0 if i in chosen else 0 for i in range(len(shape))]
    gone = [i for i in chosen if starts[i].literal is None and shape[i] == 1]
    found = picked(moved(value, views.cut(begin), shape), value, gone)
    data = _of_kind(DATA, starts)
    if data and value.kind == PARAMETER and sum(size > 1 for size in shape) < 2:
        return _embedded(op.record, value, data[0], found.array)
    return found


def _embedded(record: Record, value: Value, index: Value, array: Array) -> Value:
    """Rows that data looks up."""
    last = tuple(record.product(p, {}, kernel=False) for p in sorted(value.leaves))
    return _after(last, index, views.unlabelled(array))


def _gather(op: Op) -> Value:
    """`gather`: rows of a table, or slices of a stack."""
    operand, indices = op.values
    numbers, sizes = op.fields["dimension_numbers"], op.fields["slice_sizes"]
    if operand.kind == CONSTANT:
        return _together(op)[0]

    def move(array: Array, shape: Sequence[int]) -> Array:
        if numbers.operand_batching_dims:
            raise views.Unfollowed
        array = views.cut([0] * len(sizes))(array, sizes)
        array = views.without(numbers.collapsed_slice_dims)(array, sizes)
        return views.broadcast(numbers.offset_dims)(array, shape)

    found = moved(operand, move, op.shapes[0])
    if found.kind == DATA:
        dims = [[f._replace(axis=0) for f in dim] for dim in found.array.dims()]
        return found.but(array=views.of_factors(dims))
    chosen = [i for i, size in enumerate(operand.array.shape) if size != sizes[i]]
    if sum(size > 1 for size in sizes) > 1 and found.path:
        return picked(found, operand, chosen)
    array = views.fresh(op.shapes[0])
    if indices.kind == DATA:
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
    if found.kind == CONSTANT:
        return Value(views.unlabelled(found.array))
    return found.lost(found.array, reduced=True)


# ---- Everything else ----------------------------------------------------------------


def _together(op: Op, mixed: bool = False) -> list[Value]:
    """Sorts, cumulative sums, scatters: the entries of all operands in one array."""
    found = joined(op.values, views.fresh(()))
    data = _of_kind(DATA, op.values)
    if data:
        leaves = union(value.leaves for value in _of_kind(PARAMETER, op.values))
        op.record.say(leaves, "is written into an array of data")
        mixed = found.mixed or (mixed and len(data) > 1)
        last = _main(op.record, data).last
        found = found.but(leaves=found.leaves | leaves, mixed=mixed, last=last)
    known = {value.array.shape: value.array for value in data[:1]}
    arrays = [known.get(shape) or views.fresh(shape) for shape in op.shapes]
    return [found.but(array=array) for array in arrays]


def _constants(op: Op) -> list[Value]:
    """What does not depend on entries, and random numbers."""
    return [Value(views.fresh(shape)) for shape in op.shapes]


def _iota(op: Op) -> Value:
    """`iota`: distinct numbers along one dimension."""
    dims = [[Factor(size, None)] for size in op.shapes[0]]
    i = int(op.fields["dimension"])
    dims[i] = [Factor(op.shapes[0][i], labels=frozenset([views.DISTINCT]))]
    return Value(views.of_factors(dims))


def _unknown(op: Op) -> list[Value]:
    """A primitive that is not in the table: it may do anything to its operands."""
    leaves = union(value.leaves for value in _of_kind(PARAMETER, op.values))
    if not leaves:
        return _together(op)
    found = joined(op.values, views.fresh(()))
    reason = f"it enters {op.name!r}, a primitive that trace_layers does not know"
    if found.kind == DATA:
        last = _hidden(op.record, leaves, reason) or found.last
        found = _after(last, found, found.array)
    else:
        op.record.fail(leaves, reason)
    return [found.but(array=views.fresh(shape)) for shape in op.shapes]


_NAMES: Mapping[str, Rule] = {
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj cos cosh digamma div eq eq_to erf erf_inv erfc exp
    exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le
    le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi ne neg nextafter not
    one_minus_square or polygamma population_count pow real regularized_incomplete_beta
    rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign
    sin sinh sqrt square sub tan tanh xor zeta
    """: _elementwise,
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod": _reduce,
    "reduce_sum reduce_xor": _reduce,
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
    "squeeze": _by(lambda p: views.without(p["dimensions"])),
    "stack": _stack,
    "tile": _by(lambda _: views.tile),
    "transpose": _by(lambda p: views.transpose(p["permutation"])),
    "unknown": _unknown,
    "unstack": _unstack,
}
