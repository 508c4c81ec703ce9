"""From kernels to one table of eigenvalues.

kernels -> matrices -> buckets of equal shape -> divided by powers of two -> eigenvalues
-> one row per layer, ascending.

Each matrix is divided by a power of two near its largest magnitude, which is exact, so
that no product of two weights over- or underflows. The eigenvalues λ = σ² of a layer
are kept as ln(λ / 4^exponent), with the largest exponent of its matrices.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tb_optax.eigenvalues import Bucket, Decomposed, gram_eigenvalues, singular_values
from tb_optax.layers import Layer, MatrixAxes, by_kernel
from tb_optax.leaves import computing_dtype
from tb_optax.sharding import over_devices
from tb_optax.submatrices import Windows


class Spectra(NamedTuple):
    """Spectral densities of several layers, exact or estimated.

    λ = factor · 4^exponent · exp(log_eigenvalues).

    Attributes:
        log_eigenvalues: ascending, padding first; -inf for a zero and for padding. An
            estimate has one row of nodes for each probe of each pooled matrix instead.
        weights: which entries are eigenvalues and not padding; or, of the nodes of an
            estimate, shares that sum to 1 for each layer.
        count: N, number of eigenvalues of each layer.
        factor: `conv_norm` where several matrices are pooled, else 1.
        exponent: power of two near the largest magnitude of each layer.
        finite: whether the kernel is finite; the spectrum is zero where it is not.
        log_top: ln of the largest λ, -inf where there is none.
        stable_rank: Σλ / λ_max; 0 where there is no spectrum.
        log_noise: ln of the smallest λ / λ_max above rounding noise.
    """

    log_eigenvalues: Float[Array, "layers ..."]
    weights: Bool[Array, "layers ..."] | Float[Array, "layers ..."]
    count: Int[np.ndarray, " layers"]
    factor: Float[np.ndarray, " layers"]
    exponent: Int[Array, " layers"]
    finite: Bool[Array, " layers"]
    log_top: Float[Array, " layers"]
    stable_rank: Float[Array, " layers"]
    log_noise: Float[np.ndarray, " layers"]

    def log_unit(self) -> Float[Array, " layers"]:
        """Return the natural logarithm of the unit of each row."""
        exponent = self.exponent.astype(self.log_eigenvalues.dtype)
        return 2 * math.log(2) * exponent + np.log(self.factor)

    def absolute(self, values: Float[Array, "layers ..."]) -> Float[Array, "..."]:
        """Return values in absolute units, where they may overflow."""
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


def layer_matrices(
    kernels: Mapping[str, Any], layer: Layer
) -> Float[Array, "pooled rows columns"]:
    """Read a kernel as the matrices of one layer."""
    kernel = _part_of(kernels[layer.path], layer.part)
    stack = as_matrices(kernel, layer.axes)
    return stack[_slices(kernel, layer.axes)[layer.index]]


def layer_spectra(
    kernels: Mapping[str, Any],
    layers: Sequence[Layer],
    conv_norm: int | float,
    route: Route,
    cut: Windows = None,
) -> Spectra:
    """Compute spectra of the layers, those of one kernel read as one stack.

    With windows there is one row for each block of a layer, in order.
    """
    stacks, factors, order, whole = [], [], [], []
    for (path, axes, part), members in by_kernel(layers).items():
        kernel = _part_of(kernels[path], part)
        stack = as_matrices(kernel, axes)
        slices = _slices(kernel, axes)
        wanted = np.asarray([slices[layers[i].index] for i in members])
        if not np.array_equal(wanted, np.arange(len(stack))):
            stack = stack[wanted]
        blocks = 1
        if cut is not None:
            # A window may miss what is not finite.
            finite = jnp.isfinite(stack).all(axis=(1, 2, 3))
            stack = cut.cut(stack, bool(axes.pooled))
            blocks = len(stack) // len(members)
            whole.append(jnp.repeat(finite, blocks))
        stacks.append(stack)
        factors.append(conv_norm if axes.pooled else 1.0)
        order += np.repeat(members, blocks).tolist()
    spectra = compute_spectra(stacks, factors, route)
    if whole:
        spectra = spectra._replace(finite=spectra.finite & jnp.concatenate(whole))
    if order == sorted(order):
        return spectra
    rows = np.argsort(order, kind="stable")
    return jax.tree.map(lambda column: column[rows], spectra)


def _part_of(kernel, part):
    if part is None:
        return kernel
    axis, start, stop = part
    return jax.lax.slice_in_dim(kernel, start, stop, axis=axis)


def _slices(kernel, axes: MatrixAxes) -> np.ndarray:
    """Number the slices of the stacked axes, by index."""
    sizes = [kernel.shape[axis] for axis in axes.stacked]
    return np.arange(math.prod(sizes)).reshape(sizes)


def compute_spectra(
    stacks: Sequence[Float[Array, "_ _ _ _"]], factors: Sequence[float], route: Route
) -> Spectra:
    """Compute the eigenvalues of all layers, bucket by bucket.

    On CPU, where matrices are decomposed one by one, temporary memory is a copy of the
    kernels, 2·(n·m + n²)·itemsize for the largest matrix of n x m, n <= m, and
    40·itemsize for each matrix and each row of the largest; all but the copy twice for
    singular values, which are computed in float64. Elsewhere it is that of the matrices
    that `eigenvalues.CHUNK_BYTES` holds, with their Gram matrices.

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
    width = int(count.max())
    with jax.named_scope("pool"):
        tables = [
            _pooled(own, shape[0], width, route.power)
            for own, shape in zip(found, buckets, strict=True)
        ]
        table, exponent, finite = map(jnp.concatenate, zip(*tables, strict=True))
    # Rows are in the order of the buckets: back to that of the layers.
    members = np.concatenate(list(buckets.values()))
    stack_of_row = np.repeat(members, np.asarray(layers)[members])
    order = np.argsort(stack_of_row, kind="stable")
    logs = jnp.sort(table[order], axis=-1)
    weights = jnp.arange(width)[None] >= jnp.asarray(width - count)[:, None]
    log_top = logs[:, -1]
    has_some = log_top[:, None] > -jnp.inf
    relative = logs - jnp.where(has_some, log_top[:, None], 0)
    noise = route.power * math.log(8 * jnp.finfo(dtype).eps)
    return Spectra(
        log_eigenvalues=logs,
        weights=weights,
        count=count,
        factor=np.repeat(np.asarray(factors, dtype), layers),
        exponent=exponent[order],
        finite=finite[order],
        log_top=log_top,
        stable_rank=jnp.where(weights & has_some, jnp.exp(relative), 0).sum(axis=-1),
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


def entropies(
    spectra: Spectra,
) -> tuple[Float[Array, " layers"], Float[Array, " layers"]]:
    """Return entropy and effective rank; `tb_optax.Analysis` has their formulas."""
    logs = spectra.log_eigenvalues.reshape(len(spectra.count), -1)
    weights = spectra.weights.reshape(logs.shape).astype(logs.dtype)
    if spectra.weights.dtype != bool:
        weights = weights * jnp.asarray(spectra.count, logs.dtype)[:, None]
    logs = jnp.where(weights > 0, logs, -jnp.inf)
    top = jnp.max(logs, axis=-1, keepdims=True)
    some = top > -jnp.inf
    logs = logs - jnp.where(some, top, 0)

    def total(values):
        return jnp.sum(weights * values, axis=-1, keepdims=True)

    def shannon(probability):
        logarithm = jnp.log(jnp.where(probability > 0, probability, 1))
        return -total(probability * logarithm)

    def shares(values):
        return values / jnp.where(some, total(values), 1)

    rank = total((logs > 2 * math.log(6e-5)).astype(logs.dtype))
    known = jnp.log(jnp.where(some, rank, 2) + 6e-5)
    entropy = shannon(shares(jnp.exp(logs)) + 6e-5) / known
    effective_rank = jnp.exp(shannon(shares(jnp.exp(logs / 2))))
    return jnp.where(some, entropy, 0)[:, 0], jnp.where(some, effective_rank, 0)[:, 0]
