"""One test for each row of docs/symptoms.md: the symptom, its cause and its remedy."""

import pathlib
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_contract
import test_contract_leaves
import test_contract_wrappers
from notation import DENSE

import tb_optax
from tb_optax import Layer, fit_median, layer_analysis

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "symptoms.md"
SHOWN: list[tuple[str, str]] = []


def shows(symptom: str, cause: str):
    """Mark a test with the row that it backs: the symptom, the start of the cause."""
    SHOWN.append((symptom, cause))
    return lambda test: test


# Rows whose tests stand elsewhere.
shows("A layer that I froze moves the others", "`optax.freeze` zeroes updates")(
    test_contract_wrappers.test_who_sees_a_frozen_layer
)
shows("The checkpoint does not restore", "Orbax restores lists and dicts")(
    test_contract.test_resumed_training_is_uninterrupted_training
)
shows('"the state holds 9 multipliers, but there are 3 layers"', "The state was made")(
    test_contract_leaves.test_a_state_or_an_analysis_of_another_tree_is_an_error
)


def gaussians(**shapes: tuple[int, int]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {name: jnp.float32(rng.normal(size=own)) for name, own in shapes.items()}


def dense(*names: str) -> list[Layer]:
    return [Layer(name, DENSE) for name in names]


def refreshed(params, analyze, optimizer=None):
    """Multipliers after the first update."""
    tx = tb_optax.temp_balance(optimizer or optax.sgd(0.1), analyze, interval=10)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    return tb_optax.get_multipliers(state)


def test_every_row_of_the_page_has_a_test():
    rows = re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", PAGE.read_text(), re.MULTILINE)
    assert rows[0] == ("symptom", "cause")
    assert len(rows[1:]) == len(SHOWN) == 12
    for (symptom, cause), (shown, start) in zip(
        sorted(rows[1:]), sorted(SHOWN), strict=True
    ):
        assert symptom == shown
        assert cause.startswith(start)


@shows("All multipliers are 1", "No layer, or only one, has `min_eigenvalues`")
def test_narrow_layers_are_warned_of_once():
    params = gaussians(a=(32, 32), b=(32, 64))
    analyze = layer_analysis(dense("a", "b"))
    tx = tb_optax.temp_balance(optax.sgd(0.1), analyze, interval=1)
    state = tx.init(params)
    update = jax.jit(tx.update)
    with warnings.catch_warnings(record=True) as one:
        warnings.simplefilter("always")
        for _ in range(3):
            _, state = update(params, state, params)
        update({k: 2 * v for k, v in params.items()}, state, params)
        assert analyze(params).multipliers.tolist() == [1, 1]
    assert "min_eigenvalues = 50: all 2 have 32" in str(one[0].message)
    assert one[0].category is UserWarning
    assert len(one) == 1
    assert tb_optax.get_multipliers(state).tolist() == [1, 1]
    (remedy,) = re.findall(r"min_eigenvalues=(\d+)", str(one[0].message))
    analyze = layer_analysis(dense("a", "b"), min_eigenvalues=int(remedy))
    assert refreshed(params, analyze).tolist() == [0.5, 1.5]
    params = gaussians(a=(32, 32), b=(64, 64))
    with pytest.warns(UserWarning, match="'b' with 64 .* the other 1 have at most 32"):
        assert refreshed(params, layer_analysis(dense("a", "b"))).tolist() == [1, 1]


def test_spread_refreshes_warn_too():
    params = gaussians(a=(32, 32), b=(32, 64))
    tx = tb_optax.scale_by_temp_balance(
        layer_analysis(dense("a", "b")), interval=4, spread=True
    )
    state = tx.init(params)
    with pytest.warns(UserWarning, match="min_eigenvalues = 50"):
        tx.update(params, state, params)


@shows("All multipliers are 1", "No refresh has taken place")
def test_nothing_is_refreshed_but_by_the_host():
    params = gaussians(a=(64, 64), b=(64, 128))
    analyze = layer_analysis(dense("a", "b"))
    tx = tb_optax.temp_balance(optax.sgd(0.1), analyze, interval=None)
    state = tx.update(params, tx.init(params), params)[1]
    assert tb_optax.get_multipliers(state).tolist() == [1, 1]
    state = tb_optax.set_multipliers(state, analyze(params))
    assert tb_optax.get_multipliers(state).tolist() == [0.5, 1.5]


@shows("All multipliers are 1", "No spectrum can be fitted")
def test_spectra_without_a_tail_are_not_fitted():
    orthogonal = jax.nn.initializers.orthogonal()
    params = {
        "zero": jnp.zeros((64, 64)),
        "nan": jnp.full((64, 64), jnp.nan),
        "orthogonal": orthogonal(jax.random.key(0), (64, 64)),
    }
    analysis = layer_analysis(dense(*params))(params)
    assert not analysis.fitted.any()
    assert analysis.multipliers.tolist() == [1, 1, 1]


@shows(
    "Multipliers differ, but training is the same as without",
    "The transform stands before",
)
def test_before_adam_it_has_no_effect():
    params = gaussians(a=(64, 64), b=(64, 128))
    ours = tb_optax.scale_by_temp_balance(layer_analysis(dense("a", "b")), interval=10)
    grads = jax.tree.map(jnp.cos, params)

    def updates(tx):
        return tx.update(grads, tx.init(params), params)[0]

    adam = optax.adam(0.1, eps=0, eps_root=0)
    plain = updates(adam)
    before, after = updates(optax.chain(ours, adam)), updates(optax.chain(adam, ours))
    for name, multiplier in (("a", 0.5), ("b", 1.5)):
        np.testing.assert_allclose(before[name], plain[name], rtol=1e-5)
        np.testing.assert_allclose(after[name], multiplier * plain[name], rtol=1e-6)


@shows("Half are 0.5 and half 1.5", "There are two layers, or two shapes of layers")
def test_two_shapes_of_untrained_layers_are_two_groups():
    params = gaussians(a=(64, 64), b=(64, 64), c=(256, 64), d=(256, 64))
    analyze = layer_analysis(dense(*params))
    multipliers = np.asarray(analyze(params).multipliers)
    assert (abs(multipliers - [0.5, 0.5, 1.5, 1.5]) < 0.2).all()
    # One layer of each shape has a heavier tail after training.
    initial_alpha = analyze(params).alpha
    columns = jnp.arange(1, 65) ** -0.5
    params["b"], params["d"] = params["b"] * columns, params["d"] * columns
    analyze = layer_analysis(dense(*params), metric=lambda a: a.alpha / initial_alpha)
    multipliers = np.asarray(analyze(params).multipliers)
    assert multipliers[[1, 3]].max() < multipliers[[0, 2]].min()


@shows("The loss is worse than without", "The linear map does not keep the mean")
def test_the_mean_of_the_multipliers_is_not_1():
    # A net with many layers of one shape and one that sticks out.
    params = gaussians(**dict.fromkeys("abcdefgh", (64, 64)), w=(512, 64))
    multipliers = refreshed(params, layer_analysis(dense(*params)))
    assert multipliers.mean() < 0.85

    def assign(metric, tuned):
        multipliers = tb_optax.linear(0.5, 1.5)(metric, tuned)
        mean = jnp.sum(multipliers, where=tuned) / jnp.maximum(tuned.sum(), 1)
        return multipliers / mean

    multipliers = refreshed(params, layer_analysis(dense(*params), assign=assign))
    assert float(multipliers.mean()) == pytest.approx(1, rel=1e-6)


@shows("One step in a hundred is slow", "A refresh decomposes all layers in one step.")
def test_a_spread_refresh_fits_few_layers_in_each_step():
    params = gaussians(**dict.fromkeys("abcd", (64, 64)))
    fitted: list[int] = []

    def fit(log_eigenvalues, valid):
        rows = len(log_eigenvalues)
        jax.debug.callback(lambda: fitted.append(rows))
        return fit_median()(log_eigenvalues, valid)

    for spread, expected in (
        (False, [4, 0, 0, 0, 4, 0, 0, 0]),
        # The first refresh is whole, so that training starts from initial alphas.
        (True, [4, 1, 1, 1, 1, 1, 1, 1]),
    ):
        tx = tb_optax.scale_by_temp_balance(
            layer_analysis(dense(*params), fit=fit), interval=4, spread=spread
        )
        state, update, counts = tx.init(params), jax.jit(tx.update), []
        for _ in expected:
            fitted.clear()
            _, state = update(params, state, params)
            jax.effects_barrier()
            counts.append(sum(fitted))
        assert counts == expected


@shows("My norm follows nothing", "`find_layers` reads names")
def test_norms_follow_by_order_of_execution():
    params = {
        "up": {"kernel": jnp.ones((64, 64))},
        "LayerNorm_0": {"scale": jnp.ones(64)},
        "down": {"kernel": jnp.ones((64, 64))},
    }

    def forward(params, x):
        x = x @ params["up"]["kernel"]
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True))
        return x * params["LayerNorm_0"]["scale"] @ params["down"]["kernel"]

    named = tb_optax.find_layers(params)
    assert all(layer.follows == () for layer in named)
    notes = {row["leaf"]: row["note"] for row in tb_optax.describe(params, named)}
    assert "trace_layers(..., norms=" in notes["LayerNorm_0/scale"]
    for norms, path in (("after", "up/kernel"), ("before", "down/kernel")):
        layers = tb_optax.trace_layers(forward, params, jnp.ones((2, 64)), norms=norms)
        owners = {leaf: layer.path for layer in layers for leaf in layer.follows}
        assert owners == {"LayerNorm_0/scale": path}


@shows("The checkpoint does not restore", "It was saved without TempBalance")
def test_a_run_goes_on_with_tempbalance_switched_on():
    params = gaussians(a=(64, 64), b=(64, 128))
    optimizer = optax.adam(0.1)
    _, restored = optimizer.update(params, optimizer.init(params), params)
    analyze = layer_analysis(dense("a", "b"))
    tx = tb_optax.temp_balance(optimizer, analyze, interval=10)
    fresh: Any = tx.init(params)
    opt_state: Any = (restored, *fresh[1:])
    assert jax.tree.structure(opt_state) == jax.tree.structure(fresh)
    updates, opt_state = jax.jit(tx.update)(params, opt_state, params)
    plain: Any = optimizer.update(params, restored, params)[0]
    for name, multiplier in (("a", 0.5), ("b", 1.5)):
        np.testing.assert_allclose(updates[name], multiplier * plain[name], rtol=1e-6)
    assert tb_optax.get_state(opt_state).count == 1
    assert optax.tree.get(opt_state[0], "mu")["a"].any()
