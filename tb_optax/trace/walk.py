"""The walk through a jaxpr: its equations, calls, branches and loops."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from tb_optax.trace.record import Product, Record
from tb_optax.trace.values import (
    Constant,
    Data,
    Factor,
    Parameter,
    Trail,
    Value,
    fresh,
    moved,
    of_factors,
    resize,
    take,
    without,
)


class Fields(Mapping[str, Any]):
    """The parameters of a primitive.

    Raises:
        NotImplementedError: for one that this JAX does not have.
    """

    def __init__(self, primitive: str, params: Mapping[str, Any]):
        self.primitive, self.params = primitive, params

    def __getitem__(self, name: str) -> Any:
        if name not in self.params:
            msg = (
                f"trace_layers reads the parameter {name!r} of the primitive "
                f"{self.primitive!r}, which jax {jax.__version__} does not have; it "
                f"has {', '.join(sorted(self.params))}. Use find_layers(params), or "
                f"another JAX."
            )
            raise NotImplementedError(msg)
        return self.params[name]

    def __contains__(self, name: object) -> bool:
        return name in self.params

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)


Shapes = Sequence[tuple[int, ...]]
Rule = Callable[["Walk", Fields, Sequence[Value], Shapes], list[Value]]


class Walk:
    """Runs jaxprs on abstract values and records what happens to parameters.

    Attributes:
        record: what has happened.
        rules: what each primitive does, by name.
    """

    def __init__(self, record: Record, rules: Mapping[str, Rule]):
        self.record = record
        self.rules = {**rules, **CONTROL}

    def run(self, jaxpr: Any, values: Sequence[Value]) -> list[Value]:
        """Values of the outputs of a jaxpr, closed or not, from those of its inputs."""
        entries = list(getattr(jaxpr, "consts", ()))
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known: dict[Any, Value] = {}
        for i, variable in enumerate(jaxpr.constvars):
            compute = _entries_of(entries[i]) if i < len(entries) else None
            known[variable] = Constant(fresh(shape_of(variable)), compute)
        known.update(zip(jaxpr.invars, values, strict=True))

        def read(atom) -> Value:
            return _literal(atom) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            results = self._apply(equation, operands)
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation, values: list[Value]) -> list[Value]:
        name = equation.primitive.name
        for value in values:
            if isinstance(value, Parameter):
                self.record.seen |= value.leaves
        rule = self.rules.get(name, self.rules["unknown"])
        shapes = [shape_of(variable) for variable in equation.outvars]
        return rule(self, Fields(name, equation.params), values, shapes)


def shape_of(variable: Any) -> tuple[int, ...]:
    """Shape of a variable; tokens have none."""
    return tuple(map(int, getattr(variable.aval, "shape", ())))


def _entries_of(array: Any) -> Callable[[], np.ndarray] | None:
    """The entries of an array that is closed over; of a tracer there are none."""
    return None if isinstance(array, jax.core.Tracer) else lambda: np.asarray(array)


def _literal(atom: Literal) -> Constant:
    value = atom.val
    return Constant(fresh(np.shape(value)), lambda: np.asarray(value))


def _call(walk: Walk, p: Fields, values: Sequence[Value], _: Shapes) -> list[Value]:
    """`jit`, `remat`, `custom_jvp_call`, ...: the function inside."""
    name = next((n for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in p), "jaxpr")
    return walk.run(p[name], values)


def _shard_map(
    walk: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """`shard_map`: the function inside, with the sizes of one shard."""
    own = [
        _resized(value, shape_of(variable))
        for value, variable in zip(values, p["jaxpr"].invars, strict=True)
    ]
    results = walk.run(p["jaxpr"], own)
    return [_resized(v, shape) for v, shape in zip(results, shapes, strict=True)]


def _resized(value: Value, shape: tuple[int, ...]) -> Value:
    """A shard; where it has one slice of an axis, nobody knows which."""
    gone = [i for i, n in enumerate(shape) if n == 1 and value.array.shape[i] > 1]
    return picked(moved(value, resize, shape), value, gone)


def picked(value: Value, before: Value, gone: Sequence[int]) -> Value:
    """A value with one unknown slice along some dimensions of what it was before."""
    if not isinstance(value, Parameter) or not isinstance(before, Parameter):
        return value
    views = []
    for view, old in zip(value.views, before.views, strict=False):
        axes = [factor.axis for i in gone for factor in old.array.factors(i)]
        unknown = view.unknown | {axis for axis in axes if axis is not None}
        views.append(view._replace(unknown=unknown))
    return dataclasses.replace(value, views=tuple(views))


def _cond(walk: Walk, p: Fields, values: Sequence[Value], _: Shapes) -> list[Value]:
    """`cond`: every branch, one after the other."""
    results = [walk.run(branch, values[1:]) for branch in p["branches"]]
    return [_either(several) for several in zip(*results, strict=True)]


def _while(walk: Walk, p: Fields, values: Sequence[Value], _: Shapes) -> list[Value]:
    """`while`: its body, until the kinds of what it carries stay the same."""
    start = p["cond_nconsts"]
    stop = start + p["body_nconsts"]
    fixed = values[start:stop]

    def once(carry):
        return walk.run(p["body_jaxpr"], [*fixed, *carry])

    carry = _stable(walk, once, list(values[stop:]))
    return _joined(carry, once([_entering(value) for value in carry]))


def scanned(p: Fields, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Constants, carry and slices among the operands of a `scan`.

    Up to JAX 0.10 their numbers are parameters; from 0.11 on `ft_in` tells them apart.
    """
    if "ft_in" in p:
        constants, carry, slices = p["ft_in"].update(list(values)).unpack()
        return list(constants), list(carry), list(slices)
    start = p["num_consts"]
    stop = start + p["num_carry"]
    return list(values[:start]), list(values[start:stop]), list(values[stop:])


def _scan(
    walk: Walk, p: Fields, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """`scan`: its body once for each slice of stacks of kernels, or else once."""
    fixed, carry, slices = scanned(p, values)
    length, body = p["length"], p["jaxpr"]
    count = len(carry)

    def once(carry: Sequence[Value], turn: int = 0) -> list[Value]:
        own = [_slice_of(value, turn) for value in slices]
        return walk.run(body, [*fixed, *carry, *own])

    carry = _stable(walk, once, carry)
    entering = [_entering(value) for value in carry]
    stacks = {p for v in slices if isinstance(v, Parameter) for p in v.leaves}
    results: list[Value] = [Constant(fresh(shape)) for shape in shapes]
    for turn in reversed(range(length)) if p["reverse"] else range(length):
        mark = len(walk.record.events)
        results = once(entering, turn)
        made = walk.record.events[mark:]
        paths = {event.path for event in made if isinstance(event, Product)}
        # A loop that slices no kernel does the same in every iteration.
        if paths.isdisjoint(stacks):
            break
    outs = [_stacked(value, length) for value in results[count:]]
    return _joined(carry, results[:count]) + outs


def _slice_of(value: Value, turn: int) -> Value:
    """One iteration's slice of what is scanned."""
    shape = value.array.shape[1:]
    if not isinstance(value, Parameter) or value.array.cuts[0] != 1:
        return moved(value, without([0]), shape)
    if value.along != 0:
        return moved(value, take(turn), shape)
    for view in value.views:
        size = view.array.shape[0]
        if turn < size:
            own = dataclasses.replace(value, array=view.array, views=(view,))
            return moved(dataclasses.replace(own, along=None), take(turn), shape)
        turn -= size
    raise AssertionError


def _stable(
    walk: Walk, once: Callable[[list[Value]], list[Value]], carry: list[Value]
) -> list[Value]:
    """What a loop carries, once constants that become data have become so."""
    mark = len(walk.record.events)
    while True:
        after = _joined(carry, once([_entering(value) for value in carry]))
        walk.record.forget(mark)
        if [_kind(value) for value in after] == [_kind(value) for value in carry]:
            return after
        carry = after


def _kind(value: Value) -> Any:
    return type(value), isinstance(value, Parameter) and bool(value.views)


def _joined(before: Sequence[Value], after: Sequence[Value]) -> list[Value]:
    return [_either(pair) for pair in zip(before, after, strict=False)]


def _entering(value: Value) -> Value:
    """What a loop carries, inside: its history belongs to an earlier iteration.

    The entries of a constant change, so that those it starts with say nothing.
    """
    if isinstance(value, Data):
        kept = Trail(through=value.trail.through, rank=value.trail.rank)
        return dataclasses.replace(value, trail=kept)
    return Constant(value.array) if isinstance(value, Constant) else value


def _stacked(value: Value, length: int) -> Value:
    """What a loop puts out, an entry per iteration."""
    array = value.array
    dims = [array.factors(i) for i in range(len(array.cuts))]
    array = of_factors([[Factor(length, 0, True, frozenset())], *dims])
    if isinstance(value, Parameter):
        return dataclasses.replace(value, array=array, views=(), along=None)
    return Data(array, value.trail) if isinstance(value, Data) else Constant(array)


def _either(values: Sequence[Value]) -> Value:
    """A value that is one of several."""
    first = values[0]
    data = [value for value in values if isinstance(value, Data)]
    parameters = [value for value in values if isinstance(value, Parameter)]
    if data:
        newest = max(data, key=lambda value: max(value.trail.last, default=-1))
        trails = [value.trail for value in data]
        return Data(
            newest.array,
            newest.trail._replace(
                through=functools.reduce(operator.or_, (t.through for t in trails)),
                rank=max(trail.rank for trail in trails),
                matrices=frozenset().union(*(trail.matrices for trail in trails)),
            ),
        )
    if not parameters:
        return Constant(first.array)
    if len(parameters) == len(values):
        layouts = [[(v.path, v.array.layout()) for v in p.views] for p in parameters]
        if all(layout == layouts[0] for layout in layouts):
            return first
    leaves = frozenset().union(*(value.leaves for value in parameters))
    return Parameter(fresh(first.array.shape), leaves)


CONTROL: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "call checkpoint closed_call core_call custom_jvp_call custom_vjp_call "
            "custom_vjp_call_jaxpr jit pjit remat remat2"
        ).split(),
        _call,
    ),
    "cond": _cond,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
