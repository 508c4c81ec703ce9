"""Faults of every kind in every type, alone, together, at any step of training."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tb_optax
from tb_optax import Layer, MatrixAxes

pytestmark = pytest.mark.usefixtures("quick_compilation")

DENSE = MatrixAxes((0,), (1,))
SHAPE = (36, 30)
HEALTHY = ("first", "second", "third")
FAULTS = {
    "nan": lambda _, kernel: put(kernel, math.nan),
    "inf": lambda _, kernel: put(kernel, math.inf),
    "-inf": lambda _, kernel: put(kernel, -math.inf),
    "zero": lambda _, kernel: kernel * 0,
    "constant": lambda _, kernel: kernel * 0 + 0.25,
    "rank one": lambda rng, _: integers(rng, 1),
    "rank deficient": lambda rng, _: integers(rng, 8),
    "orthogonal": lambda rng, _: np.eye(*SHAPE)[rng.permutation(SHAPE[0])],
}
TYPES = {
    "float16": jnp.float16,
    "bfloat16": jnp.bfloat16,
    "float32": jnp.float32,
    "float64": jnp.float64,
}
every_type = pytest.mark.parametrize("dtype", TYPES)


def put(kernel, value):
    return np.where(np.arange(kernel.size).reshape(kernel.shape) == 77, value, kernel)


def integers(rng, rank):
    """Exact in every type, so that the rank survives the rounding."""
    left, right = (rng.integers(-2, 3, (side, rank)) for side in SHAPE)
    left[0], right[0] = 1, 1
    return left @ right.T


def healthy(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=SHAPE) * (1 + np.arange(SHAPE[1])) ** -rng.uniform(0.3, 1.2)


def make(dtype, faulty, seed=0):
    """Three healthy kernels, and one more for each fault, with it if it is named."""
    rng = np.random.default_rng(seed)
    params = {name: healthy(seed + i) for i, name in enumerate(HEALTHY)}
    for i, (name, spoil) in enumerate(FAULTS.items()):
        kernel = healthy(seed + 50 + i)
        params[name] = spoil(rng, kernel) if name in faulty else kernel
    return {name: jnp.asarray(kernel, TYPES[dtype]) for name, kernel in params.items()}


def analysis_of(names, **options):
    layers = [Layer(name, DENSE) for name in names]
    return tb_optax.layer_analysis(layers, min_eigenvalues=10, **options)


@functools.cache
def everything():
    return analysis_of((*HEALTHY, *FAULTS))


def rows(analysis, names):
    return {row["layer"]: row for row in analysis.rows() if row["layer"] in names}


def check(analysis, faulty, expected):
    for name, row in rows(analysis, faulty).items():
        assert (row["fitted"], row["alpha"], row["multipliers"]) == (False, 0, 1), name
    others = {*HEALTHY, *FAULTS} - {*faulty}
    assert rows(analysis, others) == rows(expected, others)
    assert all(row["fitted"] for row in rows(analysis, others).values())


@every_type
@pytest.mark.usefixtures("x64")
def test_each_fault_alone(dtype):
    """The others have to the bit what they have without the layer."""
    for fault in FAULTS:
        params = make(dtype, {fault})
        # Of a kernel of zeros nothing is left that could touch the others.
        dead = {**params, fault: jnp.zeros(SHAPE, TYPES[dtype])}
        check(everything()(params), {fault}, everything()(dead))
    without = analysis_of([*HEALTHY, *list(FAULTS)[1:]])
    check(everything()(make(dtype, {"nan"})), {"nan"}, without(make(dtype, {"nan"})))


@every_type
@pytest.mark.usefixtures("x64")
def test_all_faults_together(dtype):
    params = make(dtype, FAULTS)
    check(everything()(params), {*FAULTS}, analysis_of(HEALTHY)(params))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_scale_is_a_fault(scale):
    """Powers of two leave every digit of normal numbers as it is."""
    params = make("float32", ())
    plain = everything()(params)
    params["second"] = params["second"] * 2.0 ** round(math.log2(scale))
    scaled = everything()(params)
    assert scaled.fitted.all()
    np.testing.assert_array_equal(scaled.alpha, plain.alpha)


def test_numbers_that_are_not_normal_count_as_zero():
    params = make("float32", ())
    # By NumPy: compiled arithmetic makes zeros of them.
    tiny = np.asarray(params["second"]) * np.float32(1e-40)
    assert tiny.any()
    zero = {**params, "second": jnp.zeros_like(params["second"])}
    params["second"] = jnp.asarray(tiny)
    check(everything()(params), ("second",), everything()(zero))


@functools.cache
def step():
    tx = tb_optax.scale_by_temp_balance(everything(), interval=3)
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("first", range(1, 7))
def test_training_goes_on_and_the_next_refresh_recovers(first):
    """Faults from step `first` to the refresh behind it, then healthy kernels again."""
    tx, update = step()
    refresh = -(-first // 3) * 3
    params, broken = make("float32", ()), make("float32", FAULTS)
    state = tx.init(params)
    for count in range(refresh + 4):
        now = broken if first <= count <= refresh else params
        updates, state = update(jax.tree.map(jnp.ones_like, now), state, now)
        spoiled = refresh <= count < refresh + 3
        expected = everything()(broken if spoiled else params)
        np.testing.assert_array_equal(state.multipliers, expected.multipliers)
        np.testing.assert_array_equal(state.alpha, expected.alpha)
        for row in expected.rows():
            np.testing.assert_array_equal(
                updates[row["layer"]], np.full(SHAPE, row["multipliers"], np.float32)
            )


CHECKS = {
    "debug_nans": lambda: jax.debug_nans(True),
    "enable_checks": lambda: jax.enable_checks(True),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
}


@pytest.mark.parametrize("spread", [False, True], ids=["whole", "spread"])
@pytest.mark.parametrize("guard", CHECKS)
def test_under_the_checks_of_jax(guard, spread):
    analyze = analysis_of(("first", "second", "nan", "zero"), max_dim=40 + spread)
    tx = tb_optax.temp_balance(optax.sgd(0.1), analyze, interval=2, spread=spread)
    params = make("float32", {"nan", "zero"})
    gradients = jax.tree.map(jnp.ones_like, params)
    state, update = tx.init(params), jax.jit(tx.update)
    jax.block_until_ready((params, gradients, state))
    with contextlib.ExitStack() as stack:
        stack.enter_context(CHECKS[guard]())
        for _ in range(3):
            updates, state = update(gradients, state, params)
        state = tb_optax.set_multipliers(state, analyze(params))
        tb_optax.log_dict(state, jax.eval_shape(analyze, params).layers)
        each = jax.jit(lambda params: analyze(params).leaf_multipliers(params))
        jax.block_until_ready(each(params))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert tb_optax.get_multipliers(state)[2:].tolist() == [1, 1]


def test_the_faults_are_what_they_are_called():
    rng = np.random.default_rng(0)
    for name, rank in (("rank one", 1), ("rank deficient", 8)):
        made = np.asarray(FAULTS[name](rng, healthy(0)), np.float64)
        assert np.linalg.matrix_rank(made) == rank
        assert np.abs(made).max() <= 256
    made = FAULTS["orthogonal"](rng, healthy(0))
    np.testing.assert_array_equal(made.T @ made, np.eye(SHAPE[1]))
