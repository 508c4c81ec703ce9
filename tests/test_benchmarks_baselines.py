"""SNR, SGDP and Lookahead against steps in NumPy; each arm's chain and numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax.nnx")

import tb_optax
from benchmarks import arms, configs, data, loop
from benchmarks.baselines import (
    add_spectral_norm_gradient,
    power_iteration,
    scale_by_sgdp,
)
from benchmarks.controls import shuffled
from benchmarks.data.augment import Preparation
from benchmarks.lookahead import lookahead
from benchmarks.published import settings

pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def as_float32(tree) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def first_updates(transform, gradients, params) -> Any:
    return transform.update(gradients, transform.init(params), params)[0]


def test_power_iteration_is_that_of_numpy():
    matrix, start = normal(6, 10), normal(6, seed=1)
    u = start / np.linalg.norm(start)
    for _ in range(5):
        v = matrix.T @ u / np.linalg.norm(matrix.T @ u)
        u = matrix @ v / np.linalg.norm(matrix @ v)
    ours = power_iteration(as_float32(matrix), as_float32(start), 5)
    for one, other in zip(ours, (u @ matrix @ v, u, v), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_power_iteration_of_zeros_is_zero():
    for array in power_iteration(jnp.zeros((4, 3)), jnp.ones(4), 5):
        assert not np.any(array)


def test_snr_adds_the_gradient_of_the_squared_spectral_norm():
    # Singular values 4, 1, ...: five iterations leave an error of 4^-10 or so.
    left, _ = np.linalg.qr(normal(18, 5))
    right, _ = np.linalg.qr(normal(5, 5, seed=1))
    kernel = (left * [4, 1, 0.5, 0.2, 0.1]) @ right
    params = {"conv": kernel.reshape(3, 3, 2, 5), "bias": normal(5, seed=2)}
    gradients = {"conv": normal(3, 3, 2, 5, seed=3), "bias": normal(5, seed=4)}
    updates = first_updates(
        add_spectral_norm_gradient(0.1), as_float32(gradients), as_float32(params)
    )
    term = 0.1 * 4 * np.outer(left[:, 0], right[0]).reshape(3, 3, 2, 5)
    np.testing.assert_allclose(updates["conv"], gradients["conv"] + term, atol=1e-5)
    np.testing.assert_array_equal(updates["bias"], as_float32(gradients)["bias"])


def sgdp_step(weight, gradient, buffer, momentum, decay, delta=0.1, ratio=0.1):
    """One step of SGDP, and whether it projects; a row is an output channel."""
    buffer = momentum * buffer + gradient
    rows = weight.reshape(-1, weight.shape[-1]).T
    gradients = gradient.reshape(-1, weight.shape[-1]).T
    steps = buffer.reshape(-1, weight.shape[-1]).T
    view = None
    for pieces, towards, moves in (
        (rows, gradients, steps),
        (rows.reshape(1, -1), gradients.reshape(1, -1), steps.reshape(1, -1)),
    ):
        cosines = [
            abs(w @ g) / (np.linalg.norm(w) * np.linalg.norm(g))
            for w, g in zip(pieces, towards, strict=True)
        ]
        if max(cosines) < delta / np.sqrt(pieces.shape[1]):
            units = [w / np.linalg.norm(w) for w in pieces]
            moves = [m - w * (w @ m) for w, m in zip(units, moves, strict=True)]
            view, steps = len(pieces), np.reshape(moves, rows.shape)
            break
    factor = ratio if view else 1
    step = steps.T.reshape(weight.shape)
    return step + factor * decay / (1 - momentum) * weight, buffer, view


def orthogonal_by_row(gradient, weight):
    along = (gradient * weight).sum((0, 1, 2)) / (weight**2).sum((0, 1, 2))
    return gradient - along * weight


def test_sgdp_is_that_of_numpy_in_every_view():
    weight = normal(3, 3, 4, 6)
    free = normal(3, 3, 4, 6, seed=1)
    by_row = orthogonal_by_row(normal(3, 3, 4, 6, seed=2), weight)
    # Along the weights of one channel, against those of another: orthogonal as a whole.
    norms = (weight**2).sum((0, 1, 2))
    whole = by_row + weight * (np.array([1, -1, 0, 0, 0, 0]) / norms)
    transform: Any = scale_by_sgdp(0.9, 0.01)
    state = transform.init(as_float32(weight))
    buffer, views = np.zeros_like(weight), []
    for gradient in (free + weight, by_row, whole):
        expected, buffer, view = sgdp_step(weight, gradient, buffer, 0.9, 0.01)
        updates, state = transform.update(
            as_float32(gradient), state, as_float32(weight)
        )
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-5)
        views.append(view)
    assert views == [None, 6, 1]


def test_sgdp_of_a_vector_is_momentum_with_decay():
    weight, gradient = normal(5), normal(5, seed=1)
    transform: Any = scale_by_sgdp(0.9, 0.01)
    state = transform.init(as_float32(weight))
    for momentum in (1, 1.9):
        updates, state = transform.update(
            as_float32(gradient), state, as_float32(weight)
        )
        expected = momentum * gradient + 0.1 * weight
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)


def test_lookahead_pulls_the_weights_back_at_the_end_of_a_period():
    start = fast = slow = normal(4)
    transform: Any = lookahead(optax.sgd(0.5), period=2, step_size=0.8)
    params = as_float32(start)
    state = transform.init(params)
    for count in range(1, 5):
        gradient = normal(4, seed=count)
        fast = fast - 0.5 * gradient
        if count % 2 == 0:
            slow = slow + 0.8 * (fast - slow)
            fast = slow
        updates, state = transform.update(as_float32(gradient), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, fast, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state.slow, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "transform",
    [
        add_spectral_norm_gradient(0.1),
        scale_by_sgdp(),
        lookahead(optax.sgd(0.1), period=2, step_size=0.5),
    ],
)
def test_parameters_are_asked_for(transform):
    params = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="needs the parameters"):
        transform.update(params, transform.init(params))


SHAPES = ((16, 64), (64, 64), (64, 72), (72, 96), (96, 10))


def network(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x


def tiny():
    return [
        {
            "kernel": as_float32(normal(*shape, seed=shape[1]) / shape[0] ** 0.5),
            "bias": as_float32(0.1 * normal(shape[1], seed=7)),
        }
        for shape in SHAPES
    ]


@pytest.fixture(scope="module")
def two_steps(quick_compilation):
    """Of each arm: the first analysis, the first updates, the weights in the end."""
    del quick_compilation
    config = dataclasses.replace(configs.DIGITS, epochs=2)
    inputs = as_float32(normal(8, 16))
    layers = tb_optax.trace_layers(network, tiny(), inputs)[1:-1]
    gradient_fn = jax.jit(
        jax.grad(lambda params: jnp.mean((network(params, inputs) - 0.5) ** 2))
    )
    results = {}
    for name, arm in arms.ARMS.items():
        analyze = arm.analysis(config, layers)
        optimizer = arm.build(config, analyze, 1)
        update, params = jax.jit(optimizer.update), tiny()
        state, analysis, first = optimizer.init(params), None, None
        if arm.balanced:
            analysis = analyze(params)
            state = tb_optax.set_multipliers(state, analysis)
        for _ in range(2):
            updates, state = update(gradient_fn(params), state, params)
            params = optax.apply_updates(params, updates)
            first = first or updates
        results[name] = analysis, first, params
    return results


@pytest.mark.parametrize("name", arms.ARMS)
def test_two_steps_of_every_arm_are_finite(two_steps, name):
    _, _, params = two_steps[name]
    for before, after in zip(
        jax.tree.leaves(tiny()), jax.tree.leaves(params), strict=True
    ):
        assert np.isfinite(after).all()
        assert not np.array_equal(before, after)


def test_the_mean_matched_control_scales_all_of_cosine_sgd(two_steps):
    balanced, analysis = two_steps["tb"][0], two_steps["mean"][0]
    mean = np.mean(np.asarray(balanced.multipliers)[np.asarray(balanced.tuned)])
    np.testing.assert_allclose(analysis.multipliers, mean, rtol=1e-6)
    assert mean != 1
    for plain, scaled in zip(
        jax.tree.leaves(two_steps["cal"][1]),
        jax.tree.leaves(two_steps["mean"][1]),
        strict=True,
    ):
        np.testing.assert_allclose(scaled, mean * plain, rtol=1e-5)


def test_the_shuffled_control_permutes_the_multipliers(two_steps):
    balanced, analysis = two_steps["tb"][0], two_steps["shuffled"][0]
    np.testing.assert_array_equal(
        np.sort(analysis.multipliers), np.sort(balanced.multipliers)
    )


def test_only_tuned_layers_are_shuffled():
    def analyze(params) -> Any:
        del params
        return Table(tuple("abcdef"), multipliers, tuned)

    tuned = jnp.array([True, False, True, True, False, True])
    multipliers = jnp.array([0.5, 1.0, 0.8, 1.2, 1.0, 1.5])
    dealt = np.array([shuffled(analyze, seed)(()).multipliers for seed in range(20)])
    np.testing.assert_array_equal(dealt[:, ~np.asarray(tuned)], 1)
    np.testing.assert_array_equal(np.sort(dealt), [np.sort(multipliers)] * 20)
    assert len(np.unique(dealt, axis=0)) > 5
    np.testing.assert_array_equal(shuffled(analyze, 3)(()).multipliers, dealt[3])


@dataclasses.dataclass(frozen=True)
class Table:
    """What a control sees of an analysis."""

    layers: tuple[str, ...]
    multipliers: jax.Array
    tuned: jax.Array


def test_lookahead_trains_with_donated_states():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 8, 8, 3), np.uint8)
    labels = rng.integers(0, 10, 8, np.int32)
    preparation = Preparation.of(images, pad=1, flip=True)
    dataset = data.Dataset(images, labels, images, labels, 10, preparation)
    config = dataclasses.replace(
        configs.DIGITS, model="resnet8", width=0.25, epochs=2, batch_size=4
    )
    program = loop.make_program(config, arms.ARMS["lookahead"], dataset)
    _, scores = program.train(program.start(), images, labels, jnp.int32(0))
    assert np.isfinite(scores.loss)


def test_numbers_are_the_published_ones():
    def numbers(arm, model="resnet18", dataset="cifar10", **given):
        base = dataclasses.replace(
            configs.CIFAR10, model=model, dataset=dataset, **given
        )
        return dataclasses.astuple(settings(base, arm))

    assert numbers("cal") == (0.1, 0.001, 0.5, 1.5)
    assert numbers("tb", "vgg16") == (0.05, 0.005, 0.5, 1.5)
    assert numbers("tb_snr", "resnet34", "cifar100") == (0.1, 0.005, 0.6, 1.4)
    assert numbers("snr", "vgg19", "cifar100") == (0.05, 0.01, 0.5, 1.5)
    assert numbers("cal", "wrn28_6", "tinyimagenet")[0] == 0.05
    assert numbers("tb", "wrn28_6", "tinyimagenet") == (0.1, 1e-4, 0.6, 1.4)
    assert [numbers(arm)[0] for arm in ("lars", "lamb", "adamw")] == [28, 0.01, 0.001]
    assert [numbers(arm, "resnet34")[0] for arm in ("lars", "lookahead", "sgdr")] == [
        32,
        0.15,
        0.05,
    ]
    given = {"learning_rate": 0.2, "snr": 0.3, "low": 0.4, "high": 2.0}
    assert numbers("tb_snr", **given) == (0.2, 0.3, 0.4, 2.0)


def test_sgdr_restarts_at_half_of_the_epochs():
    config = dataclasses.replace(configs.CIFAR10, epochs=200)
    rates = arms.ARMS["sgdr"].schedule(config, 10)
    cosine = arms.ARMS["cal"].schedule(dataclasses.replace(config, epochs=100), 10)
    for epoch in (0, 1, 50, 99):
        for step in (10 * epoch, 10 * epoch + 9, 10 * (epoch + 100)):
            np.testing.assert_allclose(rates(step), cosine(10 * epoch), rtol=1e-5)
