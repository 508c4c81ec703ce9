"""Eigenvalues of symmetric matrices without their eigenvectors, in batches.

Householder reduction to tridiagonal form, then bisection on Sturm counts: the count
of negative pivots of T - xI is the number of eigenvalues below x. All shifts of all
matrices advance together, so that one short loop serves a whole batch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
) -> tuple[Float[Array, "batch n"], Float[Array, "batch m"]]:
    """Diagonals and off-diagonals of similar tridiagonal matrices, m = n - 1.

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
    return diagonal, off_diagonal


def _by_eigenvalues(matrices):
    eigenvalues = jnp.linalg.eigvalsh(matrices, symmetrize_input=False)
    return eigenvalues, jnp.zeros_like(eigenvalues[:, 1:])


def bucket_eigenvalues(
    buckets: Sequence[tuple[Float[Array, "_ _"], ...]],
) -> list[Float[Array, "_ _"]]:
    """Eigenvalues of tridiagonal matrices of several sizes, a few sizes at once.

    Sizes up to 64, up to 256, up to 1024, ... are padded to the largest among them:
    a bisection costs seconds to compile, and half as much again to run on padding.

    Args:
        buckets: diagonals (batch, n) and off-diagonals (batch, n - 1).

    Returns:
        Ascending eigenvalues (batch, n) of each bucket.
    """
    classes: dict[tuple, list[int]] = {}
    for i, (diagonal, _) in enumerate(buckets):
        size = 4 ** math.ceil(math.log(max(diagonal.shape[1], 64), 4))
        classes.setdefault((size, str(diagonal.dtype)), []).append(i)
    results: list = [None] * len(buckets)
    for members in classes.values():
        width = max(buckets[i][0].shape[1] for i in members)
        padded = [_pad(buckets[i], width) for i in members]
        diagonal, off_diagonal = map(jnp.concatenate, zip(*padded, strict=True))
        eigenvalues = tridiagonal_eigenvalues(diagonal, off_diagonal)
        start = 0
        for i in members:
            batch, n = buckets[i][0].shape
            results[i] = eigenvalues[start : start + batch, width - n :]
            start += batch
    return results


def _pad(bucket, width: int):
    """Puts 1x1 blocks in front, with the lower bound of the eigenvalues in them."""
    diagonal, off_diagonal = bucket
    more = width - diagonal.shape[1]
    low, _ = _bounds(diagonal, off_diagonal)
    block = jnp.broadcast_to(low, (len(diagonal), more))
    zeros = ((0, 0), (more, 0))
    return jnp.concatenate([block, diagonal], axis=1), jnp.pad(off_diagonal, zeros)


def _bounds(diagonal, off_diagonal):
    """Gershgorin's discs hold all eigenvalues."""
    beside = jnp.abs(off_diagonal)
    left, right = ((0, 0), (1, 0)), ((0, 0), (0, 1))
    radius = jnp.pad(beside, left) + jnp.pad(beside, right)
    low = jnp.min(diagonal - radius, axis=-1, keepdims=True)
    high = jnp.max(diagonal + radius, axis=-1, keepdims=True)
    return low, high


def tridiagonal_eigenvalues(
    diagonal: Float[Array, "batch n"], off_diagonal: Float[Array, "batch m"]
) -> Float[Array, "batch n"]:
    """Ascending eigenvalues of symmetric tridiagonal matrices, m = n - 1.

    One count on a grid of n points finds the cell of every eigenvalue at once;
    bisection of the cells then halves all intervals together, until they are
    narrower than the rounding error of a count.

    Args:
        diagonal: diagonals.
        off_diagonal: the diagonals beside them; signs do not matter.

    Returns:
        Eigenvalues within a few eps·|λ|_max.

    >>> diagonal, off_diagonal = jnp.asarray([[2.0, 2.0]]), jnp.asarray([[1.0]])
    >>> print(tridiagonal_eigenvalues(diagonal, off_diagonal).round(4))
    [[1. 3.]]
    """
    n = diagonal.shape[-1]
    info = jnp.finfo(diagonal.dtype)
    low, high = _bounds(diagonal, off_diagonal)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    # A little wider, against rounding; divided by a power of two, which is exact.
    slack = 4 * info.eps * largest
    _, exponent = jnp.frexp(largest)
    diagonal, off_diagonal, low, high = (
        jnp.ldexp(x, -exponent)
        for x in (diagonal, off_diagonal, low - slack, high + slack)
    )

    rows = _pairs_of_rows(diagonal, off_diagonal, above=high + 1)
    wanted = jnp.arange(n)
    points = jnp.linspace(0, 1, n + 2, dtype=diagonal.dtype)[None]
    grid = low + (high - low) * points

    def narrow(i, bounds):
        low, high = bounds
        shifts = jnp.where(i == 0, grid[:, 1:-1], (low + high) / 2)
        counts = _count_below(rows, shifts)

        def locate():
            search = functools.partial(jnp.searchsorted, side="right")
            cell = jax.vmap(search, in_axes=(0, None))(counts, wanted)
            return tuple(
                jnp.take_along_axis(grid, cell + side, axis=-1) for side in (0, 1)
            )

        def halve():
            above = counts > wanted
            return jnp.where(above, low, shifts), jnp.where(above, shifts, high)

        return jax.lax.cond(i == 0, locate, halve)

    halvings = max(0, math.ceil(info.nmant + 5 - math.log2(n)))
    bounds = grid[:, :-2], grid[:, 2:]
    low, high = jax.lax.fori_loop(0, 1 + halvings, narrow, bounds)
    return jnp.ldexp((low + high) / 2, exponent)


def _pairs_of_rows(diagonal, off_diagonal, above):
    """Rows (d_k, e²_{k-1}) of T, |T| <= 1, two by two; a 1x1 block evens them out.

    Args:
        above: a number above all eigenvalues, for that block.
    """
    batch, n = diagonal.shape
    odd = n % 2
    before = jnp.pad(off_diagonal, ((0, 0), (1 + odd, 0)))
    diagonal = jnp.concatenate([above] * odd + [diagonal], axis=1)
    squared = jnp.maximum(before**2, _smallest(diagonal.dtype))
    return tuple(x.T.reshape(-1, 2, batch, 1) for x in (diagonal, squared))


def _smallest(dtype) -> float:
    """The square of a number far below the rounding error of 1."""
    return float(jnp.finfo(dtype).eps) ** 2 / 2**14


def _count_below(
    rows: tuple[Float[Array, "pairs 2 batch 1"], Float[Array, "pairs 2 batch 1"]],
    shifts: Float[Array, "batch shifts"],
) -> Int[Array, "batch shifts"]:
    """Number of eigenvalues below each shift, by Sylvester's law of inertia.

    The pivots of T - xI are q_k = a_k - e²_{k-1} / q_{k-1}, a_k = d_k - x; as many are
    negative as there are eigenvalues below x. Two at a time they need one division:

        q_k = a_k - e²_{k-1} · y
        1 / q_{k+1} = q_k / (a_{k+1} q_k - e²_k) = y'

    A vanishing q_{k+1} is moved to a tiny number, which changes d_{k+1} by as much; no
    e² is zero, so that not both are. Nothing overflows, and nothing is 0 / 0.
    """
    tiny = _smallest(shifts.dtype)

    def next_pivots(carry, row):
        inverse, count = carry
        (first, second), (before, between) = row
        pivot = first - shifts - before * inverse
        product = (second - shifts) * pivot - between
        least = tiny * pivot
        product = jnp.where(jnp.abs(product) < jnp.abs(least), least, product)
        inverse = pivot / product
        return (inverse, count + jnp.signbit(pivot) + jnp.signbit(inverse)), None

    start = jnp.ones_like(shifts), jnp.zeros_like(shifts, jnp.int32)
    (_, count), _ = jax.lax.scan(next_pivots, start, rows, unroll=4)
    return count
