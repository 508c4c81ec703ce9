"""Eigenvalues of symmetric tridiagonal matrices, in batches.

Bisection on Sturm counts: the count of negative pivots of T - xI is the number of
eigenvalues below x. All shifts of all matrices advance together, so that one short loop
serves a whole batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Rows of a step of the loop that counts eigenvalues, an even number.
ROWS = 8


def tridiagonal_eigenvalues(
    buckets: Sequence[Float[Array, "_ vectors _"]],
) -> list[Float[Array, "_ _"]]:
    """Ascending eigenvalues of symmetric tridiagonal matrices of several sizes.

    One count on a grid of n points finds the cell of every eigenvalue at once;
    bisection of the cells then halves all intervals together, until they are
    narrower than the rounding error of a count.

    Args:
        buckets: matrices of one size each, as `reduction.HOUSEHOLDER` has them: their
            diagonals, and what is beside them, whose signs do not matter, behind a
            number that is not read.

    Returns:
        Eigenvalues (batch, n) of each bucket, within a few eps·|λ|_max.

    >>> matrix = jnp.asarray([[[2.0, 2.0], [0.0, 1.0]]])
    >>> print(tridiagonal_eigenvalues([matrix])[0].round(4))
    [[1. 3.]]
    """
    info = jnp.finfo(buckets[0].dtype)
    order = sorted(range(len(buckets)), key=lambda i: buckets[i].shape[2])
    buckets = [buckets[i] for i in order]
    size = np.repeat([b.shape[2] for b in buckets], [len(b) for b in buckets])
    groups = _groups(size)
    # Intervals of each matrix, some more than it has eigenvalues.
    width = np.concatenate([group.blocks * group.lanes for group in groups])
    start = np.cumsum(width) - width
    rows, low, high, unit = _prepared(buckets, size)
    rows = [group.rows_of(rows) for group in groups]
    matrix = jnp.concatenate([group.matrix_of_interval() for group in groups])

    def by_interval(column):
        """What there is one of for each matrix, for each of its intervals."""
        return jnp.asarray(column).at[matrix].get(mode="promise_in_bounds")

    low, high, unit = map(by_interval, (low, high, unit))
    first, cells = by_interval(start), by_interval(width + 1).astype(low.dtype)
    interval = jnp.arange(width.sum())

    def grid(number):
        return low + (high - low) * (number.astype(low.dtype) / cells)

    def narrow(i, bounds):
        below, above = bounds
        shifts = jnp.where(i == 0, grid(interval - first + 1), (below + above) / 2)
        parts = jnp.split(shifts, np.cumsum([group.total for group in groups])[:-1])
        counts = jnp.concatenate(
            [
                _count_below(own, part.reshape(-1, group.lanes)).reshape(-1)
                for group, own, part in zip(groups, rows, parts, strict=True)
            ]
        )

        def locate():
            # The keys ascend over all matrices, as the intervals do.
            cell = jnp.searchsorted(first + counts, interval, side="right") - first
            return grid(cell), grid(cell + 1)

        def halve():
            fewer = counts <= interval - first
            return jnp.where(fewer, shifts, below), jnp.where(fewer, above, shifts)

        return jax.lax.cond(i == 0, locate, halve)

    halvings = max(0, math.ceil(info.nmant + 3 - math.log2(width.min())))
    below, above = jax.lax.fori_loop(0, 1 + halvings, narrow, (low, high))
    found = (below + above) / 2 * unit
    results: list = [None] * len(buckets)
    matrix = 0
    for i, bucket in zip(order, buckets, strict=True):
        batch, _, n = bucket.shape
        begin, wide = start[matrix], width[matrix]
        own = found[begin : begin + batch * wide].reshape(batch, wide)
        results[i] = own[:, :n]
        matrix += batch
    return results


class _Group(NamedTuple):
    """Matrices of similar sizes, whose rows are counted in one loop.

    Attributes:
        matrices: which they are.
        steps: of that loop, each of ROWS rows.
        lanes: shifts side by side in a block, which has one matrix.
        blocks: of each matrix.
    """

    matrices: slice
    steps: int
    lanes: int
    blocks: Int[np.ndarray, " matrices"]

    @property
    def total(self) -> int:
        """Number of intervals."""
        return int(self.blocks.sum()) * self.lanes

    def rows_of(self, rows):
        """Returns the rows of each block, without those before the first."""
        own = rows[len(rows) - self.steps :, :, :, self.matrices]
        return own[:, :, :, self._matrix_of_block(), None]

    def matrix_of_interval(self):
        """Returns the number of its matrix for each interval."""
        own = self.matrices.start + jnp.asarray(self._matrix_of_block())[:, None]
        return jnp.broadcast_to(own, (len(own), self.lanes)).reshape(-1)

    def _matrix_of_block(self):
        return np.repeat(np.arange(len(self.blocks)), self.blocks)


def _groups(size: Int[np.ndarray, " matrices"]) -> list[_Group]:
    """Ascending sizes up to 256, up to 1024, up to 4096, ...

    A loop takes a tenth of a second to compile; running over rows that a matrix does
    not have takes less than that.
    """
    number = np.ceil(np.log2(np.maximum(size, 256)) / 2)
    ends = [*np.flatnonzero(np.diff(number)) + 1, len(size)]
    groups, start = [], 0
    for stop in ends:
        own = size[start:stop]
        lanes = max(64, int(own[0]) // 4)
        steps = -(-int(own[-1]) // ROWS)
        groups.append(_Group(slice(start, stop), steps, lanes, -(-own // lanes)))
        start = stop
    return groups


def _prepared(buckets, size):
    """Brings all matrices to |T| < 2 and to one number of rows.

    Returns:
        Rows (d_k, e²_{k-1}), those before the first above all eigenvalues, as (steps,
        ROWS, 2, matrices); bounds of the eigenvalues; what all were divided by.
    """
    n = ROWS * -(-size.max() // ROWS)
    form = jnp.concatenate(
        [jnp.pad(b, ((0, 0), (0, 0), (n - b.shape[2], 0)), "edge") for b in buckets]
    )
    column = np.arange(n)
    start = (n - size)[:, None]
    diagonal, before = form[:, 0], jnp.where(column > start, form[:, 1], 0)
    # Gershgorin's discs hold all eigenvalues.
    beside = jnp.abs(before)
    radius = beside + jnp.pad(beside[:, 1:], ((0, 0), (0, 1)))
    low = jnp.min(diagonal - radius, axis=1, keepdims=True)
    high = jnp.max(diagonal + radius, axis=1, keepdims=True)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    # A little wider, against rounding.
    slack = 4 * jnp.finfo(form.dtype).eps * largest
    unit = _power_of_two(largest)
    diagonal, before, low, high = (
        x / unit for x in (diagonal, before, low - slack, high + slack)
    )
    diagonal = jnp.where(column >= start, diagonal, high + 1)
    squared = jnp.maximum(before**2, _smallest(form.dtype))
    rows = jnp.stack([diagonal.T, squared.T], axis=1).reshape(-1, ROWS, 2, len(form))
    return rows, *(column[:, 0] for column in (low, high, unit))


def _power_of_two(x):
    """The power of two at or below a number, exact to divide by; 1 for 0."""
    info = jnp.finfo(x.dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    bits = jax.lax.bitcast_convert_type(x, integer) & ~integer(2**info.nmant - 1)
    return jnp.where(bits == 0, 1, jax.lax.bitcast_convert_type(bits, x.dtype))


def _smallest(dtype) -> float:
    """The square of a number far below the rounding error of 1."""
    return float(jnp.finfo(dtype).eps) ** 2 / 2**14


def _count_below(
    rows: Float[Array, "steps rows 2 blocks 1"], shifts: Float[Array, "blocks lanes"]
) -> Int[Array, "blocks lanes"]:
    """Number of eigenvalues below each shift, by Sylvester's law of inertia.

    The pivots of T - xI are q_k = a_k - e²_{k-1} / q_{k-1}, a_k = d_k - x; as many are
    negative as there are eigenvalues below x. Two at a time they need one division:

        q_k = a_k - e²_{k-1} · y
        1 / q_{k+1} = q_k / (a_{k+1} q_k - e²_k) = y'

    A vanishing q_{k+1} is moved to a tiny number, which changes d_{k+1} by as much; no
    e² is zero, so that not both are. Nothing overflows, and nothing is 0 / 0.
    """
    tiny = _smallest(shifts.dtype)

    def next_pivots(carry, rows):
        inverse, count = carry
        for (first, before), (second, between) in zip(
            rows[::2], rows[1::2], strict=True
        ):
            pivot = first - shifts - before * inverse
            product = (second - shifts) * pivot - between
            least = tiny * pivot
            product = jnp.where(jnp.abs(product) < jnp.abs(least), least, product)
            inverse = pivot / product
            count = count + jnp.signbit(pivot) + jnp.signbit(inverse)
        return (inverse, count), None

    start = jnp.ones_like(shifts), jnp.zeros_like(shifts, jnp.int32)
    (_, count), _ = jax.lax.scan(next_pivots, start, rows)
    return count
