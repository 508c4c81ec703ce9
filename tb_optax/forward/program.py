"""The forward pass of a model as a jaxpr, over abstract arrays."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from tb_optax.forward.dimensions import axes_of, fresh
from tb_optax.forward.values import Constant, Data, Value, View, parameter
from tb_optax.leaves import Leaf, is_array, leaves_of


class Program(NamedTuple):
    """A forward pass.

    Attributes:
        jaxpr: its equations.
        leaves: the leaves of its parameters, by path.
        values: what is known of its arguments.
    """

    jaxpr: ClosedJaxpr
    leaves: dict[str, Leaf]
    values: list[Value]


def program_of(fn: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> Program:
    """Traces `fn(params, *inputs)`; nothing is computed.

    An nnx module, as `fn` or as `params`, is taken apart into its parameters and the
    rest of its state; the rest is a constant.
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
    values: list[Value] = []
    rest = len(jax.tree.leaves(state))
    for position, array in enumerate(arrays):
        if position < len(own):
            values.append(_value_of(own[position]))
        elif position < len(own) + rest:
            values.append(Constant(fresh(array.shape)))
        else:
            values.append(Data(fresh(array.shape)))

    def forward(*arrays):
        params, state, *inputs = rebuild(arrays)
        out = fn(params, *inputs) if state is None else fn(params, state, *inputs)
        return [leaf for leaf in jax.tree.leaves(out) if is_array(leaf)]

    return Program(jax.make_jaxpr(forward)(*arrays), leaves, values)


def _of_module(nnx: Any, module: Any, call: Callable[..., Any]):
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def fn(params, state, *inputs):
        return call(nnx.merge(graph, params, state), *inputs)

    return fn, params, state


def _value_of(leaf: Leaf) -> Value:
    """A floating array is a parameter; counters and keys are constants."""
    if jnp.issubdtype(leaf.value.dtype, jnp.floating):
        return parameter(View(leaf.path, axes_of(leaf.path, leaf.shape)))
    return Constant(fresh(leaf.shape))


def _abstract(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a tree without their values, and what puts arrays back in it."""
    flat, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(flat) if is_array(leaf)]
    arrays = [_without_value(flat[i]) for i in places]

    def rebuild(arrays: Sequence[Any]) -> Any:
        filled = list(flat)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        return jax.tree.unflatten(structure, filled)

    return arrays, rebuild


def _without_value(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
