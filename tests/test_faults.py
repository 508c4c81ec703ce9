"""Kernels without a power law: each stays alone, by every way to a spectrum.

The faults are exact in every floating type, so that none is cured by rounding.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spectra
from layer_table import DENSE, columns_of

import tb_optax
from tb_optax import Layer, fit_median, fit_min_ks, quadrature

EPS = spectra.eps_of(np.float32)
SHAPE = (36, 30)
HEALTHY = ("first", "second", "third")


def put(value):
    """One entry of this value in a healthy kernel."""

    def make(_, kernel):
        kernel = kernel.copy()
        kernel[2, 17] = value
        return kernel

    return make


def of_rank(rank):
    """Small integers, whose products are exact."""

    def make(rng, _):
        left, right = (rng.integers(-2, 3, (side, rank)) for side in SHAPE)
        left[0], right[0] = 1, 1
        made = left @ right.T
        assert np.abs(made).max() <= 256
        assert np.linalg.matrix_rank(made) == rank
        return made

    return make


def orthogonal(rng, _):
    return np.eye(*SHAPE)[rng.permutation(SHAPE[0])]


FAULTS = {
    "nan": put(math.nan),
    "inf": put(math.inf),
    "-inf": put(-math.inf),
    "all nan": lambda _, kernel: kernel * math.nan,
    "zero": lambda _, kernel: kernel * 0,
    "negative zero": lambda _, kernel: -np.zeros_like(kernel),
    "one entry": lambda _, kernel: put(3.0)(None, kernel * 0),
    "constant": lambda _, kernel: kernel * 0 - 0.25,
    "rank one": of_rank(1),
    "rank deficient": of_rank(8),
    "orthogonal": orthogonal,
    "scaled orthogonal": lambda rng, kernel: 2.0**-10 * orthogonal(rng, kernel),
}
NAMES = (*HEALTHY, *FAULTS)
TYPES = {
    "float16": jnp.float16,
    "bfloat16": jnp.bfloat16,
    "float32": jnp.float32,
    "float64": jnp.float64,
}
ROUTES: dict[str, Any] = {
    "gram": {"fit": fit_median()},
    "singular values": {"fit": fit_min_ks()},
    "products": {"spectrum": quadrature(above=0)},
}
CASES = [("gram", dtype) for dtype in TYPES]
CASES += [("singular values", "float32"), ("singular values", "float64")]
CASES += [("products", "float32"), ("products", "bfloat16")]


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


@functools.cache
def analysis_of(names=NAMES, route="gram", **options):
    layers = [Layer(name, DENSE) for name in names]
    return tb_optax.layer_analysis(
        layers, min_eigenvalues=10, **ROUTES[route], **options
    )


def rows(analysis, names):
    return {row["layer"]: row for row in analysis.rows() if row["layer"] in names}


def check(analysis, params, faulty):
    """What is not fitted has zeros and no multiplier; nothing infinite comes out.

    But for an xmin of others, in units of eigenvalues.
    """
    for name, row in rows(analysis, faulty).items():
        assert not row["fitted"], name
        assert not row["tuned"], name
        assert row["multipliers"] == 1, name
        for column in ("alpha", "alpha_hat", "ks_distance", "xmin", "tail_size"):
            assert row[column] == 0, name
        kernel = np.asarray(params[name], np.float64)
        if np.isfinite(kernel).all() and kernel.any():
            top = np.linalg.norm(kernel, 2)
            assert row["spectral_norm"] == pytest.approx(top, rel=84 * EPS), name
        else:
            for column in ("spectral_norm", "frobenius_norm", "stable_rank"):
                assert row[column] == 0, name
    for name, column in columns_of(analysis).items():
        assert name == "xmin" or np.isfinite(column).all(), name


@pytest.mark.parametrize(("route", "dtype"), CASES)
@pytest.mark.usefixtures("x64")
def test_a_bad_kernel_stays_alone(route, dtype):
    """Each alone, and all together: the others have to the bit what they have without.

    Of a kernel of zeros nothing is left that could touch the others.
    """
    analyze = analysis_of(route=route)
    # The best tail of all may lie among a few eigenvalues that are not zero.
    names = set(FAULTS) - ({"rank deficient"} if route == "singular values" else set())
    for fault in sorted(names):
        params = make(dtype, {fault})
        analysis = analyze(params)
        check(analysis, params, {fault})
        dead = analyze({**params, fault: jnp.zeros(SHAPE, TYPES[dtype])})
        others = {*NAMES} - {fault}
        assert rows(analysis, others) == rows(dead, others)
        assert all(row["fitted"] for row in rows(analysis, others).values()), fault
    params = make(dtype, names)
    with jax.debug_nans(True):
        analysis = jax.block_until_ready(analyze(params))
    check(analysis, params, names)
    if route == "products":
        return
    others = {*NAMES} - names
    without = analysis_of(tuple(name for name in NAMES if name in others), route)
    assert rows(analysis, others) == rows(without(params), others)


def test_only_bad_layers():
    """Nothing to tune: every multiplier is 1."""
    params = dict.fromkeys(NAMES, jnp.zeros(SHAPE))
    check(analysis_of()(params), params, NAMES)


def test_numbers_below_the_smallest_normal_one_count_as_zero():
    """A listed deviation."""
    params = make("float32", ())
    # By NumPy: compiled arithmetic makes zeros of them.
    tiny = np.asarray(params["second"]) * np.float32(1e-40)
    assert tiny.any()
    zero = analysis_of()(params | {"second": jnp.zeros_like(params["second"])})
    analysis = analysis_of()(params | {"second": jnp.asarray(tiny)})
    check(analysis, params | {"second": jnp.zeros(SHAPE)}, {"second"})
    assert analysis.rows() == zero.rows()


def test_half_rank():
    """Of 50 eigenvalues 25 are the tail: with fewer nonzero ones, xmin is noise."""
    rng = np.random.default_rng(1)
    cases = [(keep, scale) for keep in (23, 24, 25, 26) for scale in (1e-30, 1, 1e30)]
    params = {}
    for keep, scale in cases:
        sigma = scale * np.linspace(1, 3, keep)
        made = spectra.with_singular_values(rng, sigma, 50, 50)
        params[f"{keep} {scale}"] = jnp.asarray(made, jnp.float32)
    analysis = analysis_of(tuple(params))(params)
    check(analysis, params, {name for name in params if name < "25"})
    for (keep, _), row in zip(cases, analysis.rows(), strict=True):
        assert row["fitted"] == (keep >= 25)
        expected = spectra.hill(np.linspace(1, 3, keep) ** 2, 25) if keep >= 25 else 0
        assert row["alpha"] == pytest.approx(expected, rel=168 * EPS)


def test_low_rank_by_products():
    """Weights of nodes tell half of a spectrum only roughly."""
    rng, n, params = np.random.default_rng(17), 300, {}
    for share in (0.05, 0.4, 0.6, 0.9):
        sigma = 1e-25 * np.linspace(1, 3, int(share * n))
        made = spectra.with_singular_values(rng, sigma, n, n)
        params[f"{share}"] = jnp.asarray(made, jnp.float32)
    found = analysis_of(tuple(params), "products")(params)
    known = analysis_of(tuple(params))(params)
    assert known.fitted.tolist() == found.fitted.tolist() == [False] * 2 + [True] * 2
    np.testing.assert_allclose(found.alpha, known.alpha, rtol=0.06)


@pytest.mark.parametrize("route", ROUTES)
def test_noise_of_larger_matrices(route):
    """The rounding noise of a rank-deficient kernel is no spectrum at any size."""
    rng = np.random.default_rng(3)
    size = 256
    made = {
        "low": spectra.with_singular_values(rng, np.linspace(1, 2, 120), size, size),
        "one": np.outer(rng.normal(size=size), rng.normal(size=size)),
        "constant": np.full((size, size), 0.1),
        "orthogonal": spectra.orthonormal(rng, size, size),
        "identity": 3e-15 * np.eye(size),
    }
    params = {name: jnp.asarray(kernel, jnp.float32) for name, kernel in made.items()}
    analysis = analysis_of(tuple(params), route)(params)
    check(analysis, params, set(made) - ({"low"} if route != "gram" else set()))
    low = analysis.rows()[0]
    if route == "singular values":
        # Its best tail may lie among the 120: then it is a true one.
        assert not low["fitted"] or low["tail_size"] <= 120
    else:
        assert not low["fitted"]


@functools.cache
def compiled(spread):
    tx = tb_optax.scale_by_temp_balance(analysis_of(), interval=3, spread=spread)
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("spread", [False, True], ids=["whole", "spread"])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_training_goes_on_and_the_next_refresh_recovers(first, spread):
    """Faults from step `first` to a refresh, then healthy kernels again.

    A refresh in pieces has the faults of the steps at which a layer was read.
    """
    tx, update = compiled(spread)
    params, broken = make("float32", ()), make("float32", FAULTS)
    state = tx.init(params)
    for count in range(7):
        now = broken if first <= count <= 3 else params
        updates, state = update(jax.tree.map(jnp.ones_like, now), state, now)
        for name, update_of_leaf in updates.items():
            own = state.multipliers[NAMES.index(name)]
            np.testing.assert_array_equal(update_of_leaf, jnp.full(SHAPE, own))
        if count in (1, 2, 4, 5):
            continue
        expected = analysis_of()(broken if count == 3 else params)
        if not spread:
            np.testing.assert_array_equal(state.multipliers, expected.multipliers)
            np.testing.assert_array_equal(state.alpha, expected.alpha)
        elif count == 6 or first == 1:
            np.testing.assert_allclose(state.alpha, expected.alpha, rtol=1e-5)
            np.testing.assert_allclose(
                state.multipliers, expected.multipliers, atol=1e-5
            )
