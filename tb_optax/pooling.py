"""From the eigenvalues of single matrices to one ascending row per layer.

A layer with pooled axes has several matrices, each divided by a power of two of its
own: they come to one unit, and their eigenvalues to one row, by one gather and one sort
for all layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tb_optax.scale import exponents


class Places(NamedTuple):
    """Where the layers are among the matrices.

    Attributes:
        pooled: number of matrices of each layer.
        n: number of eigenvalues of each matrix of a layer.
        first: number of its first matrix.
    """

    pooled: Int[np.ndarray, " layers"]
    n: Int[np.ndarray, " layers"]
    first: Int[np.ndarray, " layers"]

    @classmethod
    def of(cls, stack, layers, pooled, n):
        """From stacks as they lie one behind the other, to layers as they are asked."""
        stack, pooled, n = (np.repeat(x, layers) for x in (stack, pooled, n))
        first = np.cumsum(pooled) - pooled
        asked = np.argsort(stack, kind="stable")
        return cls(*(column[asked].astype(np.int32) for column in (pooled, n, first)))

    @property
    def total(self) -> Int[np.ndarray, " layers"]:
        """N, number of eigenvalues of each layer."""
        return self.pooled * self.n


def pool(
    values: Float[Array, "matrices n"],
    top: Int[Array, " matrices"],
    places: Places,
    log: Callable[[Float[Array, "..."]], Float[Array, "..."]],
):
    """Brings the matrices of each layer to one unit, and sorts their eigenvalues."""
    exponent, finite = exponents(top)
    # Of a layer with fewer matrices than others the last stands for those it lacks.
    slots = np.arange(places.pooled.max())
    members = places.first[:, None] + np.minimum(slots, places.pooled[:, None] - 1)
    unit = exponent[members].max(axis=1)
    is_finite = finite[members].all(axis=1)

    n, first, total = (
        jnp.asarray(column)[:, None]
        for column in (places.n, places.first, places.total)
    )
    column = jnp.arange(places.total.max())[None] - (places.total.max() - total)
    valid = (column >= 0) & is_finite[:, None]
    matrix, place = jnp.divmod(jnp.maximum(column, 0), n)
    offset = exponent[first + matrix] - unit[:, None]
    logs = log(values[first + matrix, place]) + 2 * math.log(2) * offset
    return jnp.sort(jnp.where(valid, logs, -jnp.inf), axis=-1), unit, is_finite
