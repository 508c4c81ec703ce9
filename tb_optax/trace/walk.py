"""The walk through a jaxpr: its equations, calls, branches and loops."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from tb_optax.trace import views
from tb_optax.trace.record import (
    DATA,
    PARAMETER,
    Product,
    Record,
    Value,
    joined,
    newest,
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
        known = {v: Value(views.fresh(_shape(v))) for v in jaxpr.constvars}
        known.update(zip(jaxpr.constvars, map(_constant, entries), strict=False))
        known.update(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> Value:
            return _constant(atom.val) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            name = equation.primitive.name
            operands = [read(atom) for atom in equation.invars]
            parameters = [v.leaves for v in operands if v.kind == PARAMETER]
            self.record.seen = self.record.seen.union(*parameters)
            shapes = [_shape(variable) for variable in equation.outvars]
            fields = Fields(name, equation.params)
            rule = self.rules.get(name, self.rules["unknown"])
            found = rule(Op(self, self.record, name, fields, operands, shapes))
            results = found if isinstance(found, list) else [found]
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(map(int, getattr(variable.aval, "shape", ())))


def _constant(entries: Any) -> Value:
    """A constant, with the dimensions along which it is one-hot."""
    shape = np.shape(entries)
    if not shape and isinstance(entries, (int, np.integer)):
        return Value(views.fresh(shape), literal=int(entries))
    few = 1 < math.prod(shape) <= _MOST_ENTRIES and not isinstance(entries, Tracer)
    labels = [frozenset[views.Label]() for _ in shape]
    if few and jax.dtypes.issubdtype(entries.dtype, np.generic):
        entries = np.asarray(entries)
        for i in range(len(shape) if np.isin(entries, (0, 1)).all() else 0):
            if shape[i] > 1 and (entries.sum(i) == 1).all():
                labels[i] = frozenset([views.ONE_HOT])
    pairs = zip(shape, labels, strict=True)
    return Value(views.of_factors([[views.Factor(n, labels=own)] for n, own in pairs]))


def moved(value: Value, move: views.Move, shape: Sequence[int]) -> Value:
    """A value with its entries moved; no leaf any more if that cannot be followed."""
    try:
        return value.but(array=move(value.array, shape))
    except views.Unfollowed:
        return value.lost(views.fresh(shape))


def picked(value: Value, before: Value, gone: Iterable[int] | None = None) -> Value:
    """A value with one slice along some dimensions of what it was, unknown which.

    They are those that are of size 1 and were longer, if none are given.
    """
    if gone is None:
        pairs = zip(value.array.shape, before.array.shape, strict=True)
        gone = [i for i, (size, old) in enumerate(pairs) if size == 1 != old]
    dims = before.array.dims()
    axes = frozenset(f.axis for i in gone for f in dims[i] if f.axis is not None)
    return value.but(unknown=value.unknown | axes)


def _call(op: Op) -> list[Value]:
    """`jit`, `remat`, `custom_jvp_call`, ...: the function inside."""
    names = [n for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in op.fields]
    return op.walk.run(op.fields[names[0] if names else "jaxpr"], op.values)


def _shard_map(op: Op) -> list[Value]:
    """`shard_map`: the function inside, with the sizes of one shard."""
    body = op.fields["jaxpr"]
    pairs = zip(op.values, map(_shape, body.invars), strict=True)
    shards = [picked(moved(v, views.resize, shape), v) for v, shape in pairs]
    results = zip(op.walk.run(body, shards), op.shapes, strict=True)
    return [moved(value, views.resize, shape) for value, shape in results]


def _cond(op: Op) -> list[Value]:
    """`cond`: every branch, one after the other."""
    branches = [op.walk.run(b, op.values[1:]) for b in op.fields["branches"]]
    return [_either(several) for several in zip(*branches, strict=True)]


def _while(op: Op) -> list[Value]:
    """`while`: its body, until the kinds of what it carries stay the same."""
    start = op.fields["cond_nconsts"]
    stop = start + op.fields["body_nconsts"]
    body, fixed = op.fields["body_jaxpr"], op.values[start:stop]

    def once(carry: list[Value]) -> list[Value]:
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
    stacks = {path for v in slices if v.kind == PARAMETER for path in v.leaves}
    results = [Value(views.fresh(shape)) for shape in op.shapes]
    turns = range(length)
    for turn in reversed(turns) if op.fields["reverse"] else turns:
        mark = len(op.record.events)
        results = once(_entering(carry), turn)
        made = op.record.events[mark:]
        # A loop that slices no kernel does the same in every iteration.
        if stacks.isdisjoint(e.path for e in made if isinstance(e, Product)):
            break
    first = [views.Factor(length)]
    return _joined(carry, results[:count]) + [
        value.lost(views.of_factors([first, *value.array.dims()])) if length else value
        for value in results[count:]
    ]


def _slice_of(record: Record, value: Value, turn: int) -> Value:
    """One iteration's slice of what is scanned."""
    shape = value.array.shape[1:]
    if value.kind != PARAMETER or value.array.cuts[0] != 1:
        return moved(value, views.without([0]), shape)
    dimension, parts = record.bundles.get(value.path, (0, []))
    whole = value.array.layout() == views.fresh(value.array.shape).layout()
    if parts and dimension == 0 and whole:
        start, value = [pair for pair in parts if pair[0] <= turn][-1]
        turn -= start
    return moved(value, views.take(turn), shape)


def _stable(
    record: Record, once: Callable[[list[Value]], list[Value]], carry: list[Value]
) -> list[Value]:
    """What a loop carries, once constants that become data have become so."""
    mark = len(record.events)
    while True:
        after = _joined(carry, once(_entering(carry)))
        del record.events[mark:]  # They are to be found again.
        if [(v.kind, v.path) for v in after] == [(v.kind, v.path) for v in carry]:
            return after
        carry = after


def _entering(carry: list[Value]) -> list[Value]:
    """What a loop carries, inside: its history belongs to an earlier iteration."""

    def enter(v: Value) -> Value:
        data = Value(v.array, DATA, through=v.through, rank=v.rank)
        return data if v.kind == DATA else v.but(literal=None)

    return [enter(value) for value in carry]


def _joined(before: Sequence[Value], after: Sequence[Value]) -> list[Value]:
    return [_either(pair) for pair in zip(before, after, strict=False)]


def _either(values: Sequence[Value]) -> Value:
    """A value that is one of several."""
    found = joined(values, views.fresh(values[0].array.shape))
    if found.kind == DATA:
        main = newest(value for value in values if value.kind == DATA)
        return found.but(array=main.array, pending=main.pending)
    layouts = [(value.kind, value.path, value.array.layout()) for value in values]
    alike = layouts.count(layouts[0]) == len(layouts)
    return values[0].but(literal=None) if alike else found


_CALLS = """
    call checkpoint closed_call composite core_call custom_jvp_call custom_vjp_call
    custom_vjp_call_jaxpr eval_jaxpr jit pjit remat remat2
"""
CONTROL: Mapping[str, Rule] = {
    **dict.fromkeys(_CALLS.split(), _call),
    **{"cond": _cond, "scan": _scan, "shard_map": _shard_map, "while": _while},
}
