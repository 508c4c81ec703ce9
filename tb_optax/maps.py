"""Maps from a metric of the layers to their multipliers.

A map is a function `(metric, tuned) -> multipliers` over vectors with one entry
per layer.  Only tuned layers take part in its minimum, maximum, sum or ranking;
it returns 1 for the others and NaN for a tuned layer outside its domain.  The
four here are frozen dataclasses, so that equal maps compare equal and share one
compilation; any function of that signature will do.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tb_optax.checks import check_number

Assign: TypeAlias = Callable[
    [Float[Array, " layers"], Bool[Array, " layers"]], Float[Array, " layers"]
]


@dataclasses.dataclass(frozen=True)
class linear:
    """Map the metric's range linearly onto [low, high] (`tb_linear_map`).

        low + (high - low)·(M - min M) / (max M - min M),

    and 1 for every layer where the scores are equal up to rounding
    (max - min <= 8·eps·max |M|), which includes a single tuned layer.

    Args:
        low: multiplier of the smallest metric, finite and >= 0.
        high: multiplier of the largest; low > high reverses the map.

    Raises:
        ValueError: if a bound is not a finite number >= 0.

    >>> print(linear(0.5, 1.5)(jnp.asarray([2.0, 4.0, 3.0]), jnp.ones(3, bool)))
    [0.5 1.5 1. ]
    """

    low: int | float = 0.5
    high: int | float = 1.5

    def __post_init__(self):
        check_number("low", self.low, at_least=0)
        check_number("high", self.high, at_least=0)

    def __call__(
        self, metric: Float[Array, " layers"], tuned: Bool[Array, " layers"]
    ) -> Float[Array, " layers"]:
        """Return the multipliers of the layers."""
        low, high, spread = _extremes(metric, tuned)
        position = (metric - low) / jnp.where(spread, high - low, 1)
        multipliers = self.low + (self.high - self.low) * position
        return jnp.where(tuned & spread, multipliers, 1)


@dataclasses.dataclass(frozen=True)
class sqrt:
    """Multipliers proportional to the square root of the metric (`tb_sqrt`).

        n·sqrt(M_i) / Σ_j sqrt(M_j) over the n tuned layers with M >= 0,

    so that their mean is 1; NaN for a tuned layer with M < 0, and 1 for every other
    one where their scores are equal up to rounding.

    >>> print(sqrt()(jnp.asarray([1.0, 9.0, 4.0]), jnp.ones(3, bool)))
    [0.5 1.5 1. ]
    """

    def __call__(
        self, metric: Float[Array, " layers"], tuned: Bool[Array, " layers"]
    ) -> Float[Array, " layers"]:
        """Return the multipliers of the layers."""
        defined = tuned & (metric >= 0)
        return _share(jnp.sqrt, metric, tuned, defined)


@dataclasses.dataclass(frozen=True)
class log2:
    """Multipliers proportional to the logarithm of the metric (`tb_log2`).

        n·log2(M_i) / Σ_j log2(M_j) over the n tuned layers with M >= 1,

    so that their mean is 1; NaN for a tuned layer with M < 1, whose share would
    be negative, and 1 for every other one where their scores are equal up to
    rounding.

    >>> print(log2()(jnp.asarray([2.0, 8.0, 4.0]), jnp.ones(3, bool)))
    [0.5 1.5 1. ]
    """

    def __call__(
        self, metric: Float[Array, " layers"], tuned: Bool[Array, " layers"]
    ) -> Float[Array, " layers"]:
        """Return the multipliers of the layers."""
        defined = tuned & (metric >= 1)
        return _share(jnp.log2, metric, tuned, defined)


@dataclasses.dataclass(frozen=True)
class step:
    """Multipliers by rank alone (`tb_step`).

        low + (high - low)·r / n for rank r = 0..n-1, ascending,

    so that `high` is never reached, as published; 1 for every layer where the
    scores are equal up to rounding.  Ties rank in the order of the layers.

    Args:
        low: multiplier of the smallest metric, finite and >= 0.
        high: bound of the multipliers from the other side, finite and >= 0.

    Raises:
        ValueError: if a bound is not a finite number >= 0.

    >>> print(step(0.5, 1.5)(jnp.asarray([2.0, 9.0]), jnp.ones(2, bool)))
    [0.5 1. ]
    """

    low: int | float = 0.5
    high: int | float = 1.5

    def __post_init__(self):
        check_number("low", self.low, at_least=0)
        check_number("high", self.high, at_least=0)

    def __call__(
        self, metric: Float[Array, " layers"], tuned: Bool[Array, " layers"]
    ) -> Float[Array, " layers"]:
        """Return the multipliers of the layers."""
        _, _, spread = _extremes(metric, tuned)
        order = jnp.argsort(jnp.where(tuned, metric, jnp.inf), stable=True)
        rank = jnp.argsort(order).astype(metric.dtype)
        count = jnp.maximum(tuned.sum(dtype=metric.dtype), 1)
        multipliers = self.low + (self.high - self.low) * rank / count
        return jnp.where(tuned & spread, multipliers, 1)


def _extremes(metric, tuned):
    """Find the smallest and largest tuned metric, and whether they truly differ."""
    low = jnp.min(metric, initial=jnp.inf, where=tuned)
    high = jnp.max(metric, initial=-jnp.inf, where=tuned)
    some = tuned.any()
    low, high = jnp.where(some, low, 0), jnp.where(some, high, 0)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return low, high, high - low > 8 * jnp.finfo(metric.dtype).eps * largest


def _share(score, metric, tuned, defined):
    """n·score(M) / Σ score(M) over the defined layers; NaN for the other tuned ones.

    1 for the defined layers where their metrics are equal up to rounding.
    """
    _, _, spread = _extremes(metric, defined)
    scores = jnp.where(defined, score(jnp.where(defined, metric, 1)), 0)
    total = jnp.where(spread, scores.sum(), 1)
    shares = jnp.where(spread, defined.sum(dtype=scores.dtype) * scores / total, 1)
    return jnp.where(defined, shares, jnp.where(tuned, jnp.nan, 1))
