"""Eigenvalues of tridiagonal matrices against closed forms, and of odd buckets.

Those of whole kernels are tested in `test_spectrum`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spectra import eps_of, float32

from tb_optax import eigenvalues
from tb_optax.eigenvalues import (
    find_scale,
    gram_eigenvalues,
    singular_values,
    tridiagonal_eigenvalues,
)

SIZES = (1, 2, 3, 64, 65)
several = jax.jit(
    lambda forms, sizes: tridiagonal_eigenvalues(forms, np.asarray(sizes)),
    static_argnums=1,
)


def tridiagonal(diagonal, beside):
    """Eigenvalues of a batch; what stands before the first row is not read."""
    before = np.pad(beside, ((0, 0), (1, 0)), constant_values=7)
    forms = jnp.stack([diagonal, before], axis=1)
    return several(forms, (forms.shape[2],) * len(forms))


def difference(n):
    """Second differences: 2 - 2 cos(kπ / (n + 1))."""
    exact = 2 - 2 * np.cos(np.arange(1, n + 1) * math.pi / (n + 1))
    return np.full(n, 2.0), np.full(n - 1, -1.0), exact


def clement(n):
    """Kac and Clement's matrix: n - 1, n - 3, ..., 1 - n, as much below 0 as above."""
    k = np.arange(1, n)
    return np.zeros(n), np.sqrt(k * (n - k)), np.arange(1 - n, n, 2.0)


def wilkinson(n):
    """Wilkinson's W+: pairs of eigenvalues that agree to many digits."""
    diagonal, beside = np.abs(np.arange(n) - (n - 1) / 2), np.ones(n - 1)
    full = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    return diagonal, beside, np.linalg.eigvalsh(full)


def uncoupled(n):
    """A diagonal matrix in no order, with repeated entries and zeros."""
    diagonal = np.random.default_rng(0).integers(-3, 4, n).astype(float)
    return diagonal, np.zeros(n - 1), np.sort(diagonal)


def split(n):
    """Blocks of [[1, 1], [1, 1]]: eigenvalues 0 and 2, and a 1 that is left over."""
    beside = np.where(np.arange(n - 1) % 2 == 0, 1.0, 0.0)
    exact = np.repeat([0.0, 1.0, 2.0], [n // 2, n % 2, n // 2])
    return np.ones(n), beside, exact


def zero(n):
    return np.zeros(n), np.zeros(n - 1), np.zeros(n)


def graded(n):
    """Entries that fall by ten orders of magnitude."""
    diagonal = np.logspace(0, -10, n)
    beside = np.sqrt(diagonal[1:] * diagonal[:-1]) / 3
    full = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    return diagonal, beside, np.linalg.eigvalsh(full)


FAMILIES = (difference, clement, uncoupled, split, zero, wilkinson, graded)
# Those of the last two are LAPACK's, with its own error of sqrt(n)·eps·norm.
FROM_LAPACK = np.asarray([False] * 5 + [True] * 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.usefixtures("x64")
def test_tridiagonal_matrices_of_known_spectrum(n, dtype):
    """At any scale whose squares are in range, and with either sign beside.

    Rounding in a Sturm count is a change of the entries by a few eps of each, so of
    the eigenvalues by that of |d|_max + 2|e|_max; an interval is left half as wide.
    """
    made = [family(n) for family in FAMILIES]
    for scale in (1.0, 1e-12, 1e12):
        diagonal, beside, exact = (
            np.stack([matrix[part] for matrix in made]) * scale for part in range(3)
        )
        radius = np.abs(diagonal).max(-1) + 2 * np.abs(beside).max(-1, initial=0)
        for sign in (1, -1):
            found = tridiagonal(
                jnp.asarray(diagonal, dtype), jnp.asarray(sign * beside, dtype)
            )
            assert found.dtype == dtype
            assert (np.diff(found) >= 0).all()
            error = np.abs(np.asarray(found, np.float64) - exact)
            bound = 4 * eps_of(dtype) * radius
            bound += FROM_LAPACK * 4 * eps_of(np.float64) * math.sqrt(n) * radius
            assert (error <= bound[:, None]).all()


def test_sizes_side_by_side():
    """Every size finds its own eigenvalues, whatever is decomposed along with it.

    What follows the rows of a smaller matrix is not read.
    """
    sizes = (130, 1, 64, 7, 65, 300, 2)
    forms, exact = [], []
    for n in sizes:
        for family in FAMILIES:
            diagonal, beside, known = family(n)
            before = np.pad(beside, (1, 0), constant_values=np.nan)
            missing = ((0, 0), (0, max(sizes) - n))
            form = np.pad([diagonal, before], missing, constant_values=np.nan)
            forms.append(float32(form))
            exact.append(known)
    found = several(jnp.stack(forms), tuple(map(len, exact)))
    assert found.shape == (len(exact), max(sizes))
    for values, form, known in zip(found, forms, exact, strict=True):
        n = len(known)
        radius = np.abs(form[0, :n]).max()
        radius += 2 * np.abs(form[1, 1:n]).max(initial=0)
        bound = 4 * eps_of(np.float32) * radius
        error = np.abs(np.asarray(values[:n], np.float64) - known)
        assert (error <= bound).all()


SCALES = float32([1, 1e-30, 1e30, 0, 1e-40, 1, 1])
FINITE = np.asarray([True] * 5 + [False] * 2)


@pytest.mark.parametrize(
    ("decompose", "platform", "gram_side"),
    [
        (gram_eigenvalues, "cpu", None),
        (gram_eigenvalues, "default", None),
        (singular_values, "cpu", 70),
        (singular_values, "cpu", 63),  # Too small for one of the matrices.
        (singular_values, "default", None),
    ],
)
def test_buckets_of_any_shape_and_scale(decompose, platform, gram_side, monkeypatch):
    """W = 2^exponent · (a matrix of these values).

    What is not finite has only zeros, and numbers that are not normal count as zeros.
    The way of accelerators, here on CPU, decomposes three matrices of 64 x 64 at once.
    """

    def chosen(*operands, **ways):
        return ways[platform](*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    monkeypatch.setattr(eigenvalues, "CHUNK_BYTES", 3 * 64 * 64 * 4)
    monkeypatch.setattr(eigenvalues, "_GRAM_SIDE", gram_side)
    rng = np.random.default_rng(3)
    shapes = [(3, 5), (1, 1), (70, 64), (2, 300), (300, 2), (64, 64)]
    buckets = [rng.normal(size=(7, *shape)).astype(np.float32) for shape in shapes]
    scaled = [w * SCALES[:, None, None] for w in buckets]
    for matrices in scaled:
        matrices[5, -1, -1], matrices[6, -1, -1] = math.nan, -math.inf
    scaled = [jnp.asarray(matrices) for matrices in scaled]
    # A function of its own: the way of the other platform is not in its cache.
    found = jax.jit(lambda buckets: decompose(buckets))(scaled)
    for matrices, own in zip(scaled, found, strict=True):
        n = min(matrices.shape[1:])
        assert own.values.shape == (7, n)
        np.testing.assert_array_equal(own.finite, FINITE)
        assert not own.values[3:].any()
        unit = 2.0 ** np.asarray(own.exponent[:3, None, None], np.float64)
        exact = np.linalg.svd(matrices[:3] / unit, compute_uv=False)[:, ::-1]
        if decompose is gram_eigenvalues:
            exact = exact**2
        assert (np.diff(own.values) >= 0).all()
        error = np.abs(np.asarray(own.values[:3], np.float64) - exact)
        bound = 8.4 * eps_of(np.float32) * math.sqrt(n) * exact[:, -1:]
        assert (error <= bound).all()
        if decompose is singular_values and platform == "cpu":
            noise = 8.4 * eps_of(np.float64) * math.sqrt(n) * exact[:, -1:] ** 2
            assert (error <= 0.51 * eps_of(np.float32) * exact + noise / exact).all()


def test_division_by_the_scale_is_exact():
    kernel = float32(np.random.default_rng(4).normal(size=(9, 7)))
    largest = np.abs(kernel).max()
    kernels = jnp.asarray(kernel / largest * float32([[[1.0]], [[1.5]], [[3e38]]]))
    scale = jax.jit(lambda w: find_scale([w]))(kernels)
    top = np.abs(kernels).max(axis=(1, 2))
    np.testing.assert_array_equal(scale.unit, 2.0 ** np.floor(np.log2(top)))
    np.testing.assert_array_equal(np.log2(scale.unit), scale.exponent)
