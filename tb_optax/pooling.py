"""From the eigenvalues of single matrices to one ascending row per layer.

A layer with pooled axes has several matrices, each divided by a power of two of its
own: they come to one unit, and their eigenvalues to one row, by one gather and one sort
for all layers.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from tb_optax.scale import exponents


class Places(NamedTuple):
    """Where the layers are among the matrices, and among their eigenvalues.

    Attributes:
        pooled: number of matrices of each layer.
        n: number of eigenvalues of each matrix of a layer.
        first: number of its first matrix.
        start: number of its first eigenvalue.
    """

    pooled: Int[np.ndarray, " layers"]
    n: Int[np.ndarray, " layers"]
    first: Int[np.ndarray, " layers"]
    start: Int[np.ndarray, " layers"]

    @classmethod
    def of(cls, stack, layers, pooled, n):
        """From stacks as they lie one behind the other, to layers as they are asked."""
        stack, pooled, n = (np.repeat(x, layers) for x in (stack, pooled, n))
        first = np.cumsum(pooled) - pooled
        start = np.cumsum(pooled * n) - pooled * n
        asked = np.argsort(stack, kind="stable")
        columns = (pooled, n, first, start)
        return cls(*(column[asked].astype(np.int32) for column in columns))

    @property
    def total(self) -> Int[np.ndarray, " layers"]:
        """N, number of eigenvalues of each layer."""
        return self.pooled * self.n


def pool(
    values: Sequence[Float[Array, "_ _"]],
    top: UInt[Array, " matrices"],
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
    flat = jnp.concatenate([bucket.reshape(-1) for bucket in values])

    def rows(layers):
        count, n, first, start = (
            jnp.asarray(x[layers])[:, None]
            for x in (places.total, places.n, places.first, places.start)
        )
        column = jnp.arange(places.total.max())[None] - (places.total.max() - count)
        valid = (column >= 0) & is_finite[layers, None]
        column = jnp.maximum(column, 0)
        offset = exponent[first + column // n] - unit[layers, None]
        logs = log(flat[start + column]) + 2 * math.log(2) * offset.astype(flat.dtype)
        return jnp.where(valid, logs, -jnp.inf)

    several, single = (
        np.flatnonzero(x) for x in (places.pooled > 1, places.pooled == 1)
    )
    table = jnp.concatenate([jnp.sort(rows(several), axis=-1), rows(single)])
    return table[np.argsort(np.concatenate([several, single]))], unit, is_finite
