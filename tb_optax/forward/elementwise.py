"""What elementwise functions do: biases, norms, activations, computed kernels."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tb_optax.forward.dimensions import (
    Dimensions,
    anonymous,
    fresh,
    merge,
    origins_of,
    varies,
    varying_size,
)
from tb_optax.forward.kernels import hidden_kernels
from tb_optax.forward.record import Follower, Record
from tb_optax.forward.values import Constant, Data, Parameter, Trail, Value, View

# Those by which statistics are taken out of data.
NORMALIZING = frozenset({"sub", "mul", "div"})
# Those by which a bias or a gain acts.
AFFINE = NORMALIZING | {"add", "add_any"}


def elementwise(
    name: str, values: Sequence[Value], shape: Sequence[int], record: Record
) -> Value:
    """The result of an elementwise primitive."""
    data = [value for value in values if isinstance(value, Data)]
    parameters = [value for value in values if isinstance(value, Parameter)]
    if not parameters and not data:
        return Constant(merge([value.dims for value in values], shape))
    if not data:
        return _of_parameters(name, parameters, values, shape)
    kernels = [value for value in parameters if _matrices(value)]
    if len(kernels) == 1 and not any(map(_varies, data)):
        # A number computed from data scales a kernel: spectral norm.
        products = frozenset(n for value in data for n in value.trail.last)
        scaled = _of_parameters(name, parameters, values, shape)
        return dataclasses.replace(scaled, products=scaled.products | products)
    trail = _merged(name, data, values, record)
    for value in parameters:
        trail = _meet(name, value, data, trail, record)
    # Axes of parameters are no axes of data, but it may vary along them.
    dims = [v.dims if isinstance(v, Data) else anonymous(v.dims) for v in values]
    return Data(merge(dims, shape), trail)


def joined(values: Sequence[Value], shape: Sequence[int]) -> Value:
    """One of several values, as after a branch, or all of them in one array."""
    data = [value for value in values if isinstance(value, Data)]
    parameters = [value for value in values if isinstance(value, Parameter)]
    if data:
        trail = joined_trail([value.trail for value in data])
        return Data(
            fresh(shape),
            trail._replace(matrices=trail.matrices.union(*map(_matrices, parameters))),
        )
    if parameters:
        leaves = frozenset().union(*(value.leaves for value in parameters))
        return Parameter(fresh(shape), leaves)
    return Constant(fresh(shape))


def joined_trail(trails: Sequence[Trail]) -> Trail:
    """What data has gone through that has several sources."""
    return Trail(
        last=max((trail.last for trail in trails), key=_newest),
        normalized=any(trail.normalized for trail in trails),
        reduced=all(trail.reduced for trail in trails),
        mixed=any(trail.mixed for trail in trails),
        pending=frozenset().union(*(trail.pending for trail in trails)),
        coefficients=frozenset().union(*(trail.coefficients for trail in trails)),
        matrices=frozenset().union(*(trail.matrices for trail in trails)),
    )


def _newest(last: tuple[int, ...]) -> int:
    return max(last, default=-1)


def _varies(value: Value) -> bool:
    return any(map(varies, value.dims))


def _matrices(value: Value) -> frozenset[str]:
    """The parameters that a value is, where it has two or more axes."""
    if not isinstance(value, Parameter) or sum(map(varies, value.dims)) < 2:
        return frozenset()
    return frozenset(view.path for view in value.views) or value.leaves


def _of_parameters(name, parameters, values, shape) -> Parameter:
    """Parameters and constants combined: the one that covers all axes is the kernel."""
    dims = merge([value.dims for value in values], shape)
    scaled = name in AFFINE and any(
        not isinstance(value, Parameter) and _varies(value) for value in values
    )
    # A kernel plus its own transpose, or another of its slices, has no axes.
    covering = {
        tuple(map(_layout, value.views)): value
        for value in reversed(parameters)
        if value.views and _covers(value, dims)
    }
    main = next(iter(covering.values())) if len(covering) == 1 else None
    views, along = (main.views, main.along) if main else ((), None)
    if along is None and views:
        views = (views[0]._replace(dims=_own(views[0], shape)),)
    return Parameter(
        dims=views[0].dims if views and along is None else dims,
        leaves=frozenset().union(*(value.leaves for value in parameters)),
        views=views,
        along=along,
        scaled=scaled or any(value.scaled for value in parameters),
        products=frozenset().union(*(value.products for value in parameters)),
    )


def _layout(view: View) -> Any:
    """Where each axis of a parameter is, and which slices there are of it."""
    return view.path, view.picks, tuple(map(origins_of, view.dims))


def _own(view: View, shape: Sequence[int]) -> Dimensions:
    """Dimensions of a view in an array of this rank: a scalar stands for all."""
    return view.dims if len(view.dims) == len(shape) else merge([], shape)


def _covers(value: Parameter, dims: Dimensions) -> bool:
    """Whether a parameter has an axis wherever the result varies."""
    if len(value.dims) != len(dims):
        return not any(map(varies, dims))
    return all(
        varies(own) or not varies(dim)
        for own, dim in zip(value.dims, dims, strict=True)
    )


def _merged(name, data, values, record) -> Trail:
    """The trail of several data values and constants combined."""
    trails = [value.trail for value in data]
    trail = joined_trail(trails)
    main = [value for value in data if not value.trail.reduced]
    if name in NORMALIZING and main:
        taken_out = (
            any(value.trail.reduced for value in data)
            or any(isinstance(v, Constant) and _varies(v) for v in values)
            or (bool(trail.last) and any(not value.trail.last for value in main))
        )
        trail = trail._replace(normalized=trail.normalized or taken_out)
    if name in ("add", "add_any") and len(main) > 1:
        # The sum of two branches feeds the next layer, not one branch's norm.
        trail = trail._replace(pending=frozenset())
    if trail.last and trail.coefficients:
        for path in sorted(trail.coefficients):
            for number in trail.last:
                record.add(Follower(path, number, norm=True))
        trail = trail._replace(
            coefficients=frozenset(), pending=trail.pending | trail.coefficients
        )
    return trail


def _meet(name, value: Parameter, data, trail: Trail, record: Record) -> Trail:
    """A parameter meets data: as a bias, a gain, a norm or a table of positions."""
    matrices = _matrices(value)
    outer = name == "mul" and matrices and _is_outer(value, data)
    kernels = [path for path in sorted(matrices) if record.given.get(path)]
    if kernels and (outer or not value.views):
        return Trail(last=hidden_kernels(kernels, trail.last, "", record))
    if outer:
        record.unclear(
            matrices,
            "it multiplies data that is constant along one of its axes: a matrix "
            "product written with `*`?",
        )
    norm = trail.normalized or trail.reduced or value.scaled
    if not trail.last and _same_entries(value, data):
        trail = trail._replace(matrices=trail.matrices | matrices)
        return trail._replace(coefficients=trail.coefficients | value.leaves)
    follows = name in AFFINE and (norm or not trail.mixed) and trail.last
    if not (follows and _follow(value, trail.last, norm, record)):
        trail = trail._replace(matrices=trail.matrices | matrices)
    return trail._replace(pending=trail.pending | value.leaves) if norm else trail


def _follow(
    value: Parameter, last: tuple[int, ...], norm: bool, record: Record
) -> bool:
    """Writes a bias, a gain or a norm down; False for what is none."""
    if value.along is not None and len(value.views) == len(last):
        for view, number in zip(value.views, last, strict=True):
            record.add(Follower(view.path, number, norm))
        return True
    entries = varying_size(value.dims)
    outputs = sum(record.outputs(number) for number in last)
    vector = sum(map(varies, value.dims)) < 2
    if not (norm and vector) and (entries == 0 or outputs % entries):
        return False
    for path in sorted(value.leaves):
        for number in last:
            record.add(Follower(path, number, norm))
    return True


def _same_entries(value: Parameter, data: Sequence[Data]) -> bool:
    """Whether data has no entries but one for each of the parameter's."""
    sizes = max(varying_size(item.dims) for item in data)
    return varying_size(value.dims) == sizes


def _is_outer(value: Parameter, data: Sequence[Data]) -> bool:
    """Whether data varies along some axis of a parameter and not along another."""
    for item in data:
        if len(item.dims) == len(value.dims):
            along = [
                varies(own)
                for own, dim in zip(item.dims, value.dims, strict=True)
                if varies(dim) and origins_of(dim)
            ]
            if any(along) and not all(along):
                return True
    return False
