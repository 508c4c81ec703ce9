"""Layers of every kind in one tree, and what the table of their analysis must hold."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
import reference
import spectra
from spectra import eps_of

import tb_optax
from tb_optax import Layer, MatrixAxes
from tb_optax.layers import expand_stacks

DENSE = MatrixAxes((0,), (1,))
CONV = MatrixAxes((2,), (3,), pooled=(0, 1))

# Layers of different N and shapes, but few sizes of Gram matrices, each of which has
# its own part of the compiled analysis.
ZOO = {
    "conv": ((3, 3, 20, 24), CONV),
    "dense": ((60, 50), DENSE),
    "heads": ((24, 4, 5), MatrixAxes((0,), (1, 2))),
    "one": ((7, 1), DENSE),
    "scan": ((2, 20, 50), MatrixAxes((1,), (2,), stacked=(0,))),
    "square": ((50, 50), DENSE),
    "three": ((3, 9), DENSE),
    "wide": ((50, 150), DENSE),
}
LAYERS = tuple(Layer(name, axes) for name, (_, axes) in ZOO.items())
SHAPES = {name: shape for name, (shape, _) in ZOO.items()}
EXPANDED = expand_stacks(LAYERS, SHAPES)
FIT_COLUMNS = ("alpha", "alpha_hat", "ks_distance", "xmin", "tail_size")


def make_kernels(seed, dtype=np.float32, decay=0.7) -> dict[str, Any]:
    """Kernels with heavy tails: Gaussian, their columns of falling size."""
    rng = np.random.default_rng(seed)
    kernels = {}
    for name, shape in SHAPES.items():
        columns = (1 + np.arange(shape[-1])) ** -decay
        kernels[name] = np.asarray(rng.normal(size=shape) * columns, dtype)
    return kernels


@functools.cache
def analysis_of(**options: Any):
    """Equal options give one analysis, and so one compilation."""
    options.setdefault("min_eigenvalues", 20)
    return tb_optax.layer_analysis(LAYERS, **options)


def analyze(kernels, **options):
    return analysis_of(**options)(kernels)


def columns_of(analysis) -> dict[str, Any]:
    """The columns as NumPy arrays, by name."""
    fields = dataclasses.fields(analysis)
    names = [field.name for field in fields if field.name != "layers"]
    return {name: np.asarray(getattr(analysis, name)) for name in names}


def assert_same(one, other, columns=None, rows=slice(None)):
    """To the bit."""
    one, other = columns_of(one), columns_of(other)
    for name in columns or one:
        np.testing.assert_array_equal(one[name][rows], other[name][rows], err_msg=name)


def relative_tail_error(tail, side, eps):
    """Relative error of the smallest λ of a tail, by Weyl's bound on a Gram matrix.

    Backward errors are sqrt(n)·eps·λ_max, whatever λ is.
    """
    return eps * math.sqrt(side) * tail[-1] / tail[0]


def alpha_tolerance(alpha, tail, side, eps):
    """Relative error of alpha: dα/α = (α-1)²/α · mean error of ln λ - ln xmin."""
    condition = (alpha - 1) ** 2 / alpha
    return 84 * eps + condition * relative_tail_error(tail, side, eps)


def check_norms(row, eigenvalues, eps):
    """Norms of one row; where they leave the range of normal numbers, nearly."""
    total, largest = eigenvalues.sum(), eigenvalues[-1]
    exact = {
        "spectral_norm": math.sqrt(largest),
        "frobenius_norm": math.sqrt(total),
        "stable_rank": total / largest if largest else 0,
    }
    assert row["eigenvalue_count"] == len(eigenvalues)
    tiny = float(np.finfo(np.float32).tiny)
    for name, value in exact.items():
        assert row[name] == pytest.approx(value, rel=84 * eps, abs=tiny), name


def check_fit(row, eigenvalues, law, side, eps):
    """The fit of one row against that of NumPy."""
    tail = eigenvalues[-law.tail_size :]
    tolerance = alpha_tolerance(law.alpha, tail, side, eps)
    relative = relative_tail_error(tail, side, eps)
    assert row["tail_size"] == law.tail_size
    assert row["alpha"] == pytest.approx(law.alpha, rel=tolerance)
    # ln λ/4^exponent is at most 2 ln n here, and rounded.
    rounding = eps * (4 + 2 * math.log(side))
    info = np.finfo(np.float32)
    if float(info.tiny) < law.xmin < float(info.max):
        assert row["xmin"] == pytest.approx(law.xmin, rel=2 * relative + rounding)
    # D has slope (alpha - 1)·(λ/xmin)^(1-alpha) in ln λ, 1/e in ln(alpha - 1).
    slope = law.alpha / (law.alpha - 1) * tolerance
    slope += (law.alpha - 1) * relative + 4 * eps
    assert row["ks_distance"] == pytest.approx(law.ks_distance, abs=slope)
    hat = law.alpha * math.log10(eigenvalues[-1])
    # ln λ_max is a sum of ln 4^exponent and a small rest.
    rounding = law.alpha * 84 * eps
    assert row["alpha_hat"] == pytest.approx(hat, abs=abs(hat) * tolerance + rounding)


def check_no_fit(row):
    """Zeros where there is no fit."""
    assert [row[name] for name in FIT_COLUMNS] == [0] * len(FIT_COLUMNS)
    assert not row["fitted"]
    assert not row["tuned"]
    assert row["multipliers"] == 1


def check_table(analysis, kernels, fit, *, floor=None, conv_norm=0.5, dtype=None):
    """Every row against NumPy in float64; returns the reference's alphas."""
    eps = eps_of(dtype or np.float32)
    alphas = []
    for row, layer in zip(analysis.rows(), analysis.layers, strict=True):
        eigenvalues = spectra.eigenvalues_of(kernels[layer.path], layer, conv_norm)
        check_norms(row, eigenvalues, eps)
        law = fit(reference.above_floor(eigenvalues, floor))
        fitted = 0 < law.alpha <= 1e4
        alphas.append(law.alpha if fitted else 0)
        if fitted:
            assert row["fitted"], layer.name
            side = min(layer.matrix_shape(np.shape(kernels[layer.path])))
            check_fit(row, eigenvalues, law, side, eps)
        else:
            check_no_fit(row)
    return np.asarray(alphas)


def check_multipliers(analysis, alphas):
    """The linear map of the reference's alphas, with the error of its range."""
    eps = float(np.finfo(analysis.alpha.dtype).eps)
    tuned = (alphas > 0) & (np.asarray(analysis.eigenvalue_count) >= 20)
    np.testing.assert_array_equal(analysis.tuned, tuned)
    scores = np.where(tuned, alphas, np.nan)
    expected = reference.multipliers(scores, "tb_linear_map", 0.5, 1.5)
    error = np.abs(np.asarray(analysis.alpha) - alphas)[tuned].max()
    tolerance = 4 * error / np.ptp(alphas[tuned]) + 4 * eps
    np.testing.assert_allclose(analysis.multipliers, expected, atol=tolerance)
    np.testing.assert_array_equal(analysis.multipliers[~tuned], 1)
