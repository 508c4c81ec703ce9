"""SNR, SGDP and Lookahead against steps in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.baselines import (
    add_spectral_norm_gradient,
    lookahead,
    power_iteration,
    scale_by_sgdp,
)


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
        params = params + updates
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
