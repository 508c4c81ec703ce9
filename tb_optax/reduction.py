"""From matrices to one or two vectors each: by LAPACK on CPU, by its like elsewhere.

On CPU every call of LAPACK gets one matrix. One on a batch waits in a thread of the
pool that its own parts need, so that two in one program, where there are few cores, can
wait for each other for ever. Calls that do not depend on each other wait for nothing,
and of enough of them XLA gives half to another thread.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tb_optax.hidden import hidden

# Bytes of the matrices that are reduced in one go, elsewhere than on CPU.
CHUNK_BYTES = 64 * 2**20

# Calls of LAPACK side by side, at most; XLA shares out ten or more.
TOGETHER = 16
_ENOUGH = 10

# Only matrices from this size on are reduced faster side by side, and only this many
# (Σ n³) are worth the compilation of the calls.
_SIDE = 192
_WORK = 10**9

Matrices: TypeAlias = Float[Array, "_ _ _"]
# One or a few vectors per matrix.
Vectors: TypeAlias = Float[Array, "_ ..."]
Way: TypeAlias = Callable[[Matrices], Vectors]


class Reduction(NamedTuple):
    """From matrices of n x m to vectors of min(n, m) numbers.

    Attributes:
        vectors: of each matrix.
        on_cpu: the way on CPU.
        elsewhere: the way on other platforms.
        side_by_side: a way on CPU whose calls do not wait for each other, if any.
    """

    vectors: int
    on_cpu: Way
    elsewhere: Way
    side_by_side: Way | None = None


def reduce_matrices(
    buckets: Sequence[Sequence[Matrices]],
    reduction: Reduction,
    prepare: Callable[[Matrices], tuple[Any, ...]] = lambda matrices: (matrices,),
) -> tuple[Any, ...]:
    """Prepares matrices and reduces them, one bucket after the other.

    On CPU a matrix stays in the cache from its first step to its last.

    Args:
        buckets: matrices of one shape, in one or several arrays.
        reduction: from prepared ones to vectors.
        prepare: from matrices to prepared ones, and to what is returned as it is, with
            the same batch axis.

    Returns:
        The vectors of all matrices, (matrices, vectors, largest n), behind zeros where
        they are shorter; what else `prepare` returned.
    """
    like = buckets[0][0]
    _, *others = _outline(prepare, buckets[0])
    total = sum(_count(bucket) for bucket in buckets)
    width = max(min(bucket[0].shape[1:]) for bucket in buckets)
    shapes = [(reduction.vectors, width), *(other.shape[1:] for other in others)]
    dtypes = [like.dtype, *(other.dtype for other in others)]
    table = tuple(
        jnp.zeros_like(like, dtype, shape=(total, *shape))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return jax.lax.platform_dependent(
        table,
        buckets,
        cpu=functools.partial(_one_by_one, reduction, prepare),
        default=functools.partial(_in_chunks, reduction, prepare),
    )


def _in_chunks(reduction, prepare, table, buckets):
    start = 0
    for arrays in buckets:
        for chunk in _chunks(arrays):
            stack = jnp.concatenate([arrays[i][part] for i, part in chunk])
            # One chunk after the other, in the memory of one.
            prepared, *others = prepare(after(table[0][start - 1, 0, -1], stack))
            table = _filled(table, start, (reduction.elsewhere(prepared), *others))
            start += len(stack)
    return table


def _one_by_one(reduction, prepare, table, buckets):
    def shape_of(bucket):
        return _outline(prepare, bucket)[0].shape

    # One loop for all buckets that come to matrices of one shape.
    runs = [(shape, list(run)) for shape, run in itertools.groupby(buckets, shape_of)]
    totals = [sum(map(_count, run)) for _, run in runs]
    starts = hidden([0, *itertools.accumulate(totals[:-1])])
    places = [*jnp.asarray(np.concatenate([_places(run) for _, run in runs], axis=1))]
    for (shape, run), start, total in zip(runs, starts, totals, strict=True):
        size, way = 1, reduction.on_cpu
        if reduction.side_by_side is not None:
            size = _group_size(total, shape[-1], table[0].dtype)
            way = reduction.side_by_side if size > 1 else way
        one = functools.partial(_prepared_one, prepare, run, places)
        table = _in_groups(way, one, table, start, total, size)
    return table


def _places(run):
    """Of each matrix of several buckets: its bucket, its array, its place there."""
    columns = [
        np.stack(np.broadcast_arrays(i, j, np.arange(len(array))))
        for i, bucket in enumerate(run)
        for j, array in enumerate(bucket)
    ]
    return np.concatenate(columns, axis=1).astype(np.int32)


def _prepared_one(prepare, run, places, number):
    """A matrix by its number, prepared."""

    def matrix(bucket, array, place):
        slices = [functools.partial(_slice, array) for array in bucket]
        return prepare(jax.lax.switch(array, slices, place))

    # XLA compiles what is the same in several branches and loops to one kernel.
    which, *inside = (_slice(column, number)[0] for column in places)
    branches = [functools.partial(matrix, bucket) for bucket in run]
    return jax.lax.switch(which, branches, *inside)


def _in_groups(way, one, table, start, total, size):
    """Fills the table from `start` on with `total` matrices, `size` of them at once."""

    def fill(group, table):
        if size == 1:
            first = start + group
            matrices, *others = one(first)
        else:
            # What the last group lacks is what was before it once more.
            first = start + jnp.minimum(group * size, total - size)
            results = jax.lax.map(one, first + jnp.arange(size))
            matrices, *others = jax.tree.map(lambda x: x[:, 0], results)
        vectors = [way(_slice(matrices, i)) for i in hidden(range(size))]
        return _filled(table, first, (jnp.concatenate(vectors), *others))

    return jax.lax.fori_loop(0, -(-total // size), fill, table)


def _filled(table, start, columns):
    """The table with the columns of some matrices, the first of them at `start`."""

    def fill(whole, part):
        room = [a - b for a, b in zip(whole.shape[1:], part.shape[1:], strict=True)]
        return jax.lax.dynamic_update_slice(
            whole, part, (start, *room), allow_negative_indices=False
        )

    return tuple(map(fill, table, columns))


def after(known: Float[Array, ""], array: Any) -> Any:
    """The same array, but not before a number below infinity is known."""
    return jnp.where(known == jnp.inf, 0, array)


def _outline(prepare, bucket):
    """Shapes and dtypes of what one matrix is prepared to."""
    one = jax.ShapeDtypeStruct((1, *bucket[0].shape[1:]), bucket[0].dtype)
    return jax.eval_shape(prepare, one)


def _count(bucket):
    return sum(map(len, bucket))


def _slice(array, number):
    return jax.lax.dynamic_slice_in_dim(array, number, 1, allow_negative_indices=False)


def _chunks(arrays: Sequence[Matrices]) -> list[list[tuple[int, slice]]]:
    """Cuts matrices into runs that are reduced together.

    Returns:
        Chunks of (number of the array, slice of its matrices).
    """
    size = math.prod(arrays[0].shape[1:]) * arrays[0].dtype.itemsize
    most = max(1, CHUNK_BYTES // size)
    chunks: list[list[tuple[int, slice]]] = [[]]
    room = most
    for number, matrices in enumerate(arrays):
        start, stop = 0, len(matrices)
        while start < stop:
            if not room:
                chunks.append([])
                room = most
            fitting = min(room, stop - start)
            chunks[-1].append((number, slice(start, start + fitting)))
            start += fitting
            room -= fitting
    return chunks


def _group_size(count: int, n: int, dtype: Any) -> int:
    """How many matrices are reduced side by side: one, or enough to be shared out."""
    worth = n >= _SIDE and count * n**3 >= _WORK
    fits = TOGETHER * n**2 * dtype.itemsize <= CHUNK_BYTES
    if count < _ENOUGH or not (worth and fits and _blas_has_one_thread()):
        return 1
    # As little as can be done twice, by as few calls as can be.
    sizes = range(_ENOUGH, min(count, TOGETHER) + 1)
    return min(sizes, key=lambda size: (-count % size, size))


def _blas_has_one_thread() -> bool:
    """Whether OpenBLAS was told so; calls side by side disturb its threads else."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return os.environ.get("OPENBLAS_NUM_THREADS", threads) == "1"


def _tridiagonal(matrices):
    """Reflections, diagonals, what is before them in the rows, scales."""
    # By columns, as LAPACK has matrices, an upper triangle is a lower one.
    by_columns = matrices.swapaxes(1, 2)
    reflections, diagonal, beside, scales = jax.lax.linalg.tridiagonal(by_columns)
    return reflections, diagonal, jnp.pad(beside, ((0, 0), (1, 0))), scales


def _by_householder(matrices):
    _, diagonal, before, _ = _tridiagonal(matrices)
    return jnp.stack([diagonal, before], axis=1)


def _by_householder_apart(matrices):
    reflections, diagonal, before, scales = _tridiagonal(matrices)
    # Something of each result stands where no number is read. Memory of a result that
    # nobody used would be another call's as well, which would wait for this one.
    unread = jnp.pad(
        reflections[:, 0, :1] + scales[:, :1], ((0, 0), (0, before.shape[1] - 1))
    )
    return jnp.stack([diagonal, before + unread], axis=1)


def _by_householder_or_eigenvalues(matrices):
    """Where JAX has no reflections (TPU), the eigenvalues are the diagonal."""

    def by_eigenvalues(matrices):
        lower = matrices.swapaxes(1, 2)
        eigenvalues = jnp.linalg.eigvalsh(lower, symmetrize_input=False)
        return jnp.stack([eigenvalues, jnp.zeros_like(eigenvalues)], axis=1)

    return jax.lax.platform_dependent(
        matrices, cuda=_by_householder, rocm=_by_householder, default=by_eigenvalues
    )


def _by_svd(matrices):
    return jnp.linalg.svd(matrices, compute_uv=False)[:, None]


# Symmetric matrices, of which the upper triangle is read, to similar tridiagonal ones:
# diagonals, and what is before them in the rows, behind a number that is not read.
HOUSEHOLDER = Reduction(
    2, _by_householder, _by_householder_or_eigenvalues, _by_householder_apart
)
# Any matrices to their descending singular values.
SVD = Reduction(1, _by_svd, _by_svd)
