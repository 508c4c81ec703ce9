"""Exact eigenvalues of Gram matrices, and singular values, for matrices in buckets.

A bucket is an array of matrices of one shape.

On CPU, LAPACK is called on one matrix at a time. A batched call holds a thread of
XLA's pool while it waits for its own sub-tasks; with few cores, two such calls in one
program can deadlock. LAPACK reduces each Gram matrix to tridiagonal form, and one
bisection finds the eigenvalues of many matrices together. In float64 their square roots
are the singular values of float32 matrices. On other platforms, where a loop of small
calls is slow, many matrices are decomposed in one call.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Bucket: TypeAlias = Float[Array, "_ _ _"]
Decompose: TypeAlias = Callable[[Float[Array, "_ _"]], Float[Array, "..."]]

# Bytes of the matrices that are decomposed in one call, except on CPU.
CHUNK_BYTES = 2**29

# Tridiagonal matrices up to this size are counted in one loop, as if they were as large
# as the largest of them; then those up to twice this size, and so on.
_SMALL = 128

# Rows in one step of that loop: an even number.
_ROWS = 8

# Singular values of float32 matrices are found from Gram matrices up to this smaller
# side: XLA holds two Gram matrices, or one and the matrix itself, in float64.
_GRAM_SIDE = 4096


class Decomposed(NamedTuple):
    """What is known of the matrices of one bucket.

    The values are ascending eigenvalues λ, or singular values σ, of W / 2^exponent. A
    matrix that is not finite was replaced by zeros.
    """

    values: Float[Array, "matrices n"]
    exponent: Int[Array, " matrices"]
    finite: Bool[Array, " matrices"]


class Scale(NamedTuple):
    """Powers of two near the largest magnitudes of matrices.

    The unit is 2^exponent, at most the largest magnitude; it is 0, and the exponent the
    smallest one, for what counts as zero, as a matrix does that is not finite.
    """

    unit: Float[Array, " matrices"]
    exponent: Int[Array, " matrices"]
    finite: Bool[Array, " matrices"]


def gram_eigenvalues(buckets: Sequence[Bucket]) -> list[Decomposed]:
    """Compute the eigenvalues λ of WᵀW or WWᵀ, the smaller one, for each matrix W.

    They are `scipy.linalg.svdvals(w)[::-1] ** 2` up to a few eps·sqrt(n)·λ_max.
    """

    def own_dtype(buckets, unit):
        return _by_bisection(buckets, unit, unit.dtype)

    return _decomposed(buckets, own_dtype, lambda w: jnp.linalg.eigvalsh(_gram(w)))


def singular_values(buckets: Sequence[Bucket]) -> list[Decomposed]:
    """Compute the singular values σ of each matrix, exact to a few eps·σ_max.

    On CPU, float64 is used throughout. For float32 matrices, they are square roots of
    eigenvalues λ, or zero where rounding hides λ. The others are exact to the last
    digit, in two thirds of the time of a decomposition in float32, and less if the
    matrix is not square. If the smaller side of one exceeds 4096, all are decomposed
    directly: slower, but in little more than three times its memory. On GPU, JAX
    computes singular values one matrix at a time, and with errors of 1e-5; there they
    come from eigenvalues of both signs.
    """
    n = _sides(buckets)

    def from_gram(buckets, unit):
        squared = _by_bisection(buckets, unit, jnp.float64)
        top = jnp.take_along_axis(squared, n[:, None] - 1, axis=1)
        noise = 8 * np.finfo(np.float64).eps * np.sqrt(n)[:, None] * top
        return jnp.sqrt(jnp.where(squared > noise, squared, 0))

    def directly(buckets, unit):
        def ascending(matrix):
            matrix = matrix.astype(jnp.float64)
            found = jnp.linalg.svd(matrix, full_matrices=False, compute_uv=False)
            return found[::-1]

        return _one_by_one(ascending, buckets, unit, (int(n.max()),), jnp.float64)

    def on_cpu(buckets, unit):
        direct = unit.dtype == jnp.float64 or n.max() > _GRAM_SIDE
        with jax.enable_x64(True):
            found = (directly if direct else from_gram)(buckets, unit)
            return found.astype(unit.dtype)

    return _decomposed(buckets, on_cpu, of_both_signs)


def of_both_signs(matrix: Float[Array, "_ _"]) -> Float[Array, " n"]:
    """Compute singular values σ from eigenvalues, ascending.

    With W = QR, those of R are the same, and the eigenvalues of [[0, R], [Rᵀ, 0]] are
    ±σ.

    >>> print(of_both_signs(jnp.asarray([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])))
    [3. 4.]
    """
    rows, columns = matrix.shape
    r = matrix if rows >= columns else matrix.T
    if rows != columns:
        r = jnp.linalg.qr(r, mode="r")
    zero = jnp.zeros_like(r)
    pairs = jnp.linalg.eigvalsh(jnp.block([[zero, r], [r.T, zero]]))
    below, above = jnp.split(pairs, 2)
    return (above - below[::-1]) / 2


def _by_bisection(
    buckets: Sequence[Bucket], unit: Float[Array, " matrices"], dtype: Any
) -> Float[Array, "matrices n"]:
    """Compute eigenvalues of Gram matrices in this precision."""

    def reduce(matrix):
        gram = _gram(matrix.astype(dtype))
        _, diagonal, beside, _ = jax.lax.linalg.tridiagonal(gram)
        return jnp.stack([diagonal, jnp.pad(beside, (1, 0))])

    n = _sides(buckets)
    with jax.named_scope("tridiagonal"):
        forms = _one_by_one(reduce, buckets, unit, (2, int(n.max())), dtype)
    with jax.named_scope("bisection"):
        return tridiagonal_eigenvalues(forms, n)


def _decomposed(
    buckets: Sequence[Bucket], on_cpu: Callable[..., Any], elsewhere: Decompose
) -> list[Decomposed]:
    """Decompose buckets into one table on CPU, and many matrices at once elsewhere."""
    scale = find_scale(buckets)

    def split(column):
        return jnp.split(column, np.cumsum([len(bucket) for bucket in buckets])[:-1])

    def by_bucket(buckets, unit):
        parts = zip(split(on_cpu(buckets, unit)), buckets, strict=True)
        return [part[:, : _side(bucket)] for part, bucket in parts]

    def in_chunks(buckets, unit):
        found = []
        for bucket, own in zip(buckets, split(unit), strict=True):
            together = max(1, CHUNK_BYTES // (bucket[0].size * bucket.dtype.itemsize))
            found.append(
                jax.lax.map(
                    lambda pair: elsewhere(_divided(*pair)),
                    (bucket, own),
                    batch_size=together,
                )
            )
        return found

    values = jax.lax.platform_dependent(
        list(buckets), scale.unit, cpu=by_bucket, default=in_chunks
    )
    return [*map(Decomposed, values, split(scale.exponent), split(scale.finite))]


def find_scale(buckets: Sequence[Bucket]) -> Scale:
    """Find the power of two to divide each matrix by.

    The largest magnitude of the quotient is in [1, 2): no product of two entries
    overflows, and none that matters underflows. Division by a power of two is exact,
    but that numbers below the smallest normal one count as zero.

    >>> scale = find_scale([jnp.asarray([[[3.0]], [[0.0]], [[jnp.inf]]])])
    >>> print(scale.unit, scale.finite)
    [2. 0. 0.] [ True  True False]
    """

    def largest(matrix):
        # NaN is told as infinity: on CPU XLA's maxima (JAX 0.10.2 to 0.12) skip NaN.
        return jnp.max(jnp.where(jnp.isnan(matrix), jnp.inf, jnp.abs(matrix)))

    top = jax.lax.platform_dependent(
        list(buckets),
        # One by one there is no copy of all magnitudes.
        cpu=lambda own: jnp.concatenate([jax.lax.map(largest, w) for w in own]),
        default=lambda own: jnp.concatenate([jax.vmap(largest)(w) for w in own]),
    )
    tiny = jnp.finfo(top.dtype).tiny
    finite = jnp.isfinite(top)
    usable = finite & (top >= tiny)
    mantissa, exponent = jnp.frexp(jnp.where(usable, top, tiny))
    unit = jnp.where(usable, top / (2 * mantissa), 0)
    return Scale(unit, exponent - 1, finite)


def tridiagonal_eigenvalues(
    forms: Float[Array, "matrices 2 n"], sizes: Int[np.ndarray, " matrices"]
) -> Float[Array, "matrices n"]:
    """Compute the eigenvalues of symmetric tridiagonal matrices by bisection.

    They are ascending, and exact to a few eps·|λ|_max. The number of eigenvalues below
    x is that of negative pivots of T - xI, a Sturm count. One count on a grid finds the
    cell of every eigenvalue; halving all cells together does the rest.

    Args:
        forms: the diagonals d_k, and next to them e_{k-1}; e_{-1} is not read.
        sizes: of the matrices; columns beyond them have no meaning.

    >>> matrix = jnp.asarray([[[2.0, 2.0], [0.0, 1.0]]])
    >>> print(tridiagonal_eigenvalues(matrix, np.asarray([2])).round(4))
    [[1. 3.]]

    References:
        Barth, Martin, Wilkinson, `Calculation of the Eigenvalues of a Symmetric
        Tridiagonal Matrix by the Method of Bisection
        <https://doi.org/10.1007/BF02162154>`_, 1967
    """
    found = jnp.zeros_like(forms[:, 0])
    group = np.ceil(np.log2(np.maximum(sizes, _SMALL)))
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        n = int(sizes[members].max())
        values = _bisect(forms[members, :, :n], sizes[members])
        found = found.at[members, :n].set(values)
    return found


def _gram(matrix: Float[Array, "_ _"]) -> Float[Array, "n n"]:
    # Here and not ahead of the loops: XLA 0.10 fails to spread matrices over a mesh
    # that are transposed on the way.
    rows, columns = matrix.shape
    wide = matrix if rows <= columns else matrix.T
    return jnp.matmul(wide, wide.T, precision=jax.lax.Precision.HIGHEST)


def _side(bucket: Bucket) -> int:
    """Return the number of eigenvalues of each matrix."""
    return min(bucket.shape[1:])


def _sides(buckets: Sequence[Bucket]) -> Int[np.ndarray, " matrices"]:
    return np.repeat([_side(w) for w in buckets], [len(w) for w in buckets])


def _divided(matrix, unit):
    return jnp.where(unit > 0, matrix / unit, 0)


def _one_by_one(
    decompose: Decompose,
    buckets: Sequence[Bucket],
    unit: Float[Array, " matrices"],
    shape: tuple[int, ...],
    dtype: Any = None,
) -> Float[Array, "matrices ..."]:
    """Decompose one matrix after the other into a table, each row of this shape.

    One loop hands its table to the next, so that two never run at once: the threads of
    BLAS would hinder each other.
    """
    table = jnp.zeros_like(unit, shape=(len(unit), *shape), dtype=dtype)
    start = 0
    for bucket in buckets:

        def fill(i, table, bucket=bucket, start=start):
            row = decompose(_divided(bucket[i], unit[start + i]))
            place = (start + i, *(0 for _ in shape))
            return jax.lax.dynamic_update_slice(table, row[None], place)

        table = jax.lax.fori_loop(0, len(bucket), fill, table)
        start += len(bucket)
    return table


def _bisect(
    forms: Float[Array, "matrices 2 n"], sizes: Int[np.ndarray, " matrices"]
) -> Float[Array, "matrices n"]:
    """Find the eigenvalues of tridiagonal matrices of similar sizes."""
    dtype, n = forms.dtype, forms.shape[2]
    forms = jnp.pad(forms, ((0, 0), (0, 0), (0, -n % _ROWS)))
    column = np.arange(forms.shape[2])
    within = column < sizes[:, None]
    beside = jnp.where(within & (column > 0), jnp.abs(forms[:, 1]), 0)
    # Gershgorin's discs hold all eigenvalues. The power of two nearest to the radius is
    # at least two thirds of it, so that all of T / unit are in (-1, 1).
    reach = jnp.abs(forms[:, 0]) + beside + jnp.pad(beside[:, 1:], ((0, 0), (0, 1)))
    radius = jnp.max(reach, axis=1, initial=0, where=within)[:, None]
    unit = 2 * jax.lax.reduce_precision(radius, jnp.finfo(dtype).nexp, 0)
    divisor = jnp.where(unit > 0, unit, 1)
    # Each row of padding has an eigenvalue of its own, above those of the matrix.
    diagonal = jnp.where(within, forms[:, 0] / divisor, 3)
    # Never zero, but far below the rounding error of 1.
    smallest = float(jnp.finfo(dtype).eps) ** 2 / 2**14
    squared = jnp.maximum((beside / divisor) ** 2, smallest)
    rows = jnp.stack([diagonal, squared]).reshape(2, len(sizes), -1, 2)
    pairs = rows.transpose(2, 3, 0, 1)

    # A few bits more than those of λ_max: small eigenvalues can be as exact as that.
    bits = jnp.finfo(dtype).nmant * 9 // 8 + 3
    level = n.bit_length() - 1
    number = jnp.arange(n, dtype=jnp.int32)
    grid = jnp.arange(2**level, dtype=dtype) * 2.0 ** (1 - level) - 1

    def locate():
        counts = _count_below(pairs, jnp.broadcast_to(grid, (len(sizes), len(grid))))
        cell = jax.vmap(lambda c: jnp.searchsorted(c, number, side="right"))(counts)
        return grid[cell - 1]

    def halve(_, state):
        low, width = state
        middle = low + width / 2
        low = jnp.where(_count_below(pairs, middle) <= number[None], middle, low)
        return low, width / 2

    state = locate(), jnp.asarray(2.0 ** (1 - level), dtype)
    low, width = jax.lax.fori_loop(level, bits, halve, state)
    return (low + width / 2) * unit


def _count_below(
    pairs: Float[Array, "pairs 2 2 matrices"], shifts: Float[Array, "matrices lanes"]
) -> Int[Array, "matrices lanes"]:
    """Count the eigenvalues below each shift, by Sylvester's law of inertia.

    The pivots of T - xI are q_k = a_k - e²_{k-1} / q_{k-1}, a_k = d_k - x; as many are
    negative as there are eigenvalues below x. Two at a time they need one division:

        q_k = a_k - e²_{k-1} · y
        1 / q_{k+1} = q_k / (a_{k+1} q_k - e²_k) = y'

    No e² is zero, so that not both vanish: nothing is 0 / 0. Where q_{k+1} does, the
    next pivot is infinite, and a huge number instead: a change of d_{k+1} by e² divided
    by that.
    """

    def next_pivots(carry, rows):
        inverse, count = carry
        (first, before), (second, between) = rows[..., None]
        pivot = jnp.clip(first - shifts - before * inverse, -1e30, 1e30)
        inverse = pivot / ((second - shifts) * pivot - between)
        count += jnp.signbit(pivot).astype(count.dtype)
        return (inverse, count + jnp.signbit(inverse).astype(count.dtype)), None

    # Varying from device to device, in the sense of `shard_map`, as the pivots do.
    pivot = pairs[0, 0, 0][:, None] - shifts
    start = jnp.zeros_like(pivot), jnp.zeros_like(pivot, jnp.int32)
    (_, count), _ = jax.lax.scan(next_pivots, start, pairs, unroll=_ROWS // 2)
    return count
