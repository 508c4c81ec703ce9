"""What slices and look-ups do: slices of stacks, and embeddings."""

import dataclasses
import math
from collections.abc import Sequence

from tb_optax.forward.dimensions import Factor, fresh, resize, shape_of
from tb_optax.forward.elementwise import joined, joined_trail
from tb_optax.forward.rearranging import Params, Rule, piece_of
from tb_optax.forward.record import Product, Record
from tb_optax.forward.values import (
    Constant,
    Data,
    Parameter,
    Pick,
    Trail,
    Value,
    View,
    computed,
    rearranged,
)


def slice_value(
    params: Params, values: Sequence[Value], shape: Sequence[int], record: Record
) -> Value:
    """`slice`, one dimension after the other."""
    value = values[0]
    sizes = list(shape_of(value.dims))
    for position, start in enumerate(map(int, params["start_indices"])):
        if sizes[position] != shape[position]:
            sizes[position] = shape[position]
            value = _sliced(value, position, start, sizes, record)
    return value


def dynamic_slice_value(
    _: Params, values: Sequence[Value], shape: Sequence[int], record: Record
) -> Value:
    """`dynamic_slice`; a start that is not written in the program is unknown."""
    value, starts = values[0], values[1:]
    sizes = list(shape_of(value.dims))
    for position, start in enumerate(starts):
        if sizes[position] != shape[position]:
            sizes[position] = shape[position]
            known = start.literal if isinstance(start, Constant) else None
            value = _sliced(value, position, known, sizes, record)
    return _with_data(value, starts)


def _sliced(value: Value, position: int, start, shape, record: Record) -> Value:
    if isinstance(value, Parameter) and len(value.views) == 1 and shape[position] == 1:
        (view,) = value.views
        view = picked_from(view, position, start, record)
        dims = (*view.dims[:position], (), *view.dims[position + 1 :])
        view = view._replace(dims=dims)
        return dataclasses.replace(value, dims=dims, views=(view,))
    if start is None:
        return rearranged(value, shape, resize)
    return piece_of(value, position, start, shape)


def picked_from(view: View, position: int, pick: Pick, record: Record) -> View:
    """A view with one slice of a dimension, which keeps the dimension itself."""
    factors = [factor for factor in view.dims[position] if factor.size > 1]
    for factor in factors:
        for _, axis in factor.origins:
            size = record.shapes[view.path][axis]
            whole = len(factors) == 1 and factor.size == size
            view = view.picked(axis, pick if whole else None)
    return view


def _with_data(value: Value, indices: Sequence[Value]) -> Value:
    """A slice at a place that depends on data is data, but for a whole matrix."""
    data = [index for index in indices if isinstance(index, Data)]
    if not data or isinstance(value, Data):
        return value
    if isinstance(value, Parameter) and _rows(value.dims) > 1:
        return value
    return Data(fresh(shape_of(value.dims)), joined_trail([i.trail for i in data]))


def _rows(dims) -> int:
    return sum(size > 1 for size in shape_of(dims))


def gather_value(
    params: Params, values: Sequence[Value], shape: Sequence[int], record: Record
) -> Value:
    """`gather`: rows of an embedding, or slices of a stack."""
    operand, indices = values
    if not isinstance(operand, Parameter):
        return joined(values, shape)
    numbers = params["dimension_numbers"]
    sizes = params["slice_sizes"]
    matrices = sum(size > 1 for size in sizes) > 1
    if matrices and len(operand.views) == 1 and not numbers.operand_batching_dims:
        return _gathered(operand, numbers, sizes, shape, record)
    if isinstance(indices, Data):
        return _embedded(operand, sizes, indices, shape, record)
    return computed(operand.leaves, shape)


def _gathered(operand, numbers, sizes, shape, record) -> Value:
    """Whole slices of a stack, which stay parts of their parameter."""
    (view,) = operand.views
    gone = numbers.collapsed_slice_dims
    whole = shape_of(view.dims)
    for position in range(len(whole)):
        if sizes[position] != whole[position]:
            if sizes[position] != 1:
                return computed(operand.leaves, shape)
            view = picked_from(view, position, None, record)
    kept = iter([dim for i, dim in enumerate(view.dims) if i not in gone])
    dims = tuple(
        next(kept) if i in numbers.offset_dims else (Factor(size),)
        for i, size in enumerate(shape)
    )
    if shape_of(dims) != tuple(shape):
        return computed(operand.leaves, shape)
    view = view._replace(dims=dims)
    return dataclasses.replace(operand, dims=dims, views=(view,))


def _embedded(operand, sizes, indices: Data, shape, record) -> Data:
    """Rows looked up by data."""
    last = []
    for path in sorted(operand.leaves):
        last.append(record.number())
        record.add(
            Product(
                number=last[-1],
                path=path,
                roles={},
                picks={},
                outputs=math.prod(sizes),
                inputs=indices.trail.last,
                kernel=False,
            )
        )
    return Data(fresh(shape), Trail(last=tuple(last)))


def scatter_value(
    _: Params, values: Sequence[Value], shape: Sequence[int], __: Record
) -> Value:
    """`scatter`, `dynamic_update_slice`: one array written into another."""
    return joined(values, shape)


INDEXING: dict[str, Rule] = {
    "slice": slice_value,
    "dynamic_slice": dynamic_slice_value,
    "gather": gather_value,
    **dict.fromkeys(
        (
            "dynamic_update_slice",
            "scatter",
            "scatter-add",
            "scatter-max",
            "scatter-min",
            "scatter-mul",
            "scatter-sub",
        ),
        scatter_value,
    ),
}
