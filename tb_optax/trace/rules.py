"""What each primitive does to the values of a forward pass: one table, by name."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from tb_optax.trace import record as does
from tb_optax.trace import views
from tb_optax.trace.record import (
    CONSTANT,
    DATA,
    OUTPUT,
    PARAMETER,
    POOLED,
    REDUCTION,
    STACKED,
    Record,
    Use,
    Value,
    changed,
    joined,
    newest,
    union,
)
from tb_optax.trace.views import Array, Dims, Factor, Label
from tb_optax.trace.walk import CONTROL, Op, Rule, moved, picked

# Elementwise functions by which statistics are taken out of data, and those by which a
# bias or a gain acts.
_NORMALIZING = frozenset({"sub", "mul", "div"})
_ADDING = frozenset({"add", "add_any"})
_AFFINE = _NORMALIZING | _ADDING
# What is added to logits is not multiplied with what their softmax is.
_SOFTMAX = frozenset({"exp", "exp2", "logistic"})
_BY_HAND = "it multiplies data: a matrix product written with `*`?"
_TABLE = "look-up table: constants pick its rows"


def _varying(values: Iterable[Value]) -> frozenset[int]:
    """Return the dimensions along which entries of some value may differ."""
    return union(value.array.varying() for value in values)


# ---- Elementwise functions: activations, biases, norms, kernels that are computed ----


def _elementwise(op: Op) -> Value:
    """Apply any function to the entries of some values."""
    constants, parameters, data = (op.of_kind(kind) for kind in range(3))
    if not parameters and not data:
        return Value(_of_constants(op))
    cases = {(v.path, v.array) for v in op.values[1:]}
    if op.name == "select_n" and len(cases) == 1 and op.values[1].path is not None:
        # `cond` under `vmap` selects what it closes over.
        return op.values[1].but(leaves=union(v.leaves for v in op.values[1:]))
    rows = [v for v in parameters if v.chosen and len(v.array.axes()) < 2]
    if rows and data:
        values = [_rows(op.record, v) if v in rows else v for v in op.values]
        return _elementwise(op._replace(values=values))
    if not data:
        # Constants are data where they vary and the parameters do not.
        beyond = _varying(constants) - _varying(parameters)
        if not beyond or op.name == "select_n":
            return _of_parameters(op)
        data = [v.but(kind=DATA) for v in constants if v.array.varying()]
    kernels = [
        value
        for value in parameters
        if value.array.varying()
        and any(len(op.record.shapes[path]) > 1 for path in op.record.own(value))
    ]
    if len(kernels) == 1 and not _varying(data):
        # A number that is computed from data scales a kernel, as in spectral norm.
        scaled = _of_parameters(op)
        return scaled.but(through=scaled.through | joined(data, scaled.array).through)
    found = _of_data(op, data)
    for value in parameters:
        found = _meet(op, value, data, found)
    # Dimensions of size 1 are repeated.
    shape, places = op.shapes[0], range(len(op.shapes[0]))
    kernels = [moved(k, shape, views.arrange, places) for k in found.kernels]
    array = _merged([found, *parameters, *constants], shape)
    array = array.marked(views.ONE_HOT, found.array.along(views.ONE_HOT))
    return found.but(array=array, kernels=tuple(kernels))


def _merged(
    values: Iterable[Value], shape: Sequence[int], normed: Iterable[int] = ()
) -> Array:
    """Give each dimension of an elementwise result what any operand knows of it."""
    arrays = [value.array for value in values if value.array.varying()]
    if not arrays:
        return views.of_factors([[Factor(size, None)] for size in shape])
    if len(arrays) == 1 and not normed:
        return arrays[0]
    dims = [_one_of(own) for own in zip(*(a.dims for a in arrays), strict=True)]
    for i in normed:
        dims[i] = [f._replace(of_axis=f.labels | {views.NORMED}) for f in dims[i]]
    return views.of_factors(dims)


def _one_of(dims: Dims) -> views.Dimension:
    """Combine one dimension of several arrays."""
    moving = [dim for dim in dims if any(f.varies for f in dim)] or dims
    if len(moving) == 1:
        return moving[0]
    finest = max(moving, key=lambda dim: (any(f.labels for f in dim), len(dim)))
    alike = [dim for dim in moving if [f.size for f in dim] == [f.size for f in finest]]
    found = []
    for factors in zip(*alike, strict=True):
        axis = next((f.axis for f in factors if f.axis is not None), None)
        found.append(Factor(factors[0].size, axis, union(f.labels for f in factors)))
    return found


def _of_constants(op: Op) -> Array:
    """Combine constants.

    Comparing something with distinct numbers is one-hot. Adding two sets of distinct
    numbers compares their places: what is computed from that are weights of places.
    """
    found = views.unlabelled(_merged(op.values, op.shapes[0]))
    arrays = [value.array for value in op.values if value.array.varying()]
    along = Counter(i for array in arrays for i in array.varying())
    places = {i for a in arrays for i in a.along(views.PLACES) & a.varying()}
    distinct = {i for a in arrays for i in a.along(views.DISTINCT) if along[i] == 1}
    if op.name == "eq":
        found = found.marked(views.ONE_HOT, distinct)
    elif op.name in (_AFFINE if len(arrays) == 1 else {*_ADDING, "sub"}):
        found = found.marked(views.DISTINCT, distinct)
        places |= distinct if len(distinct) > 1 else set()
    return found.marked(views.PLACES, places)


def _of_parameters(op: Op) -> Value:
    """Combine parameters and constants; the one that covers all axes is the kernel."""
    record, parameters = op.record, op.of_kind(PARAMETER)
    placed = op.values if op.name == "select_n" else parameters  # As `diag` does.
    found = joined(parameters, _merged(placed, op.shapes[0]))
    along = found.array.varying()
    covering = [
        v for v in parameters if v.path is not None and along <= v.array.varying()
    ]
    mains = list({(value.path, value.array): value for value in covering}.values())
    if len(mains) > 1:
        mains = [value for value in mains if not record.is_left_out(str(value.path))]
        mains = [value for value in mains if record.is_kernel(str(value.path))] or mains
    first = mains[0].path if mains else None
    if any(value.path != first for value in mains):
        record.fail(record.own(mains[-1]), f"{does.SECOND}, {first!r}: no kernel?")
    if len(mains) == 1:
        array, unknown = mains[0].array, mains[0].unknown
        found = found.but(array=array, path=first, unknown=unknown)
    # Running statistics that are closed over are constants.
    normalized = op.name in _AFFINE and bool(_varying(op.of_kind(CONSTANT)))
    normalized |= op.name in _NORMALIZING and any(v.reduced for v in parameters)
    return found.but(normalized=found.normalized or normalized)


def _main(record: Record, data: Sequence[Value]) -> Value:
    """Choose the value whose newest products are those of a combination.

    Statistics and what is added to all positions alike, as an embedding of time is,
    stand back.
    """

    def mainness(value: Value) -> tuple[bool | int, ...]:
        number, size = max(value.last, default=-1), len(value.array.varying())
        real = number >= 0 and record.products[number].kernel
        return number >= 0, not value.reduced, size, real, number

    return max(data, key=mainness)


def _of_data(op: Op, data: Sequence[Value]) -> Value:
    """Combine data, and note which statistics are taken out of it."""
    record, main = op.record, _main(op.record, data)
    full = [value for value in data if not value.reduced]
    found = joined(data, data[0].array).but(last=main.last, kernels=changed(data))
    normed = frozenset()
    if op.name in _ADDING and len(full) > 1:
        # The sum of two branches feeds the next layer, not one branch's norm.
        sizes = [len(v.array.varying()) for v in full if v is not main]
        alike = max(sizes, default=-1) >= len(main.array.varying())
        pending = frozenset() if alike else main.pending
        found = found.but(normalized=main.normalized, mixed=main.mixed, pending=pending)
    if op.name in _NORMALIZING and full:
        statistics = [value for value in data if value.reduced]
        taken_out = bool(statistics or _varying(op.of_kind(CONSTANT)))
        taken_out |= bool(found.last) and not all(value.last for value in full)
        found = found.but(normalized=found.normalized or taken_out)
        normed = union(_varying(full) - value.array.varying() for value in statistics)
    added = [n for value in data for n in value.last if op.name in _ADDING]
    for path, _, kernel in [record.products[number] for number in added]:
        # A bias of a slice that data has chosen is looked up as the slice is.
        if not kernel:
            record.follow([path], record.chosen(found.last), norm=False)
    if op.name in _SOFTMAX and (found.last or found.mixed):
        found = found.but(leaves=frozenset(), kernels=())
    if found.last:
        record.follow(found.coefficients, found.last, norm=True)
        pending = found.pending | found.coefficients
        found = found.but(coefficients=frozenset(), pending=pending)
    return found.but(array=_one_hot(op, _merged(data, op.shapes[0], normed)))


def _one_hot(op: Op, array: Array) -> Array:
    """Mark the dimensions along which data is compared with distinct numbers.

    What is computed from them is marked no more.
    """
    constants = op.of_kind(CONSTANT) if op.name == "eq" else []
    known = _varying(op.of_kind(DATA)) if constants else frozenset()
    hot = union(value.array.along(views.DISTINCT) for value in constants) - known
    array = array.marked(views.ONE_HOT, ())
    if not hot:
        return array
    dims = list(array.dims)
    for i in hot:
        dims[i] = (Factor(op.shapes[0][i], 0, frozenset([views.ONE_HOT])),)
    return views.of_factors(dims)


def _meet(op: Op, value: Value, data: Sequence[Value], old: Value) -> Value:
    """Let a parameter meet data: as a bias, a gain, a norm or a table of positions."""
    record, along = op.record, value.array.varying()
    if op.name in _ADDING:
        record.added |= value.leaves
    if value.reduced and not along:
        return old  # A penalty, which is added to a loss.
    whole = len(along) > 1 and not value.looked_up
    matrices = set(filter(record.is_matrix, record.own(value) if whole else ()))
    kernels = set(filter(record.is_kernel, matrices))
    # A product by hand: data varies along some axes of the parameter, not along all.
    shared = [along & v.array.varying() for v in data if not v.reduced]
    by_hand = op.name == "mul" and matrices and any(s and s != along for s in shared)
    if kernels and value.path is None:
        return Value(old.array, DATA, last=_hidden(record, kernels, ""))
    modulated = _modulated(value, old, matrices, union(shared) if by_hand else ())
    if by_hand or (value.chosen and not record.chosen(old.last)):
        record.note(value.leaves, does.SAID, "acts on no outputs of a layer")
        return modulated  # A sum tells whether it is a product.
    norm, found = old.normalized or old.reduced or value.normalized, old
    if not (old.last or value.looked_up or len(along) > 1) and all(
        not v.reduced and (v.array.varying() <= along or not v.array.varying() & along)
        for v in data
    ):
        # Data without axes of its own, as running statistics are, or a number for each
        # example.
        found = old.but(coefficients=old.coefficients | value.leaves)
        norm = False
    follows = op.name in _AFFINE and not value.looked_up and (norm or not old.mixed)
    follows = follows and _follow(record, value, old, norm)
    if not follows:
        record.note(value.leaves, does.SAID, "acts on no outputs of a layer")
        found = found.but(leaves=modulated.leaves, kernels=modulated.kernels)
    # A table that is added to normalized data is no part of the norm.
    of_norm = norm and (follows or not whole or _fits(along, old, -1, norm))
    more = value.leaves if of_norm and not value.looked_up else frozenset()
    return found.but(pending=found.pending | more)


def _modulated(
    value: Value, data: Value, matrices: set[str], shared: Collection[int]
) -> Value:
    """Remember the kernel that data has changed, and the vectors that act on it."""
    own = value.but(array=value.array.marked(views.SHARED, shared))
    kernels = changed([data, own] if matrices else [data])
    if not data.last:
        kernels = tuple(k.but(leaves=k.leaves | value.leaves) for k in kernels)
    return data.but(leaves=data.leaves | matrices, kernels=kernels)


def _follow(record: Record, value: Value, data: Value, norm: bool) -> bool:
    """Write a bias, a gain or a norm down; return False if it is none."""
    _, parts = record.bundles.get(value.path, (0, []))
    if parts and len(parts) == len(data.last):
        for (_, part), number in zip(parts, data.last, strict=True):
            record.follow(part.leaves, [number], norm)
        return True
    along, numbers = value.array.varying(), list(data.last)
    if not norm or len(along) > 1:
        numbers = [number for number in numbers if _fits(along, data, number, norm)]
    for i in along if value.path is not None else ():
        own, outputs = value.array.dims[i], data.array.dims[i]
        if [f.size for f in own] != [f.size for f in outputs]:
            continue
        record.aligned.setdefault(str(value.path), set()).update(
            (factor.axis, label.axis)
            for factor, output in zip(own, outputs, strict=True)
            for label in output.labels
            if label.number in numbers
        )
    record.follow(value.leaves, numbers, norm)
    return bool(numbers)


def _fits(along: Iterable[int], data: Value, number: int, norm: bool) -> bool:
    """Say whether dimensions of data are outputs of a product, or normalized over."""
    low, array = data.array.low(), data.array

    def is_output(factor: Factor) -> bool:
        first, last = low[factor.axis or 0], low[factor.axis or 0] + factor.size
        spans = [label.span for label in factor.labels if label.number == number]
        inside = any(s is None or (s[0] < last and first < s[1]) for s in spans)
        return inside or (norm and views.NORMED in factor.labels)

    return all(
        all(is_output(factor) for factor in array.dims[i] if factor.varies)
        if i in array.varying()
        else norm and data.reduced
        for i in along
    )


# ---- Products -----------------------------------------------------------------------

# Of each dimension of a product, the dimensions of both operands that it is, if any;
# data is on the left where a parameter multiplies it.
Pairs = Sequence[tuple[int | None, int | None]]


def _result(pairs: Pairs, shape: Sequence[int], left: Dims, right: Dims) -> Array:
    """Assemble the dimensions of a product."""
    dims = []
    for size, (i, j) in zip(shape, pairs, strict=True):
        own = [*([] if i is None else [left[i]]), *([] if j is None else [right[j]])]
        dims.append(_one_of(own) if own else [Factor(size)])
    return views.of_factors(dims).marked(views.ONE_HOT, ())


def _dimensions(op: Op) -> tuple[list[Any], list[Any]]:
    """Return the pairs of dimensions that are summed over, and those of the result."""
    contracted, batch = (
        list(zip(*(map(int, dims) for dims in own), strict=True))
        for own in op.fields["dimension_numbers"]
    )
    pairs: list[Any] = list(batch)
    for side, value in enumerate(op.values):
        taken = {pair[side] for pair in [*contracted, *batch]}
        free = [i for i in range(len(value.array.dims)) if i not in taken]
        pairs += [(None, i) if side else (i, None) for i in free]
    return contracted, pairs


def _dot_general(op: Op) -> Value:
    """Follow `dot_general`, a matrix product with batches."""
    record, shape = op.record, op.shapes[0]
    contracted, pairs = _dimensions(op)
    left, right = (value.array.dims for value in op.values)
    array = _result(pairs, shape, left, right)
    op = _unchanged(op, contracted)
    parameters = [i for i in (0, 1) if op.values[i].kind == PARAMETER]
    if not parameters:
        return _without_kernel(op, array)
    side = parameters[0] if len(parameters) == 1 else _kernel_of(record, op.values)
    if side is None:
        return _of_two(op, array, [j for _, j in contracted] == [0])
    data, kernel = op.values[1 - side], op.values[side]
    if kernel.chosen and not _sums(kernel, contracted, side):
        # Rows of a table, in the gradient of the kernel after it.
        values = [_rows(record, value) for value in op.values]
        return _dot_general(op._replace(values=values))
    if side == 0:
        pairs, contracted = ([p[::-1] for p in own] for own in (pairs, contracted))
    if data.kind == PARAMETER:
        data = _in_place_of_data(record, data, kernel)
    found = _look_up(record, data, kernel, {i for i, _ in contracted}, array)
    if found is not None:
        return found
    if data.kind == CONSTANT:
        # An initial state is one for each row, though all start alike.
        data = Value(views.fresh(data.array.shape), DATA)
    if not contracted and all(i is not None for i, _ in pairs):
        values = [
            moved(value, shape, views.arrange, [pair[k] for pair in pairs])
            for k, value in enumerate((data, kernel))
        ]
        return _elementwise(op._replace(name="mul", values=values))
    roles = {j: OUTPUT if i is None else STACKED for i, j in pairs if j is not None}
    roles |= {j: REDUCTION for _, j in contracted}
    return _with_kernel(op, data, kernel, roles, pairs)


def _with_kernel(
    op: Op,
    data: Value,
    kernel: Value,
    roles: Mapping[int, str | None],
    pairs: Pairs,
    shared: frozenset[int] = frozenset(),
) -> Value:
    """Multiply data with a parameter whose dimensions have these roles."""
    record, matrices = op.record, {REDUCTION, OUTPUT} <= {*roles.values()}
    for i, j in pairs:
        if i is not None and j is not None and kernel.path is not None:
            axes = {factor.axis for factor in kernel.array.dims[j] if factor.varies}
            _are_apart(record, data.array.dims[i], axes, matrices)
    if kernel.path is None:
        picked = "constants pick its rows, which multiply data"
        reason = picked if kernel.looked_up else does.COMPUTED
        last = _hidden(record, kernel.leaves, reason)
    else:
        of_dims: dict[int, Use] = {
            i: None if role is None else frozenset([role]) for i, role in roles.items()
        }
        found = _uses(record, kernel, of_dims, shared)
        paths = {path for path, _ in found}
        for number, made in enumerate(record.products if kernel.through else ()):
            if kernel.through >> number & 1 and made.path in paths:
                record.auxiliary.add(number)
        last = tuple(record.product(path, uses) for path, uses in found)
        record.follow(kernel.leaves - paths, last, norm=False)
        for number in last[:1]:
            record.note(data.pending, does.FEEDS, number)
    outputs = _outputs(record, kernel, last)
    return _after(last, data, _result(pairs, op.shapes[0], data.array.dims, outputs))


def _after(last: tuple[int, ...], data: Value, array: Array) -> Value:
    """Return the result of a product."""
    through = data.through | sum(1 << number for number in last)
    return Value(array, DATA, last=last, through=through)


def _outputs(record: Record, kernel: Value, numbers: Sequence[int]) -> Dims:
    """Label the dimensions of a kernel as they are in the outputs of its products."""
    dimension, parts = record.bundles.get(kernel.path, (0, []))
    low = kernel.array.low()

    def output(factor: Factor) -> Factor:
        if factor.axis is None:  # Data has chosen, or all entries are equal.
            return Factor(factor.size, 0 if kernel.unknown else None)
        whole = factor.whole and kernel.path is not None
        labels = [Label(number, factor.axis, whole) for number in numbers]
        if factor.axis == dimension and len(parts) == len(numbers):
            labels = []
            for number, (start, part) in zip(numbers, parts, strict=True):
                first = start - low[dimension]
                span = first, first + part.array.shape[dimension]
                labels.append(Label(number, span=span))
        return Factor(factor.size, 0, frozenset(labels))

    return [[output(factor) for factor in dim] for dim in kernel.array.dims]


def _are_apart(record: Record, dim: Sequence[Factor], axes: Any, matrices: bool):
    """Write down that data meets a batch axis: outputs along it may be apart."""
    for label in [label for f in dim for label in f.labels if axes and label.whole]:
        sure = matrices and label.axis in axes
        record.apart.setdefault(label.number, []).append((label.axis, sure))


def _uses(
    record: Record,
    kernel: Value,
    of_dims: Mapping[int, Use],
    shared: frozenset[int] = frozenset(),
) -> list[tuple[str, dict[int, Use]]]:
    """Find the uses of the axes of a leaf from those of the dimensions of its view.

    Of what was put side by side, this is asked of each part by itself.
    """
    low, dims, uses = kernel.array.low(), kernel.array.dims, dict[int, Use]()
    for i, use in of_dims.items():
        for axis in [factor.axis for factor in dims[i] if factor.axis is not None]:
            before = uses.get(axis, frozenset())
            if not isinstance(use, frozenset):
                uses[axis] = use if len(dims[i]) == 1 and dims[i][0].whole else None
            elif isinstance(before, frozenset):
                uses[axis] = before | ({STACKED} if axis in shared else use)
    for axis, size in enumerate(kernel.array.source):
        if size > 1 and axis not in uses:
            uses[axis] = None if axis in kernel.unknown else low[axis]
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


def _hidden(record: Record, leaves: Iterable[str], reason: str) -> tuple[int, ...]:
    """Write a product down in which the axes of its parameters are out of sight."""
    kernels = sorted(filter(record.is_kernel, leaves))
    record.fail(set(leaves) - set(kernels), reason)
    return tuple(record.product(path, None) for path in kernels)


def _sums(kernel: Value, contracted: Sequence[tuple[int, int]], side: int) -> bool:
    """Say whether a product sums over axes of a kernel.

    It may sum over some of the choices that data made among several, as a mixture of
    experts does; the gradient of the kernel after an embedding sums over all of them.
    """
    array, along = kernel.array, {pair[side] for pair in contracted}
    long = {i for i, size in enumerate(array.shape) if size > 1}
    own, choices = array.varying(), long - array.varying()
    if choices.isdisjoint(along):
        return True
    return kernel.chosen and bool(own & along) and not choices <= along


def _unchanged(op: Op, contracted: Sequence[tuple[int, int]]) -> Op:
    """Take what data has changed for the kernel of a product, if it is said to be one.

    What is the same for all entries that are summed over, as a table of positions is in
    the gradient of the kernel after it, is none.
    """
    record, values = op.record, list(op.values)
    if len(op.of_kind(DATA)) < 2:
        return op
    able = []
    for side, value in enumerate(values):
        fit = [k for k in changed([value]) if _sums(k, contracted, side)]
        none = union(record.own(k) for k in value.kernels if k not in fit)
        values[side] = value.but(leaves=value.leaves - none, kernels=())
        left_out = [k for k in fit if all(map(record.is_left_out, record.own(k)))]
        able += [(side, kernel) for kernel in fit if kernel not in left_out]
    for side, kernel in able:
        own = record.own(kernel)
        record.fail(set(own) - set(filter(record.is_kernel, own)), does.BETWEEN_DATA)
        if len(able) == 1 and record.is_said(kernel):
            record.needed |= own
            values[side] = kernel
    return op._replace(values=values)


def _without_kernel(op: Op, array: Array) -> Value:
    """Multiply data with data, as in attention, or with constants."""
    data = op.of_kind(DATA)
    found = joined(data, array)
    if len(data) < 2:
        return found if data else Value(views.unlabelled(array))
    last = _hidden(op.record, found.leaves, does.BETWEEN_DATA)
    return _after(last or found.last, found, array).but(mixed=not last)


def _kernel_of(record: Record, values: Sequence[Value]) -> int | None:
    """Tell which of two parameters is a kernel, if the other stands in for data."""

    def stands_for_data(value: Value) -> bool:
        matrices = list(filter(record.is_matrix, record.own(value)))
        left_out = bool(matrices) and all(map(record.is_left_out, matrices))
        return len(value.array.varying()) < 2 or value.looked_up or left_out

    said = [any(map(record.is_kernel, record.own(value))) for value in values]
    if any(said):
        return None if all(said) else said.index(True)
    able = [v.path is not None and not stands_for_data(v) for v in values]
    fed = [i for i in (0, 1) if able[i] and stands_for_data(values[1 - i])]
    if len(fed) != 1 and values[0].chosen != values[1].chosen:
        return int(values[0].chosen)
    return fed[0] if len(fed) == 1 else None


def _in_place_of_data(record: Record, value: Value, kernel: Value) -> Value:
    """Take a learned query, or another activation made from parameters, for data."""
    if value.chosen:
        return _rows(record, value)
    record.needed |= record.own(kernel)
    record.note(value.leaves, does.SAID, "enters a product in the place of data")
    vectors = [path for path in value.leaves if not record.is_matrix(path)]
    pending = frozenset(vectors if value.normalized else ()) - record.own(value)
    return Value(views.unlabelled(value.array), DATA, pending=pending)


def _of_two(op: Op, array: Array, rows: bool) -> Value:
    """Multiply parameters alone: factors of a kernel, or learned queries."""
    record, (left, right) = op.record, op.values
    found = joined([left, right], array)
    alone = left.leaves == right.leaves and len(found.leaves) == 1
    if any(map(record.is_kernel, found.leaves)) and not alone:
        last = _hidden(record, found.leaves, does.COMPUTED)
        return _after(last, Value(array), array)
    kernel = right if rows or left.path is None else left
    if kernel.path is not None and left.leaves != right.leaves:
        record.likely |= set(filter(record.is_matrix, record.own(kernel)))
    for value, other in ((left, right), (right, left)):
        names = ", ".join(map(repr, sorted(other.leaves)))
        reason = (
            f"{does.PRODUCT} {names} holds no data: learned queries and their kernel, "
            f"or factors of one kernel?"
        )
        record.fail(value.leaves, reason)
    return found


def _look_up(
    record: Record, data: Value, kernel: Value, along: set[int], array: Array
) -> Value | None:
    """Take a product with rows that are one-hot for a look-up; None if it is none."""
    constant = data.kind == CONSTANT
    if constant and (kernel.looked_up or _picks_rows(data.array, along)):
        record.note(filter(record.is_matrix, kernel.leaves), does.SAID, _TABLE)
        return kernel.lost(views.fresh(array.shape), looked_up=True)
    rows = len(kernel.array.axes()) <= len(along) + 1
    if along and along <= data.array.along(views.ONE_HOT) and rows and not constant:
        return _embedded(record, kernel, data, array)
    return None


def _picks_rows(array: Array, contracted: set[int]) -> bool:
    """Say whether a constant picks or weighs rows of what it is multiplied with.

    A permutation, as the features of nodes that have no others, is data.
    """
    long = {i for i, size in enumerate(array.shape) if size > 1}
    hot, weighed = long & array.along(views.ONE_HOT), array.along(views.PLACES)
    own = long & contracted
    one = own <= weighed or (own <= hot and len(hot) < max(len(long), 2))
    return len(own) == 1 and one


def _convolution(op: Op) -> Value:
    """Follow `conv_general_dilated`, of any layout and any number of groups."""
    record, data, kernel = op.record, op.values[0], _in_kernels_place(op)
    numbers, groups = op.fields["dimension_numbers"], op.fields["feature_group_count"]
    outputs, inputs, *positions = map(int, numbers.rhs_spec)
    rows, features, *_ = map(int, numbers.lhs_spec)
    if data.kind == CONSTANT and kernel.kind == PARAMETER:
        data = Value(views.fresh(data.array.shape), DATA)
    both = data.kind == kernel.kind == PARAMETER and kernel.path is not None
    if both and record.is_said(kernel):
        data = _in_place_of_data(record, data, kernel)
    if (data.kind, kernel.kind) != (DATA, PARAMETER):
        if data.kind == PARAMETER and kernel.kind != CONSTANT:
            reason = "it is convolved with no data, or as in gradients only"
            record.fail(data.leaves | kernel.leaves, reason)
        return _together(op, mixed=True)[0]
    groups = groups if kernel.array.shape[inputs] > 1 and kernel.path is not None else 1
    # A stack of convolutions on one input is one with a group for each.
    first, rest = _grouped(kernel.array, outputs, groups)
    shared = frozenset(f.axis for f in first if f.axis is not None)
    shared -= {factor.axis for factor in rest}
    _are_apart(record, _grouped(data.array, features, groups)[0], shared, True)
    roles = dict.fromkeys(positions, POOLED) | {inputs: REDUCTION, outputs: OUTPUT}
    pairs: list[Any] = [(None, None) for _ in op.shapes[0]]
    pairs[numbers.out_spec[0]] = rows, None
    pairs[numbers.out_spec[1]] = None, outputs
    return _with_kernel(op, data, kernel, roles, pairs, shared)


def _in_kernels_place(op: Op) -> Value:
    """Return the second operand; a kernel that data has only changed is one here."""
    value, record = op.values[1], op.record
    own = [k for k in changed([value]) if not record.is_left_out(str(k.path))]
    if value.kind == DATA and len(own) == 1:
        return own[0]
    if value.kind == op.values[0].kind == DATA:
        _hidden(record, value.leaves, does.BETWEEN_DATA)
    return value


def _grouped(array: Array, position: int, groups: int) -> Dims:
    """Split the factors of a dimension into the first, of this size, and the others."""
    shape, size = list(array.shape), array.shape[position]
    shape[position : position + 1] = [groups, size // groups]
    if not 1 < groups < size:
        return [], []
    try:
        return views.reshape(array, shape).dims[position : position + 2]
    except views.Unfollowed:
        return [], []


def _ragged_dot(op: Op) -> Value:
    """Follow `ragged_dot_general`: rows of each group meet their own kernel."""
    data, kernel = op.values[0], _in_kernels_place(op)
    numbers = op.fields["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    if (data.kind, kernel.kind) != (DATA, PARAMETER):
        return _together(op, mixed=True)[0]
    stacked = [*batch, *numbers.rhs_group_dimensions]
    # In an order that only data knows.
    roles: dict[int, str | None] = dict.fromkeys(range(len(kernel.array.dims)), OUTPUT)
    roles |= dict.fromkeys(stacked) | dict.fromkeys(contracted, REDUCTION)
    free = max(i for i, role in roles.items() if role == OUTPUT)
    pairs = [(None, None) for _ in op.shapes[0][1:]] + [(None, free)]
    return _with_kernel(op, data, kernel, roles, pairs)


# ---- Moves and look-ups -------------------------------------------------------------


def _by(move: Callable[..., Array], *names: str) -> Rule:
    """Make a rule that moves the entries of each operand, as some fields say."""

    def rule(op: Op) -> list[Value]:
        fields = [op.fields[name] for name in names]
        own = [field if field is None else list(map(int, field)) for field in fields]
        pairs = zip(op.values, op.shapes, strict=False)
        return [moved(value, shape, move, *own) for value, shape in pairs]

    return rule


def _split(op: Op) -> list[Value]:
    """Return one value for each piece of a `split`."""
    axis, start, found = op.fields["axis"], 0, []
    for shape in op.shapes:
        starts = [start if i == axis else 0 for i in range(len(shape))]
        found.append(moved(op.values[0], shape, views.cut, starts))
        start += shape[axis]
    return found


def _unstack(op: Op) -> list[Value]:
    """Return one value for each entry along a dimension."""
    return [
        moved(op.values[0], shape, views.take, i, int(op.fields["axis"]))
        for i, shape in enumerate(op.shapes)
    ]


def _stack(op: Op) -> Value:
    """Put operands side by side along a new dimension."""
    axis, shape = int(op.fields["axis"]), op.shapes[0]
    thin = [1 if i == axis else size for i, size in enumerate(shape)]
    others = [i for i in range(len(shape)) if i != axis]
    values = [moved(value, thin, views.broadcast, others) for value in op.values]
    return _side_by_side(op, values, axis)


def _side_by_side(op: Op, values: Sequence[Value], along: int) -> Value:
    """Put values side by side; parameters remain known."""
    found = joined(values, views.fresh(op.shapes[0]))
    if found.kind == DATA:
        leaves = union(v.leaves for v in op.of_kind(PARAMETER))
        op.record.note(leaves, does.SAID, "lies next to data in one array")
        data = [value for value in values if value.kind == DATA]
        dims = list(newest(data).array.dims)
        dims[along] = [Factor(op.shapes[0][along])]
        last = _main(op.record, data).last
        array = views.of_factors(dims).marked(views.ONE_HOT, ())
        return found.but(array=array, last=last)
    if all(value.path is not None for value in values):
        return found.but(path=op.record.bundle(along, values))
    return found


def _dynamic_slice(op: Op) -> Value:
    """Take a slice, unknown which if the program does not say where it starts."""
    (value, *starts), shape = op.values, op.shapes[0]
    chosen = [i for i, size in enumerate(shape) if size != value.array.shape[i]]
    begin = [starts[i].literal or 0 if i in chosen else 0 for i in range(len(shape))]
    gone = [i for i in chosen if starts[i].literal is None and shape[i] == 1]
    found = picked(moved(value, shape, views.cut, begin), value, gone)
    data = [start for start in starts if start.kind == DATA]
    if data and value.kind == PARAMETER and sum(size > 1 for size in shape) < 2:
        return _embedded(op.record, value, data[0], found.array)
    return found


def _rows(record: Record, value: Value) -> Value:
    """Take what data has chosen for rows of a table, which are data."""
    if not value.chosen:
        return value
    return _embedded(record, value, Value(value.array, DATA), value.array)


def _embedded(record: Record, value: Value, index: Value, array: Array) -> Value:
    """Write down that data looks up rows."""
    last = tuple(record.product(p, {}, kernel=False) for p in sorted(value.leaves))
    return _after(last, index, views.unlabelled(array))


def _gather(op: Op) -> Value:
    """Gather rows of a table, or slices of a stack."""
    operand, indices = op.values
    numbers, sizes = op.fields["dimension_numbers"], op.fields["slice_sizes"]
    if operand.kind == CONSTANT:
        return _together(op)[0]

    def move(array: Array, shape: Sequence[int]) -> Array:
        batch, own = numbers.operand_batching_dims, list(sizes)
        gone = {*numbers.collapsed_slice_dims, *batch}
        kept = [i for i in range(len(own)) if i not in gone]
        places = dict(zip(numbers.offset_dims, kept, strict=True))
        others = [i for i in range(len(shape)) if i not in places]
        of_indices = numbers.start_indices_batching_dims
        for i, place in zip(batch, of_indices, strict=True):
            places[others[place]], own[i] = i, array.shape[i]
        array = views.cut(array, own, [0] * len(own))
        return views.arrange(array, shape, [places.get(i) for i in range(len(shape))])

    found = moved(operand, op.shapes[0], move)
    chosen = [i for i, size in enumerate(operand.array.shape) if size != sizes[i]]
    if found.kind == DATA:
        found = picked(found, operand, chosen)
        dims = [[f._replace(axis=0) for f in dim] for dim in found.array.dims]
        return found.but(array=views.of_factors(dims))
    if sum(size > 1 for size in sizes) > 1 and found.path is not None:
        found = picked(found, operand, chosen)
        if indices.kind == DATA:
            op.record.note(operand.leaves, does.SAID, does.LOOKED_UP)
            return found.but(through=found.through | indices.through, chosen=True)
        return found
    array = views.fresh(op.shapes[0])
    if indices.kind == DATA:
        return _embedded(op.record, operand, indices, array)
    op.record.note(operand.leaves, does.SAID, _TABLE)
    return operand.lost(array, looked_up=True)


def _reduce(op: Op) -> list[Value]:
    """Take sums or extrema over some axes; names of mesh axes say nothing."""
    axes = [int(axis) for axis in op.fields["axes"] if isinstance(axis, Integral)]
    pairs = zip(op.values, op.shapes, strict=False)
    return [_reduced(op, value, shape, axes) for value, shape in pairs]


def _reduced(op: Op, value: Value, shape: Sequence[int], axes: Sequence[int]) -> Value:
    """Take a sum or an extremum of one value; a sum may end a product by hand."""
    record, found = op.record, moved(value, shape, views.without, axes)
    for kernel in value.kernels if op.name == "reduce_sum" else ():
        summed = union(f.labels for axis in axes for f in kernel.array.dims[axis])
        shared = record.own(kernel) if views.SHARED in summed else ()
        if last := _hidden(record, shared, _BY_HAND):
            return _after(last, value, found.array)
    if all(value.array.shape[axis] == 1 for axis in axes):
        return found
    if found.kind == CONSTANT:
        return Value(views.unlabelled(found.array))
    leaves = found.leaves - union(record.own(kernel) for kernel in value.kernels)
    array = found.array.marked(views.ONE_HOT, ())
    return found.lost(array, reduced=True, leaves=leaves, coefficients=frozenset())


# ---- Everything else ----------------------------------------------------------------


def _together(op: Op, mixed: bool = False) -> list[Value]:
    """Mix the entries of all operands, as sorts, cumulative sums and scatters do."""
    found = joined(op.values, views.fresh(()))
    data = op.of_kind(DATA)
    if data:
        leaves = union(value.leaves for value in op.of_kind(PARAMETER))
        op.record.note(leaves, does.SAID, "is written into an array of data")
        mixed = found.mixed or (mixed and len(data) > 1)
        last = _main(op.record, data).last
        found = found.but(leaves=found.leaves | leaves, mixed=mixed, last=last)
    known = {v.array.shape: v.array.marked(views.ONE_HOT, ()) for v in data[:1]}
    arrays = [known.get(shape) or views.fresh(shape) for shape in op.shapes]
    return [found.but(array=array) for array in arrays]


def _constants(op: Op) -> list[Value]:
    """Return constants: what depends on no entries, and random numbers."""
    return [Value(views.fresh(shape)) for shape in op.shapes]


def _iota(op: Op) -> Value:
    """Return distinct numbers along one dimension."""
    shape, i = op.shapes[0], int(op.fields["dimension"])
    numbers = views.fresh([shape[i]]).marked(views.DISTINCT, [0])
    return Value(views.broadcast(numbers, shape, [i]))


def _unknown(op: Op) -> list[Value]:
    """Expect anything of a primitive that is not in the table."""
    leaves = union(value.leaves for value in op.of_kind(PARAMETER))
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


_BY_NAMES: Mapping[str, Rule] = {
    **CONTROL,
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj cos cosh digamma div eq eq_to erf erf_inv erfc exp
    exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le
    le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi ne neg nextafter not
    one_minus_square or polygamma population_count pow real regularized_incomplete_beta
    rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign
    sin sinh sqrt square sub tan tanh xor zeta
    """: _elementwise,
    """
    argmax argmin pmax pmin psum psum2 psum_invariant reduce_and reduce_max reduce_min
    reduce_or reduce_prod reduce_sum reduce_xor
    """: _reduce,
    """
    all_gather all_gather_invariant all_to_all bitcast_convert_type convert_element_type
    copy copy_p device_put layout_constraint mesh_cast name optimization_barrier pad
    pbroadcast pcast ppermute pvary reduce_precision reduce_scatter reduce_window
    reduce_window_max reduce_window_min reduce_window_sum reshard sharding_constraint
    stop_gradient
    """: _by(views.resize),  # Casts, copies and identities change no size.
    """
    approx_top_k cumlogsumexp cummax cummin cumprod cumsum dynamic_update_slice scatter
    scatter-add scatter-max scatter-min scatter-mul scatter-sub scatter_add sort top_k
    """: _together,
    """
    axis_index empty empty2 random_bits random_clone random_fold_in random_gamma
    random_seed random_split random_unwrap random_wrap rng_bit_generator rng_uniform
    threefry2x32 zeros_like
    """: _constants,
    "broadcast_in_dim": _by(views.broadcast, "broadcast_dimensions"),
    "concatenate": lambda op: _side_by_side(op, op.values, int(op.fields["dimension"])),
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "iota": _iota,
    "ragged_dot_general": _ragged_dot,
    "reshape": _by(views.reshape, "dimensions"),
    "rev": _by(views.flip, "dimensions"),
    "slice": _by(views.cut, "start_indices", "strides"),
    "split": _split,
    "squeeze": _by(views.without, "dimensions"),
    "stack": _stack,
    "tile": _by(views.tile),
    "transpose": _by(views.arrange, "permutation"),
    "unknown": _unknown,
    "unstack": _unstack,
}
RULES: Mapping[str, Rule] = {
    name: rule for names, rule in _BY_NAMES.items() for name in names.split()
}
