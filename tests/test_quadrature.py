"""An analysis that estimates the spectra of large kernels from products alone.

Faults are for `test_faults`, refreshes in pieces for `test_spread`. Kernels of one test
are in one tree, which is compiled once.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spectra
from layer_table import (
    CONV,
    DENSE,
    EXPANDED,
    analyze,
    assert_same,
    columns_of,
    make_kernels,
)
from spectra import eps_of, float32

from tb_optax import (
    Layer,
    MatrixAxes,
    PowerLaw,
    fit_median,
    fit_min_ks,
    fit_peak,
    layer_analysis,
    quadrature,
)
from tb_optax.lanczos import quadrature_spectra

# Some kernels are analyzed alone here, to read their alphas.
pytestmark = pytest.mark.filterwarnings("ignore:only one layer can be tuned")

EPS = eps_of(np.float32)
# Every kernel of the zoo is large.
ALL = quadrature(above=0)
STACK = MatrixAxes((1,), (2,), stacked=(0,))


def heavy(seed, *shape):
    """A kernel with heavy tails."""
    rng = np.random.default_rng(seed)
    return float32(rng.normal(size=shape) * (1 + np.arange(shape[-1])) ** -0.5)


def dense(kernels):
    return [Layer(name, DENSE) for name in kernels]


def table(kernels, layers=None, **options):
    options.setdefault("spectrum", ALL)
    return layer_analysis(layers or dense(kernels), **options)(kernels)


# --- construction -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": fit_min_ks()}, r"fit = fit_min_ks\(\) needs .*fit_median.*exact\(\)"),
        ({"fit": fit_peak()}, r"fit = fit_peak\(.*\) needs .*exact\(\)"),
        ({"fit": lambda *_: None}, r"fit = <function.*> needs .*fit_median"),
        ({"metric": "ks_distance"}, r"metric = 'ks_distance' needs .*another metric"),
        ({"eigenvalue_floor": 1e-5}, r"eigenvalue_floor = 1e-05 needs .*leave it out"),
    ],
    ids=["min KS", "peak", "own fit", "metric", "floor"],
)
def test_what_needs_single_eigenvalues_raises(options, message):
    layer_analysis(**options)
    with pytest.raises(ValueError, match=message):
        layer_analysis(spectrum=quadrature(), **options)


@dataclasses.dataclass(frozen=True)
class Mean:
    """A fit of the user that takes weights: alpha is 2 plus the mean of λ."""

    keep: int | None = None

    def __call__(self, log_eigenvalues, valid):
        """Fit eigenvalues."""
        mean = jnp.mean(jnp.exp(log_eigenvalues), axis=-1, where=valid)
        return self._law(mean, valid.sum(axis=-1))

    def fit_weighted(self, log_nodes, weights, count):
        """Fit nodes."""
        mean = jnp.sum(jnp.exp(log_nodes) * weights, axis=(1, 2))
        return self._law(mean, jnp.asarray(count))

    def _law(self, mean, count):
        law = PowerLaw(2 + mean, jnp.ones_like(mean), 0 * mean, count)
        return PowerLaw(*(column[: self.keep] for column in law))


def test_a_fit_of_the_user_that_takes_weights():
    """It is given nodes in the unit of the eigenvalues that it would be given."""
    kernels = {"w": float32(np.random.default_rng(2).normal(size=(200, 400)))}
    found = table(kernels, fit=Mean())
    known = layer_analysis(dense(kernels), fit=Mean())(kernels)
    assert known.alpha[0] > 10
    # The mean of eight forms qᵀAq, each with variance 2·mean λ² / n, is within 0.04.
    np.testing.assert_allclose(found.alpha, known.alpha, rtol=0.12)
    with pytest.raises(ValueError, match=r"fit \(alpha\) must return shape \(1,\)"):
        table(kernels, fit=Mean(keep=0))


# --- the table ----------------------------------------------------------------------


def test_rows_of_small_kernels_are_as_ever():
    """To the bit, in the order of the layers, whatever is estimated between them."""
    kernels = make_kernels(0)
    mixed = analyze(kernels, spectrum=quadrature(above=20))
    known = analyze(kernels)
    large = np.asarray(
        [min(x.matrix_shape(np.shape(kernels[x.path]))) > 20 for x in EXPANDED]
    )
    assert 0 < large.sum() < len(large)
    assert mixed.layers == known.layers
    names = set(columns_of(mixed)) - {"multipliers"}
    assert_same(mixed, known, names, rows=~large)
    assert (np.asarray(mixed.ks_distance)[large] == 0).all()
    assert (np.asarray(mixed.alpha)[large] != np.asarray(known.alpha)[large]).all()


@pytest.mark.parametrize(
    "fit", [fit_median(position=4), fit_median(include_threshold=False)], ids=str
)
def test_columns_against_the_exact_ones(fit):
    """Kernels of some hundred rows, of every shape; many steps and probes."""
    kernels = {
        "dense": heavy(3, 150, 220),
        "tall": heavy(4, 260, 180),
        "conv": heavy(5, 2, 2, 150, 180),
        "scan": heavy(6, 2, 150, 180),
    }
    axes = {"conv": CONV, "scan": STACK}
    layers = [Layer(name, axes.get(name, DENSE)) for name in kernels]
    known = layer_analysis(layers, fit=fit)(kernels)
    found = table(kernels, layers, fit=fit, spectrum=quadrature(0, 32, 64))
    assert found.fitted.all()
    assert found.tuned.all()
    np.testing.assert_array_equal(found.tail_size, known.tail_size)
    for name, tolerance in (
        ("frobenius_norm", 84 * EPS),
        ("eigenvalue_count", 0),
        ("alpha", 0.05),
        ("alpha_hat", 0.05),
        ("xmin", 0.15),
        ("stable_rank", 2e-3),
    ):
        one, other = getattr(found, name), getattr(known, name)
        np.testing.assert_allclose(one, other, rtol=tolerance, err_msg=name)
    norm = np.asarray(found.spectral_norm) / np.asarray(known.spectral_norm)
    assert (norm <= 1 + 84 * EPS).all()
    assert (norm >= 1 - 1e-3).all()


def test_the_largest_node_falls_short_by_no_more_than_promised():
    """The bound of Kuczyński and Woźniakowski, on the hardest spectrum: no gap."""
    n, steps = 400, 12
    rng = np.random.default_rng(7)
    sigma = np.sqrt(1 - (np.arange(n) / n) ** 2)[::-1]
    kernel = float32(spectra.with_singular_values(rng, sigma, n, n))
    found = table({"w": kernel}, spectrum=quadrature(0, 1, steps))
    shortfall = 1 - float(found.spectral_norm[0]) ** 2
    bound = 0.103 * (math.log(n * (steps - 1) ** 4) / (steps - 1)) ** 2
    assert 1e-4 < shortfall < bound


def test_the_same_bits_each_time_jitted_or_not():
    kernels = {"w": heavy(1, 40, 50), "v": heavy(2, 40, 60)}
    analysis = layer_analysis(dense(kernels), spectrum=ALL, min_eigenvalues=20)
    first = analysis(kernels)
    assert_same(analysis(kernels), first)
    assert_same(jax.jit(analysis.__call__)(kernels), first)
    jax.clear_caches()
    assert_same(analysis(kernels), first)


@pytest.mark.usefixtures("x64")
def test_dtypes_mixed_in_one_tree():
    """Each kernel is read in its own precision."""
    double = np.asarray(heavy(30, 80, 90), np.float64)
    kernels = {
        "half": jnp.asarray(heavy(28, 80, 90), jnp.bfloat16),
        "float16": jnp.asarray(heavy(29, 80, 90), jnp.float16),
        "double": jnp.asarray(double),
    }
    for name in ("half", "float16", "double"):
        kernels[f"{name} as single"] = kernels[name].astype(jnp.float32)
    found = table(kernels)
    rows = {row["layer"]: row for row in found.rows()}
    assert found.alpha.dtype == jnp.float64
    for name, tolerance in (("half", 1e-5), ("float16", 1e-5), ("double", 1e-4)):
        one, other = rows[name], rows[f"{name} as single"]
        assert one["fitted"]
        assert other["fitted"]
        assert one["alpha"] == pytest.approx(other["alpha"], rel=tolerance)
        norm = pytest.approx(other["frobenius_norm"], rel=1e-6)
        assert one["frobenius_norm"] == norm
    top = np.linalg.norm(double, 2)
    assert rows["double"]["spectral_norm"] == pytest.approx(top, rel=1e-10)


# --- layers of every kind -----------------------------------------------------------


def test_slices_parts_and_transposes_are_read_like_kernels_of_their_own():
    """The same density, whichever way the kernel holds the matrix."""
    matrix, other = heavy(12, 80, 100), heavy(13, 80, 100)
    kernels = {
        "alone": matrix,
        "tall": matrix.T,
        "stack": np.stack([other, matrix, other]),
        "inner": np.stack([other, matrix], axis=1),
        "fused": np.concatenate([other, matrix, other[:, :50]], axis=1),
        "fused tall": np.concatenate([matrix.T, other.T], axis=1),
        "heads": matrix.reshape(80, 4, 25),
        "conv": matrix.reshape(1, 1, 80, 100),
        "whole": np.stack([other, matrix]),
    }
    layers = [
        Layer("alone", DENSE),
        Layer("tall", DENSE),
        Layer("stack", STACK, index=(1,)),
        Layer("inner", MatrixAxes((0,), (2,), stacked=(1,)), index=(1,)),
        Layer("fused", DENSE, part=(1, 100, 200)),
        Layer("fused tall", DENSE, part=(1, 0, 80)),
        Layer("heads", MatrixAxes((0,), (1, 2))),
        Layer("conv", CONV),
        *(Layer("whole", STACK, index=(i,)) for i in (1, 0)),
    ]
    found = table(kernels, layers)
    assert found.fitted.all()
    np.testing.assert_allclose(found.alpha[1:-1], found.alpha[0], rtol=1e-5)
    assert abs(found.alpha[-1] / found.alpha[0] - 1) > 1e-3
    own = np.arange(9) == 7
    norms = np.linalg.norm(matrix) * np.where(own, 0.5**0.5, 1)
    np.testing.assert_allclose(found.frobenius_norm[:-1], norms, rtol=8 * EPS)


def test_pooled_matrices_weigh_the_same():
    """The nodes of each have its own mean eigenvalue, in the unit of the layer."""
    kernel = heavy(15, 2, 1, 70, 90)
    kernel[1] *= 8
    layers = [Layer("w", CONV)]
    pooled = quadrature_spectra({"w": jnp.asarray(kernel)}, layers, 1.0, ALL)
    unit = 4.0 ** np.asarray(pooled.exponent, np.float64)[0]
    logs, weights = (np.asarray(x, np.float64)[0] for x in pooled[:2])
    assert logs.shape == (2 * ALL.probes, ALL.steps)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=1), 1 / 16, rtol=1e-5)
    for position in range(2):
        own = slice(position * ALL.probes, (position + 1) * ALL.probes)
        mean = (np.exp(logs[own]) * weights[own]).sum() * 2 * unit
        matrix = kernel[position, 0].astype(np.float64)
        # A quadratic form of a random sign vector scatters about the trace.
        gram = matrix @ matrix.T
        scatter = math.sqrt(2 * (gram**2).sum() / ALL.probes) / 70
        assert abs(mean - np.trace(gram) / 70) < 4 * scatter
    assert pooled.count.tolist() == [140]


def test_pooled_kernels_with_a_zero_matrix():
    """A dead position counts as zeros, of which half a spectrum may consist."""
    kernels = {name: heavy(16, 3, 1, 60, 80) for name in ("one", "two")}
    kernels["one"][1] = kernels["two"][1:] = 0
    layers = [Layer(name, CONV) for name in kernels]
    known, found = layer_analysis(layers)(kernels), table(kernels, layers)
    assert known.fitted.tolist() == found.fitted.tolist() == [True, False]
    np.testing.assert_allclose(found.alpha, known.alpha, rtol=0.08)


def test_tiny_kernels():
    """With fewer rows than steps, nodes are eigenvalues; all columns stay finite."""
    shapes = [(1, 1), (1, 9), (2, 2), (3, 40), (33, 31)]
    kernels = {str(shape): heavy(20, *shape) for shape in shapes}
    found = table(kernels, min_eigenvalues=1)
    for name, column in columns_of(found).items():
        assert np.isfinite(column).all(), name
    for row, shape in zip(found.rows(), shapes, strict=True):
        assert row["eigenvalue_count"] == min(shape)
        top = np.linalg.norm(kernels[row["layer"]].astype(np.float64), 2)
        assert row["spectral_norm"] == pytest.approx(top, rel=84 * EPS)
        # A tail of one eigenvalue has no spread.
        assert row["fitted"] == (min(shape) > 2)
