"""Layers that share a leaf: stacked kernels and fused ones against separate leaves."""

from typing import Any

import configurations as table
import jax
import jax.numpy as jnp
import optax
import pytest

import tb_optax
from tb_optax import Layer, MatrixAxes

pytestmark = pytest.mark.usefixtures("quick_compilation")

every_interval = pytest.mark.parametrize("interval", [1, 3])

DENSE = MatrixAxes((0,), (1,))


def kernels(count, shape):
    return [table.random_kernel(10 + i, shape, 0.4 * i) for i in range(count)]


def biases(count, shape):
    return [table.random_kernel(20 + i, shape) for i in range(count)]


def train(params, layers, interval, steps=4):
    """Params and state after some steps, refreshed by the host where none is due."""
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    optimizer = optax.sgd(0.05, momentum=0.9)
    transform = tb_optax.temp_balance(optimizer, analyze, interval=interval)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = transform.init(params)
    step = table.make_step(transform)
    for i in range(steps):
        if interval is None and i % 3 == 0:
            state = tb_optax.set_multipliers(state, analyze(params))
        params, state = step(params, state)
    return params, tb_optax.get_state(state)


def separate(weights, offsets, axes):
    """The same layers with a leaf for each, and the tree of them."""
    params = {
        f"layer_{i}": {"kernel": kernel, "bias": bias}
        for i, (kernel, bias) in enumerate(zip(weights, offsets, strict=True))
    }
    layers = [
        Layer(f"{name}/kernel", axes, follows=(f"{name}/bias",)) for name in params
    ]
    return params, layers


def assert_same(found, expected, join):
    """Asserts equal states, and equal params where `join` puts leaves together."""
    (params, state), (apart, state_apart) = found, expected
    assert len(set(state.multipliers.tolist())) == len(apart)
    table.assert_close(state, state_apart)
    for name, leaf in params.items():
        parts = [layer[name] for layer in apart.values()]
        table.assert_close(leaf, join(name, parts))


@every_interval
@pytest.mark.parametrize(
    ("axes", "stacked_axes", "shape"),
    [
        (DENSE, MatrixAxes((1,), (2,), stacked=(0,)), (8, 6)),
        (MatrixAxes((1,), (0,)), MatrixAxes((2,), (1,), stacked=(0,)), (8, 6)),
        (
            MatrixAxes((1,), (2,), pooled=(0,)),
            MatrixAxes((2,), (3,), pooled=(1,), stacked=(0,)),
            (2, 8, 6),
        ),
        (
            MatrixAxes((0, 1), (2,)),
            MatrixAxes((1, 2), (3,), stacked=(0,)),
            (2, 4, 6),
        ),
    ],
    ids=["dense", "transposed", "conv", "two_inputs"],
)
def test_a_stack_is_its_layers(axes, stacked_axes, shape, interval):
    weights, offsets = kernels(3, shape), biases(3, (6,))
    stacked = {"kernel": jnp.stack(weights), "bias": jnp.stack(offsets)}
    layers = [Layer("kernel", stacked_axes, follows=("bias",))]
    assert_same(
        train(stacked, layers, interval),
        train(*separate(weights, offsets, axes), interval),
        lambda _, parts: jnp.stack(parts),
    )


@pytest.mark.parametrize("interval", [1, 3, None])
def test_a_stack_of_stacks_is_its_layers(interval):
    weights, offsets = kernels(4, (8, 6)), biases(4, (6,))
    stacked = {
        "kernel": jnp.stack(weights).reshape(2, 2, 8, 6),
        "bias": jnp.stack(offsets).reshape(2, 2, 6),
    }
    axes = MatrixAxes((2,), (3,), stacked=(0, 1))
    layers = [Layer("kernel", axes, follows=("bias",))]
    assert_same(
        train(stacked, layers, interval),
        train(*separate(weights, offsets, DENSE), interval),
        lambda _, parts: jnp.stack(parts).reshape(2, 2, *parts[0].shape),
    )


@every_interval
def test_a_stack_behind_its_inputs_is_its_layers(interval):
    """A vmapped kernel can have its stack anywhere."""
    weights = kernels(3, (8, 6))
    stacked = {"kernel": jnp.stack(weights, axis=1)}
    layers = [Layer("kernel", MatrixAxes((0,), (2,), stacked=(1,)))]
    params = {f"layer_{i}": {"kernel": w} for i, w in enumerate(weights)}
    apart = [Layer(f"{name}/kernel", DENSE) for name in params]
    assert_same(
        train(stacked, layers, interval),
        train(params, apart, interval),
        lambda _, parts: jnp.stack(parts, axis=1),
    )


@every_interval
def test_slices_named_one_by_one(interval):
    """In an order of one's own; a slice that nobody names is left alone."""
    weights, offsets = kernels(3, (8, 6)), biases(3, (6,))
    stacked = {"kernel": jnp.stack(weights), "bias": jnp.stack(offsets)}
    axes = MatrixAxes((1,), (2,), stacked=(0,))
    layers = [Layer("kernel", axes, ("bias",), index=(i,)) for i in (2, 0)]
    params, apart = separate(weights, offsets, DENSE)
    found, state = train(stacked, layers, interval)
    expected, state_apart = train(params, [apart[2], apart[0]], interval)
    table.assert_close(state, state_apart)
    for name, leaf in found.items():
        table.assert_close(leaf, jnp.stack([e[name] for e in expected.values()]))


@every_interval
@pytest.mark.parametrize(
    ("join", "axes", "parts", "bias_shape"),
    [
        (
            lambda parts: jnp.concatenate(parts, axis=-1),
            DENSE,
            [(1, 0, 6), (1, 6, 12), (1, 12, 18)],
            (6,),
        ),
        (
            lambda parts: jnp.stack(parts, axis=-2),
            MatrixAxes((0,), (1, 2)),
            [(1, 0, 1), (1, 1, 2), (1, 2, 3)],
            (6,),
        ),
        (
            lambda parts: jnp.stack(parts, axis=-1),
            MatrixAxes((0,), (1, 2)),
            [(2, 0, 1), (2, 1, 2), (2, 2, 3)],
            (6,),
        ),
    ],
    ids=["side_by_side", "three_by_outputs", "outputs_by_three"],
)
def test_a_fused_kernel_is_its_parts(join, axes, parts, bias_shape, interval):
    weights, offsets = kernels(3, (8, 6)), biases(3, bias_shape)
    fused = {"kernel": join(weights), "bias": join(offsets)}
    layers = [Layer("kernel", axes, follows=("bias",), part=part) for part in parts]
    assert_same(
        train(fused, layers, interval),
        train(*separate(weights, offsets, DENSE), interval),
        lambda _, leaves: join(leaves),
    )


@every_interval
def test_a_stack_of_fused_kernels_is_its_parts(interval):
    weights, offsets = kernels(4, (8, 6)), biases(4, (6,))

    def join(parts):
        return jnp.stack([jnp.concatenate(parts[i : i + 2], axis=-1) for i in (0, 2)])

    fused = {"kernel": join(weights), "bias": join(offsets)}
    axes = MatrixAxes((1,), (2,), stacked=(0,))
    layers = [
        Layer("kernel", axes, ("bias",), index=(i,), part=(2, start, start + 6))
        for i in (0, 1)
        for start in (0, 6)
    ]
    assert_same(
        train(fused, layers, interval),
        train(*separate(weights, offsets, DENSE), interval),
        lambda _, leaves: join(leaves),
    )


@every_interval
def test_a_part_that_nobody_names_is_left_alone(interval):
    weights, offsets = kernels(3, (8, 6)), biases(3, (6,))
    fused = {
        "kernel": jnp.concatenate(weights, axis=-1),
        "bias": jnp.concatenate(offsets),
    }
    layers = [
        Layer("kernel", DENSE, ("bias",), part=part)
        for part in [(1, 0, 6), (1, 12, 18)]
    ]
    params, apart = separate(weights, offsets, DENSE)
    found, state = train(fused, layers, interval)
    expected, state_apart = train(params, [apart[0], apart[2]], interval)
    table.assert_close(state, state_apart)
    for name, leaf in found.items():
        together = jnp.concatenate([e[name] for e in expected.values()], axis=-1)
        table.assert_close(leaf, together)


STACK = MatrixAxes((1,), (2,), stacked=(0,))


@every_interval
@pytest.mark.parametrize(
    ("kernel", "bias", "layers"),
    [
        ((3, 8, 6), (3, 6), [Layer("kernel", STACK, ("bias",))]),
        (
            (8, 6),
            (6,),
            [Layer("kernel", DENSE, ("bias",), part=(1, i, i + 3)) for i in (0, 3)],
        ),
        ((8, 6), (6,), [Layer("kernel", DENSE, ("bias",))]),
    ],
    ids=["stacked", "parts", "plain"],
)
def test_a_layer_whose_kernel_has_no_update(kernel, bias, layers, interval):
    """Only the bias is trained; Equinox gives None for what is frozen."""
    params: Any = {
        "kernel": jnp.asarray(table.random_kernel(0, kernel), jnp.float32),
        "bias": jnp.ones(bias),
        "other": {"kernel": jnp.asarray(table.random_kernel(1, (8, 6)), jnp.float32)},
    }
    layers = [*layers, Layer("other/kernel", DENSE)]
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=2)
    transform = tb_optax.scale_by_temp_balance(analyze, interval=interval)
    frozen = params | {"kernel": None}
    updates, _ = transform.update(frozen, transform.init(params), params)
    expected: Any = transform.update(params, transform.init(params), params)[0]
    table.assert_equal(updates, expected | {"kernel": None})


def test_multipliers_of_leaves_broadcast():
    params = {
        "kernel": jnp.stack([jnp.asarray(w) for w in kernels(3, (8, 6))]),
        "bias": jnp.zeros((3, 6)),
        "other": jnp.zeros(4),
    }
    layers = [Layer("kernel", STACK, ("bias",))]
    analysis = tb_optax.layer_analysis(layers, min_eigenvalues=4)(params)
    multipliers = analysis.leaf_multipliers(params)
    assert {name: m.shape for name, m in multipliers.items()} == {
        "kernel": (3, 1, 1),
        "bias": (3, 1),
        "other": (),
    }
    assert multipliers["kernel"].ravel().tolist() == analysis.multipliers.tolist()


def test_slices_and_parts_have_names_in_the_log():
    params = {"qkv": jnp.ones((2, 8, 12)), "out": jnp.ones((6, 8))}
    layers = [
        Layer("qkv", STACK, index=(1,), part=(2, 0, 6)),
        Layer("qkv", STACK, index=(0,)),
        Layer("out", DENSE),
    ]
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    transform = tb_optax.scale_by_temp_balance(analyze, interval=None)
    names = tb_optax.log_dict(
        transform.init(params), jax.eval_shape(analyze, params).layers
    )
    assert list(names) == [
        "alpha/qkv[1]{0:6}",
        "alpha/qkv[0]",
        "alpha/out",
        "multiplier/qkv[1]{0:6}",
        "multiplier/qkv[0]",
        "multiplier/out",
    ]


def test_a_stack_has_a_row_for_each_slice():
    params = {"qkv": jnp.ones((2, 8, 12)), "out": jnp.ones((12, 8))}
    layers = [Layer("qkv", STACK), Layer("out", DENSE)]
    transform = tb_optax.scale_by_temp_balance(
        tb_optax.layer_analysis(layers), interval=None
    )
    state = transform.init(params)
    assert tb_optax.get_multipliers(state).shape == (3,)
    names = ["qkv[0]", "qkv[1]", "out"]
    assert list(tb_optax.log_dict(state, layers))[:3] == [f"alpha/{n}" for n in names]
    with pytest.raises(ValueError, match="slice by slice"):
        tb_optax.log_dict(state, layers[1:])


def test_the_log_names_the_slices_of_several_stacks():
    """From moments in the optimizer state, or from the parameters."""
    params = {
        "up": jnp.ones((2, 8, 12)),
        "experts": jnp.ones((3, 12, 8)),
        "down": jnp.ones((2, 12, 8)),
    }
    halves = [Layer("down", STACK, part=(2, start, start + 4)) for start in (0, 4)]
    layers = [Layer("up", STACK), Layer("experts", STACK), *halves]
    analyze = tb_optax.layer_analysis(layers)
    names = [f"alpha/{x.name}" for x in analyze.resolve(params)[0]]
    assert len(names) == 2 + 3 + 2 * 2
    for optimizer, given in [
        (optax.adamw(0.1), ()),
        (optax.sgd(0.1), (params,)),
        (optax.sgd(0.1), (jax.eval_shape(lambda: params),)),
    ]:
        state = tb_optax.temp_balance(optimizer, analyze, interval=9).init(params)
        logged = list(tb_optax.log_dict(state, layers, *given))
        assert logged[: len(names)] == names
    with pytest.raises(ValueError, match="how many slices 'up', 'experts', 'down'"):
        tb_optax.log_dict(state, layers)
    with pytest.raises(ValueError, match="how many slices 'experts', 'down'"):
        tb_optax.log_dict(state, layers, {"up": params["up"]})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [Layer("kernel", STACK, ("bias",))],
            r"'bias' of shape \(6,\) follows one slice of 'kernel'.*not stacked alike",
        ),
        (
            [Layer("kernel", STACK, ("few",))],
            r"'few' of shape \(2, 6\) follows one slice of 'kernel'.*\(3, 8, 6\)",
        ),
        ([Layer("kernel", STACK, index=(3,))], r"'kernel': index \(3,\) is outside"),
        (
            [Layer("kernel", STACK), Layer("kernel", STACK, index=(1,))],
            r"'kernel' belongs to two layers, 'kernel\[1\]' and 'kernel\[1\]'",
        ),
        (
            [
                Layer("flat", DENSE, part=(1, 0, 4)),
                Layer("flat", DENSE, part=(1, 3, 6)),
            ],
            r"'flat' belongs to two layers, 'flat\{0:4\}' and 'flat\{3:6\}'",
        ),
        (
            [Layer("flat", DENSE, part=(1, 4, 7))],
            r"'flat': part \(1, 4, 7\) passes the end of axis 1 of shape \(8, 6\)",
        ),
        (
            [Layer("flat", DENSE, ("long",), part=(1, 0, 3))],
            r"'long' of shape \(8,\) follows a part of 'flat'.*output axis 1",
        ),
    ],
)
def test_slices_and_parts_that_do_not_fit(layers, message):
    params = {
        "kernel": jnp.ones((3, 8, 6)),
        "bias": jnp.ones(6),
        "few": jnp.ones((2, 6)),
        "flat": jnp.ones((8, 6)),
        "long": jnp.ones(8),
    }
    analyze = tb_optax.layer_analysis(layers)
    transform = tb_optax.scale_by_temp_balance(analyze, interval=1)
    state = transform.init(params)
    with pytest.raises(ValueError, match=message):
        transform.update(params, state, params)
