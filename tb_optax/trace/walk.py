"""A forward pass as a jaxpr, and the walk through its calls, branches and loops."""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from tb_optax.leaves import is_array, leaves_of
from tb_optax.trace import views
from tb_optax.trace.record import (
    CONSTANT,
    DATA,
    ENTERS,
    PARAMETER,
    SAID,
    Record,
    Value,
    changed,
    joined,
    newest,
    union,
)

# Constants with more entries are not searched for one-hot vectors.
_MOST_ENTRIES = 1 << 24


class Program(NamedTuple):
    """A forward pass."""

    jaxpr: Any  # its equations
    shapes: dict[str, tuple[int, ...]]  # of the arrays among its parameters, by path
    unreal: frozenset[str]  # the complex ones among them
    notes: dict[str, str]  # why leaves are no parameters
    values: list[Value]  # what is known of its arguments


def program_of(fn: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> Program:
    """Trace `fn(params, *inputs)`; nothing is computed.

    An nnx module, as `fn` or as `params`, is taken apart into its parameters and the
    rest of its state; the rest is a constant.

    Raises:
        ValueError: if the forward pass needs the name of an axis.
    """
    module, state, call = None, None, fn
    nnx: Any = sys.modules.get("flax.nnx")

    def is_module(x: Any) -> bool:
        return nnx is not None and isinstance(x, nnx.Module)

    if is_module(fn):
        inputs = inputs if params is None else (params, *inputs)
        module, call = fn, lambda module, *args: module(*args)
    elif any(map(is_module, jax.tree.leaves(params, is_leaf=is_module))):
        module = params
    if module is not None:
        graph, params, state = nnx.split(module, nnx.Param, ...)

    shapes, notes, unreal, values = {}, {}, set(), []
    for path, leaf in leaves_of(params).items():
        if not leaf.is_array:
            notes[path] = "masked or None" if leaf.value is None else "not an array"
            continue
        shapes[path], value = leaf.shape, Value(views.fresh(leaf.shape))
        if not jnp.issubdtype(leaf.value.dtype, jnp.inexact):
            notes[path] = "not floating"
        else:
            value = value.but(kind=PARAMETER, path=path, leaves=frozenset([path]))
        if jnp.issubdtype(leaf.value.dtype, jnp.complexfloating):
            unreal.add(path)
        values.append(value)
    flat, structure = jax.tree.flatten((params, state, *inputs))
    places = [i for i, leaf in enumerate(flat) if is_array(leaf)]
    arrays = [jax.ShapeDtypeStruct(flat[i].shape, flat[i].dtype) for i in places]
    rest = len(values) + len(jax.tree.leaves(state))
    for array in arrays[len(values) :]:
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        kind = CONSTANT if len(values) < rest or is_key else DATA
        values.append(Value(views.fresh(array.shape), kind))

    def forward(*arrays):
        filled = list(flat)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        params, state, *inputs = jax.tree.unflatten(structure, filled)
        model = params if module is None else nnx.merge(graph, params, state)
        out = call(model, *inputs)
        return [leaf for leaf in jax.tree.leaves(out) if is_array(leaf)]

    try:
        jaxpr = jax.make_jaxpr(forward)(*arrays)
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        msg = (
            f"trace_layers: {error} A BatchNorm with axis_name needs that axis: bind "
            f"it with jax.vmap(fn, ..., axis_name=...) around the forward pass, or "
            f"trace the forward pass of evaluation (train=False)."
        )
        raise ValueError(msg) from error
    return Program(jaxpr, shapes, frozenset(unreal), notes, values)


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

    record: Record
    run: Callable[[Any, Sequence[Value]], list[Value]]  # runs a jaxpr inside
    name: str  # of its primitive
    fields: Fields
    values: Sequence[Value]  # its operands
    shapes: Sequence[tuple[int, ...]]  # of its results

    def of_kind(self, kind: int) -> list[Value]:
        """Return the operands of one kind."""
        return [value for value in self.values if value.kind == kind]


# What a primitive does: from an equation to its result, or to all of its results.
Rule = Callable[[Op], Value | list[Value]]


def run(
    record: Record, rules: Mapping[str, Rule], jaxpr: Any, values: Sequence[Value]
) -> list[Value]:
    """Run a jaxpr, closed or not, on abstract values, and record what happens."""
    entries = map(_constant, getattr(jaxpr, "consts", ()))
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    known = {v: Value(views.fresh(_shape(v))) for v in jaxpr.constvars}
    known.update(zip(jaxpr.constvars, entries, strict=False))
    known.update(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Value:
        return _constant(atom.val) if isinstance(atom, Literal) else known[atom]

    inside = functools.partial(run, record, rules)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        operands = [read(atom) for atom in equation.invars]
        record.seen.update(*(v.leaves for v in operands if v.kind == PARAMETER))
        shapes = [_shape(variable) for variable in equation.outvars]
        fields = Fields(name, equation.params)
        rule = rules.get(name, rules["unknown"])
        found = rule(Op(record, inside, name, fields, operands, shapes))
        results = found if isinstance(found, list) else [found]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(map(int, getattr(variable.aval, "shape", ())))


def _constant(entries: Any) -> Value:
    """Take a constant, with the dimensions along which it is one-hot."""
    shape = np.shape(entries)
    if not shape and isinstance(entries, (int, np.integer)):
        return Value(views.fresh(shape), literal=int(entries))
    few = 1 < math.prod(shape) <= _MOST_ENTRIES and not isinstance(entries, Tracer)
    hot = []
    if few and jax.dtypes.issubdtype(entries.dtype, np.generic):
        entries = np.asarray(entries)
        if np.isin(entries, (0, 1)).all():
            long = [i for i, size in enumerate(shape) if size > 1]
            hot = [i for i in long if (entries.sum(i) == 1).all()]
    return Value(views.fresh(shape).marked(views.ONE_HOT, hot))


def moved(
    value: Value, shape: views.Shape, move: Callable[..., views.Array], *how: Any
) -> Value:
    """Move the entries of a value; if that is not followed, it is a leaf no more."""
    try:
        kernels = [k.but(array=move(k.array, shape, *how)) for k in value.kernels]
        array = move(value.array, shape, *how)
        return value.but(array=array, kernels=tuple(kernels))
    except views.Unfollowed:
        return value.lost(views.fresh(shape))


def picked(value: Value, before: Value, gone: Iterable[int]) -> Value:
    """Mark a value as one slice along some dimensions, unknown which."""
    gone = list(gone)
    factors = [factor for i in gone for factor in before.array.dims[i]]
    axes = frozenset(factor.axis for factor in factors if factor.axis is not None)
    pairs = zip(value.kernels, before.kernels, strict=False)
    kernels = tuple(picked(kernel, old, gone) for kernel, old in pairs)
    return value.but(unknown=value.unknown | axes, kernels=kernels)


def _call(op: Op) -> list[Value]:
    """Run the function inside `jit`, `remat`, `custom_jvp_call`, ..."""
    names = [n for n in ("call_jaxpr", "fun_jaxpr") if n in op.fields]
    return op.run(op.fields[(*names, "jaxpr")[0]], op.values)


def _shard_map(op: Op) -> list[Value]:
    """Run the function inside `shard_map`, with the sizes of one shard."""
    body, shards = op.fields["jaxpr"], []
    for value, shape in zip(op.values, map(_shape, body.invars), strict=True):
        sizes = enumerate(zip(shape, value.array.shape, strict=True))
        gone = [i for i, (size, old) in sizes if size == 1 != old]
        shards.append(picked(moved(value, shape, views.resize), value, gone))
    results = zip(op.run(body, shards), op.shapes, strict=True)
    return [moved(value, shape, views.resize) for value, shape in results]


def _cond(op: Op) -> list[Value]:
    """Run every branch, one after the other."""
    branches = [op.run(b, op.values[1:]) for b in op.fields["branches"]]
    return [_either(several) for several in zip(*branches, strict=True)]


def _while(op: Op) -> list[Value]:
    """Run the body of a `while`, however often it runs."""
    start = op.fields["cond_nconsts"]
    stop = start + op.fields["body_nconsts"]
    fixed, carry = op.values[start:stop], op.values[stop:]
    return _loop(op, op.fields["body_jaxpr"], fixed, carry, [], [0])


def scanned(fields: Fields, values: Sequence[Any]) -> tuple[list, list, list]:
    """Tell constants, carry and slices among the operands of a `scan` apart.

    Up to JAX 0.10 their numbers are parameters; from 0.11 on `ft_in` tells them apart.
    """
    if "ft_in" in fields:
        constants, carry, slices = fields["ft_in"].update(list(values)).unpack()
        return list(constants), list(carry), list(slices)
    start = fields["num_consts"]
    stop = start + fields["num_carry"]
    return list(values[:start]), list(values[start:stop]), list(values[stop:])


def _scan(op: Op) -> list[Value]:
    """Run the body of a `scan` for each slice of stacks of kernels, or else once."""
    fixed, carry, slices = scanned(op.fields, op.values)
    turns = range(op.fields["length"])
    turns = turns[::-1] if op.fields["reverse"] else turns
    results = _loop(op, op.fields["jaxpr"], fixed, carry, slices, turns)
    if not turns:
        return results
    first = [views.Factor(len(turns))]
    return results[: len(carry)] + [
        value.lost(views.of_factors([first, *value.array.dims]))
        for value in results[len(carry) :]
    ]


def _loop(op: Op, body, fixed, carry, slices, turns) -> list[Value]:
    """Return what a loop carries at its end, and what its last iteration puts out."""

    def once(carry: Sequence[Value], turn: int = 0) -> list[Value]:
        # The history of what comes in belongs to an earlier iteration.
        entering = [
            Value(v.array, DATA, through=v.through, kernels=v.kernels)
            if v.kind == DATA
            else v.but(literal=None)
            for v in carry
        ]
        own = [_slice_of(op.record, value, turn) for value in slices]
        return op.run(body, [*fixed, *entering, *own])

    def either(carry: Sequence[Value], after: Sequence[Value]) -> list[Value]:
        return [_either(pair) for pair in zip(carry, after, strict=False)]

    events, known, starts = op.record.events, None, carry
    mark = len(events)
    # Constants may become data on the way; what the body does is found again then.
    while known != (kinds := [(value.kind, value.path) for value in carry]):
        known, carry = kinds, either(carry, once(carry))
        del events[mark:]
    for start, value in zip(starts, carry, strict=True):
        became = (start.kind, value.kind) == (PARAMETER, DATA)
        if became and len(start.array.axes()) < 2:
            paths = start.leaves if start.path in op.record.shapes else ()
            op.record.note(paths, SAID, "is where a loop starts")
    sliced = [own for value in slices for own in (value, *value.kernels)]
    stacks = union(value.leaves for value in sliced if value.kind == PARAMETER)
    results = [Value(views.fresh(shape)) for shape in op.shapes]
    for turn in turns:
        mark = len(events)
        results = once(carry, turn)
        # A loop that slices no kernel does the same in every iteration.
        if stacks.isdisjoint(path for path, does, _ in events[mark:] if does == ENTERS):
            break
    return either(carry, results) + results[len(carry) :]


def _slice_of(record: Record, value: Value, turn: int) -> Value:
    """Take one iteration's slice of what is scanned."""
    shape = value.array.shape[1:]
    if value.kind != PARAMETER:
        kernels = [_slice_of(record, kernel, turn) for kernel in value.kernels]
        found = moved(value.but(kernels=()), shape, views.without, [0])
        return found.but(kernels=tuple(kernels))
    dimension, parts = record.bundles.get(value.path, (0, []))
    whole = value.array == views.fresh(value.array.shape)
    if parts and dimension == 0 and whole:
        start, value = [pair for pair in parts if pair[0] <= turn][-1]
        turn -= start
    return moved(value, shape, views.take, turn)


def _either(values: Sequence[Value]) -> Value:
    """Return a value that is one of several."""
    found = joined(values, views.fresh(values[0].array.shape))
    if found.kind == DATA:
        main = newest(value for value in values if value.kind == DATA)
        kernels = changed(values)
        return found.but(array=main.array, pending=main.pending, kernels=kernels)
    alike = {(value.kind, value.path, value.array) for value in values}
    return values[0].but(literal=None) if len(alike) == 1 else found


# Rules for primitives that run others; a key may be several names.
CONTROL: Mapping[str, Rule] = {
    """
    call checkpoint closed_call composite core_call custom_jvp_call custom_vjp_call
    custom_vjp_call_jaxpr eval_jaxpr jit pjit remat remat2
    """: _call,
    "cond": _cond,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
