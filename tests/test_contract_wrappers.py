"""The transform inside what Optax wraps around transforms.

A wrapper does not know what it holds, so the rows are the ways to refresh after one
optimizer, which is momentum.
"""

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

ROWS = CONFIGURATIONS[:3]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)

MODULES = ("BatchNorm_0", "Conv_0", "Dense_0", "Dense_1")


def ours(row, analyze=ANALYZE):
    """Our transform alone, with the row's interval."""
    return tb_optax.scale_by_temp_balance(analyze, interval=row.interval)


def label_modules(*labels):
    """A tree like the params, with one label for all leaves of each module."""
    params = table.make_params()
    return {
        module: jax.tree.map(lambda _, label=label: label, params[module])
        for module, label in zip(MODULES, labels, strict=True)
    }


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
    return optimizer.update(table.gradient(params), optimizer.init(params), params)[0]


def scaled(updates, analysis):
    """Updates times the multipliers of an analysis, which may know fewer leaves."""
    return jax.tree.map(lambda u, m: u * m, updates, analysis.leaf_multipliers(updates))


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


# --- which leaves are seen ----------------------------------------------------------


@every_row
@pytest.mark.parametrize(
    "wrap", ["masked", "selective", "listed", "partitioned", "freeze"]
)
def test_who_sees_a_frozen_layer(row, wrap):
    """A mask, a partition and a list leave it out of the ranks; a freeze does not."""
    params = table.make_params()
    frozen = label_modules(False, False, False, True)
    trainable = jax.tree.map(lambda leaf: not leaf, frozen)
    groups = jax.tree.map(lambda yes: "balanced" if yes else "frozen", trainable)
    layers = tb_optax.find_layers(params)
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    fewer = tb_optax.layer_analysis(layers[:-1], min_eigenvalues=4)
    transform = {
        "masked": lambda: optax.chain(
            row.optimizer(), optax.masked(ours(row, analyze), trainable)
        ),
        "selective": lambda: optax.selective_transform(
            row.transform(analyze), freeze_mask=frozen
        ),
        "listed": lambda: row.transform(fewer),
        "partitioned": lambda: optax.partition(
            {"balanced": row.transform(analyze), "frozen": optax.set_to_zero()}, groups
        ),
        "freeze": lambda: optax.chain(row.transform(analyze), optax.freeze(frozen)),
    }[wrap]()
    analysis = (analyze if wrap == "freeze" else fewer)(params)
    updates, state = update_once(row, transform, params, analysis)
    expected = scaled(plain_updates(row), analysis)
    if wrap in ("selective", "partitioned", "freeze"):
        expected["Dense_1"] = zeros(expected["Dense_1"])
    table.assert_close(updates, expected)
    found = tb_optax.get_state(state)
    np.testing.assert_array_equal(found.multipliers, analysis.multipliers)
    np.testing.assert_array_equal(found.alpha, analysis.alpha)
    assert not np.array_equal(
        fewer(params).multipliers, analyze(params).multipliers[:2]
    )


@every_row
def test_masked_followers_are_left_alone(row):
    params = table.make_params()
    mask = label_modules(False, True, True, True)
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
    analysis = ANALYZE(params)
    updates, state = update_once(row, transform, params, analysis)
    table.assert_close(tb_optax.get_multipliers(state), analysis.multipliers)
    plain = plain_updates(row)
    expected = scaled(plain, analysis)
    expected["BatchNorm_0"] = plain["BatchNorm_0"]
    expected["Conv_0"]["bias"] = plain["Conv_0"]["bias"]
    table.assert_close(updates, expected)


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
def test_two_groups_balanced_apart_are_told_apart(row):
    params = table.make_params()
    analyze = tb_optax.layer_analysis(min_eigenvalues=4)
    transform = optax.partition(
        {"a": row.transform(analyze), "b": row.transform(analyze)},
        label_modules("a", "a", "b", "b"),
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


# --- wrappers that change nothing ---------------------------------------------------


def injected(row, *static):
    """An interval that is not static is an array, inside jit a traced one."""
    inject = optax.inject_hyperparams(
        tb_optax.scale_by_temp_balance, static_args=("analyze", *static)
    )
    return optax.chain(row.optimizer(), inject(ANALYZE, interval=row.interval))


def factory(row):
    return optax.inject_hyperparams(
        lambda learning_rate: tb_optax.temp_balance(
            row.optimizer(learning_rate), ANALYZE, interval=row.interval
        )
    )(learning_rate=0.05)


def always(step: Any, **_: Any) -> Any:
    return step >= 0


TRANSPARENT = {
    "injected": lambda row: injected(row, "interval"),
    "hyperparameter": injected,
    "factory": factory,
    "named chain": lambda row: optax.named_chain(
        ("first", row.optimizer()), ("then", ours(row))
    ),
    "if finite": lambda row: optax.apply_if_finite(row.transform(), 2),
    "always": lambda row: optax.conditionally_transform(row.transform(), always),
}


@every_row
@pytest.mark.parametrize("wrapper", TRANSPARENT)
def test_a_wrapper_that_changes_nothing(row, wrapper):
    transform = TRANSPARENT[wrapper](row)
    params = table.make_params()
    step = traced(table.make_step(transform))
    steps = range(4)
    found, state = table.train(row, params, transform.init(params), steps, step)
    bare = row.transform().init(params)
    expected, bare = table.train(row, params, bare, steps)
    table.assert_close(found, expected)
    table.assert_close(tb_optax.get_state(state), tb_optax.get_state(bare))


def is_odd(step: Any, **_: Any) -> Any:
    return step % 2 == 1


REJECTING: dict[str, Any] = {
    "if finite": (lambda inner: optax.apply_if_finite(inner, 2), zeros),
    "conditionally": (
        lambda inner: optax.conditionally_transform(inner, is_odd),
        lambda grads: grads,
    ),
    "mask": (lambda inner: optax.conditionally_mask(inner, is_odd), zeros),
    "multi": (lambda inner: optax.MultiSteps(inner, 2).gradient_transformation(), None),
}


@every_row
@pytest.mark.parametrize("wrapper", ["if finite", "conditionally", "mask"])
def test_a_rejected_step_delays_no_more_than_itself(row, wrapper):
    wrap, otherwise = REJECTING[wrapper]
    transform = wrap(row.transform())
    params = table.make_params()
    grads = table.gradient(params)
    state: Any = row.refresh_by_host(params, transform.init(params), 0)
    first = jax.tree.map(lambda g: g * jnp.nan, grads)
    first = first if wrapper == "if finite" else grads
    updates, rejected = transform.update(first, state, params)
    table.assert_equal(updates, otherwise(first))
    table.assert_equal(rejected.inner_state, state.inner_state)
    updates, state = transform.update(grads, rejected, params)
    expected, bare = update_once(row, row.transform(), params, ANALYZE(params))
    table.assert_close(updates, expected)
    table.assert_close(state.inner_state, bare)


@every_row
@pytest.mark.parametrize("wrapper", REJECTING)
def test_branches_of_wrappers_agree_in_every_dtype(row, wrapper):
    transform = REJECTING[wrapper][0](ours(row))
    for dtype in ("bfloat16", "float16", "float32"):
        params = table.make_params(dtype)
        state = jax.eval_shape(transform.init, params)
        updates, later = jax.eval_shape(transform.update, params, state, params)
        assert later == state
        assert jax.tree.structure(updates) == jax.tree.structure(params)


# --- several steps ------------------------------------------------------------------


def multi_steps_inside(transform, optimizer, every):
    return optax.MultiSteps(optax.chain(optimizer, transform), every)


def multi_steps_outside(transform, optimizer, every):
    """Our transform after the accumulation: it counts mini-steps."""
    several = optax.MultiSteps(optimizer, every).gradient_transformation()
    return optax.chain(several, transform)


@every_row
@pytest.mark.parametrize(
    ("place", "counts"), [(multi_steps_inside, 1), (multi_steps_outside, 2)]
)
def test_multi_steps_is_a_step_with_the_mean_gradient(place, counts, row):
    interval = row.interval and row.interval * counts
    own = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    transform = place(own, row.optimizer(), 2)
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

    own = tb_optax.scale_by_temp_balance(analyze, interval=interval)
    transform = place(own, optax.sgd(0.1), 4)
    params = table.make_params()
    state = transform.init(params)
    update = jax.jit(transform.update)
    counts = []
    for _ in analyses:
        _, state = update(params, state, params)
        jax.effects_barrier()
        counts.append(len(calls))
    assert counts == analyses


@pytest.mark.parametrize("by", ["hand", "schedule"])
def test_an_interval_that_changes_while_training(by):
    """Every step at first, every third step later."""

    def schedule(count):
        return jnp.where(count < 2, 1, 3)

    transform = optax.inject_hyperparams(
        tb_optax.scale_by_temp_balance, static_args=("analyze",)
    )(ANALYZE, interval=schedule if by == "schedule" else 1)
    params = table.make_params()
    state: Any = transform.init(params)
    step = jax.jit(table.make_step(transform))
    refreshed = []
    for i in range(7):
        if by == "hand" and i == 2:
            state.hyperparams["interval"] = jnp.asarray(3)
        due = ANALYZE(params).multipliers
        params, state = step(params, state)
        if np.allclose(tb_optax.get_multipliers(state), due, atol=1e-5):
            refreshed.append(i)
    assert refreshed == [0, 1, 3, 6]


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


def test_extra_arguments_reach_what_comes_after():
    row = ROWS[1]
    transform = optax.chain(row.transform(), optax.contrib.reduce_on_plateau())
    params = table.make_params()
    state = transform.init(params)
    update = jax.eval_shape(
        lambda: transform.update(params, state, params, value=jnp.ones(()))
    )
    assert update == jax.eval_shape(lambda: (params, state))
