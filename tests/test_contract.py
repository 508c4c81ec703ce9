"""The transform inside a training step: jit, scan, cond, dtypes, donation, restarts.

The rows of `configurations.py` are ways to refresh after several optimizers. Where the
optimizer plays no part, only the ways to refresh are run.
"""

import dataclasses
import functools
from pathlib import Path

import configurations as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from configurations import ANALYZE, CONFIGURATIONS, EVERY_OPTIMIZER

import tb_optax

every_row = pytest.mark.parametrize("row", CONFIGURATIONS, ids=lambda row: row.name)
every_refresh = pytest.mark.parametrize(
    "row", CONFIGURATIONS[:3], ids=lambda row: row.name
)

VECTOR = [1.0, 0.5, 2.0]


def start(row):
    params = table.make_params()
    return params, row.transform().init(params)


def ours(row):
    return tb_optax.scale_by_temp_balance(ANALYZE, interval=row.interval)


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


def assert_no_shared_buffers(tree):
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]
    assert len(set(pointers)) == len(pointers)


@every_row
def test_one_compiled_step_serves_a_whole_training(row, compilations):
    """With donated arguments, across refreshes, and after multipliers set by hand.

    It does what the same step does that is not compiled, a state keeps its types, and
    donating it spares what was set into it.
    """
    traces = []
    eager = table.make_step(row.transform())

    def counted(params, state):
        traces.append(None)
        return eager(params, state)

    step = jax.jit(counted, donate_argnums=(0, 1))
    params, first = start(row)
    expected = table.train(row, params, first, range(4), eager)
    state = row.transform().init(params)
    params = jax.tree.map(jnp.copy, params)
    for i in range(4):
        state = row.refresh_by_host(params, state, i)
        assert_no_shared_buffers((params, state))
        donated = state
        params, state = step(params, state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
        table.assert_same_types(state, first)
    table.assert_close((params, state), expected)
    given = (
        VECTOR,
        tuple(VECTOR),
        np.asarray(VECTOR),
        np.asarray(VECTOR, np.float16),
        jnp.asarray(VECTOR),
        jnp.asarray([1, 2, 3]),
        ANALYZE(params),
        ANALYZE(jax.device_get(params)),
    )
    for multipliers in given:
        state = tb_optax.set_multipliers(state, multipliers)
        table.assert_same_types(state, first)
        assert_no_shared_buffers((params, state))
        params, state = step(params, state)
    kept = [leaf for leaf in jax.tree.leaves(given) if isinstance(leaf, jax.Array)]
    assert not any(leaf.is_deleted() for leaf in kept)
    assert len(traces) == 1
    assert compilations().count("jit(counted)") == 1


@every_refresh
def test_eager_steps_compile_nothing_new(row, compilations):
    params = table.make_params()
    state = ours(row).init(params)
    seen = []
    for _ in range(2):
        for _ in range(4):
            _, state = ours(row).update(params, state, params)
        seen.append(compilations())
    assert seen[0] == seen[1]


@every_refresh
def test_scan_and_vmap_are_loops(row):
    """Under vmap every member of a population has the multipliers of its own."""
    step = table.make_step(row.transform())
    members = [table.make_params(), jax.tree.map(jnp.sin, table.make_params())]
    states = [row.refresh_by_host(m, row.transform().init(m), 0) for m in members]

    def stacked(*trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    @jax.jit
    def scan(carry):
        return jax.lax.scan(lambda c, _: (step(*c), None), carry, length=7)[0]

    each = list(zip(members, states, strict=True))
    scanned = scan(each[0])
    population = stacked(*each)
    batched = jax.jit(jax.vmap(step))
    for i in range(7):
        if i < 2:
            population = batched(*population)
        each = [table.jitted_step(row)(*one) for one in each]
        if i == 1:
            table.assert_close(population, stacked(*each))
    table.assert_close(scanned, each[0])
    multipliers = jax.vmap(tb_optax.get_multipliers)(population[1])
    assert not np.array_equal(multipliers[0], multipliers[1])


@every_row
@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
def test_types(row, wide, request):
    """Updates keep those of params, the state has the default of JAX; all stand."""
    if wide:
        request.getfixturevalue("x64")
    default = jnp.float64 if wide else jnp.float32
    transform = row.transform()
    for dtype in ["bfloat16", "float16", "float32", "float64"][: 3 + wide]:
        params = table.make_params(dtype)
        state = jax.eval_shape(transform.init, params)
        updates, later = jax.eval_shape(transform.update, params, state, params)
        types = jax.tree.map(jnp.result_type, (updates, params))
        assert types[0] == types[1]
        assert later == state
        own = tb_optax.get_state(state)
        assert [field.shape for field in own] == [(), (3,), (3,), (3,), ()]
        expected = [jnp.int32, default, default, default, jnp.int32]
        assert [field.dtype for field in own] == expected
        assert not any(field.weak_type for field in own)


@every_refresh
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed"])
def test_half_precision_is_scaled_in_place(row, dtype):
    """An update in half precision is its exact product, rounded once."""
    params = table.make_params(jnp.float32 if dtype == "mixed" else dtype)
    if dtype == "mixed":
        params["Dense_0"] = jax.tree.map(jnp.bfloat16, params["Dense_0"])
    analysis = ANALYZE(params)
    state = tb_optax.set_multipliers(ours(row).init(params), analysis)
    updates, _ = ours(row).update(params, state, params)
    expected = jax.tree.map(
        lambda p, m: (p.astype(jnp.float32) * m).astype(p.dtype),
        params,
        analysis.leaf_multipliers(params),
    )
    table.assert_equal(updates, expected)


@every_row
def test_init_needs_shapes_only(row):
    params, state = start(row)
    init = row.transform().init
    abstract = jax.eval_shape(lambda: params)
    assert jax.eval_shape(init, abstract) == jax.eval_shape(lambda: state)
    table.assert_equal(jax.jit(init)(params), state)
    # Not only inside `eval_shape`: nothing of ours is made from values.
    table.assert_equal(ours(row).init(abstract), ours(row).init(params))
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), params)
    multipliers = jax.vmap(lambda p: tb_optax.get_multipliers(init(p)))(twice)
    assert multipliers.shape == (2, len(table.KERNELS))


WITHOUT_KERNELS = {
    "empty": {},
    "vectors": {"bias": jnp.ones(8), "scale": jnp.ones(())},
    "norm": {"scale": jnp.ones((8, 8)), "steps": jnp.zeros(3, jnp.int32)},
}


@pytest.mark.parametrize("params", WITHOUT_KERNELS.values(), ids=WITHOUT_KERNELS)
@pytest.mark.parametrize(
    "options",
    [
        *({"interval": 1}, {"interval": 3}, {"interval": None}),
        {"interval": 4, "spread": True},
        {"interval": 4, "ramp": 2, "start": 1},
        {"interval": 4, "smoothing": 0.5},
    ],
    ids=str,
)
def test_a_tree_without_kernels_is_left_alone(params, options):
    """With one warning, so that any model can have the transform."""
    transform = tb_optax.scale_by_temp_balance(**options)
    first = state = transform.init(params)
    # A second warning would be an error.
    with pytest.warns(UserWarning, match=r"no layer to balance.*trace_layers"):
        transform.update(params, state, params)
    for update in (jax.jit(transform.update), transform.update, transform.update):
        updates, state = update(params, state, params)
        table.assert_equal(updates, params)
    table.assert_same_types(state, first)
    own = tb_optax.get_state(state)
    assert [field.shape for field in own] == [(), (0,), (0,), (0,), ()]
    assert own.count == 3


def test_named_layers_that_are_not_there_stay_an_error():
    """So does an analysis of such a tree, which would have no row."""
    params = WITHOUT_KERNELS["vectors"]
    transform = tb_optax.scale_by_temp_balance(tb_optax.layer_analysis([]), interval=1)
    with pytest.raises(ValueError, match="no layer to balance"):
        transform.update(params, transform.init(params), params)
    with pytest.raises(ValueError, match="there is no layer to balance"):
        ANALYZE(params)


def test_a_function_that_analyzes_no_layer_is_an_error():
    params = table.make_params()

    def analyze(params):
        columns = jax.tree.map(lambda column: column[:0], ANALYZE(params))
        return dataclasses.replace(columns, layers=())

    transform = tb_optax.scale_by_temp_balance(analyze, interval=1)
    state = transform.init(params)
    with pytest.raises(ValueError, match=r"analyze must return .* at least one"):
        transform.update(params, state, params)


@every_row
def test_helpers_of_optax_find_our_state(row):
    """`tree_map_params` keeps our vectors apart; `tree.get` and `set` see them."""
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
    same = optax.tree.map_params(row.transform(), lambda leaf: leaf, state)
    table.assert_equal(same, state)
    found = optax.tree.get(state, "TempBalanceState")
    assert isinstance(found, tb_optax.TempBalanceState)
    table.assert_equal(found, tb_optax.get_state(state))
    changed = optax.tree.set(state, multipliers=jnp.asarray(VECTOR))
    by_us = tb_optax.set_multipliers(state, VECTOR)
    table.assert_equal(*map(tb_optax.get_multipliers, (changed, by_us)))
    table.assert_equal(
        optax.tree.get(by_us, "multipliers"), tb_optax.get_multipliers(by_us)
    )


@every_row
def test_arguments_of_update(row):
    """Unknown extra ones are ignored; parameters are needed."""
    params, state = start(row)
    update, grads = row.transform().update, table.gradient(params)
    assert isinstance(row.transform(), optax.GradientTransformationExtraArgs)
    extra = functools.partial(update, value=1.0, no_transform_knows_this=object())
    abstract = jax.eval_shape(update, grads, state, params)
    assert jax.eval_shape(extra, grads, state, params) == abstract
    transform = optax.chain(optax.identity(), ours(row))
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        transform.update(params, transform.init(params))


CHECKS = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "enable_checks": lambda: jax.enable_checks(True),
    "leaks": jax.checking_leaks,
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
}


@pytest.mark.parametrize("spread", [False, True], ids=["whole", "spread"])
@pytest.mark.parametrize("check", CHECKS)
def test_under_the_checks_of_jax(check, spread):
    """Also where a kernel is zero, or orthogonal and so without a power law."""
    params = table.make_params()
    params["Dense_0"]["kernel"] = jnp.zeros((8, 6))
    params["Dense_1"]["kernel"] = jnp.eye(6, 7)
    tx = tb_optax.temp_balance(optax.sgd(0.1), ANALYZE, interval=2, spread=spread)
    grads, state, update = table.gradient(params), tx.init(params), jax.jit(tx.update)
    layers = jax.eval_shape(ANALYZE, params).layers
    each = jax.jit(lambda params: ANALYZE(params).leaf_multipliers(params))
    jax.block_until_ready((params, grads, state))
    with CHECKS[check]():
        for _ in range(3):
            updates, state = update(grads, state, params)
        state = tb_optax.set_multipliers(state, ANALYZE(params))
        tb_optax.log_dict(state, layers)
        jax.block_until_ready((updates, each(params)))
    assert tb_optax.get_state(state).alpha[0] > 1
    assert tb_optax.get_state(state).alpha[1:].tolist() == [0, 0]


# Fits and maps see one type; the modules that test them allow no promotion at all.
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"windows": tb_optax.windows(rows=4)},
        {"spectrum": tb_optax.quadrature(above=4)},
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_no_promotion_in_the_analysis_is_implicit(options):
    params = table.make_params()
    params["Dense_0"] = jax.tree.map(jnp.bfloat16, params["Dense_0"])
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        analyze = tb_optax.layer_analysis(min_eigenvalues=4, **options)
        jax.eval_shape(analyze, params)


@every_refresh
def test_multipliers_of_the_host_act_until_the_next_refresh(row):
    """Set eagerly or in a branch of `cond`, like any function."""
    params, state = start(row)
    params, state = table.jitted_step(row)(params, state)
    state = tb_optax.set_multipliers(state, VECTOR)
    assert tb_optax.get_multipliers(state).tolist() == VECTOR
    _, later = table.jitted_step(row)(params, state)
    expected = ANALYZE(params).multipliers if row.interval == 1 else jnp.asarray(VECTOR)
    table.assert_close(tb_optax.get_multipliers(later), expected)

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


@every_row
def test_log_dict_names_layers(row):
    """Inside a jitted step, or outside of it."""
    params, state = start(row)
    _, state = table.jitted_step(row)(params, state)
    layers = jax.eval_shape(ANALYZE, params).layers
    read = functools.partial(tb_optax.log_dict, layers=layers)
    log, found = read(state), tb_optax.get_state(state)
    names = [f"{kind}/{p}" for kind in ("alpha", "multiplier") for p in table.KERNELS]
    assert list(log) == names
    expected = [*found.alpha.tolist(), *found.multipliers.tolist()]
    assert [float(value) for value in log.values()] == expected
    assert all(value.shape == () for value in log.values())
    table.assert_equal(jax.jit(read)(state), log)


@every_refresh
def test_the_count_saturates(row):
    """It does not overflow, and stays a count of updates."""
    params = table.make_params()
    last = jnp.asarray(np.iinfo(np.int32).max)
    state = tb_optax.get_state(ours(row).init(params))._replace(count=last)
    _, state = ours(row).update(params, state, params)
    assert tb_optax.get_state(state).count == last


# Saved after two steps of five, these are between two refreshes.
@pytest.mark.parametrize(
    "row", [row for row in CONFIGURATIONS if row.every == 3], ids=lambda row: row.name
)
def test_resumed_training_is_uninterrupted_training(row, tmp_path):
    """Saved between two refreshes, restored into the shapes that `init` tells."""
    first, state = start(row)
    halfway = table.train(row, first, state, range(2))
    expected = table.train(row, halfway[0], halfway[1], range(2, 5))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "halfway", halfway)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: (first, row.transform().init(first)))
        restored = checkpointer.restore(tmp_path / "halfway", target)
        _, bare = checkpointer.restore(tmp_path / "halfway")
    table.assert_equal(restored, halfway)
    assert isinstance(tb_optax.get_state(restored), tb_optax.TempBalanceState)
    params, state = restored
    table.assert_equal(table.train(row, params, state, range(2, 5)), expected)
    # Without that target it restores lists and dicts; old checkpoints can be read only
    # as long as the names in these stand.
    with pytest.raises(ValueError, match="no TempBalanceState"):
        tb_optax.get_state(bare)
    assert set(bare[-1]) == {"count", "multipliers", "alpha", "target", "refreshed"}


def test_types_are_checked_wherever_arrays_have_one(pytestconfig):
    """Other rooms walk programs and trees, where checks cost more than their use."""
    root, use = Path(tb_optax.__file__).parent, "from jaxtyping import"
    typed = {f"tb_optax.{f.stem}" for f in root.rglob("*.py") if use in f.read_text()}
    *checked, checker = pytestconfig.getoption("--jaxtyping-packages").split(",")
    assert {*checked} == typed
    assert checker == "beartype.beartype"
