"""From matrices to one or two vectors each: by LAPACK on CPU, by its like elsewhere.

On CPU every call of LAPACK gets one matrix. One on a batch waits in a thread of the
pool that its own parts need, so that two in one program, where there are few cores, can
wait for each other for ever. Calls that do not depend on each other wait for nothing,
and of enough of them XLA gives half to another thread.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Bytes of the matrices that are reduced in one go, elsewhere than on CPU.
CHUNK_BYTES = 64 * 2**20

# Calls of LAPACK side by side, at most; XLA shares out what is more than nine.
TOGETHER = 16
_TOO_FEW = 9

# Only matrices from this size on are reduced faster side by side, and only this many
# (Σ n³) are worth the compilation of the calls.
_SIDE = 192
_WORK = 10**9

Matrices: TypeAlias = Float[Array, "_ _ _"]
# One or a few vectors per matrix.
Vectors: TypeAlias = Float[Array, "_ ..."]
Way: TypeAlias = Callable[[Matrices], Vectors]


class Reduction(NamedTuple):
    """From matrices to vectors.

    Attributes:
        on_cpu: the way on CPU.
        elsewhere: the way on other platforms.
        side_by_side: a way on CPU whose calls do not wait for each other, if any.
    """

    on_cpu: Way
    elsewhere: Way
    side_by_side: Way | None = None


def after(known: Float[Array, ""], array: Any) -> Any:
    """The same array, but not before a number below infinity is known."""
    return jnp.where(known == jnp.inf, 0, array)


def reduce_matrices(
    arrays: Sequence[Matrices],
    reduction: Reduction,
    known: Float[Array, ""],
    prepare: Callable[[Matrices], tuple[Any, ...]] = lambda matrices: (matrices,),
) -> tuple[Any, ...]:
    """Prepares matrices of one shape, and reduces them.

    On CPU a matrix stays in the cache from its first step to its last.

    Args:
        arrays: the matrices.
        reduction: from prepared ones to vectors.
        known: a number below infinity; nothing begins before it is known.
        prepare: from matrices to prepared ones, and to what is returned as it is, with
            the same batch axis.

    Returns:
        The vectors; what else `prepare` returned.
    """

    def one_by_one(known, *arrays):
        size, way = 1, reduction.on_cpu
        if reduction.side_by_side is not None:
            size = _group_size(arrays)
            way = reduction.side_by_side if size > 1 else way
        return _one_by_one(arrays, size, way, known, prepare)

    def in_chunks(known, *arrays):
        return _in_chunks(arrays, reduction.elsewhere, known, prepare)

    return jax.lax.platform_dependent(known, *arrays, cpu=one_by_one, default=in_chunks)


def _in_chunks(arrays, way, known, prepare):
    chunks = []
    for chunk in _chunks(arrays):
        stack = jnp.concatenate([arrays[i][part] for i, part in chunk])
        # One chunk after the other, in the memory of one.
        prepared, *others = prepare(after(known, stack))
        chunks.append((way(prepared), *others))
        known = chunks[-1][0].reshape(-1)[0]
    return tuple(map(jnp.concatenate, zip(*chunks, strict=True)))


def _one_by_one(arrays, size, way, known, prepare):
    counts = [len(array) for array in arrays]
    total = sum(counts)
    number = np.repeat(np.arange(len(arrays)), counts)
    place = np.concatenate([np.arange(count) for count in counts])

    def prepared(matrix):
        one = jax.lax.switch(
            jnp.asarray(number)[matrix],
            [
                lambda i, array=array: jax.lax.dynamic_slice_in_dim(array, i, 1)
                for array in arrays
            ],
            jnp.asarray(place)[matrix],
        )
        return prepare(one)

    def reduced(group):
        if size == 1:
            first, *others = prepared(group[0])
        else:
            results = jax.lax.map(prepared, group)
            first, *others = jax.tree.map(lambda x: x[:, 0], results)
        vectors = [way(first[i : i + 1]) for i in range(size)]
        return jnp.concatenate(vectors), *others

    # What the last group lacks is the last matrix once more.
    groups = np.minimum(np.arange(-(-total // size) * size), total - 1)
    found = jax.lax.map(reduced, after(known, jnp.asarray(groups.reshape(-1, size))))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], tuple(found))


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


def _group_size(arrays: Sequence[Matrices]) -> int:
    """How many matrices are reduced side by side: one, or enough to be shared out."""
    count, n = sum(map(len, arrays)), min(arrays[0].shape[1:])
    size = -(-count // -(-count // TOGETHER))
    fits = size * n**2 * arrays[0].dtype.itemsize <= CHUNK_BYTES
    worth = n >= _SIDE and count * n**3 >= _WORK
    shared = size > _TOO_FEW and fits and worth and _blas_has_one_thread()
    return size if shared else 1


def _blas_has_one_thread() -> bool:
    """Whether OpenBLAS was told so; calls side by side disturb its threads else."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return os.environ.get("OPENBLAS_NUM_THREADS", threads) == "1"


def _tridiagonal(matrices):
    """Diagonals, what is before them in the rows, and the scales of the reflections."""
    # By columns, as LAPACK has matrices, an upper triangle is a lower one.
    by_columns = matrices.swapaxes(1, 2)
    _, diagonal, beside, scales = jax.lax.linalg.tridiagonal(by_columns)
    return diagonal, jnp.pad(beside, ((0, 0), (1, 0))), scales


def _by_householder(matrices):
    diagonal, before, _ = _tridiagonal(matrices)
    return jnp.stack([diagonal, before], axis=1)


def _by_householder_apart(matrices):
    diagonal, before, scales = _tridiagonal(matrices)
    # A scale of the reflections stands where no number is read. Were none of them used,
    # all calls would share the memory for them, and so wait for each other.
    unread = jnp.pad(scales[:, :1], ((0, 0), (0, scales.shape[1])))
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
    return jnp.linalg.svd(matrices, compute_uv=False)


# Symmetric matrices, of which the upper triangle is read, to similar tridiagonal ones:
# diagonals, and what is before them in the rows, behind a number that is not read.
HOUSEHOLDER = Reduction(
    _by_householder, _by_householder_or_eigenvalues, _by_householder_apart
)
# Any matrices to their descending singular values.
SVD = Reduction(_by_svd, _by_svd)
