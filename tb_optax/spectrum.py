"""From kernels to one table of eigenvalues.

kernels -> matrices -> buckets of equal shape -> divided by powers of two -> eigenvalues
-> one row per layer, ascending.

Each matrix is divided by a power of two near its largest magnitude, which is exact, so
that no product of two weights over- or underflows. The eigenvalues λ = σ² of a layer
are kept as ln(λ / 4^exponent), with the largest exponent of its matrices.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tb_optax.eigenvalues import Bucket, Decomposed, gram_eigenvalues, singular_values
from tb_optax.layers import MatrixAxes
from tb_optax.leaves import computing_dtype
from tb_optax.sharding import over_devices


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
    """A way from matrices to eigenvalues.

    Attributes:
        decompose: buckets of matrices to λ^(1/power).
        power: 1 for eigenvalues, 2 for singular values. λ / λ_max below
            (8·eps)^power is rounding noise.
    """

    decompose: Callable[[Sequence[Bucket]], list[Decomposed]]
    power: int


GRAM = Route(gram_eigenvalues, 1)
SINGULAR_VALUES = Route(singular_values, 2)


def as_matrices(
    kernel: Float[Array, "..."], axes: MatrixAxes
) -> Float[Array, "stacked pooled rows columns"]:
    """Read a kernel as matrices, by transposing and reshaping it.

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
    """Compute the eigenvalues of all layers, bucket by bucket.

    On CPU, where matrices are decomposed one by one, temporary memory is a copy of the
    kernels, 2·(n·m + n²)·itemsize for the largest matrix of n x m, n <= m, and
    40·itemsize for each matrix and each row of the largest. Elsewhere it is that of the
    matrices that `eigenvalues.CHUNK_BYTES` holds, with their Gram matrices.

    Args:
        stacks: kernels as matrices, (layers, pooled, rows, columns) each, of any
            floating dtype; half precision is computed in float32.
        factors: what to multiply the eigenvalues of each stack by.
        route: `GRAM` or `SINGULAR_VALUES`.

    Returns:
        Spectra, one row per layer, in the order given.
    """
    dtype = computing_dtype(*stacks)
    buckets: dict[tuple[int, ...], list[int]] = {}
    for i, stack in enumerate(stacks):
        buckets.setdefault(stack.shape[1:], []).append(i)
    matrices = [
        jnp.concatenate([stacks[i] for i in members])
        .reshape(-1, *shape[1:])
        .astype(dtype)
        for shape, members in buckets.items()
    ]
    found = over_devices(route.decompose, matrices)

    layers = [len(stack) for stack in stacks]
    count = np.repeat([w.shape[1] * min(w.shape[2:]) for w in stacks], layers)
    with jax.named_scope("pool"):
        tables = [
            _pooled(own, shape[0], int(count.max()), route.power)
            for own, shape in zip(found, buckets, strict=True)
        ]
        table, exponent, finite = map(jnp.concatenate, zip(*tables, strict=True))
    # Rows are in the order of the buckets: back to that of the layers.
    members = np.concatenate(list(buckets.values()))
    stack_of_row = np.repeat(members, np.asarray(layers)[members])
    order = np.argsort(stack_of_row, kind="stable")
    noise = route.power * math.log(8 * jnp.finfo(dtype).eps)
    return Spectra(
        log_eigenvalues=jnp.sort(table[order], axis=-1),
        count=count,
        factor=np.repeat(np.asarray(factors, dtype), layers),
        exponent=exponent[order],
        finite=finite[order],
        log_noise=np.full(len(count), noise, dtype),
    )


def _pooled(found: Decomposed, pooled: int, width: int, power: int):
    """Bring the matrices of each layer to one unit, and their ln λ to one row."""
    exponent = found.exponent.reshape(-1, pooled)
    unit = exponent.max(axis=1)
    finite = found.finite.reshape(-1, pooled).all(axis=1)
    logs = power * jnp.log(jnp.maximum(found.values, 0))
    steps = (exponent - unit[:, None]).reshape(-1, 1).astype(logs.dtype)
    offset = 2 * math.log(2) * steps
    rows = (logs + offset).reshape(len(unit), -1)
    rows = jnp.where(finite[:, None], rows, -jnp.inf)
    padding = (width - rows.shape[1], 0)
    return jnp.pad(rows, ((0, 0), padding), constant_values=-jnp.inf), unit, finite
