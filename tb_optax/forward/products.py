"""What products do: matrix products, convolutions, products of groups."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tb_optax.forward.dimensions import (
    Dimensions,
    Factor,
    fresh,
    origins_of,
    size_of,
)
from tb_optax.forward.elementwise import elementwise, joined, joined_trail
from tb_optax.forward.kernels import (
    OUTPUT,
    POOLED,
    REDUCTION,
    STACKED,
    Roles,
    apply_kernel,
    hidden_kernels,
    leading,
)
from tb_optax.forward.rearranging import Params, Rule
from tb_optax.forward.record import Batched, Record
from tb_optax.forward.values import Constant, Data, Parameter, Trail, Value, computed


def dot_general(
    params: Params, values: Sequence[Value], shape: Sequence[int], record: Record
) -> Value:
    """`dot_general`: a matrix product with batches."""
    contracting, batch = params["dimension_numbers"]
    sides = [
        _Side(value, contracted, batched)
        for value, contracted, batched in zip(values, contracting, batch, strict=True)
    ]
    if not any(isinstance(value, Data) for value in values):
        return _without_data(values, shape)
    left, right = sides
    pairs = list(zip(left.batch, right.batch, strict=True))
    dims = [_agreed(left, right, i, j) for i, j in pairs]
    dims += [left.value.dims[i] for i in left.free()]
    dims += [right.value.dims[i] for i in right.free()]
    if isinstance(left.value, Data) and isinstance(right.value, Data):
        return _of_data(values, _known(dims, {}), record)
    side, other = (left, right) if isinstance(right.value, Data) else (right, left)
    kernel, data = side.value, other.value
    assert isinstance(data, Data)
    if not isinstance(kernel, Parameter):
        return Data(_known(dims, {}), data.trail)
    if not side.contracted and not side.free():
        return elementwise("mul", values, shape, record)
    roles = (
        dict.fromkeys(side.contracted, REDUCTION)
        | dict.fromkeys(side.batch, STACKED)
        | dict.fromkeys(side.free(), OUTPUT)
    )
    for i, j in zip(side.batch, other.batch, strict=True):
        if origins_of(kernel.dims[i]):
            _batched(data.dims[j], record)
    last = apply_kernel(kernel, Roles(roles), data, record)
    return Data(_known(dims, _numbers(kernel, last)), Trail(last=last))


class _Side(NamedTuple):
    """An operand of a matrix product."""

    value: Value
    contracted: Sequence[int]
    batch: Sequence[int]

    def free(self) -> list[int]:
        taken = {*self.contracted, *self.batch}
        return [i for i in range(len(self.value.dims)) if i not in taken]


def _agreed(left: _Side, right: _Side, i: int, j: int) -> tuple[Factor, ...]:
    """A batch dimension as the data has it."""
    side, position = (left, i) if isinstance(left.value, Data) else (right, j)
    return side.value.dims[position]


def _numbers(kernel: Parameter, last: tuple[int, ...]) -> dict[str, int]:
    paths = [view.path for view in kernel.views]
    return dict(zip(paths, last, strict=True)) if len(paths) == len(last) else {}


def _known(dims: Sequence[Any], numbers: Mapping[str, int]) -> Dimensions:
    """Dimensions of data: axes of the kernel become axes of the product's outputs."""

    def renamed(factor):
        origins = frozenset(
            (numbers.get(owner, owner), axis) for owner, axis in factor.origins
        )
        kept = frozenset(o for o in origins if isinstance(o[0], int))
        return Factor(factor.size, kept)

    return tuple(tuple(map(renamed, dim)) for dim in dims)


def _batched(dimension: Sequence[Factor], record: Record) -> None:
    """Data meets a kernel's batch axis: outputs along it are apart."""
    for owner, axis in sorted(origins_of(dimension), key=str):
        if isinstance(owner, int):
            record.add(Batched(owner, axis))


def conv_general_dilated(
    params: Params, values: Sequence[Value], shape: Sequence[int], record: Record
) -> Value:
    """`conv_general_dilated`, of any layout and any number of groups."""
    data, kernel = values
    numbers = params["dimension_numbers"]
    outputs, inputs, *positions = numbers.rhs_spec
    if not any(isinstance(value, Data) for value in values):
        return _without_data(values, shape)
    parameters = [value for value in values if isinstance(value, Parameter)]
    if not parameters:
        if isinstance(data, Data) and isinstance(kernel, Data):
            return _of_data(values, fresh(shape), record)
        return joined(values, shape)
    if not isinstance(kernel, Parameter) or params["batch_group_count"] > 1:
        record.unclear(
            parameters[0].leaves, "it is convolved in a way that only gradients have"
        )
        return joined(values, shape)
    assert isinstance(data, Data)
    groups = int(params["feature_group_count"])
    roles = Roles(
        {outputs: OUTPUT, inputs: REDUCTION} | dict.fromkeys(positions, POOLED), groups
    )
    shared = leading(kernel.dims[outputs], groups)
    if groups > 1 and shared and size_of(kernel.dims[inputs]) > 1:
        _batched(leading(data.dims[numbers.lhs_spec[1]], groups), record)
    last = apply_kernel(kernel, roles, data, record)
    dims = list(fresh(shape))
    dims[numbers.out_spec[0]] = data.dims[numbers.lhs_spec[0]]
    dims[numbers.out_spec[1]] = kernel.dims[outputs]
    return Data(_known(dims, _numbers(kernel, last)), Trail(last=last))


def ragged_dot_general(
    params: Params, values: Sequence[Value], shape: Sequence[int], record: Record
) -> Value:
    """`ragged_dot_general`: rows of each group meet their own kernel."""
    data, kernel = values[:2]
    numbers = params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    stacked = {*batch, *numbers.rhs_group_dimensions}
    if not isinstance(data, Data) or not isinstance(kernel, Parameter):
        return joined(values, shape)
    free = set(range(len(kernel.dims))) - stacked - set(contracted)
    roles = (
        dict.fromkeys(contracted, REDUCTION)
        | dict.fromkeys(stacked, STACKED)
        | dict.fromkeys(free, OUTPUT)
    )
    last = apply_kernel(kernel, Roles(roles), data, record)
    return Data(fresh(shape), Trail(last=last))


def _without_data(values: Sequence[Value], shape: Sequence[int]) -> Value:
    leaves = [value.leaves for value in values if isinstance(value, Parameter)]
    if leaves:
        return computed(frozenset().union(*leaves), shape)
    return Constant(fresh(shape))


def _of_data(values: Sequence[Any], dims: Dimensions, record: Record) -> Data:
    """Data by data, as in attention."""
    trail = joined_trail([value.trail for value in values])
    record.unclear(
        trail.matrices,
        "it is added to or multiplied with data and then enters a product of data "
        "with data",
    )
    given = [path for path in trail.matrices if record.given.get(path)]
    if given:
        return Data(dims, Trail(last=hidden_kernels(given, trail.last, "", record)))
    return Data(dims, Trail(last=trail.last, mixed=True))


PRODUCTS: dict[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "ragged_dot_general": ragged_dot_general,
}
