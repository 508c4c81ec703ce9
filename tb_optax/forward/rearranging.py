"""What primitives that move entries do to abstract values."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tb_optax.forward.dimensions import (
    Dimensions,
    broadcast,
    fresh,
    reshape,
    resize,
    shape_of,
    tile,
)
from tb_optax.forward.elementwise import joined, joined_trail
from tb_optax.forward.record import Record
from tb_optax.forward.values import (
    Constant,
    Data,
    Parameter,
    Value,
    computed,
    rearranged,
)

Params = Mapping[str, Any]


def transpose_value(
    params: Params, values: Sequence[Value], shape: Sequence[int], _: Record
) -> Value:
    """`transpose`."""

    def move(dims, _):
        return tuple(dims[axis] for axis in params["permutation"])

    return rearranged(values[0], shape, move)


def reshape_value(
    params: Params, values: Sequence[Value], shape: Sequence[int], _: Record
) -> Value:
    """`reshape`, which may permute its dimensions first."""
    order = params.get("dimensions")

    def move(dims, shape):
        if order is not None:
            dims = tuple(dims[axis] for axis in order)
        return reshape(dims, shape)

    return rearranged(values[0], shape, move)


def broadcast_value(
    params: Params, values: Sequence[Value], shape: Sequence[int], _: Record
) -> Value:
    """`broadcast_in_dim`."""
    positions = tuple(map(int, params["broadcast_dimensions"]))

    def move(dims, shape):
        return broadcast(dims, shape, positions)

    return rearranged(values[0], shape, move)


def tile_value(
    _: Params, values: Sequence[Value], shape: Sequence[int], __: Record
) -> Value:
    """`tile`: copies side by side along some dimensions."""
    return rearranged(values[0], shape, tile)


def squeeze_value(
    params: Params, values: Sequence[Value], shape: Sequence[int], record: Record
) -> Value:
    """`squeeze`; an axis of which a shard holds one slice is a stacked one."""
    gone = set(params["dimensions"])

    def move(dims, _):
        return tuple(dim for i, dim in enumerate(dims) if i not in gone)

    value = values[0]
    if isinstance(value, Parameter) and len(value.views) == 1:
        (view,) = value.views
        for position in gone:
            for factor in view.dims[position]:
                for _, axis in factor.origins:
                    if record.shapes[view.path][axis] > 1:
                        view = view.picked(axis, None)
        value = dataclasses.replace(value, views=(view,))
    return rearranged(value, shape, move)


def same_entries(
    _: Params, values: Sequence[Value], shape: Sequence[int], __: Record
) -> Value:
    """Casts, copies, sharding constraints, reversals: each entry is one entry."""
    return rearranged(values[0], shape, lambda dims, _: dims)


def other_sizes(
    _: Params, values: Sequence[Value], shape: Sequence[int], __: Record
) -> Value:
    """`pad`, `all_gather` and the like: the same dimensions, longer or shorter."""
    value = values[0]
    if len(shape) != len(value.dims):
        return joined(values[:1], shape)
    return rearranged(value, shape, resize)


def concatenate_values(
    params: Params, values: Sequence[Value], shape: Sequence[int], _: Record
) -> Value:
    """`concatenate`: parameters side by side stay known, each by itself."""
    along = params["dimension"]
    parameters = [value for value in values if isinstance(value, Parameter)]
    data = [value for value in values if isinstance(value, Data)]
    if data:
        dims = list(fresh(shape))
        for position in range(len(shape)):
            if position != along:
                dims[position] = data[0].dims[position]
        return Data(tuple(dims), joined_trail([value.trail for value in data]))
    if not parameters:
        return Constant(fresh(shape))
    leaves = frozenset().union(*(value.leaves for value in parameters))
    if not all(v.views and v.along in (None, along) for v in parameters):
        return computed(leaves, shape)
    return dataclasses.replace(
        parameters[0],
        dims=_but(parameters[0].dims, shape, along),
        leaves=leaves,
        views=tuple(view for value in parameters for view in value.views),
        along=along,
        scaled=any(value.scaled for value in parameters),
    )


def _but(dims: Dimensions, shape: Sequence[int], position: int) -> Dimensions:
    """Dimensions of which one comes from nowhere known."""
    return (
        *dims[:position],
        *fresh(shape[position : position + 1]),
        *dims[position + 1 :],
    )


def split_values(
    params: Params,
    values: Sequence[Value],
    shapes: Sequence[Sequence[int]],
    _: Record,
) -> list[Value]:
    """`split`: one value for each piece."""
    starts = [0]
    for size in params["sizes"]:
        starts.append(starts[-1] + int(size))
    cut = functools.partial(piece_of, values[0], params["axis"])
    return [cut(start, shape) for start, shape in zip(starts, shapes, strict=False)]


def piece_of(value: Value, position: int, start: int, shape: Sequence[int]) -> Value:
    """A value from `start` on along one dimension, to a shape that differs there."""
    if not isinstance(value, Parameter) or position != value.along:
        return rearranged(value, shape, resize)
    stop, offset, views = start + shape[position], 0, []
    for view in value.views:
        size = shape_of(view.dims)[position]
        low, high = max(start, offset), min(stop, offset + size)
        offset += size
        if low < high:
            part = [*shape[:position], high - low, *shape[position + 1 :]]
            dims = resize(view.dims, part)
            if dims is None:
                return computed(value.leaves, shape)
            views.append(view._replace(dims=dims))
    alone = len(views) == 1
    return dataclasses.replace(
        value,
        dims=views[0].dims if alone else _but(value.dims, shape, position),
        views=tuple(views),
        along=None if alone else position,
    )


Rule = Callable[[Params, Sequence[Value], Sequence[int], Record], Value]

REARRANGING: dict[str, Rule] = {
    "transpose": transpose_value,
    "reshape": reshape_value,
    "broadcast_in_dim": broadcast_value,
    "squeeze": squeeze_value,
    "tile": tile_value,
    "concatenate": concatenate_values,
    "pad": other_sizes,
    "all_gather": other_sizes,
    "all_gather_invariant": other_sizes,
    "reduce_scatter": other_sizes,
    "all_to_all": other_sizes,
    **dict.fromkeys(
        (
            "convert_element_type",
            "copy",
            "copy_p",
            "device_put",
            "mesh_cast",
            "optimization_barrier",
            "pbroadcast",
            "pcast",
            "pmax",
            "pmin",
            "ppermute",
            "psum",
            "psum_invariant",
            "psum2",
            "pvary",
            "reduce_precision",
            "reshard",
            "rev",
            "sharding_constraint",
            "layout_constraint",
            "bitcast_convert_type",
            "name",
        ),
        same_entries,
    ),
}
