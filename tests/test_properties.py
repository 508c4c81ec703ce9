"""The analysis of any tree, of any shapes, types, scales and special values."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import reference
import spectra
from hypothesis import given
from hypothesis import strategies as st
from layer_table import (
    CONV,
    DENSE,
    alpha_tolerance,
    check_fit,
    check_no_fit,
    check_norms,
)
from spectra import eps_of

from tb_optax import Layer, MatrixAxes, fit_median, fit_min_ks, layer_analysis
from tb_optax.layers import expand_stacks

STACK = MatrixAxes((1,), (2,), stacked=(0,))
# Few trees, so that there are few compilations: type, fit, and kernels by shape.
TREES = (
    (jnp.float32, fit_median(), {(9, 6): DENSE}),
    (jnp.float32, fit_median(3.5), {(1, 1): DENSE, (1, 8): DENSE, (3, 2): DENSE}),
    (jnp.bfloat16, fit_median(), {(12, 12): DENSE, (2, 2, 5, 4): CONV}),
    (jnp.float16, fit_median(), {(3, 7, 5): STACK, (33, 12): DENSE}),
    (jnp.float32, fit_median(), {(3, 7, 5): STACK, (5, 40): DENSE, (31, 31): DENSE}),
    (jnp.float32, fit_min_ks(), {(3, 7, 5): STACK, (2, 2, 5, 4): CONV}),
)
VALUES = {
    "gaussian": lambda rng, shape: rng.normal(size=shape),
    "cauchy": lambda rng, shape: np.clip(rng.standard_cauchy(size=shape), -30, 30),
    "integers": lambda rng, shape: rng.integers(-2, 3, size=shape),
    "sparse": lambda rng, shape: rng.normal(size=shape) * (rng.random(shape) < 0.2),
    "constant": lambda _, shape: np.ones(shape),
    "zero": lambda _, shape: np.zeros(shape),
    "one row": lambda rng, shape: np.ones(shape) * rng.normal(size=shape[-1]),
    "nan": lambda rng, shape: np.where(rng.random(shape) < 0.9, 1.0, math.nan),
    "infinite": lambda rng, shape: np.where(rng.random(shape) < 0.9, 1.0, -math.inf),
}


@functools.cache
def analysis_of(tree):
    _, fit, shapes = TREES[tree]
    layers = [Layer(f"w{i}", axes) for i, axes in enumerate(shapes.values())]
    return layer_analysis(layers, fit=fit, min_eigenvalues=3)


@st.composite
def trees(draw):
    """Which tree, and its kernels: values of some kind at some power of ten."""
    tree = draw(st.sampled_from(range(len(TREES))))
    dtype, _, shapes = TREES[tree]
    # No subnormal numbers: those count as zero.
    powers = st.integers(-4, 3) if dtype == jnp.float16 else st.integers(-28, 36)
    kernels = {}
    for i, shape in enumerate(shapes):
        rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        values = VALUES[draw(st.sampled_from(sorted(VALUES)))](rng, shape)
        with np.errstate(invalid="ignore"):
            kernels[f"w{i}"] = jnp.asarray(values * 10.0 ** draw(powers), dtype)
    return tree, kernels


@spectra.PROFILE
@given(trees())
def test_table_of_any_tree(drawn):
    """Each row is NumPy's fit or no fit, and the multipliers are those of the map."""
    tree, kernels = drawn
    _, fit, _ = TREES[tree]
    analysis = analysis_of(tree)(kernels)
    layers = analysis_of(tree).layers
    assert layers is not None
    shapes = {path: kernel.shape for path, kernel in kernels.items()}
    assert analysis.layers == expand_stacks(layers, shapes)
    for row, layer in zip(analysis.rows(), analysis.layers, strict=True):
        kernel = np.asarray(kernels[layer.path], np.float64)
        for name, value in row.items():
            assert name in ("layer", "xmin") or math.isfinite(value), name
        own = kernel[layer.index]
        if not np.isfinite(own).all() or not own.any():
            check_no_fit(row)
            assert row["spectral_norm"] == row["stable_rank"] == 0
        else:
            check_row(row, layer, kernel, fit)
    check_map(analysis)


def check_row(row, layer, kernel, fit):
    eps = eps_of(np.float32)
    eigenvalues = spectra.eigenvalues_of(kernel, layer)
    side = min(layer.matrix_shape(kernel.shape))
    check_norms(row, eigenvalues, eps)
    if isinstance(fit, fit_min_ks):
        check_best_tail(row, eigenvalues)
        return
    with np.errstate(all="ignore"):
        law = reference.fit_median(eigenvalues, fit.position)
    noise = 8 * eps * eigenvalues[-1]
    tail = eigenvalues[-law.tail_size :]
    if law.tail_size == 1 or tail[0] < noise / 16:
        check_no_fit(row)
        return
    tolerance = alpha_tolerance(law.alpha, tail, side, eps)
    # Nearer to the bounds of noise and of alpha, rounding decides.
    if tail[0] > 3 * noise and tolerance < 0.1 and law.alpha < 5e3:
        assert row["fitted"]
        check_fit(row, eigenvalues, law, side, eps)
    elif not row["fitted"]:
        check_no_fit(row)


def check_best_tail(row, eigenvalues):
    """Of spectra without zeros: one of the best tails, up to rounding."""
    if len(eigenvalues) < 3 or eigenvalues[0] < 1e-4 * eigenvalues[-1]:
        return
    tried = reference.candidates(eigenvalues)
    if not row["fitted"]:
        # The best tail is a pair of nearly equal λ.
        assert tried.alpha[np.argmin(tried.ks_distance)] > 5e3
        return
    first = len(eigenvalues) - row["tail_size"]
    if tried.alpha[first] < 100:
        assert tried.ks_distance[first] <= tried.ks_distance.min() + 1e-4
        # Here λ_max/λ < 1e4, and σ/σ_max > 1e-2.
        assert math.isclose(row["alpha"], tried.alpha[first], rel_tol=1e-3)


def check_map(analysis):
    """The published line through the alphas of the table itself."""
    alpha = np.asarray(analysis.alpha, np.float64)
    tuned = np.asarray(analysis.tuned)
    enough = np.asarray(analysis.eigenvalue_count) >= 3
    np.testing.assert_array_equal(tuned, np.asarray(analysis.fitted) & enough)
    multipliers = np.asarray(analysis.multipliers)
    assert (multipliers[~tuned] == 1).all()
    if not tuned.any():
        return
    eps = eps_of(np.float32)
    low, spread = alpha[tuned].min(), np.ptp(alpha[tuned])
    if spread <= 8 * eps * alpha[tuned].max():
        assert (multipliers == 1).all()
    else:
        expected = 0.5 + (alpha[tuned] - low) / spread
        np.testing.assert_allclose(multipliers[tuned], expected, atol=8 * eps)
