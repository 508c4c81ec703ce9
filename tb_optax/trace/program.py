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
    module, state = None, None
    nnx: Any = sys.modules.get("flax.nnx")

    def is_module(x: Any) -> bool:
        return nnx is not None and isinstance(x, nnx.Module)

    if is_module(fn):
        inputs = inputs if params is None else (params, *inputs)
        module, call = fn, lambda module, *args: module(*args)
    elif any(map(is_module, jax.tree.leaves(params, is_leaf=is_module))):
        module, call = params, fn
    if module is not None:
        graph, params, state = nnx.split(module, nnx.Param, ...)

    shapes, notes, unreal, values = {}, {}, set(), []
    for path, leaf in leaves_of(params).items():
        if not leaf.is_array:
            notes[path] = "masked or None" if leaf.value is None else "not an array"
            continue
        shapes[path], value = leaf.shape, Value(fresh(leaf.shape))
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
        value = Value(fresh(array.shape))
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        if len(values) >= rest and not is_key:
            value = value.but(kind=DATA)
        values.append(value)

    def forward(*arrays):
        filled = list(flat)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        params, state, *inputs = jax.tree.unflatten(structure, filled)
        if module is None:
            out = fn(params, *inputs)
        else:
            out = call(nnx.merge(graph, params, state), *inputs)
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
