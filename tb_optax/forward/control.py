"""What control flow does: calls, branches and loops, each with a jaxpr inside."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from tb_optax.forward.dimensions import Factor, fresh, resize, shape_of
from tb_optax.forward.elementwise import joined, joined_trail
from tb_optax.forward.indexing import picked_from
from tb_optax.forward.record import Record
from tb_optax.forward.values import (
    START,
    Constant,
    Data,
    Loop,
    Parameter,
    Value,
    rearranged,
)

Run: TypeAlias = Callable[[Any, Sequence[Value]], list[Value]]


def field(primitive: str, params: Mapping[str, Any], name: str) -> Any:
    """A parameter of a primitive.

    Raises:
        NotImplementedError: if this JAX has none of that name.
    """
    if name not in params:
        msg = (
            f"trace_layers reads the parameter {name!r} of the primitive "
            f"{primitive!r}, which jax {jax.__version__} does not have; it has "
            f"{', '.join(sorted(params))}. Use find_layers(params), or another JAX."
        )
        raise NotImplementedError(msg)
    return params[name]


def call(
    primitive: str, params: Mapping[str, Any], values: Sequence[Value], run: Run
) -> list[Value]:
    """`jit`, `remat`, `custom_jvp_call`, ...: the function inside."""
    name = "jaxpr" if "jaxpr" in params else "call_jaxpr"
    return run(field(primitive, params, name), values)


def shard_map(
    primitive: str, params: Mapping[str, Any], values: Sequence[Value], run: Run
) -> list[Value]:
    """`shard_map`: the same with the sizes of one shard."""
    body = field(primitive, params, "jaxpr")
    shards = [
        rearranged(value, variable.aval.shape, resize)
        for value, variable in zip(values, body.invars, strict=True)
    ]
    return run(body, shards)


def cond(
    primitive: str, params: Mapping[str, Any], values: Sequence[Value], run: Run
) -> list[Value]:
    """`cond`: every branch, one after the other."""
    branches = field(primitive, params, "branches")
    results = [run(branch, values[1:]) for branch in branches]
    return [_either(several) for several in zip(*results, strict=True)]


def while_loop(
    primitive: str,
    params: Mapping[str, Any],
    values: Sequence[Value],
    run: Run,
    record: Record,
) -> list[Value]:
    """`while`: its body, until the kinds of what it carries stay the same."""
    condition = field(primitive, params, "cond_nconsts")
    constants = condition + field(primitive, params, "body_nconsts")
    body = field(primitive, params, "body_jaxpr")
    fixed = [_entering(value) for value in values[condition:constants]]

    def once(carry):
        return run(body, [*fixed, *carry])

    return _until_stable(once, list(values[constants:]), record)


def scan(
    primitive: str,
    params: Mapping[str, Any],
    values: Sequence[Value],
    run: Run,
    record: Record,
) -> list[Value]:
    """`scan`: its body once per slice of what is scanned."""
    length = field(primitive, params, "length")
    reverse = field(primitive, params, "reverse")
    body = field(primitive, params, "jaxpr")
    constants, carry, scanned = scan_operands(primitive, params, values)
    fixed = [_entering(value) for value in constants]

    def once(carry):
        with record.loop(length, reverse=reverse) as loop:
            slices = [_slice_of(value, loop, record) for value in scanned]
            return run(body, [*fixed, *carry, *slices])

    results = _until_stable(once, carry, record)
    stacks = [_stacked(value, length) for value in results[len(carry) :]]
    return results[: len(carry)] + stacks


def scan_operands(
    primitive: str, params: Mapping[str, Any], values: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Divide the operands of `scan` into constants, carry and scanned arrays.

    JAX up to 0.10 counts them (`num_consts`, `num_carry`); from 0.11 on `ft_in` is a
    tree of three parts in the order of the operands.
    """
    if "num_consts" in params:
        first = field(primitive, params, "num_consts")
        last = first + field(primitive, params, "num_carry")
        return list(values[:first]), list(values[first:last]), list(values[last:])
    parts = field(primitive, params, "ft_in").update(values).unpack()
    constants, carry, scanned = (list(part) for part in parts)
    return constants, carry, scanned


def _until_stable(
    once: Callable[[list[Value]], list[Value]], carry: list[Value], record: Record
) -> list[Value]:
    """Runs a body until constants that become data or parameters have become so."""
    mark = len(record.events)
    while True:
        record.forget(mark)
        results = once([_unwritten(_entering(value)) for value in carry])
        after = [
            _either([before, result])
            for before, result in zip(carry, results[: len(carry)], strict=True)
        ]
        if [type(value) for value in after] == [type(value) for value in carry]:
            return after + results[len(carry) :]
        carry = after


def _entering(value: Value) -> Value:
    """A value inside a loop: what happened before is another iteration's affair."""
    if isinstance(value, Data):
        return dataclasses.replace(value, trail=START)
    return value


def _unwritten(value: Value) -> Value:
    """A value that changes: the number it starts with says nothing."""
    return Constant(value.dims) if isinstance(value, Constant) else value


def _slice_of(value: Value, loop: Loop, record: Record) -> Value:
    """One iteration's slice of what is scanned."""
    if isinstance(value, Parameter) and value.views and value.along != 0:
        along = None if value.along is None else value.along - 1
        views = tuple(
            picked_from(view, 0, loop, record)._replace(dims=view.dims[1:])
            for view in value.views
        )
        return dataclasses.replace(value, dims=value.dims[1:], views=views, along=along)
    if isinstance(value, Parameter):
        return dataclasses.replace(
            value, dims=fresh(shape_of(value.dims)[1:]), views=(), along=None
        )
    return _entering(dataclasses.replace(value, dims=value.dims[1:]))


def _stacked(value: Value, length: int) -> Value:
    """What a loop puts out, an entry per iteration."""
    dims = ((Factor(length),), *value.dims)
    if isinstance(value, Parameter):
        return Parameter(dims, value.leaves)
    return dataclasses.replace(value, dims=dims)


def _either(values: Sequence[Value]) -> Value:
    """A value that is one of several."""
    first = values[0]
    shape = shape_of(first.dims)
    if all(type(value) is type(first) for value in values):
        if isinstance(first, Parameter):
            return first if all(v == first for v in values) else joined(values, shape)
        if isinstance(first, Constant):
            return Constant(first.dims)
    data = [value for value in values if isinstance(value, Data)]
    if not data:
        return joined(values, shape)
    newest = max(data, key=lambda value: max(value.trail.last, default=-1))
    trail = joined_trail([value.trail for value in data])
    return Data(newest.dims, trail._replace(pending=newest.trail.pending))
