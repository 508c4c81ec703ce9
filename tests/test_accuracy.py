"""Eigenvalues and alphas in float32 against float64, at the bounds that are promised.

The reference is NumPy's SVD of the same float32 kernels. Spectra are such that no xmin
is near the rounding noise: what is fitted does not depend on the last bit.
"""

import functools

import jax
import numpy as np
import pytest
import spectra
from layer_table import alpha_tolerance

import tb_optax
from tb_optax import Layer, MatrixAxes
from tb_optax.analysis import layer_spectra
from tb_optax.spectrum import GRAM

SIZES = (1, 2, 3, 63, 64, 65, 511, 512, 513)
EPS = spectra.eps_of(np.float32)

# Singular values of n x n matrices.
KINDS = {
    "clusters": spectra.clusters,
    "gap": spectra.gap,
    "zeros": lambda n: np.linspace(1, 3, n) * (np.arange(n) >= n // 4),
    "rank 0": np.zeros,
    "rank 1": lambda n: 3.0 * (np.arange(n) == n - 1),
    "rank n/2": lambda n: np.linspace(1, 3, n) * (np.arange(n) >= n - n // 2),
    "orthogonal": np.ones,
    "power law": lambda n: spectra.pareto_quantiles(2.5, n) ** 0.5,
    # λ_max / xmin of 5e3 and of 1e5.
    "steep": lambda n: np.logspace(-3.7, 0, n),
    "steeper": lambda n: np.logspace(-5, 0, n),
}

CASES = [(kind, n) for kind in KINDS for n in SIZES]


@functools.cache
def matrices(cases):
    """Of each case one, in float64."""
    rng = np.random.default_rng(0)
    return [
        spectra.with_singular_values(rng, KINDS[kind](n), n, n) for kind, n in cases
    ]


def layers_of(kernels):
    return tuple(Layer(name, MatrixAxes((0,), (1,))) for name in kernels)


@jax.jit
def gram_spectra(kernels):
    """By the way of the default fit."""
    return layer_spectra(kernels, layers_of(kernels), 0.5, GRAM)


def exact_eigenvalues(kernels):
    """Of each layer, ascending, in float64."""
    layers = layers_of(kernels)
    return [spectra.eigenvalues_of(kernels[layer.path], layer) for layer in layers]


def check_eigenvalues(kernels, exact, goal):
    """Within goal·sqrt(n)·λ_max."""
    table = gram_spectra(kernels)
    unit = 4.0 ** np.asarray(table.exponent, np.float64)
    found = np.exp(np.asarray(table.log_eigenvalues, np.float64)) * unit[:, None]
    for own, known in zip(found, exact, strict=True):
        n = len(known)
        error = np.abs(own[-n:] - known).max()
        assert error <= goal * np.sqrt(n) * known[-1]


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_every_size_spectrum_and_scale(scale):
    made = matrices(tuple(CASES))
    kernels = {
        f"{i:02}": spectra.float32(scale * matrix) for i, matrix in enumerate(made)
    }
    exact = exact_eigenvalues(kernels)
    check_eigenvalues(kernels, exact, 1e-6)
    rows = tb_optax.layer_analysis(layers_of(kernels))(kernels).rows()
    seen = []
    for row, own, case in zip(rows, exact, CASES, strict=True):
        n, size = len(own), len(own) - len(own) // 2
        xmin, largest = own[-size], own[-1]
        # A single value has no spread, equal ones have too little.
        some = size > 1 and xmin > 8 * EPS * largest
        alpha = spectra.hill(own, size) if some else 0
        assert row["fitted"] == (0 < alpha <= 1e4), case
        if not row["fitted"]:
            assert row["alpha"] == 0
            continue
        ratio = largest / xmin
        seen.append(ratio)
        tolerance = 1e-5 if ratio <= 1e3 else 1e-4
        if ratio > 1e4:
            tolerance = alpha_tolerance(alpha, own[-size:], n, EPS)
        assert row["alpha"] == pytest.approx(alpha, rel=tolerance), case
    assert min(seen) < 1e3 < max(ratio for ratio in seen if ratio < 1e4)
    assert max(seen) > 1e4
    assert 30 < len(seen) < len(CASES) - 30


def test_matrices_above_1024():
    made = matrices((("clusters", 1025), ("power law", 1025)))
    kernels = {f"{i:02}": spectra.float32(matrix) for i, matrix in enumerate(made)}
    exact = exact_eigenvalues(kernels)
    check_eigenvalues(kernels, exact, 4e-6)
