"""The transform inside what Optax wraps around transforms, row by row of the table."""

import functools
from contextlib import nullcontext
from typing import Any

import configurations as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from configurations import ANALYZE, CONFIGURATIONS

import tb_optax
from tb_optax import Layer, MatrixAxes

pytestmark = pytest.mark.usefixtures("quick_compilation")

every_row = pytest.mark.parametrize("row", CONFIGURATIONS, ids=lambda row: row.name)


def ours(row, analyze=ANALYZE):
    """Our transform alone, with the row's interval."""
    return tb_optax.scale_by_temp_balance(analyze, interval=row.interval)


def label_modules(params, labels):
    """The tree of the params with one label for all leaves of a module."""
    return {
        module: jax.tree.map(lambda _, label=labels[module]: label, leaves)
        for module, leaves in params.items()
    }


def without(params, *modules):
    return {name: leaves for name, leaves in params.items() if name not in modules}


def traced(function):
    """The function, run step by step and also traced, with the same types.

    It is not compiled, which would take most of the time of these tests.
    """

    def both(*arguments):
        result = function(*arguments)
        table.assert_same_types(result, jax.eval_shape(function, *arguments))
        return result

    return both


def update_once(row, transform, params, analysis):
    """One update from a new state, refreshed by the host where none is due."""
    state = transform.init(params)
    if row.interval is None:
        state = tb_optax.set_multipliers(state, analysis)
    return traced(transform.update)(table.gradient(params), state, params)


@functools.cache
def plain_updates(row):
    """First updates of the row's optimizer alone."""
    params = table.make_params()
    optimizer = row.optimizer()
    grads = table.gradient(params)
    return optimizer.update(grads, optimizer.init(params), params)[0]


@functools.cache
def balanced_update(row):
    """First updates of the row's transform, and the state behind them."""
    params = table.make_params()
    return update_once(row, row.transform(), params, ANALYZE(params))


def scaled(updates, analysis):
    """Updates times the multipliers of an analysis, which may know fewer leaves."""
    return jax.tree.map(lambda u, m: u * m, updates, analysis.leaf_multipliers(updates))


@every_row
def test_masked_layers_are_not_ranked(row):
    params = table.make_params()
    mask = label_modules(
        params,
        {"BatchNorm_0": True, "Conv_0": True, "Dense_0": True, "Dense_1": False},
    )
    analysis = ANALYZE(without(params, "Dense_1"))
    transform = optax.chain(row.optimizer(), optax.masked(ours(row), mask))
    updates, state = update_once(row, transform, params, analysis)
    table.assert_close(tb_optax.get_multipliers(state), analysis.multipliers)
    table.assert_close(updates, scaled(plain_updates(row), analysis))
    assert not np.array_equal(
        analysis.multipliers, ANALYZE(params).multipliers[jnp.asarray([0, 1])]
    )


@every_row
def test_masked_followers_are_left_alone(row):
    params = table.make_params()
    mask = label_modules(
        params,
        {"BatchNorm_0": False, "Conv_0": True, "Dense_0": True, "Dense_1": True},
    )
    mask["Conv_0"]["bias"] = False
    # The layers as they are found before anything is masked, followers and all.
    layers = tb_optax.find_layers(params)
    assert layers[0].follows == (
        "BatchNorm_0/bias",
        "BatchNorm_0/scale",
        "Conv_0/bias",
    )
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    transform = optax.chain(row.optimizer(), optax.masked(ours(row, analyze), mask))
    updates, state = update_once(row, transform, params, analyze(params))
    analysis = ANALYZE(params)
    table.assert_close(tb_optax.get_multipliers(state), analysis.multipliers)
    plain = plain_updates(row)
    expected = scaled(plain, analysis)
    expected["BatchNorm_0"] = plain["BatchNorm_0"]
    expected["Conv_0"]["bias"] = plain["Conv_0"]["bias"]
    table.assert_close(updates, expected)


@every_row
def test_three_ways_to_leave_frozen_layers_out_are_one(row):
    """A mask, a partition and a list without the frozen layers agree to the bit."""
    params = table.make_params()
    modules = {"BatchNorm_0": True, "Conv_0": True, "Dense_0": False, "Dense_1": True}
    trainable = label_modules(params, modules)
    groups = jax.tree.map(lambda yes: "balanced" if yes else "frozen", trainable)
    layers = tb_optax.find_layers(params)
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    without_frozen = tb_optax.layer_analysis(
        [layer for layer in layers if layer.path != "Dense_0/kernel"], min_eigenvalues=4
    )
    analysis = without_frozen(params)
    masked = optax.masked(row.transform(analyze), trainable)
    partitioned = optax.partition(
        {"balanced": row.transform(analyze), "frozen": optax.set_to_zero()}, groups
    )
    listed = row.transform(without_frozen)
    assert set(analysis.multipliers.tolist()) == {0.5, 1.5}
    for transform in (masked, partitioned, listed):
        _, state = update_once(row, transform, params, analysis)
        found = tb_optax.get_state(state)
        np.testing.assert_array_equal(found.multipliers, analysis.multipliers)
        np.testing.assert_array_equal(found.alpha, analysis.alpha)


def test_a_frozen_layer_costs_no_eigenproblem():
    """The shapes of a masked kernel appear nowhere in the compiled refresh."""
    params = {name: jnp.ones((8, 8)) for name in ("a", "b")} | {"c": jnp.ones((9, 11))}
    layers = [Layer(name, MatrixAxes((0,), (1,))) for name in params]
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    masked = {**params, "c": optax.MaskedNode()}
    assert "9,9]" in str(jax.make_jaxpr(analyze)(params))
    assert "9,9]" not in str(jax.make_jaxpr(analyze)(masked))
    everything_masked = dict.fromkeys(params, optax.MaskedNode())
    with pytest.raises(ValueError, match=r"no layer to balance: .* all 3 .* masked"):
        analyze(everything_masked)


@every_row
def test_partition_trains_a_group_as_if_alone(row):
    params = table.make_params()
    groups = {
        "BatchNorm_0": "plain",
        "Conv_0": "balanced",
        "Dense_0": "balanced",
        "Dense_1": "plain",
    }
    balanced = without(params, "BatchNorm_0", "Dense_1")
    analysis = ANALYZE(balanced)
    transform = optax.partition(
        {"balanced": row.transform(), "plain": row.optimizer()},
        label_modules(params, groups),
    )
    updates, state = update_once(row, transform, params, analysis)
    alone, alone_state = update_once(row, row.transform(), balanced, analysis)
    plain = without(plain_updates(row), "Conv_0", "Dense_0")
    table.assert_close(updates, alone | plain)
    table.assert_close(tb_optax.get_state(state), tb_optax.get_state(alone_state))


@every_row
def test_two_groups_balanced_apart_are_told_apart(row):
    params = table.make_params()
    groups = {"BatchNorm_0": "a", "Conv_0": "a", "Dense_0": "b", "Dense_1": "b"}
    analyze = tb_optax.layer_analysis(min_eigenvalues=4)
    transform = optax.partition(
        {"a": row.transform(analyze), "b": row.transform(analyze)},
        label_modules(params, groups),
    )
    state = transform.init(params)
    with pytest.raises(ValueError, match=r"2 TempBalanceStates.*\ba\b.*\bb\b"):
        tb_optax.get_state(state)
    with pytest.raises(ValueError, match="2 TempBalanceStates"):
        tb_optax.set_multipliers(state, [1.0, 1.0, 1.0])
    # Group a holds one layer, which has no other to be compared with.
    alone = "only one layer can be tuned: 'Conv_0/kernel'"
    expect = pytest.warns(UserWarning, match=alone) if row.interval else nullcontext()
    with expect:
        later: Any = transform.update(table.gradient(params), state, params)[1]
    one, two = later.inner_states["a"], later.inner_states["b"]
    assert tb_optax.get_multipliers(one).tolist() == [1]
    due = row.interval is not None
    assert tb_optax.get_multipliers(two).tolist() == ([0.5, 1.5] if due else [1, 1])


@every_row
def test_frozen_layers_stand_still_but_are_ranked(row):
    params = table.make_params()
    frozen = label_modules(
        params,
        {"BatchNorm_0": False, "Conv_0": False, "Dense_0": False, "Dense_1": True},
    )
    analysis = ANALYZE(params)
    transform = optax.chain(row.transform(), optax.freeze(frozen))
    updates, state = update_once(row, transform, params, analysis)
    expected = scaled(plain_updates(row), analysis)
    expected["Dense_1"] = jax.tree.map(jnp.zeros_like, expected["Dense_1"])
    table.assert_close(updates, expected)
    table.assert_close(tb_optax.get_multipliers(state), analysis.multipliers)


@every_row
def test_selective_transform_freezes_without_ranking(row):
    params = table.make_params()
    frozen = label_modules(
        params,
        {"BatchNorm_0": False, "Conv_0": False, "Dense_0": False, "Dense_1": True},
    )
    rest = without(params, "Dense_1")
    analysis = ANALYZE(rest)
    transform = optax.selective_transform(row.transform(), freeze_mask=frozen)
    updates, state = update_once(row, transform, params, analysis)
    expected = scaled(without(plain_updates(row), "Dense_1"), analysis)
    expected["Dense_1"] = jax.tree.map(jnp.zeros_like, params["Dense_1"])
    table.assert_close(updates, expected)
    table.assert_close(tb_optax.get_multipliers(state), analysis.multipliers)


def is_odd(step: Any, **_: Any) -> Any:
    return step % 2 == 1


MINI_STEPS = 2


def multi_steps_inside(row):
    return optax.MultiSteps(row.transform(), every_k_schedule=MINI_STEPS)


def multi_steps_outside(row):
    """Our transform behind the accumulation: it counts mini-steps."""
    accumulated = optax.MultiSteps(row.optimizer(), every_k_schedule=MINI_STEPS)
    interval = row.interval and row.interval * MINI_STEPS
    return optax.chain(
        accumulated.gradient_transformation(),
        tb_optax.scale_by_temp_balance(ANALYZE, interval=interval),
    )


# Inside, all rows; outside, where the optimizer knows nothing of us, those of one.
PLACES = [(multi_steps_inside, 1, row) for row in CONFIGURATIONS] + [
    (multi_steps_outside, MINI_STEPS, row) for row in CONFIGURATIONS[:3]
]


@pytest.mark.parametrize(
    ("place", "counts", "row"),
    PLACES,
    ids=[f"{place.__name__}-{row.name}" for place, _, row in PLACES],
)
def test_multi_steps_is_a_step_with_the_mean_gradient(place, counts, row):
    transform = place(row)
    params = table.make_params()
    state = transform.init(params)

    @jax.jit
    def mini_step(params, state, factor):
        grads = jax.tree.map(lambda g: factor * g, table.gradient(params))
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(params, state):
        return mini_step(*mini_step(params, state, 0.5), 1.5)

    steps = range(4)
    params, state = table.train(row, params, state, steps, step)
    expected = table.make_params()
    expected, bare = table.train(row, expected, row.transform().init(expected), steps)
    table.assert_close(params, expected, rtol=1e-4)
    found, wanted = tb_optax.get_state(state), tb_optax.get_state(bare)
    assert found.count == wanted.count * counts
    table.assert_close(found.multipliers, wanted.multipliers, rtol=1e-4)


@pytest.mark.parametrize(
    ("place", "interval", "analyses"),
    [
        # The inner update runs at every mini-step, its count advances at the fourth.
        (multi_steps_inside, 2, [1, 2, 3, 4, 4, 4, 4, 4, 5, 6, 7, 8]),
        (multi_steps_outside, 2, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]),
        (multi_steps_outside, 8, [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]),
    ],
)
def test_analyses_under_multi_steps(place, interval, analyses):
    calls = []

    def analyze(params):
        jax.debug.callback(lambda: calls.append(None))
        return ANALYZE(params)

    ours = tb_optax.scale_by_temp_balance(analyze, interval=interval)
    transform = {
        multi_steps_inside: lambda: optax.MultiSteps(ours, 4),
        multi_steps_outside: lambda: optax.chain(
            optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(), ours
        ),
    }[place]()
    params = table.make_params()
    state = transform.init(params)
    update = jax.jit(transform.update)
    counts = []
    for _ in analyses:
        _, state = update(params, state, params)
        jax.effects_barrier()
        counts.append(len(calls))
    assert counts == analyses


@every_row
def test_inject_hyperparams_around_ours(row):
    """With static arguments it is our transform to the bit."""
    params = table.make_params()
    injected = optax.inject_hyperparams(
        tb_optax.scale_by_temp_balance, static_args=("analyze", "interval")
    )(ANALYZE, interval=row.interval)
    state, bare = injected.init(params), ours(row).init(params)
    table.assert_equal(optax.tree.get(state, "inner_state"), bare)
    for i in range(4):
        state = row.refresh_by_host(params, state, i)
        bare = row.refresh_by_host(params, bare, i)
        updates, state = injected.update(params, state, params)
        updates_bare, bare = ours(row).update(params, bare, params)
        table.assert_equal(updates, updates_bare)
        table.assert_equal(optax.tree.get(state, "inner_state"), bare)


@every_row
def test_inject_hyperparams_around_a_factory(row):
    def factory(learning_rate):
        optimizer = row.optimizer(learning_rate)
        return tb_optax.temp_balance(optimizer, ANALYZE, interval=row.interval)

    transform = optax.inject_hyperparams(factory)(learning_rate=0.05)
    params = table.make_params()
    step = traced(table.make_step(transform))
    steps = range(4)
    found, state = table.train(row, params, transform.init(params), steps, step)
    bare = row.transform().init(params)
    expected, bare = table.train(row, params, bare, steps)
    table.assert_close(found, expected)
    table.assert_close(tb_optax.get_state(state), tb_optax.get_state(bare))


@every_row
def test_interval_as_a_hyperparameter(row):
    """It is an array then, inside jit a traced one."""
    transform = optax.inject_hyperparams(
        tb_optax.scale_by_temp_balance, static_args=("analyze",)
    )(ANALYZE, interval=row.interval)
    params = table.make_params()
    step = traced(table.make_step(transform))
    steps = range(4)
    found, state = table.train(row, params, transform.init(params), steps, step)
    bare_step, bare = table.make_step(ours(row)), ours(row).init(params)
    expected, bare = table.train(row, params, bare, steps, bare_step)
    table.assert_close(found, expected)
    table.assert_close(state.inner_state, bare)


def test_interval_changed_while_training():
    transform = optax.inject_hyperparams(
        tb_optax.scale_by_temp_balance, static_args=("analyze",)
    )(ANALYZE, interval=100)
    params = table.make_params()
    update = jax.jit(transform.update)
    _, state = update(params, transform.init(params), params)
    smaller = jax.tree.map(jnp.sin, params)
    _, state = update(params, state, smaller)
    table.assert_close(tb_optax.get_multipliers(state), ANALYZE(params).multipliers)
    state.hyperparams["interval"] = jnp.asarray(2)
    _, state = update(params, state, smaller)
    table.assert_close(tb_optax.get_multipliers(state), ANALYZE(smaller).multipliers)


def test_interval_as_a_schedule():
    """Every step at first, every third step later."""
    transform = optax.inject_hyperparams(
        tb_optax.scale_by_temp_balance, static_args=("analyze",)
    )(ANALYZE, interval=lambda count: jnp.where(count < 2, 1, 3))
    row = CONFIGURATIONS[0]
    params = table.make_params()
    state = transform.init(params)
    step = jax.jit(table.make_step(transform))
    refreshed = []
    for i in range(7):
        due = ANALYZE(params).multipliers
        params, state = table.train(row, params, state, range(i, i + 1), step)
        if np.allclose(tb_optax.get_multipliers(state), due, atol=1e-5):
            refreshed.append(i)
    assert refreshed == [0, 1, 3, 6]


@every_row
def test_apply_if_finite_delays_no_more_than_the_rejected_step(row):
    transform = optax.apply_if_finite(row.transform(), 2)
    params = table.make_params()
    update = jax.jit(transform.update)
    state = row.refresh_by_host(params, transform.init(params), 0)
    grads = table.gradient(params)
    broken = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, rejected = update(broken, state, params)
    table.assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
    table.assert_equal(rejected.inner_state, state.inner_state)
    updates, state = update(grads, rejected, params)
    expected, bare = balanced_update(row)
    table.assert_close(updates, expected)
    table.assert_close(state.inner_state, bare)


def check_conditional_steps(row, wrapper, otherwise):
    transform = wrapper(row.transform(), is_odd)
    params = table.make_params()
    grads = table.gradient(params)
    update = jax.jit(transform.update)
    state = row.refresh_by_host(params, transform.init(params), 0)
    updates, skipped = update(grads, state, params)
    table.assert_equal(updates, otherwise(grads))
    table.assert_equal(skipped.inner_state, state.inner_state)
    updates, state = update(grads, skipped, params)
    expected, bare = balanced_update(row)
    table.assert_close(updates, expected)
    table.assert_close(state.inner_state, bare)


@every_row
def test_conditionally_transform(row):
    check_conditional_steps(row, optax.conditionally_transform, lambda grads: grads)


@pytest.mark.parametrize("row", CONFIGURATIONS[:3], ids=lambda row: row.name)
def test_conditionally_mask(row):
    def zeros(grads):
        return jax.tree.map(jnp.zeros_like, grads)

    check_conditional_steps(row, optax.conditionally_mask, zeros)


@every_row
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: optax.apply_if_finite(inner, 2),
        lambda inner: optax.conditionally_transform(inner, is_odd),
        lambda inner: optax.conditionally_mask(inner, is_odd),
        lambda inner: optax.MultiSteps(inner, 2).gradient_transformation(),
    ],
    ids=["apply_if_finite", "conditionally_transform", "conditionally_mask", "multi"],
)
def test_branches_of_wrappers_agree_in_every_dtype(row, wrap, dtype):
    params = table.make_params(dtype)
    transform = wrap(ours(row))
    state = jax.eval_shape(transform.init, params)
    updates, later = jax.eval_shape(transform.update, params, state, params)
    assert later == state
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@every_row
def test_lookahead(row):
    """The fast parameters are balanced by their own spectra."""
    transform = optax.lookahead(row.transform(), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(table.make_params())
    state = transform.init(params)

    @traced
    def step(params, state):
        grads = table.gradient(params.fast)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    bare = row.transform().init(params.fast)
    expected = params.fast
    for i in range(2):
        if row.interval is None and i % row.every == 0:
            state = tb_optax.set_multipliers(state, ANALYZE(params.fast))
        params, state = step(params, state)
        expected, bare = table.train(row, expected, bare, range(i, i + 1))
    table.assert_close(params.fast, expected)
    table.assert_close(tb_optax.get_state(state), tb_optax.get_state(bare))
    params, state = step(params, state)
    table.assert_close(params.fast, params.slow)


@every_row
def test_schedule_free_is_balanced_where_the_gradient_is_taken(row):
    transform = optax.contrib.schedule_free(row.transform(), learning_rate=0.05)
    params = table.make_params()
    state = transform.init(params)
    step = traced(table.make_step(transform))
    analysis = ANALYZE(params)
    for i in range(4):
        if i % row.every == 0:
            analysis = ANALYZE(params)
        params, state = table.train(row, params, state, range(i, i + 1), step)
        multipliers = tb_optax.get_multipliers(state)
        table.assert_close(multipliers, analysis.multipliers, rtol=1e-4)


@every_row
def test_named_chain(row):
    transform = optax.named_chain(("first", row.optimizer()), ("then", ours(row)))
    params = table.make_params()
    updates, state = update_once(row, transform, params, ANALYZE(params))
    expected, bare = balanced_update(row)
    table.assert_equal(updates, expected)
    table.assert_equal(tb_optax.get_state(state), tb_optax.get_state(bare))


@every_row
def test_extra_arguments_reach_what_stands_behind(row):
    transform = optax.chain(row.transform(), optax.contrib.reduce_on_plateau())
    params = table.make_params()
    state = transform.init(params)
    update = jax.eval_shape(
        lambda: transform.update(params, state, params, value=jnp.ones(()))
    )
    assert update == jax.eval_shape(lambda: (params, state))
