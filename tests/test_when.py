"""When multipliers change: start, stop, ramps, smoothing, weight decay; two states."""

import functools
from typing import Any

import configurations as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from configurations import ANALYZE

import tb_optax

PATH = [
    jax.tree.map(lambda leaf, i=i: jnp.sin((1 + 0.3 * i) * leaf), table.make_params())
    for i in range(10)
]


@functools.cache
def compiled(**options) -> Any:
    tx = tb_optax.scale_by_temp_balance(ANALYZE, **options)
    return tx.init, jax.jit(tx.update)


@functools.cache
def analyzed(i):
    return ANALYZE(PATH[i])


def states_of(steps=range(10), state=None, host=(), **options):
    """States after updates along a path of parameters, the host refreshing at some."""
    init, update = compiled(**options)
    state = init(PATH[0]) if state is None else state
    states = []
    for i in steps:
        if i in host:
            state = tb_optax.set_multipliers(state, analyzed(i))
        _, state = update(PATH[i], state, PATH[i])
        states.append(state)
    return states


def ramps(refreshes, ramp, count=10):
    """Multipliers of each update by the definition, in NumPy."""
    now = start = np.ones(3)
    target, since, found = now, -ramp, []
    for i in range(count):
        if i in refreshes:
            start, target, since = now, np.asarray(analyzed(i).multipliers), i
        part = min(1.0, (i - since + 1) / max(ramp, 1))
        now = start + (target - start) * part
        found.append(now)
    return np.stack(found)


def stacked(states):
    return np.stack([state.multipliers for state in states])


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(
    ("start", "stop", "refreshes"),
    [(0, None, [0, 3, 6, 9]), (2, None, [3, 6, 9]), (3, 6, [3, 6]), (0, 5, [0, 3])],
)
def test_refreshes_are_between_start_and_stop(start, stop, refreshes, spread):
    states = states_of(interval=3, start=start, stop=stop, spread=spread)
    since = [max((r for r in refreshes if r <= i), default=0) for i in range(10)]
    assert [int(state.refreshed) for state in states] == since
    for i, state in enumerate(states):
        if i < refreshes[0]:
            np.testing.assert_array_equal(state.multipliers, 1)
            np.testing.assert_array_equal(state.alpha, 0)
        if i == refreshes[0]:
            table.assert_close(state.multipliers, analyzed(i).multipliers)
        np.testing.assert_array_equal(state.multipliers, state.target)
    differs = np.any(np.diff(stacked(states), axis=0), axis=1).tolist()
    changed = [i for i in range(1, 10) if differs[i - 1]]
    assert changed == [r for r in refreshes if r > 0], changed


@pytest.mark.parametrize("ramp", [1, 2, 5])
def test_a_ramp_moves_in_equal_steps(ramp):
    """A refresh within a ramp starts from where it is; the last one lands exactly."""
    states = states_of(interval=3, stop=6, ramp=ramp)
    expected = ramps([0, 3, 6], ramp)
    np.testing.assert_allclose(stacked(states), expected, rtol=1e-5)
    if ramp < 5:
        np.testing.assert_array_equal(states[-1].multipliers, states[-1].target)


def test_a_ramp_to_what_the_host_sets():
    states = states_of(interval=None, host=(0, 4), ramp=3)
    np.testing.assert_allclose(stacked(states), ramps([0, 4], 3), rtol=1e-5)
    state = tb_optax.set_multipliers(states[-1], analyzed(9))
    table.assert_close(tb_optax.get_multipliers(state), analyzed(9).multipliers)
    table.assert_close(tb_optax.get_state(state).target, analyzed(9).multipliers)
    assert tb_optax.get_state(state).refreshed == 10


def test_a_ramp_with_a_spread_refresh_starts_when_it_is_whole():
    at_once = stacked(states_of(interval=3, spread=True))
    states = states_of(interval=3, spread=True, ramp=2)
    np.testing.assert_allclose(states[3].target, at_once[3], rtol=1e-5)
    middle = (at_once[2] + at_once[3]) / 2
    np.testing.assert_allclose(states[3].multipliers, middle, rtol=1e-5)
    np.testing.assert_allclose(states[4].multipliers, at_once[3], rtol=1e-5)


@pytest.mark.parametrize("spread", [False, True])
def test_smoothing_averages_alpha_over_refreshes(spread):
    new = states_of(interval=3, spread=spread)
    found = states_of(interval=3, spread=spread, smoothing=0.75)
    mean = new[0].alpha
    for i in (0, 3, 6, 9):
        mean = new[i].alpha if i == 0 else 0.75 * mean + 0.25 * new[i].alpha
        np.testing.assert_allclose(found[i].alpha, mean, rtol=1e-5)
        expected = tb_optax.linear(0.5, 1.5)(mean, jnp.ones(3, bool))
        np.testing.assert_allclose(found[i].multipliers, expected, rtol=1e-4)


def test_a_layer_that_dies_leaves_the_average():
    init, update = compiled(interval=1, smoothing=0.5)
    _, state = update(PATH[0], init(PATH[0]), PATH[0])
    broken = jax.tree.map(jnp.copy, PATH[1])
    broken["Dense_0"]["kernel"] *= jnp.nan
    _, state = update(PATH[1], state, broken)
    assert state.alpha[1] == 0
    assert state.multipliers[1] == 1
    _, state = update(PATH[2], state, PATH[2])
    np.testing.assert_allclose(state.alpha[1], analyzed(2).alpha[1], rtol=1e-5)


OPTIONS = {"start": 3, "stop": 7, "ramp": 2, "smoothing": 0.5, "weight_decay": 0.1}


def test_all_numbers_may_be_traced():
    """As `inject_hyperparams` passes them: values and structure stay the same."""
    make = optax.inject_hyperparams(
        tb_optax.scale_by_temp_balance, static_args=("analyze",)
    )
    injected: Any = make(ANALYZE, interval=3, **OPTIONS)
    update: Any = jax.jit(injected.update)
    init, plain = compiled(interval=3, **OPTIONS)
    state, plain_state = injected.init(PATH[0]), init(PATH[0])
    for params in PATH:
        updates, state = update(params, state, params)
        expected, plain_state = plain(params, plain_state, params)
        table.assert_close(updates, expected)
    table.assert_close(state.inner_state, plain_state)


def test_the_structure_never_changes():
    for options in ({}, OPTIONS, OPTIONS | {"spread": True}):
        init, update = compiled(interval=3, **options)
        state = init(PATH[0])
        _, after = update(PATH[0], state, PATH[0])
        table.assert_same_types(after, state)
        assert update._cache_size() == 1


def test_multi_steps_count_updates_of_the_optimizer():
    inner = tb_optax.scale_by_temp_balance(ANALYZE, interval=1, ramp=2)
    tx = optax.MultiSteps(inner, 2)
    state, update = tx.init(PATH[0]), jax.jit(tx.update)
    for i in range(8):
        _, state = update(PATH[i // 2], state, PATH[i // 2])
    found = tb_optax.get_multipliers(state)
    np.testing.assert_allclose(found, ramps(range(4), 2, 4)[-1], rtol=1e-5)


@pytest.mark.parametrize("options", [{"stop": 6, "ramp": 5}, {"spread": True}])
def test_resumed_in_the_middle_of_a_ramp_or_of_a_cycle(options, tmp_path):
    options = {"interval": 3, **options}
    whole = states_of(**options)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", whole[4])
        checkpointer.wait_until_finished()
        target = jax.eval_shape(compiled(**options)[0], PATH[0])
        restored = checkpointer.restore(tmp_path / "state", target)
    table.assert_equal(states_of(range(5, 10), restored, **options)[-1], whole[-1])


def test_a_checkpoint_without_the_new_fields_says_what_to_do(tmp_path):
    init, update = compiled(interval=3)
    _, state = update(PATH[0], init(PATH[0]), PATH[0])
    old = {name: getattr(state, name) for name in ("count", "multipliers", "alpha")}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", old)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="target"):
            checkpointer.restore(tmp_path / "state", jax.eval_shape(init, PATH[0]))
        raw = checkpointer.restore(tmp_path / "state")
    for use in (tb_optax.get_state, lambda raw: update(PATH[1], raw, PATH[1])):
        with pytest.raises(ValueError, match=r"target and no refreshed.*0\.1.*devices"):
            use(raw)
    again = tb_optax.TempBalanceState(
        **raw, target=jnp.copy(raw["multipliers"]), refreshed=jnp.zeros((), jnp.int32)
    )
    table.assert_close(
        update(PATH[1], again, PATH[1])[1].multipliers, state.multipliers
    )


BAD = [
    ({"start": -1}, r"start must be an int >= 0, got start = -1"),
    ({"start": 4, "stop": 3}, r"stop must be an int >= 4, got stop = 3"),
    ({"ramp": 1.5}, r"ramp must be an int >= 0, got ramp = 1.5"),
    ({"smoothing": 1.0}, r"smoothing must be a finite number >= 0 and < 1"),
    ({"weight_decay": -0.1}, r"weight_decay must be a finite number >= 0"),
    ({"interval": None, "smoothing": 0.5}, r"smoothing = 0.5 needs an interval"),
    ({"interval": None, "start": 2}, r"start = 2 needs an interval"),
    ({"interval": None, "stop": 2}, r"stop = 2 needs an interval"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_does_not_go_together_raises_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        tb_optax.scale_by_temp_balance(ANALYZE, **({"interval": 3} | options))


def test_smoothing_needs_the_metric_alpha():
    other = tb_optax.layer_analysis(metric="stable_rank")
    with pytest.raises(ValueError, match=r"metric='alpha'.*got 'stable_rank'"):
        tb_optax.scale_by_temp_balance(other, interval=3, smoothing=0.1)


# --- weight decay -------------------------------------------------------------------


def no_norms(params):
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: "BatchNorm" not in jax.tree_util.keystr(keys), params
    )


@pytest.mark.parametrize("mask", [None, no_norms, no_norms(PATH[0])])
def test_balanced_weight_decay(mask):
    params, grads = PATH[1], table.gradient(PATH[1])
    multipliers = ANALYZE(params).leaf_multipliers(params)
    kept = (
        no_norms(params) if mask is not None else jax.tree.map(lambda _: True, params)
    )
    added = jax.tree.map(
        lambda u, m, p, k: u + 0.1 * m * p * k, grads, multipliers, params, kept
    )
    alone = tb_optax.add_balanced_weight_decay(0.1, ANALYZE, interval=1, mask=mask)
    updates, state = alone.update(grads, alone.init(params), params)
    table.assert_close(updates, added)
    assert isinstance(state, tb_optax.TempBalanceState)
    both = tb_optax.scale_by_temp_balance(
        ANALYZE, interval=1, weight_decay=0.1, mask=mask
    )
    updates, _ = both.update(grads, both.init(params), params)
    table.assert_close(updates, jax.tree.map(lambda u, m: u * m, added, multipliers))


def test_multipliers_of_one_make_it_the_decay_of_optax():
    params, grads = PATH[1], table.gradient(PATH[1])
    flat = tb_optax.layer_analysis(min_eigenvalues=4, assign=tb_optax.linear(1, 1))
    ours = tb_optax.add_balanced_weight_decay(0.3, flat, interval=1, mask=no_norms)
    theirs = optax.add_decayed_weights(0.3, no_norms)
    updates, _ = ours.update(grads, ours.init(params), params)
    table.assert_close(updates, theirs.update(grads, theirs.init(params), params)[0])


def test_two_states_are_told_apart():
    tx = optax.chain(
        optax.scale_by_adam(),
        tb_optax.add_balanced_weight_decay(0.1, ANALYZE, interval=None),
        tb_optax.scale_by_temp_balance(ANALYZE, interval=None),
    )
    state = tx.init(PATH[0])
    with pytest.raises(ValueError, match=r"2 TempBalanceStates.*'1', '2'.*which="):
        tb_optax.get_state(state)
    state = tb_optax.set_multipliers(state, [2.0, 3.0, 4.0], which=1)
    np.testing.assert_array_equal(tb_optax.get_multipliers(state, "1"), 1)
    np.testing.assert_array_equal(tb_optax.get_multipliers(state, "2"), [2, 3, 4])
    logged = tb_optax.log_dict(state, tb_optax.find_layers(PATH[0]), which="2")
    assert logged["multiplier/Dense_1/kernel"] == 4
    for wrong in (2, "3"):
        with pytest.raises(ValueError, match="which must be a position below 2 or one"):
            tb_optax.get_state(state, which=wrong)
