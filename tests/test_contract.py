"""The transform inside a training step: jit, scan, cond, dtypes, donation, restarts.

Every test runs over one table: three ways to refresh behind four optimizers.
"""

import functools

import configurations as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from configurations import (
    ANALYZE,
    CONFIGURATIONS,
    EVERY_OPTIMIZER,
    OPTIMIZERS,
    REFRESHES,
)

import tb_optax

pytestmark = pytest.mark.usefixtures("quick_compilation")

every_row = pytest.mark.parametrize("row", CONFIGURATIONS, ids=lambda row: row.name)
every_interval = pytest.mark.parametrize("interval", [1, 3, None])


def start(row):
    params = table.make_params()
    return params, row.transform().init(params)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("row", EVERY_OPTIMIZER, ids=lambda row: row.name)
def test_updates_are_those_of_the_optimizer_times_the_multipliers(row):
    """And the multipliers are those of the parameters that came in, when due."""
    params, state = start(row)
    optimizer = row.optimizer()
    inner = optimizer.init(params)
    update, update_inner = row.transform().update, optimizer.update
    seen = []
    analysis = ANALYZE(params)
    for i in range(5):
        if i % row.every == 0:
            analysis = ANALYZE(params)
        state = row.refresh_by_host(params, state, i)
        grads = table.gradient(params)
        plain, inner = update_inner(grads, inner, params)
        updates, state = update(grads, state, params)
        multipliers = analysis.leaf_multipliers(params)
        expected = jax.tree.map(lambda u, m: u * m, plain, multipliers)
        table.assert_close(updates, expected)
        found = tb_optax.get_state(state)
        table.assert_close(found.multipliers, analysis.multipliers)
        table.assert_close(found.alpha, analysis.alpha)
        assert found.count == i + 1
        seen.append(tuple(found.multipliers.tolist()))
        params = optax.apply_updates(params, updates)
    changes = [i for i in range(1, 5) if seen[i] != seen[i - 1]]
    assert changes == [i for i in range(1, 5) if i % row.every == 0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_refresh_by_host_is_refresh_inside(optimizer):
    interval, every = REFRESHES["every_3"]
    inside = table.Configuration("inside", optimizer, interval, every)
    outside = table.Configuration("outside", optimizer, None, every)
    table.assert_close(
        table.train(outside, *start(outside), range(7)),
        table.train(inside, *start(inside), range(7)),
    )


@every_row
def test_jit_is_eager(row):
    eager = table.make_step(row.transform())
    table.assert_close(
        table.train(row, *start(row), range(4)),
        table.train(row, *start(row), range(4), eager),
    )


@every_interval
def test_eager_steps_compile_nothing_new(interval, compilations):
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    params = table.make_params()
    state = transform.init(params)
    for _ in range(4):
        _, state = transform.update(params, state, params)
    before = compilations()
    for _ in range(4):
        _, state = transform.update(params, state, params)
    assert compilations() == before


@every_row
def test_scan_is_a_loop(row):
    params, state = start(row)
    state = row.refresh_by_host(params, state, 0)
    step = table.make_step(row.transform())

    @jax.jit
    def scan(carry):
        return jax.lax.scan(lambda c, _: (step(*c), None), carry, length=7)[0]

    expected = params, state
    for _ in range(7):
        expected = table.jitted_step(row)(*expected)
    table.assert_close(scan((params, state)), expected)


@every_row
def test_vmap_is_a_loop(row):
    """A population in one step: every member with the multipliers of its own."""
    step = table.make_step(row.transform())
    members = [table.make_params(), jax.tree.map(jnp.sin, table.make_params())]
    states = [row.refresh_by_host(m, row.transform().init(m), 0) for m in members]

    def stacked(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    population = stacked(members), stacked(states)
    each = list(zip(members, states, strict=True))
    batched = jax.jit(jax.vmap(step))
    for _ in range(2):
        population = batched(*population)
        each = [table.jitted_step(row)(*one) for one in each]
    multipliers = jax.vmap(tb_optax.get_multipliers)(population[1])
    assert not np.array_equal(multipliers[0], multipliers[1])
    table.assert_close(population, stacked(each))


@every_row
def test_init_under_vmap(row):
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), table.make_params())
    states = jax.vmap(row.transform().init)(params)
    multipliers = jax.vmap(tb_optax.get_multipliers)(states)
    assert multipliers.shape == (2, len(table.KERNELS))


@every_row
def test_state_keeps_its_structure_and_types(row):
    params, state = start(row)
    ours = tb_optax.get_state(state)
    assert [f.shape for f in ours] == [(), (3,), (3,), (3,), ()]
    vectors = [jnp.float32] * 3
    assert [f.dtype for f in ours] == [jnp.int32, *vectors, jnp.int32]
    assert not any(field.weak_type for field in ours)
    refreshed = row.refresh_by_host(params, state, 0)
    _, updated = table.jitted_step(row)(params, state)
    table.assert_same_types(refreshed, state)
    table.assert_same_types(updated, state)


@every_row
def test_first_and_later_state_are_branches_of_cond(row):
    params, state = start(row)
    transform = row.transform()

    def either(flag):
        return jax.lax.cond(
            flag,
            lambda: (params, state),
            lambda: transform.update(table.gradient(params), state, params),
        )

    _, chosen = jax.eval_shape(either, True)
    assert jax.tree.structure(chosen) == jax.tree.structure(state)


@every_row
def test_one_compilation_for_all_steps(row, compilations):
    """Across refreshes, and after multipliers of any kind set by hand."""
    traces = []
    inner = table.make_step(row.transform())

    @jax.jit
    def one_step(params, state):
        traces.append(None)
        return inner(params, state)

    params, state = start(row)
    for i in range(4):
        state = row.refresh_by_host(params, state, i)
        params, state = one_step(params, state)
    vector = [1.0, 0.5, 2]
    for multipliers in (
        vector,
        tuple(vector),
        np.asarray(vector),
        np.asarray(vector, np.float16),
        jnp.asarray(vector),
        jnp.asarray([1, 2, 3]),
        ANALYZE(params),
        ANALYZE(jax.device_get(params)),
    ):
        state = tb_optax.set_multipliers(state, multipliers)
        params, state = one_step(params, state)
    assert len(traces) == 1
    assert compilations().count("jit(one_step)") == 1


@functools.cache
def donating_step(row):
    return jax.jit(table.make_step(row.transform()), donate_argnums=(0, 1))


@every_row
def test_params_and_state_can_be_donated(row):
    step = donating_step(row)
    params, state = start(row)
    expected = table.train(row, params, state, range(4))
    params, state = copy(params), row.transform().init(params)
    for i in range(4):
        state = row.refresh_by_host(params, state, i)
        donated = state
        params, state = step(params, state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    table.assert_close((params, state), expected)


@every_row
def test_donating_a_state_spares_the_analysis_set_into_it(row):
    step = donating_step(row)
    params, state = start(row)
    analysis = ANALYZE(params)
    vector = jnp.asarray([1.0, 0.5, 2.0])
    for given in (analysis, vector):
        state = tb_optax.set_multipliers(state, given)
        params, state = step(copy(params), state)
    kept = (*jax.tree.leaves(analysis), vector)
    assert not any(leaf.is_deleted() for leaf in kept)


@every_row
def test_no_two_arrays_of_a_state_share_a_buffer(row):
    params, state = start(row)
    refreshed = tb_optax.set_multipliers(state, ANALYZE(params))
    _, updated = table.jitted_step(row)(params, state)
    for each in (state, refreshed, updated):
        leaves = jax.tree.leaves((params, each))
        pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
        assert len(set(pointers)) == len(pointers)


def check_dtypes(row, params, default):
    transform = row.transform()
    state = jax.eval_shape(transform.init, params)
    updates, later = jax.eval_shape(transform.update, params, state, params)
    assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(
        jnp.result_type, params
    )
    assert later == state
    assert tb_optax.get_state(later).count.dtype == jnp.int32
    assert tb_optax.get_state(later).alpha.dtype == default
    assert tb_optax.get_state(later).multipliers.dtype == default


@every_row
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_updates_keep_the_dtype_of_params(row, dtype):
    check_dtypes(row, table.make_params(dtype), jnp.float32)


@every_row
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.usefixtures("x64")
def test_updates_keep_the_dtype_of_params_in_x64(row, dtype):
    check_dtypes(row, table.make_params(dtype), jnp.float64)


@every_interval
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_scaled_in_place(interval, dtype):
    """An update in half precision is its exact product, rounded once."""
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    params = table.make_params(dtype)
    analysis = ANALYZE(params)
    state = tb_optax.set_multipliers(transform.init(params), analysis)
    updates, _ = transform.update(params, state, params)
    expected = jax.tree.map(
        lambda p, m: (p.astype(jnp.float32) * m).astype(dtype),
        params,
        analysis.leaf_multipliers(params),
    )
    table.assert_equal(updates, expected)


@every_interval
def test_mixed_dtypes_share_one_state(interval):
    params = table.make_params()
    params["Dense_0"] = jax.tree.map(jnp.bfloat16, params["Dense_0"])
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    updates, state = transform.update(params, transform.init(params), params)
    assert table.types_of(updates) == table.types_of(params)
    assert tb_optax.get_multipliers(state).dtype == jnp.float32


@every_row
def test_init_needs_shapes_only(row):
    params, state = start(row)
    abstract = jax.eval_shape(lambda: params)
    shapes = jax.eval_shape(row.transform().init, abstract)
    assert shapes == jax.eval_shape(lambda: state)
    table.assert_equal(jax.jit(row.transform().init)(params), state)


@every_interval
def test_bare_init_accepts_abstract_params(interval):
    """Not only inside `eval_shape`: nothing of ours is made from values."""
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    params = table.make_params()
    state = transform.init(jax.eval_shape(lambda: params))
    table.assert_equal(state, transform.init(params))


@every_row
def test_empty_tree(row):
    """`init` accepts it, as helpers of Optax need; `update` says what is wrong."""
    transform = row.transform()
    state = transform.init({})
    assert tb_optax.get_multipliers(state).shape == (0,)
    with pytest.raises(ValueError, match="no layer to balance"):
        transform.update({}, state, {})


@every_row
def test_map_params_keeps_our_vectors_apart(row):
    params, state = start(row)
    specs = jax.tree.map(lambda leaf: f"spec of rank {leaf.ndim}", params)
    mapped = optax.tree.map_params(
        row.transform(),
        lambda _, spec: spec,
        state,
        specs,
        transform_non_params=lambda _: "replicated",
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert set(tb_optax.get_state(mapped)) == {"replicated"}
    assert set(jax.tree.leaves(mapped)) >= {"replicated", "spec of rank 2"}
    table.assert_equal(
        optax.tree.map_params(row.transform(), lambda leaf: leaf, state), state
    )


@every_row
def test_optax_tree_get_and_set(row):
    params, state = start(row)
    found = optax.tree.get(state, "TempBalanceState")
    assert isinstance(found, tb_optax.TempBalanceState)
    table.assert_equal(found, tb_optax.get_state(state))
    _, state = table.jitted_step(row)(params, state)
    table.assert_equal(
        optax.tree.get(state, "multipliers"), tb_optax.get_multipliers(state)
    )
    vector = jnp.asarray([1.0, 0.5, 2.0])
    changed = optax.tree.set(state, multipliers=vector)
    by_us = tb_optax.set_multipliers(state, [1.0, 0.5, 2.0])
    table.assert_equal(*map(tb_optax.get_multipliers, (changed, by_us)))


@every_row
def test_unknown_extra_arguments_are_ignored(row):
    params, state = start(row)
    update = row.transform().update
    extra = functools.partial(update, value=1.0, no_transform_knows_this=object())
    grads = table.gradient(params)
    assert isinstance(row.transform(), optax.GradientTransformationExtraArgs)
    assert jax.eval_shape(extra, grads, state, params) == jax.eval_shape(
        update, grads, state, params
    )


@every_row
def test_update_needs_params(row):
    params, state = start(row)
    transform = optax.chain(
        optax.identity(), tb_optax.scale_by_temp_balance(interval=row.interval)
    )
    state = transform.init(params)
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        transform.update(params, state)


@every_row
def test_debug_nans_finds_none(row):
    """Also where a kernel is zero, or orthogonal and so without a power law."""
    params = table.make_params()
    params["Dense_0"]["kernel"] = jnp.zeros((8, 6))
    params["Dense_1"]["kernel"] = jnp.eye(6, 7)
    state = row.transform().init(params)
    with jax.debug_nans(True), jax.debug_infs(True):
        state = row.refresh_by_host(params, state, 0)
        _, state = jax.jit(row.transform().update)(params, state, params)
    assert tb_optax.get_state(state).alpha[0] > 1
    assert tb_optax.get_state(state).alpha[1:].tolist() == [0, 0]


@every_row
def test_rank_promotion_is_never_implicit(row):
    params, state = start(row)
    with jax.numpy_rank_promotion("raise"):
        update = row.transform().update
        jax.eval_shape(update, table.gradient(params), state, params)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fit": tb_optax.fit_median(include_threshold=False), "eigenvalue_floor": 1e-5},
        {"fit": tb_optax.fit_min_ks(), "assign": tb_optax.sqrt()},
        {"fit": tb_optax.fit_peak(), "assign": tb_optax.step()},
        {"fit": tb_optax.fit_peak(published_window=False), "assign": tb_optax.log2()},
        {"assign": tb_optax.mean_one(tb_optax.sigmoid(), by_size=True)},
        {"assign": tb_optax.nested(tb_optax.linear(), tb_optax.standard_sigmoid())},
        {"groups": lambda layer: layer.path[:7], "metric": tb_optax.relative_alpha},
        {"windows": tb_optax.windows(rows=4)},
        {"spectrum": tb_optax.quadrature(above=4)},
    ],
    ids=lambda options: " ".join(options) or "default",
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_promotion_in_the_analysis_is_implicit(options, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), table.make_params())
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        analyze = tb_optax.layer_analysis(min_eigenvalues=4, **options)
        jax.eval_shape(analyze, params)


@every_row
def test_steps_move_nothing_between_host_and_device(row):
    params, state = start(row)
    state = row.refresh_by_host(params, state, 0)
    step = table.jitted_step(row)
    step(params, state)
    with jax.transfer_guard("disallow"):
        for _ in range(4):
            params, state = step(params, state)
        jax.block_until_ready(params)


@every_row
def test_nothing_leaks_from_tracing(row):
    params, state = start(row)
    with jax.checking_leaks(), jax.enable_checks(True):
        jax.eval_shape(row.transform().update, table.gradient(params), state, params)


@every_row
def test_set_multipliers_acts_until_the_next_refresh(row):
    params, state = start(row)
    params, state = table.jitted_step(row)(params, state)
    state = tb_optax.set_multipliers(state, [2.0, 0.25, 1.0])
    assert tb_optax.get_multipliers(state).tolist() == [2.0, 0.25, 1.0]
    _, later = table.jitted_step(row)(params, state)
    due = row.interval is not None and 1 % row.interval == 0
    expected = ANALYZE(params).multipliers if due else jnp.asarray([2.0, 0.25, 1.0])
    table.assert_close(tb_optax.get_multipliers(later), expected)


@every_row
def test_a_refresh_of_ones_own_inside_jit(row):
    """`analyze` and `set_multipliers` are branches of `cond` like any function."""
    params, state = start(row)

    @jax.jit
    def refreshed(due, state):
        return jax.lax.cond(
            due,
            lambda: tb_optax.set_multipliers(state, ANALYZE(params)),
            lambda: state,
        )

    table.assert_equal(refreshed(False, state), state)
    expected = tb_optax.set_multipliers(state, ANALYZE(params))
    table.assert_close(refreshed(True, state), expected)
    table.assert_same_types(refreshed(True, state), state)


@every_row
def test_log_dict_names_layers(row):
    params, state = start(row)
    _, state = table.jitted_step(row)(params, state)
    layers = jax.eval_shape(ANALYZE, params).layers
    log = tb_optax.log_dict(state, layers)
    assert list(log) == [
        *(f"alpha/{path}" for path in table.KERNELS),
        *(f"multiplier/{path}" for path in table.KERNELS),
    ]
    found = tb_optax.get_state(state)
    assert [float(v) for v in log.values()] == [
        *found.alpha.tolist(),
        *found.multipliers.tolist(),
    ]
    assert all(value.shape == () for value in log.values())


@every_row
def test_log_dict_reads_inside_a_jitted_step(row):
    params, state = start(row)
    layers = jax.eval_shape(ANALYZE, params).layers

    @jax.jit
    def measured(state):
        return tb_optax.log_dict(state, layers)

    assert measured(state)["multiplier/Dense_0/kernel"] == 1


@every_interval
def test_interval_counts_steps_of_its_own_state(interval):
    """The count saturates rather than overflow, and stays a refresh count."""
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=interval)
    params = table.make_params()
    last = jnp.asarray(np.iinfo(np.int32).max)
    state = tb_optax.get_state(transform.init(params))._replace(count=last)
    _, state = transform.update(params, state, params)
    assert tb_optax.get_state(state).count == last
