"""The walk through a jaxpr: its equations, calls, branches and loops."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from tb_optax.trace.record import Product, Record
from tb_optax.trace.values import Constant, Data, Parameter, Trail, Value, joined, moved
from tb_optax.trace.views import (
    ONE_HOT,
    Factor,
    fresh,
    of_factors,
    resize,
    take,
    without,
)

# Constants with more entries are not searched for one-hot vectors.
_MOST_ENTRIES = 1 << 24


class Fields(dict[str, Any]):
    """The parameters of a primitive; one that this JAX does not have raises."""

    def __init__(self, primitive: str, params: Mapping[str, Any]):
        super().__init__(params)
        self.primitive = primitive

    def __missing__(self, name: str) -> Any:
        msg = (
            f"trace_layers reads the parameter {name!r} of the primitive "
            f"{self.primitive!r}, which jax {jax.__version__} does not have; it has "
            f"{', '.join(sorted(self))}. Use find_layers(params), or another JAX."
        )
        raise NotImplementedError(msg)


class Op(NamedTuple):
    """One equation, with what is known of its operands."""

    walk: "Walk"
    record: Record
    name: str  # of its primitive
    fields: Fields
    values: Sequence[Value]  # its operands
    shapes: Sequence[tuple[int, ...]]  # of its results


# What a primitive does: from an equation to its result, or to all of its results.
Rule = Callable[[Op], Value | list[Value]]


class Walk:
    """Runs jaxprs on abstract values and records what happens to parameters."""

    def __init__(self, record: Record, rules: Mapping[str, Rule]):
        self.record, self.rules = record, rules

    def run(self, jaxpr: Any, values: Sequence[Value]) -> list[Value]:
        """Values of the outputs of a jaxpr, closed or not, from those of its inputs."""
        entries = list(getattr(jaxpr, "consts", ()))
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known: dict[Any, Value] = {
            variable: Constant(fresh(_shape(variable))) for variable in jaxpr.constvars
        }
        for variable, array in zip(jaxpr.constvars, entries, strict=False):
            known[variable] = _closed_over(array)
        known.update(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> Value:
            return _closed_over(atom.val) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            name = equation.primitive.name
            operands = [read(atom) for atom in equation.invars]
            for value in operands:
                if isinstance(value, Parameter):
                    self.record.seen |= value.leaves
            rule = self.rules.get(name, self.rules["unknown"])
            shapes = [_shape(variable) for variable in equation.outvars]
            fields = Fields(name, equation.params)
            found = rule(Op(self, self.record, name, fields, operands, shapes))
            results = found if isinstance(found, list) else [found]
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(map(int, getattr(variable.aval, "shape", ())))


def _closed_over(entries: Any) -> Constant:
    """A constant, with the dimensions along which it is one-hot."""
    shape = np.shape(entries)
    array = fresh(shape)
    if not shape and isinstance(entries, (int, np.integer)):
        return Constant(array, int(entries))
    few = 1 < math.prod(shape) <= _MOST_ENTRIES and not isinstance(entries, Tracer)
    if few and jax.dtypes.issubdtype(entries.dtype, np.generic):
        values = np.asarray(entries)
        if np.isin(values, (0, 1)).all():
            hot = [n > 1 and (values.sum(i) == 1).all() for i, n in enumerate(shape)]
            labels = [frozenset([ONE_HOT] if one else ()) for one in hot]
            pairs = zip(shape, labels, strict=True)
            array = of_factors([[Factor(n, labels=label)] for n, label in pairs])
    return Constant(array)


def _call(op: Op) -> list[Value]:
    """`jit`, `remat`, `custom_jvp_call`, ...: the function inside."""
    names = [n for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in op.fields]
    return op.walk.run(op.fields[names[0] if names else "jaxpr"], op.values)


def _shard_map(op: Op) -> list[Value]:
    """`shard_map`: the function inside, with the sizes of one shard."""
    body = op.fields["jaxpr"]
    shards = [
        picked(moved(value, resize, _shape(variable)), value)
        for value, variable in zip(op.values, body.invars, strict=True)
    ]
    results = op.walk.run(body, shards)
    return [moved(v, resize, s) for v, s in zip(results, op.shapes, strict=True)]


def picked(value: Value, before: Value, gone: Iterable[int] | None = None) -> Value:
    """A value with one slice along some dimensions of what it was, unknown which.

    They are those that are of size 1 and were longer, if none are given.
    """
    if not isinstance(value, Parameter):
        return value
    if gone is None:
        pairs = zip(value.array.shape, before.array.shape, strict=True)
        gone = [i for i, (size, old) in enumerate(pairs) if size == 1 != old]
    dims = before.array.dims()
    axes = frozenset(f.axis for i in gone for f in dims[i] if f.axis is not None)
    return dataclasses.replace(value, unknown=value.unknown | axes)


def _cond(op: Op) -> list[Value]:
    """`cond`: every branch, one after the other."""
    branches = [op.walk.run(b, op.values[1:]) for b in op.fields["branches"]]
    return [_either(several) for several in zip(*branches, strict=True)]


def _while(op: Op) -> list[Value]:
    """`while`: its body, until the kinds of what it carries stay the same."""
    start = op.fields["cond_nconsts"]
    stop = start + op.fields["body_nconsts"]
    body, fixed = op.fields["body_jaxpr"], op.values[start:stop]

    def once(carry: list[Value], _: int = 0) -> list[Value]:
        return op.walk.run(body, [*fixed, *carry])

    carry = _stable(op.record, once, list(op.values[stop:]))
    return _joined(carry, once(_entering(carry)))


def scanned(fields: Fields, values: Sequence[Any]) -> tuple[list, list, list]:
    """Constants, carry and slices among the operands of a `scan`.

    Up to JAX 0.10 their numbers are parameters; from 0.11 on `ft_in` tells them apart.
    """
    if "ft_in" in fields:
        constants, carry, slices = fields["ft_in"].update(list(values)).unpack()
        return list(constants), list(carry), list(slices)
    start = fields["num_consts"]
    stop = start + fields["num_carry"]
    return list(values[:start]), list(values[start:stop]), list(values[stop:])


def _scan(op: Op) -> list[Value]:
    """`scan`: its body once for each slice of stacks of kernels, or else once."""
    fixed, carry, slices = scanned(op.fields, op.values)
    length, body, count = op.fields["length"], op.fields["jaxpr"], len(carry)

    def once(carry: list[Value], turn: int = 0) -> list[Value]:
        own = [_slice_of(op.record, value, turn) for value in slices]
        return op.walk.run(body, [*fixed, *carry, *own])

    carry = _stable(op.record, once, carry)
    stacks = {p for v in slices if isinstance(v, Parameter) for p in v.leaves}
    results: list[Value] = [Constant(fresh(shape)) for shape in op.shapes]
    turns = range(length)
    for turn in reversed(turns) if op.fields["reverse"] else turns:
        mark = len(op.record.events)
        results = once(_entering(carry), turn)
        made = op.record.events[mark:]
        # A loop that slices no kernel does the same in every iteration.
        if stacks.isdisjoint(e.path for e in made if isinstance(e, Product)):
            break
    outs = [_stacked(value, length) for value in results[count:]] if length else []
    return _joined(carry, results[:count]) + (outs or results[count:])


def _slice_of(record: Record, value: Value, turn: int) -> Value:
    """One iteration's slice of what is scanned."""
    shape = value.array.shape[1:]
    if not isinstance(value, Parameter) or value.array.cuts[0] != 1:
        return moved(value, without([0]), shape)
    dimension, parts = record.bundles.get(value.path or "", (0, []))
    if (
        parts
        and dimension == 0
        and value.array.layout() == fresh(value.array.shape).layout()
    ):
        start, part = [pair for pair in parts if pair[0] <= turn][-1]
        return moved(part, take(turn - start), shape)
    return moved(value, take(turn), shape)


def _stable(
    record: Record, once: Callable[[list[Value]], list[Value]], carry: list[Value]
) -> list[Value]:
    """What a loop carries, once constants that become data have become so."""

    def kinds(values: list[Value]) -> list[Any]:
        return [(type(v), isinstance(v, Parameter) and v.path) for v in values]

    mark = len(record.events)
    while True:
        after = _joined(carry, once(_entering(carry)))
        del record.events[mark:]  # They are to be found again.
        if kinds(after) == kinds(carry):
            return after
        carry = after


def _entering(carry: list[Value]) -> list[Value]:
    """What a loop carries, inside: its history belongs to an earlier iteration."""

    def enter(value: Value) -> Value:
        if isinstance(value, Data):
            trail = Trail(through=value.trail.through, rank=value.trail.rank)
            return Data(value.array, trail)
        return Constant(value.array) if isinstance(value, Constant) else value

    return [enter(value) for value in carry]


def _joined(before: Sequence[Value], after: Sequence[Value]) -> list[Value]:
    return [_either(pair) for pair in zip(before, after, strict=False)]


def _either(values: Sequence[Value]) -> Value:
    """A value that is one of several."""
    first = values[0]
    data = [value for value in values if isinstance(value, Data)]
    parameters = [value for value in values if isinstance(value, Parameter)]
    if data:
        newest = max(data, key=lambda value: max(value.trail.last, default=-1))
        pending = newest.trail.pending
        return Data(
            newest.array, joined(v.trail for v in data)._replace(pending=pending)
        )
    if not parameters:
        return Constant(first.array)
    layouts = [(value.path, value.array.layout()) for value in parameters]
    if len(parameters) == len(values) and layouts.count(layouts[0]) == len(layouts):
        return first
    leaves = frozenset().union(*(value.leaves for value in parameters))
    return Parameter(fresh(first.array.shape), leaves)


def _stacked(value: Value, length: int) -> Value:
    """What a loop puts out, an entry per iteration."""
    array = of_factors([[Factor(length)], *value.array.dims()])
    if isinstance(value, Parameter):
        return value.lost(array)
    return dataclasses.replace(value, array=array)


CONTROL: Mapping[str, Rule] = {
    "call": _call,
    "checkpoint": _call,
    "closed_call": _call,
    "composite": _call,
    "cond": _cond,
    "core_call": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "custom_vjp_call_jaxpr": _call,
    "eval_jaxpr": _call,
    "jit": _call,
    "pjit": _call,
    "remat": _call,
    "remat2": _call,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
