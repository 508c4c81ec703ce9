"""The forward pass of a model as a jaxpr, over abstract arrays."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tb_optax.leaves import is_array, leaves_of
from tb_optax.trace.record import DATA, PARAMETER, Value
from tb_optax.trace.views import fresh


class Program(NamedTuple):
    """A forward pass.

    Attributes:
        jaxpr: its equations.
        shapes: of the arrays among its parameters, by path.
        unreal: the complex ones among them.
        notes: why leaves are no parameters.
        values: what is known of its arguments.
    """

    jaxpr: Any
    shapes: dict[str, tuple[int, ...]]
    unreal: frozenset[str]
    notes: dict[str, str]
    values: list[Value]


def program_of(fn: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> Program:
    """Trace `fn(params, *inputs)`; nothing is computed.

    An nnx module, as `fn` or as `params`, is taken apart into its parameters and the
    rest of its state; the rest is a constant.

    Raises:
        ValueError: if the forward pass needs the name of an axis.
    """
    state = None
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(fn, nnx.Module):
        inputs = inputs if params is None else (params, *inputs)
        fn, params, state = _of_module(nnx, fn, lambda module, *args: module(*args))
    elif nnx is not None and isinstance(params, nnx.Module):
        fn, params, state = _of_module(nnx, params, fn)
    leaves = leaves_of(params)
    arrays, rebuild = _abstract((params, state, *inputs))
    # The arguments in the order of their flattening; those of params come first.
    own = [leaf for leaf in leaves.values() if leaf.is_array]
    rest = len(own) + len(jax.tree.leaves(state))
    values: list[Value] = []
    for position, array in enumerate(arrays):
        value = Value(fresh(array.shape))
        if position < len(own) and jnp.issubdtype(array.dtype, jnp.inexact):
            path = own[position].path
            value = value.but(kind=PARAMETER, path=path, leaves=frozenset([path]))
        elif position >= rest and not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            value = value.but(kind=DATA, rank=1 + len(array.shape))
        values.append(value)

    def forward(*arrays):
        params, state, *inputs = rebuild(arrays)
        out = fn(params, *inputs) if state is None else fn(params, state, *inputs)
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
    shapes = {leaf.path: leaf.shape for leaf in own}
    notes = {}
    for path, leaf in leaves.items():
        if not leaf.is_array:
            notes[path] = "masked or None" if leaf.value is None else "not an array"
        elif not jnp.issubdtype(leaf.value.dtype, jnp.inexact):
            notes[path] = "not floating"
    unreal = frozenset(
        leaf.path
        for leaf in own
        if jnp.issubdtype(leaf.value.dtype, jnp.complexfloating)
    )
    return Program(jaxpr, shapes, unreal, notes, values)


def _of_module(nnx: Any, module: Any, call: Callable[..., Any]):
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def fn(params, state, *inputs):
        return call(nnx.merge(graph, params, state), *inputs)

    return fn, params, state


def _abstract(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a tree without their values, and what puts arrays back in it."""
    flat, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(flat) if is_array(leaf)]
    arrays = [jax.ShapeDtypeStruct(flat[i].shape, flat[i].dtype) for i in places]

    def rebuild(arrays: Sequence[Any]) -> Any:
        filled = list(flat)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        return jax.tree.unflatten(structure, filled)

    return arrays, rebuild
