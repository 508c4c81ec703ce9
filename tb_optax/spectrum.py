"""From kernels to one table of eigenvalues, in few calls.

kernels -> matrices -> buckets of equal shape -> chunks, rescaled and reduced one after
the other -> eigenvalues of the bucket -> one row per layer, ascending.

Each matrix is divided by a power of two near its largest magnitude: exact to apply,
and no product of two weights over- or underflows, whatever their scale. The
eigenvalues λ = σ² of a layer are kept as ln(λ / 4^exponent), with the largest exponent
of its matrices.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tb_optax.devices import Bucket, over_devices
from tb_optax.eigenvalues import tridiagonal_eigenvalues
from tb_optax.layers import MatrixAxes
from tb_optax.pooling import Places, pool
from tb_optax.reduction import (
    HOUSEHOLDER,
    SVD,
    Matrices,
    Reduction,
    Vectors,
    reduce_matrices,
)
from tb_optax.scale import rescale

# Of Gram matrices from this size on, a quarter is left out.
_LARGE = 512


class Spectra(NamedTuple):
    """Empirical spectral densities of several layers.

    λ = factor · 4^exponent · exp(log_eigenvalues).

    Attributes:
        log_eigenvalues: rows ascending, padding first, an exact zero -inf.
        count: N, number of eigenvalues of each row.
        factor: `conv_norm` where several matrices are pooled, else 1.
        exponent: power of two near the largest magnitude of each layer.
        finite: whether the kernel is finite; the spectrum is zero where it is not.
        log_noise: ln of the smallest λ / λ_max above rounding noise.
    """

    log_eigenvalues: Float[Array, "layers n"]
    count: Int[np.ndarray, " layers"]
    factor: Float[np.ndarray, " layers"]
    exponent: Int[Array, " layers"]
    finite: Bool[Array, " layers"]
    log_noise: Float[np.ndarray, " layers"]

    def is_eigenvalue(self) -> Bool[Array, "layers n"]:
        """Which entries are eigenvalues and not padding."""
        width = self.log_eigenvalues.shape[-1]
        padding = jnp.asarray(width - self.count)
        return jnp.arange(width)[None] >= padding[:, None]

    def log_unit(self) -> Float[Array, " layers"]:
        """Natural logarithm of the unit of each row."""
        exponent = self.exponent.astype(self.log_eigenvalues.dtype)
        return 2 * math.log(2) * exponent + np.log(self.factor)

    def absolute(self, values: Float[Array, "layers ..."]) -> Float[Array, "..."]:
        """Values in the units of the rows, in absolute units; they may overflow."""
        rows = (slice(None),) + (None,) * (values.ndim - 1)
        return jnp.ldexp(values * self.factor[rows], 2 * self.exponent[rows])


class Route(NamedTuple):
    """A way from matrices to eigenvalues, in four steps.

    Attributes:
        prepare: matrices of one shape to those that are reduced.
        reduction: these to one or a few vectors per matrix.
        finish: those vectors, and how many of the last numbers count, to ascending λ
            or σ, which come first.
        log: these to ln λ.
        noise: power of 8·eps below which λ / λ_max is rounding noise.
    """

    prepare: Callable[[Matrices], Matrices]
    reduction: Reduction
    finish: Callable[[Vectors, Int[np.ndarray, " matrices"]], Float[Array, "_ _"]]
    log: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    noise: int


def as_matrices(
    kernel: Float[Array, "..."], axes: MatrixAxes
) -> Float[Array, "stacked pooled rows columns"]:
    """Reads a kernel as matrices, by transposing and reshaping it.

    >>> conv = MatrixAxes((2,), (3,), pooled=(0, 1))
    >>> print(as_matrices(jnp.zeros((3, 3, 16, 32)), conv).shape)
    (1, 9, 16, 32)
    """
    groups = (axes.stacked, axes.pooled, axes.reduction, axes.output)
    order = tuple(axis for group in groups for axis in group)
    sizes = [int(np.prod([kernel.shape[axis] for axis in group])) for group in groups]
    return jnp.transpose(kernel, order).reshape(sizes)


def compute_spectra(
    stacks: Sequence[Float[Array, "_ _ _ _"]], factors: Sequence[float], route: Route
) -> Spectra:
    """Eigenvalues of all layers, bucket by bucket.

    The peak of temporary memory for matrices of n x m is on CPU, where they are reduced
    one by one, at most 3·(n·m + min(n, m)²)·itemsize, and where their LAPACK calls are
    shared out 2·TOGETHER·min(n, m)²·itemsize more; elsewhere, where CHUNK_BYTES of them
    are reduced in one go, (2 + 2 min(n, m) / max(n, m)) times as much. The eigenvalues
    of all matrices are then found at once, in less than 100·itemsize for each matrix
    and each row of the largest.

    Args:
        stacks: kernels as matrices, (layers, pooled, rows, columns) each, of any
            floating dtype; half precision is computed in float32.
        factors: what to multiply the eigenvalues of each stack by.
        route: `GRAM` or `SINGULAR_VALUES`.

    Returns:
        Spectra, one row per layer, in the order given.
    """
    dtype = jnp.result_type(jnp.float32, *stacks)
    stacks = [stack.astype(dtype) for stack in stacks]
    buckets: dict[tuple[int, ...], list[int]] = {}
    for i, stack in enumerate(stacks):
        buckets.setdefault(stack.shape[2:], []).append(i)
    # Those of one number of eigenvalues beside each other.
    buckets = dict(sorted(buckets.items(), key=lambda item: min(item[0])))
    matrices = [[_matrices(stacks[i]) for i in members] for members in buckets.values()]
    values, top = over_devices(functools.partial(_decompose, route=route), matrices)

    members = np.concatenate([*buckets.values()])
    shapes = np.asarray([stack.shape for stack in stacks])[members]
    places = Places.of(members, shapes[:, 0], shapes[:, 1], shapes[:, 2:].min(axis=1))
    table, unit, is_finite = pool(values, top, places, route.log)
    repeats = [len(stack) for stack in stacks]
    noise = route.noise * math.log(8 * jnp.finfo(dtype).eps)
    return Spectra(
        log_eigenvalues=table,
        count=places.total,
        factor=np.repeat(np.asarray(factors, dtype), repeats),
        exponent=unit,
        finite=is_finite,
        log_noise=np.full(len(places.total), noise, dtype),
    )


def _decompose(buckets: list[Bucket], route: Route):
    """Ascending λ or σ of all matrices, and what `exponents` reads."""

    def prepare(matrices):
        with jax.named_scope("rescale"):
            matrices, top = rescale(matrices)
        with jax.named_scope("prepare"):
            return route.prepare(matrices), top

    vectors, top = reduce_matrices(buckets, route.reduction, prepare)
    n = [min(array.shape[1:]) for bucket in buckets for array in bucket]
    counts = [len(array) for bucket in buckets for array in bucket]
    with jax.named_scope("finish"):
        return route.finish(vectors, np.repeat(n, counts)), top


def _matrices(stack):
    return stack.reshape(-1, *stack.shape[2:])


@jax.jit
def _gram(w: Float[Array, "batch rows columns"]) -> Float[Array, "batch n n"]:
    """WᵀW or WWᵀ; of a large one without a quarter, below the diagonal."""
    side = 1 if w.shape[1] <= w.shape[2] else 2
    product = functools.partial(
        jnp.einsum,
        "bik,bjk->bij" if side == 1 else "bki,bkj->bij",
        precision=jax.lax.Precision.HIGHEST,
    )
    if w.shape[side] < _LARGE:
        return product(w, w)
    first, second = jnp.split(w, [w.shape[side] // 2], axis=side)
    beside = product(first, second)
    below = jnp.zeros_like(beside).swapaxes(1, 2)
    rows = [[product(first, first), beside], [below, product(second, second)]]
    return jnp.block(rows)


def _log_eigenvalues(eigenvalues: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.log(jnp.maximum(eigenvalues, 0))


def _ascending(vectors, sizes):
    """Singular values; those of a smaller matrix are its last."""
    del sizes
    return vectors[:, 0, ::-1]


def _log_squares(singular_values: Float[Array, "..."]) -> Float[Array, "..."]:
    """2 ln σ, exact to the smallest singular values."""
    return 2 * jnp.log(singular_values)


def _unchanged(matrices):
    return matrices


GRAM = Route(_gram, HOUSEHOLDER, tridiagonal_eigenvalues, _log_eigenvalues, 1)
SINGULAR_VALUES = Route(_unchanged, SVD, _ascending, _log_squares, 2)
