"""The transform on trees that hold more than healthy kernels, and its errors.

A kernel without a spectrum is `test_faults.py`'s affair.
"""

import re

import configurations as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from configurations import ANALYZE, CONFIGURATIONS
from notation import DENSE, STACK

import tb_optax
from tb_optax import Layer

every_row = pytest.mark.parametrize("row", CONFIGURATIONS, ids=lambda row: row.name)
every_interval = pytest.mark.parametrize("interval", [1, None])


def updated(transform, grads, params, analysis):
    """One update from a state that holds the multipliers of an analysis."""
    state = tb_optax.set_multipliers(transform.init(params), analysis)
    return transform.update(grads, state, params)


ODD = {
    "none": None,
    "integer_scalar": np.int32(7),
    "integers": np.arange(8),
    "empty": np.zeros((0,), np.float32),
    "scalar": np.float32(0.5),
    "vector": np.linspace(1, 2, 5, dtype=np.float32),
    "kernel_of_integers": {"kernel": np.arange(64).reshape(8, 8)},
    "kernel_of_booleans": {"kernel": np.arange(64).reshape(8, 8) > 9},
    "empty_kernel": {"kernel": np.zeros((0, 4), np.float32)},
    "complex_kernel": {"kernel": np.full((4, 4), 1j, np.complex64)},
    "vector_kernel": {"kernel": np.ones(8, np.float32)},
}
# Leaves of a raw Equinox model.
NO_ARRAYS = {"activation": jax.nn.relu, "name": "text", "rate": 0.5}


@every_interval
@pytest.mark.parametrize("odd", ["present", "not trained", "no arrays"])
def test_leaves_without_a_spectrum_do_not_count(interval, odd):
    """Whether they have updates or, not being trained or no arrays, none."""
    params = table.make_params()
    own = jax.tree.map(jnp.asarray, ODD)
    own = NO_ARRAYS if odd == "no arrays" else own
    own_updates = own if odd == "present" else jax.tree.map(lambda _: None, own)
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    analysis = ANALYZE(params)
    expected, expected_state = updated(transform, params, params, analysis)
    grads, params = params | own_updates, params | own
    updates, state = updated(transform, grads, params, analysis)
    table.assert_equal(updates, expected | own_updates)
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


# Which leaf has None for an update, in what tree and layers.
FROZEN = {
    "follower": ((8, 6), (6,), [Layer("kernel", DENSE, ("bias",))], "bias"),
    "kernel": ((8, 6), (6,), [Layer("kernel", DENSE, ("bias",))], "kernel"),
    "stack": ((3, 8, 6), (3, 6), [Layer("kernel", STACK, ("bias",))], "kernel"),
    "parts": (
        (8, 6),
        (6,),
        [Layer("kernel", DENSE, ("bias",), part=(1, i, i + 3)) for i in (0, 3)],
        "kernel",
    ),
}


@every_interval
@pytest.mark.parametrize(("kernel", "bias", "layers", "leaf"), FROZEN.values())
def test_a_leaf_without_an_update_keeps_its_place(kernel, bias, layers, leaf, interval):
    """Equinox gives None for what is frozen; the layer goes on without it."""
    params = {
        "kernel": jnp.asarray(table.random_kernel(0, kernel), jnp.float32),
        "bias": jnp.ones(bias),
        "other": {"kernel": jnp.asarray(table.random_kernel(1, (8, 6)), jnp.float32)},
    }
    layers = [*layers, Layer("other/kernel", DENSE)]
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=2)
    transform = tb_optax.scale_by_temp_balance(analyze, interval=interval)
    analysis = analyze(params)
    updates, _ = updated(transform, params | {leaf: None}, params, analysis)
    expected, _ = updated(transform, params, params, analysis)
    table.assert_equal(updates, dict(expected) | {leaf: None})


ONES = {
    "Conv_0": {"kernel": jnp.ones((1, 2, 6, 6)), "bias": jnp.ones(6)},
    "Dense_0": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6), "long": jnp.ones(9)},
    "Dense_1": {"kernel": jnp.ones((6, 7))},
    "stack": {"kernel": jnp.ones((3, 8, 6)), "bias": jnp.ones(6), "two": jnp.ones(2)},
}
D0, STACKED = "Dense_0/kernel", "stack/kernel"
# Lists of layers that do not fit the tree, and what the error says.
MISFITS = {
    "missing layer": (
        [Layer(D0, DENSE), Layer("Dense_9/kernel", DENSE)],
        r"'Dense_9/kernel' is not in the parameters.*'Dense_0/kernel'",
    ),
    "missing follower": (
        [Layer(D0, DENSE, ("Dense_0/offset",))],
        r"'Dense_0/offset', which follows layer 'Dense_0/kernel', is not in the param",
    ),
    "follower of two": (
        [Layer(path, DENSE, ("Dense_0/bias",)) for path in (D0, "Dense_1/kernel")],
        r"'Dense_0/bias' belongs to two layers, 'Dense_0/kernel' and 'Dense_1/k",
    ),
    "twice": (
        [Layer(D0, DENSE), Layer(D0, DENSE)],
        r"'Dense_0/kernel' belongs to two layers",
    ),
    "rank": ([Layer("Conv_0/kernel", DENSE)], r"'Conv_0/ker.*rank 2.*\(1, 2, 6, 6\)"),
    "one slice twice": (
        [Layer(STACKED, STACK), Layer(STACKED, STACK, index=(1,))],
        r"'stack/kernel' belongs to two layers, 'stack/kernel\[1\]' and 'stack/ker",
    ),
    "overlapping parts": (
        [Layer(D0, DENSE, part=(1, 0, 4)), Layer(D0, DENSE, part=(1, 3, 6))],
        r"belongs to two layers, 'Dense_0/kernel\{0:4\}' and 'Dense_0/kernel\{3:6\}'",
    ),
    "not stacked": (
        [Layer(STACKED, STACK, ("stack/bias",))],
        r"'stack/bias' of shape \(6,\) follows one slice of 'stack.*not stacked alike",
    ),
    "of another length": (
        [Layer(STACKED, STACK, ("stack/two",))],
        r"'stack/two' of shape \(2,\) follows one slice of 'stack/kernel'.*\(3, 8, 6\)",
    ),
    "index": (
        [Layer(STACKED, STACK, index=(3,))],
        r"'stack/kernel': index \(3,\) is outside",
    ),
    "negative index": (
        [Layer(STACKED, STACK, index=(-1,))],
        r"'stack/kernel': index \(-1,\) is outside",
    ),
    "part": (
        [Layer(D0, DENSE, part=(1, 4, 7))],
        r"'Dense_0/kernel': part \(1, 4, 7\) passes the end of axis 1 of shape \(8, 6",
    ),
    "follower of a part": (
        [Layer(D0, DENSE, ("Dense_0/long",), part=(1, 0, 3))],
        r"'Dense_0/long' of shape \(9,\) follows a part of 'Dense_0/k.*output axis 1",
    ),
    "matrix of a part": (
        [Layer(D0, DENSE, ("Dense_1/kernel",), part=(1, 0, 3))],
        r"'Dense_1/kernel' of shape \(6, 7\) follows a part.*output axis 1",
    ),
}


@every_interval
@pytest.mark.parametrize("name", MISFITS)
def test_layers_that_do_not_fit_are_named(name, interval):
    """By `update`; `init` passes, as helpers of Optax need."""
    layers, message = MISFITS[name]
    analyze = tb_optax.layer_analysis(layers)
    transform = tb_optax.scale_by_temp_balance(analyze, interval=interval)
    state = transform.init(ONES)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        transform.update(ONES, state, ONES)


@every_interval
def test_what_is_found_and_does_not_fit_is_named(interval):
    params = table.make_params()
    odd = params | {"Odd_0": {"table": jnp.ones((5, 4))}}
    small = tb_optax.layer_analysis(max_dim=5)
    too_large = "'Conv_0/kernel' needs the eigenvalues of a 6 x 6 matrix.*max_dim = 5"
    for analyze, tree, message in (
        (ANALYZE, odd, r"(?s)'Odd_0/table' of shape \(5, 4\).*axes="),
        (small, params, too_large),
    ):
        transform = tb_optax.scale_by_temp_balance(analyze, interval=interval)
        state = transform.init(tree)
        with pytest.raises(ValueError, match=message):
            transform.update(tree, state, tree)


@every_row
def test_a_state_or_an_analysis_of_another_tree_is_an_error(row):
    params = table.make_params()
    fewer = {"Dense_0": params["Dense_0"]}
    state, other = row.transform().init(params), row.transform().init(fewer)
    mixed = (*state[:-1], tb_optax.get_state(other))
    message = "1 multipliers, but there are 3 layers: Conv_0/kernel, Dense_0/kernel, "
    with pytest.raises(ValueError, match=message):
        row.transform().update(params, mixed, params)
    with pytest.warns(UserWarning, match="only one layer can be tuned"):
        analysis = tb_optax.layer_analysis(min_eigenvalues=4)(fewer)
    message = "3 multipliers, but there are 1 layers"
    with pytest.raises(ValueError, match=message):
        tb_optax.set_multipliers(state, analysis)
    with pytest.raises(ValueError, match=message):
        tb_optax.log_dict(state, analysis.layers)


@pytest.mark.parametrize("interval", [3, None])
def test_set_multipliers_wants_one_finite_number_per_layer(interval):
    state = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval).init(
        table.make_params()
    )
    for values in ([1.0], [1.0] * 4, 1.0, [[1.0, 1.0, 1.0]]):
        shape = re.escape(str(np.shape(values)))
        message = rf"shape \(3,\), one per layer, got {shape}"
        for given in (values, jnp.asarray(values)):
            with pytest.raises(ValueError, match=message):
                tb_optax.set_multipliers(state, given)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"multipliers must be finite.*{value}"):
            tb_optax.set_multipliers(state, [1.0, value, 1.0])


@pytest.mark.parametrize("interval", [0, -1, True, False, np.int64(0)])
def test_interval_is_checked_when_it_is_given(interval):
    message = rf"interval must be an int >= 1, got interval = .*{interval}"
    with pytest.raises(ValueError, match=message):
        tb_optax.scale_by_temp_balance(interval=interval)
    with pytest.raises(ValueError, match=message):
        tb_optax.temp_balance(optax.sgd(0.1), interval=interval)


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
    with pytest.raises(ValueError, match=r"no TempBalanceState.*in the chain"):
        read(optax.adam(0.1).init(params))
    twice = optax.chain(
        tb_optax.scale_by_temp_balance(ANALYZE, interval=1),
        optax.identity(),
        tb_optax.scale_by_temp_balance(ANALYZE, interval=None),
    )
    with pytest.raises(ValueError, match=r"2 TempBalanceStates.*, at '0', '2'"):
        read(twice.init(params))
