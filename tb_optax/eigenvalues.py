"""Eigenvalues of symmetric matrices without their eigenvectors, in batches.

Householder reduction to tridiagonal form, then bisection on Sturm counts: the count
of negative pivots of T - xI is the number of eigenvalues below x. All shifts of all
matrices advance together, so that one short loop serves a whole batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Shifts that are counted side by side for one matrix.
LANES = 64
# Rows of a step of the loop that counts them, an even number.
ROWS = 8


def after(known: Float[Array, ""], array: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same array, but not before a number below infinity is known."""
    return jnp.where(known == jnp.inf, 0, array)


def by_matrix(
    function: Callable[[Float[Array, "batch _ _"]], Any],
    matrices: Float[Array, "batch _ _"],
) -> Any:
    """A function of a batch of matrices, which on CPU gets one at a time.

    A matrix then stays in the cache from its first step to its last. And a LAPACK
    call on a batch waits in a thread of the pool that its own parts need, so that
    two in one program, where there are few cores, can wait for each other for ever.

    Args:
        function: to a tree of arrays with the same batch axis.
        matrices: its argument.
    """

    def one(matrix):
        return jax.tree.map(lambda result: result[0], function(matrix[None]))

    return jax.lax.platform_dependent(
        matrices, cpu=lambda batch: jax.lax.map(one, batch), default=function
    )


def tridiagonal_form(
    matrices: Float[Array, "batch n n"],
) -> Float[Array, "batch 2 n"]:
    """Similar tridiagonal matrices: diagonals, and what is before them in the rows.

    By Householder reflections on CPU and GPU. Where JAX has none (TPU), the
    eigenvalues themselves are the diagonal, by `jnp.linalg.eigvalsh`.

    Args:
        matrices: symmetric matrices; the lower triangles are read.
    """
    return jax.lax.platform_dependent(
        matrices,
        cpu=_by_householder,
        cuda=_by_householder,
        rocm=_by_householder,
        default=_by_eigenvalues,
    )


def _by_householder(matrices):
    _, diagonal, off_diagonal, _ = jax.lax.linalg.tridiagonal(matrices)
    return jnp.stack([diagonal, jnp.pad(off_diagonal, ((0, 0), (1, 0)))], axis=1)


def _by_eigenvalues(matrices):
    eigenvalues = jnp.linalg.eigvalsh(matrices, symmetrize_input=False)
    return jnp.stack([eigenvalues, jnp.zeros_like(eigenvalues)], axis=1)


def tridiagonal_eigenvalues(
    buckets: Sequence[Float[Array, "_ 2 _"]],
) -> list[Float[Array, "_ _"]]:
    """Ascending eigenvalues of symmetric tridiagonal matrices of several sizes.

    One count on a grid of n points finds the cell of every eigenvalue at once;
    bisection of the cells then halves all intervals together, until they are
    narrower than the rounding error of a count.

    Args:
        buckets: matrices of one size each, as `tridiagonal_form` returns them: their
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
    # The intervals of a matrix lie in blocks of LANES.
    blocks = -(-size // LANES)
    matrix = np.repeat(np.arange(len(size)), blocks)
    first = (np.cumsum(blocks) - blocks)[matrix][:, None] * LANES
    lane = np.arange(len(matrix) * LANES).reshape(-1, LANES)
    cells = blocks[matrix][:, None] * LANES + 1

    rows, low, high, unit = _prepared(buckets, size)
    low, high = low[matrix], high[matrix]
    groups = _groups(rows[..., matrix, :], size[matrix])

    def grid(number):
        return low + (high - low) * (number.astype(low.dtype) / cells.astype(low.dtype))

    def narrow(i, bounds):
        below, above = bounds
        shifts = jnp.where(i == 0, grid(lane - first + 1), (below + above) / 2)
        counts = jnp.concatenate([_count_below(r, shifts[part]) for r, part in groups])

        def locate():
            # Ascending over all matrices, as `lane` is.
            keys = (first + counts).reshape(-1)
            cell = jnp.searchsorted(keys, lane, side="right") - first
            return grid(cell), grid(cell + 1)

        def halve():
            fewer = counts <= lane - first
            return jnp.where(fewer, shifts, below), jnp.where(fewer, above, shifts)

        return jax.lax.cond(i == 0, locate, halve)

    halvings = max(0, math.ceil(info.nmant + 3 - math.log2(cells.min())))
    start = jnp.broadcast_to(low, lane.shape), jnp.broadcast_to(high, lane.shape)
    below, above = jax.lax.fori_loop(0, 1 + halvings, narrow, start)
    found = ((below + above) / 2 * unit[matrix]).reshape(-1)
    results: list = [None] * len(buckets)
    stop = 0
    for i, bucket in zip(order, buckets, strict=True):
        batch, _, n = bucket.shape
        width = -(-n // LANES) * LANES
        begin, stop = stop, stop + batch * width
        results[i] = found[begin:stop].reshape(batch, width)[:, :n]
    return results


def _groups(rows, size: Int[np.ndarray, " blocks"]):
    """Blocks of sizes up to 64, up to 256, up to 1024, ..., without the rows before.

    A loop over the rows of each is half a tenth of a second to compile.

    Returns:
        Rows and blocks of each group.
    """
    group = np.ceil(np.log2(np.maximum(size, 64)) / 2)
    groups, start = [], 0
    for stop in [*np.flatnonzero(np.diff(group)) + 1, len(size)]:
        steps = -(-size[start:stop].max() // ROWS)
        part = slice(start, stop)
        groups.append((rows[len(rows) - steps :, ..., part, :], part))
        start = stop
    return groups


def _prepared(buckets, size):
    """Brings all matrices to |T| < 2 and to one number of rows.

    Returns:
        Rows (d_k, e²_{k-1}) as (steps, ROWS, 2, matrices, 1); bounds of the eigenvalues
        and what they were divided by, (matrices, 1). Rows before the first are above
        all eigenvalues.
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
    rows = jnp.stack([diagonal.T, squared.T], axis=1)
    return rows.reshape(-1, ROWS, 2, len(form), 1), low, high, unit


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
        for (first, before), (second, between) in zip(rows[::2], rows[1::2]):
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
