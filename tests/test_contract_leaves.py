"""The transform on trees that hold more than healthy kernels, and its errors."""

import re
from typing import Any

import configurations as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from configurations import ANALYZE, CONFIGURATIONS

import tb_optax
from tb_optax import Layer, MatrixAxes

pytestmark = pytest.mark.usefixtures("quick_compilation")

every_row = pytest.mark.parametrize("row", CONFIGURATIONS, ids=lambda row: row.name)
every_interval = pytest.mark.parametrize("interval", [1, 3, None])

DENSE = MatrixAxes((0,), (1,))


def updated(transform, grads, params, analysis):
    """One update from a state that holds the multipliers of an analysis."""
    state = tb_optax.set_multipliers(transform.init(params), analysis)
    return transform.update(grads, state, params)


ODD_VECTORS = {
    "none": None,
    "integer_scalar": np.int32(7),
    "integers": np.arange(8),
    "empty": np.zeros((0,), np.float32),
    "scalar": np.float32(0.5),
    "vector": np.linspace(1, 2, 5, dtype=np.float32),
}
ODD_KERNELS = {
    "integers": {"kernel": np.arange(64).reshape(8, 8)},
    "booleans": {"kernel": np.arange(64).reshape(8, 8) > 9},
    "empty": {"kernel": np.zeros((0, 4), np.float32)},
    "complex": {"kernel": np.full((4, 4), 1j, np.complex64)},
    "vector": {"kernel": np.ones(8, np.float32)},
}


@every_row
def test_leaves_that_are_no_kernels_do_not_count(row):
    """Each of them gets the update that it would get without us."""
    params = table.make_params()
    grads = table.gradient(params)
    odd = jax.tree.map(jnp.asarray, ODD_VECTORS)
    analysis = ANALYZE(params)
    updates, state = updated(row.transform(), grads | odd, params | odd, analysis)
    optimizer = row.optimizer()
    plain, _ = optimizer.update(grads | odd, optimizer.init(params | odd), params | odd)
    multipliers = analysis.leaf_multipliers(plain)
    expected = jax.tree.map(lambda u, m: (u * m).astype(u.dtype), plain, multipliers)
    table.assert_close(updates, expected)
    assert tb_optax.get_multipliers(state).shape == (len(table.KERNELS),)


@every_interval
@pytest.mark.parametrize("present", [True, False])
def test_kernels_without_a_spectrum_do_not_count(interval, present):
    """Whether they have updates or, not being trained, none."""
    params = table.make_params()
    odd = jax.tree.map(jnp.asarray, ODD_KERNELS)
    odd_updates = odd if present else jax.tree.map(lambda _: None, odd)
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    analysis = ANALYZE(params)
    expected, expected_state = updated(transform, params, params, analysis)
    grads, params = params | odd_updates, params | odd
    updates, state = updated(transform, grads, params, analysis)
    table.assert_equal(updates, expected | odd_updates)
    table.assert_equal(state, expected_state)


@every_interval
def test_one_by_one_kernels_are_layers_that_are_not_tuned(interval):
    params = table.make_params() | {"Dense_2": {"kernel": jnp.ones((1, 1))}}
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    updates, state = updated(transform, params, params, ANALYZE(params))
    usual = ANALYZE(table.make_params())
    table.assert_equal(updates["Dense_2"], params["Dense_2"])
    assert tb_optax.get_multipliers(state)[3] == 1
    table.assert_close(tb_optax.get_multipliers(state)[:3], usual.multipliers)


@every_interval
def test_leaves_that_are_no_arrays_pass_by(interval):
    """Params of a raw Equinox model: functions and text, with None as updates."""
    params = table.make_params()
    raw = params | {"activation": jax.nn.relu, "name": "text", "rate": 0.5}
    grads = params | {"activation": None, "name": None, "rate": None}
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    analysis = ANALYZE(params)
    updates, state = updated(transform, grads, raw, analysis)
    expected, expected_state = updated(transform, params, params, analysis)
    nothing = {"activation": None, "name": None, "rate": None}
    table.assert_equal(updates, expected | nothing)
    table.assert_equal(state, expected_state)


@every_interval
def test_updates_without_params_for_them_keep_their_place(interval):
    """A leaf whose update is None is no follower lost."""
    params = table.make_params()
    grads: Any = table.make_params()
    grads["Conv_0"]["bias"] = None
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    updates, _ = updated(transform, grads, params, ANALYZE(params))
    whole, _ = updated(transform, params, params, ANALYZE(params))
    whole["Conv_0"]["bias"] = None
    table.assert_equal(updates, whole)


def orthogonal(seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(8, 6)))[0]


def one_entry(value):
    kernel = table.random_kernel(3, (8, 6))
    kernel[2, 3] = value
    return kernel


BROKEN_KERNELS = {
    "all_nan": np.full((8, 6), np.nan),
    "one_nan": one_entry(np.nan),
    "one_infinity": one_entry(np.inf),
    "one_negative_infinity": one_entry(-np.inf),
    "zero": np.zeros((8, 6)),
    "negative_zero": -np.zeros((8, 6)),
    "orthogonal": orthogonal(4),
    "scaled_orthogonal": 3e-5 * orthogonal(5),
    "identity": np.eye(8, 6),
    "rank_one": np.outer(np.linspace(1, 2, 8), np.linspace(1, 3, 6)),
}


@pytest.mark.parametrize("kernel", BROKEN_KERNELS.values(), ids=BROKEN_KERNELS)
@pytest.mark.parametrize(
    "assign",
    [tb_optax.linear(0.5, 1.5), tb_optax.sqrt(), tb_optax.log2(), tb_optax.step()],
    ids=repr,
)
def test_a_broken_kernel_does_not_spread_in_the_analysis(kernel, assign):
    analyze = tb_optax.layer_analysis(assign=assign, min_eigenvalues=4)
    params = table.make_params()
    params["Dense_0"]["kernel"] = jnp.asarray(kernel, jnp.float32)
    analysis = analyze(params)
    del params["Dense_0"]
    others = analyze(params)
    assert analysis.fitted.tolist() == [True, False, True]
    assert analysis.tuned.tolist() == [True, False, True]
    assert analysis.alpha[1] == 0
    assert analysis.multipliers[1] == 1
    kept = jnp.asarray([0, 2])
    table.assert_close(analysis.multipliers[kept], others.multipliers)
    table.assert_close(analysis.alpha[kept], others.alpha)
    assert len(set(others.multipliers.tolist())) == 2


@every_interval
@pytest.mark.parametrize("kernel", BROKEN_KERNELS.values(), ids=BROKEN_KERNELS)
def test_a_broken_kernel_does_not_spread_in_training(kernel, interval):
    """The updates of all others are those of a network without it."""
    params = table.make_params()
    del params["Dense_0"]
    grads = table.gradient(params)
    broken = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.ones(6)}
    broken_grads = {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    expected, _ = updated(transform, grads, params, ANALYZE(params))
    params, grads = params | {"Dense_0": broken}, grads | {"Dense_0": broken_grads}
    updates, state = updated(transform, grads, params, ANALYZE(params))
    table.assert_equal(updates.pop("Dense_0"), broken_grads)
    table.assert_close(updates, expected)
    assert np.isfinite(tb_optax.get_multipliers(state)).all()
    assert np.isfinite(tb_optax.get_state(state).alpha).all()


@every_row
def test_no_layer_to_balance_is_an_error_of_update(row):
    params = {"bias": jnp.ones(8), "scale": jnp.ones((8, 8))}
    state = row.transform().init(params)
    with pytest.raises(ValueError, match="no layer to balance"):
        row.transform().update(params, state, params)


@every_row
def test_an_unclear_kernel_is_named(row):
    params = table.make_params() | {"Odd_0": {"table": jnp.ones((5, 4))}}
    state = row.transform().init(params)
    message = r"'Odd_0/table' of shape \(5, 4\)(.|\n)*axes="
    with pytest.raises(ValueError, match=message):
        row.transform().update(params, state, params)


@every_row
def test_a_missing_layer_is_named(row):
    layers = (Layer("Dense_0/kernel", DENSE), Layer("Dense_9/kernel", DENSE))
    transform = row.transform(tb_optax.layer_analysis(layers))
    params = table.make_params()
    state = transform.init(params)
    message = "'Dense_9/kernel' is not in the parameters.*'Dense_0/kernel'"
    with pytest.raises(ValueError, match=message):
        transform.update(params, state, params)


@every_row
def test_a_missing_follower_is_named(row):
    layers = (Layer("Dense_0/kernel", DENSE, follows=("Dense_0/offset",)),)
    transform = row.transform(tb_optax.layer_analysis(layers))
    params = table.make_params()
    state = transform.init(params)
    message = "'Dense_0/offset', which follows layer 'Dense_0/kernel', is not in"
    with pytest.raises(ValueError, match=message):
        transform.update(params, state, params)


@every_row
def test_a_leaf_of_two_layers_is_named(row):
    layers = (
        Layer("Dense_0/kernel", DENSE, follows=("Dense_0/bias",)),
        Layer("Dense_1/kernel", DENSE, follows=("Dense_0/bias",)),
    )
    transform = row.transform(tb_optax.layer_analysis(layers))
    params = table.make_params()
    state = transform.init(params)
    message = "'Dense_0/bias' belongs to two layers, 'Dense_0/kernel' and 'Dense_1/k"
    with pytest.raises(ValueError, match=message):
        transform.update(params, state, params)


@every_row
def test_axes_of_another_rank_are_named(row):
    layers = (Layer("Conv_0/kernel", DENSE),)
    transform = row.transform(tb_optax.layer_analysis(layers))
    params = table.make_params()
    state = transform.init(params)
    message = r"'Conv_0/kernel'.*rank 2.*\(1, 2, 6, 6\)"
    with pytest.raises(ValueError, match=message):
        transform.update(params, state, params)


@every_row
def test_a_kernel_too_large_is_named(row):
    transform = row.transform(tb_optax.layer_analysis(max_dim=5))
    params = table.make_params()
    state = transform.init(params)
    message = "'Conv_0/kernel' needs the eigenvalues of a 6 x 6 matrix.*max_dim = 5"
    with pytest.raises(ValueError, match=message):
        transform.update(params, state, params)


@every_row
def test_a_state_of_another_tree_is_an_error(row):
    params = table.make_params()
    fewer = {"Dense_0": params["Dense_0"]}
    state = row.transform().init(params)
    ours = tb_optax.get_state(row.transform().init(fewer))
    state = (*state[:-1], ours)
    message = "1 multipliers, but there are 3 layers: Conv_0/kernel, Dense_0/kernel, "
    with pytest.raises(ValueError, match=message):
        row.transform().update(params, state, params)


@every_row
@pytest.mark.parametrize("values", [[1.0], [1.0] * 4, 1.0, [[1.0, 1.0, 1.0]]])
def test_set_multipliers_wants_one_per_layer(row, values):
    state = row.transform().init(table.make_params())
    shape = re.escape(str(np.shape(values)))
    with pytest.raises(ValueError, match=rf"shape \(3,\), one per layer, got {shape}"):
        tb_optax.set_multipliers(state, values)
    with pytest.raises(ValueError, match=rf"shape \(3,\), one per layer, got {shape}"):
        tb_optax.set_multipliers(state, jnp.asarray(values))


@every_row
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_set_multipliers_wants_finite_numbers(row, value):
    state = row.transform().init(table.make_params())
    with pytest.raises(ValueError, match=rf"multipliers must be finite.*{value}"):
        tb_optax.set_multipliers(state, [1.0, value, 1.0])


@every_row
def test_an_analysis_of_another_tree_is_an_error(row):
    params = table.make_params()
    state = row.transform().init(params)
    analyze = tb_optax.layer_analysis(min_eigenvalues=4)
    with pytest.warns(UserWarning, match="only one layer can be tuned"):
        analysis = analyze({"Dense_0": params["Dense_0"]})
    with pytest.raises(ValueError, match="3 multipliers, but there are 1 layers"):
        tb_optax.set_multipliers(state, analysis)
    with pytest.raises(ValueError, match="3 multipliers, but there are 1 layers"):
        tb_optax.log_dict(state, analysis.layers)


@pytest.mark.parametrize("interval", [0, -1, True, False, np.int64(0)])
@pytest.mark.parametrize(
    "make",
    [
        tb_optax.scale_by_temp_balance,
        lambda interval: tb_optax.temp_balance(optax.sgd(0.1), interval=interval),
    ],
    ids=["scale_by_temp_balance", "temp_balance"],
)
def test_interval_is_checked_when_it_is_given(make, interval):
    message = rf"interval must be an int >= 1, got interval = .*{interval}"
    with pytest.raises(ValueError, match=message):
        make(interval=interval)


def test_an_integer_of_numpy_is_an_interval():
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=np.int64(3))
    params = table.make_params()
    _, state = transform.update(params, transform.init(params), params)
    table.assert_close(tb_optax.get_multipliers(state), ANALYZE(params).multipliers)


@pytest.mark.parametrize(
    "read",
    [
        tb_optax.get_state,
        tb_optax.get_multipliers,
        lambda state: tb_optax.set_multipliers(state, [1.0]),
        lambda state: tb_optax.log_dict(state, ()),
    ],
    ids=["get_state", "get_multipliers", "set_multipliers", "log_dict"],
)
def test_a_state_without_ours_says_so(read):
    params = table.make_params()
    plain = optax.adam(0.1).init(params)
    with pytest.raises(ValueError, match=r"no TempBalanceState.*in the chain"):
        read(plain)
    twice = optax.chain(
        tb_optax.scale_by_temp_balance(ANALYZE, interval=1),
        optax.identity(),
        tb_optax.scale_by_temp_balance(ANALYZE, interval=None),
    )
    with pytest.raises(ValueError, match=r"2 TempBalanceStates.*, at '0', '2'"):
        read(twice.init(params))
