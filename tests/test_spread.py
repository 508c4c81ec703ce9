"""A refresh in pieces: the same numbers as a whole one, a little work at each step."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from notation import DENSE

import tb_optax
from tb_optax import Layer, MatrixAxes, quadrature
from tb_optax.spread import piece_starts

INTERVAL = 4
SHAPES = {
    "conv": (3, 3, 6, 8),
    "dense": (20, 16),
    "fused": (16, 24),
    "stack": (3, 12, 10),
    "wide": (10, 30),
}
LAYERS = (
    Layer("conv", MatrixAxes((2,), (3,), pooled=(0, 1))),
    Layer("dense", DENSE, ("dense_bias",)),
    Layer("fused", DENSE, part=(1, 0, 12)),
    Layer("fused", DENSE, part=(1, 12, 24)),
    Layer("stack", MatrixAxes((1,), (2,), stacked=(0,))),
    Layer("wide", DENSE),
)
EXACT = tb_optax.layer_analysis(LAYERS, min_eigenvalues=1)
# Larger kernels by products alone, the others exactly.
ESTIMATED = tb_optax.layer_analysis(
    LAYERS, min_eigenvalues=1, spectrum=quadrature(above=10, probes=2, steps=6)
)

every_analysis = pytest.mark.parametrize(
    "analyze", [EXACT, ESTIMATED], ids=["exact", "estimated"]
)


def make_params(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    params = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    return {**params, "dense_bias": jnp.zeros(16)}


@functools.cache
def compiled(analyze, interval, options):
    """One compilation for all tests of an interval."""
    tx = tb_optax.scale_by_temp_balance(analyze, interval=interval, spread=True)
    return tx.init, jax.jit(tx.update, compiler_options=dict(options))


def run(trajectory, interval=INTERVAL, analyze=EXACT, options=()):
    """States after each update, of parameters that come from outside."""
    init, update = compiled(analyze, interval, options)
    state, states = init(trajectory[0]), []
    for params in trajectory:
        _, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        states.append(state)
    return states


@every_analysis
def test_a_cycle_at_rest_gives_the_whole_analysis(analyze, alike):
    """The first refresh is whole; later the pieces of a cycle add up to one.

    Sums over tables of another width may round differently in the last place.
    """
    first, later = make_params(0), make_params(1)
    trajectory = [first] + [later] * INTERVAL
    start, *between, last = run(trajectory, analyze=analyze, options=alike)
    whole = jax.jit(analyze.__call__, compiler_options=dict(alike))
    known = whole(first)
    chex.assert_trees_all_equal(start.alpha, known.alpha)
    chex.assert_trees_all_equal(start.multipliers, known.multipliers)
    known = whole(later)
    np.testing.assert_allclose(last.alpha, known.alpha, rtol=2e-6)
    np.testing.assert_allclose(last.multipliers, known.multipliers, atol=1e-4)
    for state in between:
        chex.assert_trees_all_equal(state.multipliers, start.multipliers)


@pytest.mark.parametrize("interval", [1, INTERVAL])
def test_each_piece_takes_the_parameters_of_its_step(interval):
    """With an interval of 1 every step analyzes everything."""
    trajectory = [make_params(seed) for seed in range(interval + 1)]
    states = run(trajectory, interval)
    alphas = np.stack([EXACT(params).alpha for params in trajectory])
    layers = EXACT.resolve(trajectory[0]).layers
    starts = piece_starts(layers, SHAPES, interval)
    for piece in range(interval):
        own = slice(starts[piece], starts[piece + 1])
        seen = states[piece + 1].alpha[own]
        np.testing.assert_allclose(seen, alphas[piece + 1, own], rtol=1e-6)
        rest = np.r_[starts[piece + 1] : len(layers)]
        np.testing.assert_array_equal(states[piece + 1].alpha[rest], alphas[0, rest])


@pytest.mark.parametrize("interval", [1, 2, 3, 8, 50])
def test_pieces_are_whole_layers_in_order_and_even(interval):
    layers, kernels, _ = EXACT.resolve(make_params(0))
    starts = piece_starts(layers, SHAPES, interval)
    assert starts.shape == (interval + 1,)
    assert starts[0] == 0
    assert starts[-1] == len(layers)
    assert (np.diff(starts) >= 0).all()
    costs = []
    for layer in layers:
        m, n = sorted(layer.matrix_shape(kernels[layer.path].shape), reverse=True)
        pooled = 9 if layer.axes.pooled else 1
        costs.append(pooled * n**2 * (m + 4 / 3 * n))
    of_pieces = [sum(costs[a:b]) for a, b in itertools.pairwise(starts)]
    assert max(of_pieces) <= sum(costs) / interval + max(costs) * (1 + 1e-9)


def test_pieces_of_estimates_cost_what_products_cost():
    """Estimates of large kernels are cheap, and many of them make one piece."""
    shapes = {"small": (1024, 1024)} | {f"large {i}": (4096, 4096) for i in range(4)}
    layers = [Layer(name, DENSE) for name in shapes]
    # 2.3 · 1024³ = 2.5e9 against 2 · 32 · 8 · 4096² = 8.6e9 multiplications each.
    starts = piece_starts(layers, shapes, 2, quadrature())
    assert starts.tolist() == [0, 3, 5]


def test_state_is_stable_under_scan_and_compiled_once():
    tx = tb_optax.temp_balance(
        optax.sgd(0.1), ESTIMATED, interval=INTERVAL, spread=True
    )
    params = make_params(0)
    state = tx.init(params)
    traces = 0

    def step(carry, _):
        nonlocal traces
        traces += 1
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return (optax.apply_updates(params, updates), state), state

    scan = jax.jit(lambda c: jax.lax.scan(step, c, length=9))
    (_, after), states = scan((params, state))
    assert traces == 1
    before, after = tb_optax.get_state(state), tb_optax.get_state(after)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, before)
    assert after.count == 9
    alphas = tb_optax.get_state(states).alpha
    assert (alphas[8] != alphas[0]).all()


def test_what_cannot_be_spread_is_an_error():
    def transform(interval=INTERVAL, analyze=EXACT):
        return tb_optax.scale_by_temp_balance(analyze, interval=interval, spread=True)

    with pytest.raises(ValueError, match=r"spread=True needs an int interval.*None"):
        transform(interval=None)
    by_norm = tb_optax.layer_analysis(LAYERS, metric="spectral_norm")
    with pytest.raises(ValueError, match=r"metric='alpha'.*spectral_norm"):
        transform(analyze=by_norm)
    with pytest.raises(ValueError, match="spread=True needs a layer_analysis"):
        transform(analyze=lambda params: EXACT(params))
