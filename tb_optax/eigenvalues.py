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
    # A little wider, against rounding.
    slack = 4 * info.eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
    low, high = low - slack, high + slack

    before = jnp.pad(off_diagonal, ((0, 0), (1, 0)))
    pivots = (diagonal.T[:, :, None], (before**2).T[:, :, None])
    wanted = jnp.arange(n)[None]
    points = jnp.linspace(0, 1, n + 2, dtype=diagonal.dtype)[None]
    grid = low + (high - low) * points

    def narrow(i, bounds):
        low, high = bounds
        shifts = jnp.where(i == 0, grid[:, 1:-1], (low + high) / 2)
        counts = _count_below(pivots, shifts)

        def locate():
            cell = jnp.sum(counts[:, :, None] <= wanted[:, None], axis=1)
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
    return (low + high) / 2


def _count_below(
    pivots: tuple[Float[Array, "n batch 1"], Float[Array, "n batch 1"]],
    shifts: Float[Array, "batch shifts"],
) -> Int[Array, "batch shifts"]:
    """Number of eigenvalues below each shift, by Sylvester's law of inertia.

    The pivots of T - xI are q_k = d_k - x - e²_{k-1} / q_{k-1}; a vanishing one is
    moved to a tiny negative number, a change of the matrix below its rounding error.
    """
    tiny = jnp.finfo(shifts.dtype).tiny * 4

    def next_pivot(carry, row):
        pivot, count = carry
        diagonal, before_squared = row
        pivot = diagonal - shifts - before_squared / pivot
        pivot = jnp.where(jnp.abs(pivot) < tiny, -tiny, pivot)
        return (pivot, count + (pivot < 0)), None

    start = jnp.ones_like(shifts), jnp.zeros_like(shifts, jnp.int32)
    (_, count), _ = jax.lax.scan(next_pivot, start, pivots)
    return count
