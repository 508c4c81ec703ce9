"""Layers that share a leaf: stacked kernels and fused ones against separate leaves."""

import itertools
from typing import Any

import configurations as table
import jax
import jax.numpy as jnp
import optax
import pytest
from notation import DENSE, STACK

import tb_optax
from tb_optax import Layer, MatrixAxes


def train(params, layers):
    """Params and state after four steps, the first and the last with a refresh."""
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    transform = tb_optax.temp_balance(
        optax.sgd(0.05, momentum=0.9), analyze, interval=3
    )
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = transform.init(params)
    step = table.make_step(transform)
    for _ in range(4):
        params, state = step(params, state)
    return params, tb_optax.get_state(state)


def stacked(axis):
    return lambda leaves: jnp.stack(leaves, axis)


def side_by_side(leaves):
    return jnp.concatenate(leaves, axis=-1)


def grid(leaves):
    return jnp.stack(leaves).reshape(2, 2, *leaves[0].shape)


def stack_of_fused(leaves):
    return jnp.stack([side_by_side(leaves[i : i + 2]) for i in (0, 2)])


def parts(axes, axis, size, count=3, **options):
    """Equal parts of an output axis."""
    cuts = itertools.pairwise(range(0, count * size + 1, size))
    return [Layer("kernel", axes, ("bias",), part=(axis, *c), **options) for c in cuts]


# How the kernels of separate layers and their biases become two leaves, the layers of
# these, and the axes and the shape of each separate kernel.
CASES = {
    "stack": (stacked(0), [Layer("kernel", STACK, ("bias",))], DENSE, (8, 6)),
    "transposed": (
        stacked(0),
        [Layer("kernel", MatrixAxes((2,), (1,), stacked=(0,)), ("bias",))],
        MatrixAxes((1,), (0,)),
        (8, 6),
    ),
    "convolutions": (
        stacked(0),
        [Layer("kernel", MatrixAxes((2,), (3,), pooled=(1,), stacked=(0,)), ("bias",))],
        MatrixAxes((1,), (2,), pooled=(0,)),
        (2, 8, 6),
    ),
    "two inputs": (
        stacked(0),
        [Layer("kernel", MatrixAxes((1, 2), (3,), stacked=(0,)), ("bias",))],
        MatrixAxes((0, 1), (2,)),
        (2, 4, 6),
    ),
    "stack of stacks": (
        grid,
        [Layer("kernel", MatrixAxes((2,), (3,), stacked=(0, 1)), ("bias",))],
        DENSE,
        (8, 6),
    ),
    "side by side": (side_by_side, parts(DENSE, 1, 6), DENSE, (8, 6)),
    "three by outputs": (
        stacked(-2),
        parts(MatrixAxes((0,), (1, 2)), 1, 1),
        DENSE,
        (8, 6),
    ),
    "outputs by three": (
        stacked(-1),
        parts(MatrixAxes((0,), (1, 2)), 2, 1),
        DENSE,
        (8, 6),
    ),
    "stack of fused": (
        stack_of_fused,
        [x for i in (0, 1) for x in parts(STACK, 2, 6, count=2, index=(i,))],
        DENSE,
        (8, 6),
    ),
    # In an order of one's own; a slice or a part that nobody names is left alone.
    "two slices of three": (
        stacked(0),
        [Layer("kernel", STACK, ("bias",), index=(i,)) for i in (2, 0)],
        DENSE,
        (8, 6),
    ),
    "two parts of three": (side_by_side, parts(DENSE, 1, 6)[::2], DENSE, (8, 6)),
}
NAMED = {"two slices of three": [2, 0], "two parts of three": [0, 2]}


@pytest.mark.parametrize("name", CASES)
def test_a_shared_leaf_is_its_layers(name):
    join, layers, axes, shape = CASES[name]
    count = 4 if join in (grid, stack_of_fused) else 3
    apart = {
        f"layer_{i}": {
            "kernel": table.random_kernel(10 + i, shape, 0.4 * i),
            "bias": table.random_kernel(20 + i, (shape[-1],)),
        }
        for i in range(count)
    }
    separate = [Layer(f"{own}/kernel", axes, (f"{own}/bias",)) for own in apart]
    separate = [separate[i] for i in NAMED.get(name, range(count))]
    joined = {
        leaf: join([jnp.asarray(layer[leaf]) for layer in apart.values()])
        for leaf in ("kernel", "bias")
    }
    found, state = train(joined, layers)
    expected, state_apart = train(apart, separate)
    assert len(set(state.multipliers.tolist())) == len(separate)
    table.assert_close(state, state_apart)
    for leaf, value in found.items():
        own = join([layer[leaf] for layer in expected.values()])
        table.assert_close(value, own)


def test_a_stack_after_its_inputs_is_its_layers():
    """A vmapped kernel can have its stack anywhere."""
    weights = [table.random_kernel(10 + i, (8, 6), 0.4 * i) for i in range(3)]
    layer = Layer("kernel", MatrixAxes((0,), (2,), stacked=(1,)))
    found, state = train({"kernel": jnp.stack(weights, axis=1)}, [layer])
    params = {f"layer_{i}": w for i, w in enumerate(weights)}
    expected, state_apart = train(params, [Layer(name, DENSE) for name in params])
    table.assert_close(state, state_apart)
    table.assert_close(found["kernel"], jnp.stack([*expected.values()], axis=1))


def test_the_log_names_slices_and_parts():
    """From moments in the optimizer state, or from the parameters."""
    params = {
        "up": jnp.ones((2, 8, 12)),
        "experts": jnp.ones((3, 12, 8)),
        "down": jnp.ones((2, 12, 8)),
    }
    halves = [Layer("down", STACK, part=(2, start, start + 4)) for start in (0, 4)]
    layers = [Layer("up", STACK), Layer("experts", STACK), *halves]
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    names = [f"alpha/up[{i}]" for i in range(2)]
    names += [f"alpha/experts[{i}]" for i in range(3)]
    names += [f"alpha/down[{i}]{{{j}:{j + 4}}}" for j in (0, 4) for i in range(2)]
    cases: list[Any] = [
        (optax.adamw(0.1), (layers,)),
        (optax.sgd(0.1), (layers, params)),
        (optax.sgd(0.1), (layers, jax.eval_shape(lambda: params))),
        (optax.sgd(0.1), (jax.eval_shape(analyze, params).layers,)),
    ]
    for optimizer, given in cases:
        state = tb_optax.temp_balance(optimizer, analyze, interval=9).init(params)
        assert tb_optax.get_multipliers(state).shape == (len(names),)
        logged = list(tb_optax.log_dict(state, *given))
        assert logged[: len(names)] == names
    state = tb_optax.temp_balance(optax.sgd(0.1), analyze, interval=9).init(params)
    with pytest.raises(ValueError, match="how many slices 'up', 'experts', 'down'"):
        tb_optax.log_dict(state, layers)
    with pytest.raises(ValueError, match="how many slices 'experts', 'down'"):
        tb_optax.log_dict(state, layers, {"up": params["up"]})
    few = tb_optax.scale_by_temp_balance(
        tb_optax.layer_analysis([layers[0], Layer("down", STACK)]), interval=None
    )
    with pytest.raises(ValueError, match="slice by slice"):
        tb_optax.log_dict(few.init(params), [Layer("experts", DENSE)])
