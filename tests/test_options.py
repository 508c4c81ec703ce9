"""Options of fits, maps, spectra and analyses: their numbers, and their equality."""

import itertools
import math
import re

import jax.numpy as jnp
import pytest

import tb_optax
from tb_optax import (
    Layer,
    MatrixAxes,
    exact,
    fit_median,
    fit_min_ks,
    fit_peak,
    layer_analysis,
    linear,
    log2,
    quadrature,
    sigmoid,
    sqrt,
    standard_sigmoid,
    step,
    windows,
)

NAN, INF = math.nan, math.inf
NO_BOUND = [-0.1, -1, INF, NAN, True]


def esd(conv_norm):
    layers = [Layer("w", MatrixAxes((0,), (1,)))]
    return tb_optax.esd({"w": jnp.ones((6, 5))}, layers, conv_norm=conv_norm)


@pytest.mark.parametrize(
    ("make", "name", "rule", "values"),
    [
        (fit_median, "position", "a finite number > 1", [1, 1.0, 0.5, -2, INF, NAN]),
        (fit_peak, "bins", "an int >= 1", [0, -3, True]),
        (linear, "low", "a finite number >= 0", NO_BOUND),
        (linear, "high", "a finite number >= 0", NO_BOUND),
        (step, "low", "a finite number >= 0", NO_BOUND),
        (step, "high", "a finite number >= 0", NO_BOUND),
        (sigmoid, "below", "a finite number >= 0", [-1]),
        (sigmoid, "temperature", "a finite number > 0", [0]),
        (standard_sigmoid, "temperature", "a finite number > 0", [0]),
        (quadrature, "above", "an int >= 0", [-1]),
        (quadrature, "probes", "an int >= 1", [0, True]),
        (quadrature, "steps", "an int >= 2", [1, -5]),
        (windows, "ratio", "a finite number > 0", [0]),
        (windows, "rows", "an int >= 1", [0]),
        (layer_analysis, "min_eigenvalues", "an int >= 0", [-1]),
        (layer_analysis, "max_dim", "an int >= 1", [0]),
        (layer_analysis, "conv_norm", "a finite number > 0", [0.0, INF]),
        (layer_analysis, "eigenvalue_floor", "a finite number > 0", [0.0, NAN]),
        (esd, "conv_norm", "a finite number > 0", [0, -1.0, INF, NAN]),
    ],
)
def test_numbers_out_of_range(make, name, rule, values):
    for value in values:
        message = f"{name} must be {rule}, got {name} = {value!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            make(**{name: value})


def test_options_compare_by_value():
    """By it equal analyses share what they compile."""
    makers = [
        fit_median,
        lambda: fit_median(3),
        lambda: fit_median(include_threshold=False),
        fit_min_ks,
        fit_peak,
        lambda: fit_peak(50),
        lambda: fit_peak(published_window=False),
        linear,
        lambda: linear(0.1, 2),
        sqrt,
        log2,
        step,
        lambda: step(0.1, 2),
        exact,
        quadrature,
        lambda: quadrature(steps=64),
    ]
    for (i, make), (j, other) in itertools.product(enumerate(makers), repeat=2):
        assert (make() == other()) == (i == j)
    assert all(hash(make()) == hash(make()) for make in makers)
    assert linear(1, 2) == linear(1.0, 2.0)
    assert quadrature() == quadrature(above=1024, probes=8, steps=32)
