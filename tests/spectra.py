"""Manufactured spectra: eigenvalues and kernels whose power laws are known."""

import math
from typing import Any

import hypothesis
import numpy as np

# One profile for every property: the same examples each time, in bounded time. The
# fixture that sets 64-bit types may stay set from one example to the next.
PROFILE = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)


def eps_of(dtype: type) -> float:
    """Distance from 1 to the next number of this type."""
    return float(np.finfo(dtype).eps)


def float32(values: Any) -> np.ndarray:
    """An array of this type, rounded to it."""
    return np.asarray(values, np.float32)


def pareto_quantiles(alpha, count):
    """Ascending quantiles at (j + 1/2) / N of the density ∝ λ^-alpha above 1."""
    survival = (count - np.arange(count) - 0.5) / count
    return survival ** (-1 / (alpha - 1))


def marchenko_pastur(aspect, count):
    """Ascending quantiles at (j + 1/2) / N of the eigenvalues of WᵀW / rows.

    W is rows x columns with independent standard entries and aspect = columns / rows
    <= 1. With x = (a + b)/2 + (b - a)/2·cos θ the density sqrt((b-x)(x-a))/(2π q x)
    becomes smooth in θ, and the trapezoid rule on it is accurate to rounding.
    """
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2
    theta = np.linspace(np.pi, 0, 200_001)
    half = (high - low) / 2
    x = (low + high) / 2 + half * np.cos(theta)
    # At aspect 1 the density is 1/sqrt(x) at 0: its limit in θ is finite there.
    safe = np.where(x > 0, x, 1)
    weight = np.where(x > 0, (half * np.sin(theta)) ** 2 / safe, 2 * half)
    mass = np.concatenate([[0], np.cumsum((weight[1:] + weight[:-1]) / 2)])
    probability = (np.arange(count) + 0.5) / count
    return np.interp(probability, mass / mass[-1], x)


def hill(eigenvalues, tail_size):
    """Hill estimate of the `tail_size` largest of ascending eigenvalues."""
    tail = np.asarray(eigenvalues, np.float64)[-tail_size:]
    total = math.fsum(np.log(tail / tail[0]))
    return 1 + tail_size / total if total > 0 else math.inf


def orthonormal(rng, rows, columns):
    """Columns of a random orthogonal matrix, in float64."""
    q, r = np.linalg.qr(rng.normal(size=(rows, columns)))
    return q * np.sign(np.diagonal(r))


def with_singular_values(rng, sigma, rows, columns):
    """A random matrix of this shape with these singular values, in float64."""
    left = orthonormal(rng, rows, len(sigma))
    right = orthonormal(rng, columns, len(sigma))
    return left * np.asarray(sigma) @ right.T


def clusters(count):
    """Three groups of nearly equal singular values, far apart."""
    centres = np.repeat([1.0, 3.0, 30.0], [count - 2 * (count // 3), *[count // 3] * 2])
    return centres * (1 + 1e-3 * np.linspace(0, 1, count))


def gap(count):
    """Singular values 1..2 and, a factor of fifty above, a few more."""
    sigma = np.linspace(1, 2, count)
    sigma[-max(1, count // 10) :] *= 50
    return sigma


def eigenvalues_of(kernel, layer, conv_norm=0.5):
    """Ascending λ of one layer (one slice, one part) by NumPy's SVD in float64."""
    kernel = np.asarray(kernel, np.float64)
    if layer.part is not None:
        axis, start, stop = layer.part
        kernel = np.take(kernel, range(start, stop), axis)
    axes = layer.axes
    kernel = np.moveaxis(kernel, axes.stacked, range(len(axes.stacked)))[layer.index]

    def remaining(group):
        """Positions of axes once the stacked ones are gone."""
        return [axis - sum(s < axis for s in axes.stacked) for axis in group]

    pooled, rows, columns = map(remaining, (axes.pooled, axes.reduction, axes.output))
    found = []
    for position in np.ndindex(*(kernel.shape[axis] for axis in pooled)):
        where = [slice(None)] * kernel.ndim
        for axis, index in zip(pooled, position, strict=True):
            where[axis] = slice(index, index + 1)
        matrix = np.transpose(kernel[tuple(where)], [*pooled, *rows, *columns])
        size = math.prod(kernel.shape[axis] for axis in rows)
        found.append(np.linalg.svd(matrix.reshape(size, -1), compute_uv=False) ** 2)
    return np.sort(np.concatenate(found)) * (conv_norm if pooled else 1)
