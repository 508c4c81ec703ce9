"""Eigenvalues of kernels by every route, against NumPy's SVD in float64."""

import dataclasses
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import spectra
from layer_table import alpha_tolerance

import tb_optax
from tb_optax import Layer, MatrixAxes, esd
from tb_optax.analysis import layer_spectra
from tb_optax.layers import expand_stacks
from tb_optax.spectrum import GRAM, SINGULAR_VALUES

DENSE = MatrixAxes((0,), (1,))
EPS = spectra.eps_of(np.float32)
CONV = MatrixAxes((2,), (3,), pooled=(0, 1))
LAYERS = {
    (1, 1): DENSE,
    (1, 9): DENSE,
    (2, 2): DENSE,
    (7, 3): DENSE,
    (63, 64): DENSE,
    (64, 64): DENSE,
    (65, 64): DENSE,
    (65, 65): DENSE,
    (64, 200): DENSE,
    (3, 3, 20, 24): CONV,
    (24, 20, 3, 3): MatrixAxes((1,), (0,), pooled=(2, 3)),
    (24, 4, 5): MatrixAxes((0,), (1, 2)),
    (4, 5, 24): MatrixAxes((0, 1), (2,)),
    (3, 20, 30): MatrixAxes((1,), (2,), stacked=(0,)),
    (20, 2, 30, 2): MatrixAxes((0,), (2,), pooled=(1,), stacked=(3,)),
}
NAMED = {f"w{i}": item for i, item in enumerate(LAYERS.items())}


def stacks():
    return [Layer(name, axes) for name, (_, axes) in NAMED.items()]


def make_params(kind, dtype):
    """One kernel of every shape, its matrices with a spectrum of this kind."""
    rng = np.random.default_rng(0)
    params = {}
    for name, (shape, axes) in NAMED.items():
        groups = (axes.stacked, axes.pooled, axes.reduction, axes.output)
        sizes = [math.prod(shape[axis] for axis in group) for group in groups]
        rows, columns = sizes[2:]
        matrices = np.stack(
            [KINDS[kind](rng, rows, columns) for _ in range(math.prod(sizes[:2]))]
        )
        order = [axis for group in groups for axis in group]
        kernel = matrices.reshape([shape[axis] for axis in order])
        params[name] = jnp.asarray(np.transpose(kernel, np.argsort(order)), dtype)
    return params


def manufactured(sigma_of):
    def make(rng, rows, columns):
        sigma = sigma_of(min(rows, columns))
        return spectra.with_singular_values(rng, sigma, rows, columns)

    return make


def rank(keep):
    return lambda count: np.linspace(1, 3, max(1, int(keep * count)))


KINDS = {
    "gaussian": lambda rng, rows, columns: rng.normal(size=(rows, columns)),
    "clusters": manufactured(spectra.clusters),
    "gap": manufactured(spectra.gap),
    "decay": manufactured(lambda count: np.logspace(-3, 0, count)),
    "pareto": manufactured(lambda n: spectra.pareto_quantiles(2.5, n) ** 0.5),
    "half rank": manufactured(rank(0.5)),
    "rank one": manufactured(rank(0)),
    "orthogonal": manufactured(np.ones),
    "constant": lambda _, rows, columns: np.full((rows, columns), 0.7),
    "zero": lambda _, rows, columns: np.zeros((rows, columns)),
    "integers": lambda rng, rows, columns: rng.integers(-3, 4, size=(rows, columns)),
}


SHAPES = {name: shape for name, (shape, _) in NAMED.items()}
EXPANDED = expand_stacks(stacks(), SHAPES)


def eigenvalues(table):
    """Ascending λ of each layer, as the analysis sees them."""
    logs = np.asarray(table.log_eigenvalues + table.log_unit()[:, None], np.float64)
    valid = np.asarray(table.weights)
    for row, allowed in zip(logs, valid, strict=True):
        assert (np.diff(allowed.astype(int)) >= 0).all()
        assert (row[allowed] < np.inf).all()
    np.testing.assert_array_equal(table.count, valid.sum(axis=-1))
    return [np.exp(row[allowed]) for row, allowed in zip(logs, valid, strict=True)]


def check_eigenvalues(found, kernel, layer, eps, *, power, conv_norm=0.5):
    """Weyl's bound: |λ̂ - λ| (or |σ̂ - σ|) is at most the norm of a backward error.

    That of a product and of LAPACK's reductions grows like sqrt(n)·eps·norm, with a
    constant below ten.  On top, ln λ is rounded, where λ is far from 1.
    """
    exact = spectra.eigenvalues_of(kernel, layer, conv_norm)
    side = min(layer.matrix_shape(kernel.shape))
    assert found.shape == exact.shape
    assert (np.diff(found) >= 0).all()
    found, exact = found ** (1 / power), exact ** (1 / power)
    backward = 8.4 * eps * math.sqrt(side) * exact[-1]
    logarithm = 4 * eps * (1 + abs(np.log(np.where(exact > 0, exact, 1)))) * exact
    np.testing.assert_array_less(np.abs(found - exact), backward + logarithm + 1e-45)


@pytest.mark.parametrize(
    ("route", "dtype"),
    [(GRAM, np.float32), (GRAM, np.float64), (SINGULAR_VALUES, np.float64)],
    ids=["gram float32", "gram float64", "singular values float64"],
)
@pytest.mark.usefixtures("x64")
def test_eigenvalues_of_every_shape_and_spectrum(route, dtype):
    decompose = jax.jit(lambda kernels: layer_spectra(kernels, EXPANDED, 0.5, route))
    for kind in KINDS:
        params = make_params(kind, dtype)
        table = decompose(params)
        for layer, found in zip(EXPANDED, eigenvalues(table), strict=True):
            eps = spectra.eps_of(dtype)
            power = 1 if route is GRAM else 2
            check_eigenvalues(found, params[layer.path], layer, eps, power=power)


def test_esd_is_the_spectrum_by_singular_values():
    for kind in KINDS:
        params = make_params(kind, np.float32)
        found = esd(params, stacks(), conv_norm=0.25)
        for layer, own in zip(EXPANDED, found, strict=True):
            assert isinstance(own, np.ndarray)
            assert own.dtype == np.float32
            kernel = params[layer.path]
            check_eigenvalues(own, kernel, layer, EPS, power=2, conv_norm=0.25)


# Singular values of n x n matrices of which the alpha is promised: λ_max / xmin is
# below 1e3, or 5e3 ("steep") and 1e5.
PROMISED = {
    "clusters": spectra.clusters,
    "gap": spectra.gap,
    "zeros": lambda n: np.linspace(1, 3, n) * (np.arange(n) >= n // 4),
    "power law": lambda n: spectra.pareto_quantiles(2.5, n) ** 0.5,
    "steep": lambda n: np.logspace(-3.7, 0, n),
    "steeper": lambda n: np.logspace(-5, 0, n),
}


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 63, 64, 65, 257),
        pytest.param((511, 512, 513, 1025), marks=pytest.mark.long),
    ],
)
def test_what_float32_promises(sizes):
    """λ within 1e-6·sqrt(n)·λ_max, and alpha within 1e-5 or 1e-4 of float64."""
    rng, kernels = np.random.default_rng(0), {}
    for kind, sigma in PROMISED.items():
        for n in sizes:
            made = spectra.with_singular_values(rng, sigma(n), n, n)
            kernels[f"{kind} {n}"] = spectra.float32(made)
    layers = tuple(Layer(name, DENSE) for name in kernels)
    table = jax.jit(lambda kernels: layer_spectra(kernels, layers, 0.5, GRAM))(kernels)
    rows = tb_optax.layer_analysis(layers)(kernels).rows()
    for row, layer, own in zip(rows, layers, eigenvalues(table), strict=True):
        exact = spectra.eigenvalues_of(kernels[layer.path], layer)
        n, size = len(exact), len(exact) - len(exact) // 2
        goal = 1e-6 if n < 1024 else 4e-6
        assert np.abs(own - exact).max() <= goal * math.sqrt(n) * exact[-1]
        ratio, alpha = exact[-1] / exact[-size], spectra.hill(exact, size)
        tolerance = 1e-5 if ratio <= 1e3 else 1e-4
        if ratio > 1e4:
            tolerance = alpha_tolerance(alpha, exact[-size:], n, EPS)
        assert row["fitted"], layer
        assert row["alpha"] == pytest.approx(alpha, rel=tolerance), layer


@pytest.mark.parametrize("spectrum", [tb_optax.exact(), tb_optax.quadrature(above=8)])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_every_platform_lowers_a_whole_analysis(platform, spectrum):
    layers = [Layer("conv", CONV), Layer("dense", DENSE)]
    params = {
        "conv": jax.ShapeDtypeStruct((3, 3, 16, 24), jnp.float32),
        "dense": jax.ShapeDtypeStruct((60, 50), jnp.bfloat16),
    }
    for fit in (tb_optax.fit_median(), tb_optax.fit_min_ks()):
        if isinstance(spectrum, tb_optax.quadrature) and fit.whole_spectrum:
            continue
        analyze = tb_optax.layer_analysis(layers, fit=fit, spectrum=spectrum)
        exported = jax.export.export(
            jax.jit(lambda params, analyze=analyze: analyze(params).multipliers),
            platforms=[platform],
        )(params)
        assert exported.platforms == (platform,)
        assert exported.out_avals[0].shape == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "v"}, "layer 'v'.* is not in the parameters.*'w'"),
        ({"axes": CONV}, r"layer 'w'.*rank 4.*\(6, 5\)"),
        ({"part": (1, 3, 9)}, r"layer 'w'.*\(1, 3, 9\)"),
    ],
)
def test_esd_refuses_layers_that_do_not_fit(change, message):
    layer = dataclasses.replace(Layer("w", DENSE), **change)
    with pytest.raises(ValueError, match=message):
        esd({"w": jnp.ones((6, 5))}, [layer])
