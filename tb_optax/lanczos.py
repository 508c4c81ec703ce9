r"""Spectral densities of large matrices from products with them alone.

For a unit vector q, k steps of the Lanczos recurrence on A = WWᵀ give a tridiagonal
k x k matrix T. Its eigenvalues θ_j (nodes) and the squared first components τ_j of its
eigenvectors (weights) are the Gauss quadrature of the measure that q sees:

    Σ_j τ_j f(θ_j) = qᵀ f(A) q    for every polynomial f of degree below 2k.

Over random sign vectors q / sqrt(n) the right side has the mean tr f(A) / n, which is
the mean of f over the eigenvalues. A few probes therefore tell the density of the
eigenvalues, and with it the tail that `fit_median` asks for, from k products with W
and k with Wᵀ each. Nothing of the size of W is stored, decomposed, or moved between
devices: a sharded kernel stays where it is, and only vectors travel.

References:
    Golub and Meurant, `Matrices, Moments and Quadrature with Applications
    <https://press.princeton.edu/books/hardcover/9780691143415>`_, 2010
"""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tb_optax.checks import check_int
from tb_optax.layers import Layer, MatrixAxes, by_kernel
from tb_optax.leaves import computing_dtype
from tb_optax.sharding import over_devices, replicated
from tb_optax.spectrum import Spectra

# Lanczos vectors that are kept at once, in bytes; a stack of matrices is never cut.
_BASIS_BYTES = 2**28

_HIGHEST = jax.lax.Precision.HIGHEST
_barrier = jax.lax.optimization_barrier


@dataclasses.dataclass(frozen=True)
class exact:
    """Read every spectrum by an eigendecomposition.

    >>> exact()
    exact()
    """

    above: ClassVar[float] = math.inf

    def cost(self, n: int, m: int) -> int | float:
        """Multiplications for a matrix of n x m: Gram matrix, Householder."""
        return n**2 * (m + 4 / 3 * n)


@dataclasses.dataclass(frozen=True)
class quadrature:
    r"""Read the spectra of large kernels by stochastic Lanczos quadrature.

    A kernel whose matrices have a smaller side above `above` is read by 2·steps
    products of it with `probes` vectors, without a decomposition and, where it is
    sharded, without being gathered. Its alpha, xmin and tail are estimates from
    the mean over the probes of the weighted densities

        p(λ) ≈ Σ_j τ_j δ(λ - θ_j),

    each interpolated in ln λ. The probes are fixed signs from a fixed seed, the same at
    every refresh: an analysis is a deterministic function of the parameters, and the
    error of a layer does not jitter from one refresh to the next.

    With the defaults and n = 2048, alpha was within about 1 % (root mean square) of the
    exact one on random kernels, 2 % where a group of eigenvalues stands off; 64 steps
    and 32 probes halve that. `spectral_norm` is a lower bound: the largest node falls
    short of λ_max by at most 0.103·(ln(n·(steps - 1)⁴) / (steps - 1))² of it in the
    mean over probes (Kuczyński and Woźniakowski), and by far less where λ_max stands
    off from the rest. `frobenius_norm` is exact. `ks_distance` is 0: single eigenvalues
    are not known. A kernel with fewer distinct eigenvalues than steps, such as an
    orthogonal one or one of low rank, is not fitted.

    Args:
        above: the largest smaller side of a matrix that is still decomposed, an
            int >= 0.
        probes: random vectors per matrix, an int >= 1. The error that they leave falls
            with the root of probes·n.
        steps: steps of the recurrence, an int >= 2. The bias that they leave falls
            with their number, faster on smooth spectra than on gapped ones. The
            vectors of all steps are kept: probes·steps·n numbers per matrix.

    Raises:
        ValueError: if a field is out of range.

    >>> quadrature(probes=16)
    quadrature(above=1024, probes=16, steps=32)

    References:
        Ubaru, Chen and Saad, `Fast Estimation of tr(f(A)) via Stochastic Lanczos
        Quadrature <https://doi.org/10.1137/16M1104974>`_, 2017

        Kuczyński and Woźniakowski, `Estimating the Largest Eigenvalue by the Power and
        Lanczos Algorithms with a Random Start <https://doi.org/10.1137/0613066>`_, 1992
    """

    above: int = 1024
    probes: int = 8
    steps: int = 32

    def __post_init__(self):
        check_int("above", self.above, at_least=0)
        check_int("probes", self.probes, at_least=1)
        check_int("steps", self.steps, at_least=2)

    def cost(self, n: int, m: int) -> int | float:
        """Multiplications for a matrix of n x m, where n <= m."""
        if n <= self.above:
            return exact().cost(n, m)
        return 2 * self.steps * self.probes * n * m


Spectrum: TypeAlias = exact | quadrature


class Measures(NamedTuple):
    """What one look at the entries of each matrix tells.

    Attributes:
        exponent: e, where 2^e is at most its largest magnitude, and more than half.
        finite: whether its slice of the kernel is finite.
        square_sum: Σλ / 4^e, its squared Frobenius norm.
    """

    exponent: Int[Array, " matrices"]
    finite: Bool[Array, " matrices"]
    square_sum: Float[Array, " matrices"]


@dataclasses.dataclass(frozen=True)
class Operator:
    """A = WWᵀ / 4^e of all matrices W of one kernel, on the smaller side of each.

    The kernel is contracted along its own axes. It is never transposed, reshaped, cast
    or cut to a part, since each of these could copy it or move it between devices. A
    product with a part therefore costs as much as one with the whole.

    Attributes:
        kernel: the kernel.
        axes: how to read it as matrices.
        part: `(axis, start, stop)`, the outputs that count; None for all.
    """

    kernel: Float[Array, "..."]
    axes: MatrixAxes
    part: tuple[int, int, int] | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the axes along which there are several matrices."""
        return tuple(self.kernel.shape[a] for a in self.axes.stacked + self.axes.pooled)

    @property
    def count(self) -> int:
        """The number of matrices: slice by slice, those of a slice together."""
        return math.prod(self.batch)

    @property
    def pooled(self) -> int:
        """The number of matrices of each slice."""
        return math.prod(self.kernel.shape[axis] for axis in self.axes.pooled)

    @property
    def n(self) -> int:
        """The smaller side of the matrices."""
        return math.prod(self._sizes(self._sides()[0]))

    @property
    def dtype(self) -> np.dtype:
        """The type of its vectors; half precision is computed in float32."""
        return computing_dtype(self.kernel)

    def measure(self) -> Measures:
        """Read off each matrix what one look at its entries tells.

        The parts of a kernel share its unit, and what is not finite spoils them all.
        """
        matrix_axes = self.axes.reduction + self.axes.output
        high = jnp.max(self.kernel, axis=matrix_axes, keepdims=True)
        low = jnp.min(self.kernel, axis=matrix_axes, keepdims=True)
        top = jnp.maximum(high, -low).astype(self.dtype)
        usable = jnp.isfinite(top) & (top > 0)
        exponent = jnp.frexp(jnp.where(usable, top, 1))[1] - 1
        half, rest = _powers(exponent, self.dtype)
        squares = (self.kernel.astype(self.dtype) * half * rest) ** 2
        # First along all axes but that of the part: what is left is a vector.
        kept = () if self.part is None else (self.part[0],)
        others = tuple(axis for axis in matrix_axes if axis not in kept)
        squares = jnp.sum(squares, axis=others, keepdims=True)
        # XLA's maximum on CPU may pass over NaN; a sum does not.
        finite = jnp.isfinite(jnp.sum(squares, axis=kept, keepdims=True))
        own = self._fitted(squares, tuple(range(squares.ndim)), -1)
        square_sum = jnp.where(finite, jnp.sum(own, axis=kept, keepdims=True), 0)
        order = self.axes.stacked + self.axes.pooled + matrix_axes
        columns = (exponent, finite, square_sum)
        return Measures(*(jnp.transpose(x, order).ravel() for x in columns))

    def product(
        self,
        vectors: Float[Array, "matrices probes n"],
        exponent: Int[Array, " matrices"],
    ) -> Float[Array, "matrices probes n"]:
        """Multiply vectors by their matrices A: by W, then by Wᵀ."""
        near, far = self._sides()
        half, rest = _powers(exponent.reshape(self.batch), self.dtype)

        def times(vectors, side, other):
            # Only the part counts: where the rest of the kernel is stand zeros.
            vectors = self._fitted(_rows_times(half, vectors), side, 1)
            found = self._contract(vectors, side, other)
            return _rows_times(rest, self._fitted(found, other, -1))

        number = vectors.shape[1]
        vectors = vectors.reshape(*self.batch, number, *self._sizes(near))
        vectors = times(times(vectors, near, far), far, near)
        return vectors.reshape(self.count, number, self.n)

    def _sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the axes of the smaller side of the matrices, then of the other."""
        rows, columns = self.axes.reduction, self.axes.output
        fewer_rows = math.prod(self._sizes(rows)) <= math.prod(self._sizes(columns))
        return (rows, columns) if fewer_rows else (columns, rows)

    def _sizes(self, side: tuple[int, ...]) -> list[int]:
        """Return the sizes of the axes of one side, of the part only."""
        sizes = {axis: self.kernel.shape[axis] for axis in side}
        if self.part is not None and self.part[0] in side:
            sizes[self.part[0]] = self.part[2] - self.part[1]
        return list(sizes.values())

    def _fitted(self, array, side: tuple[int, ...], sign: int):
        """Cut the last axes of an array, a side, to the part (-1), or pad them (1)."""
        if self.part is None or self.part[0] not in side:
            return array
        axis, start, stop = self.part
        widths = [(0, 0, 0)] * array.ndim
        after = self.kernel.shape[axis] - stop
        place = array.ndim - len(side) + side.index(axis)
        widths[place] = (sign * start, sign * after, 0)
        return jax.lax.pad(array, jnp.zeros((), array.dtype), widths)

    def _contract(self, vectors, side, other):
        """Sum over the axes of one side, which leaves those of the other.

        A float32 vector is the sum of three bfloat16 ones: with these a bfloat16 kernel
        is multiplied as it is, to the accuracy of float32 and without a float32 copy.

        On CPU, a product takes half the time if the last axis of the kernel is the last
        one of its vectors too, and any other side of the kernel stands before their
        number. Without the barriers XLA would put the number first everywhere; it knows
        no other products of bfloat16 numbers.
        """
        batch = self.axes.stacked + self.axes.pooled
        names, place = string.ascii_lowercase, len(batch)

        def letters(axes):
            return "".join(names[axis] for axis in axes)

        def numbered(axes):
            first = in_pieces or self.kernel.ndim - 1 in axes
            return f"z{letters(axes)}" if first else f"{letters(axes)}z"

        in_pieces = self.kernel.dtype == jnp.bfloat16
        if in_pieces:
            pieces = []
            for _ in range(3):
                pieces.append(jax.lax.reduce_precision(vectors, 8, 7))
                vectors = vectors - pieces[-1]
            vectors = jnp.concatenate(pieces, axis=place).astype(jnp.bfloat16)
        of_side, of_other, of_batch = numbered(side), numbered(other), letters(batch)
        found = jnp.einsum(
            f"{of_batch}{of_side},{names[: self.kernel.ndim]}->{of_batch}{of_other}",
            _barrier(jnp.moveaxis(vectors, place, place + of_side.index("z"))),
            self.kernel,
            precision=None if in_pieces else _HIGHEST,
            preferred_element_type=self.dtype,
        )
        found = jnp.moveaxis(_barrier(found), place + of_other.index("z"), place)
        return sum(jnp.split(found, 3, axis=place)) if in_pieces else found


@dataclasses.dataclass(frozen=True)
class _OneOf(Operator):
    """One of several operators of equal sizes, by number; its own is the first."""

    operators: Sequence[Operator] = ()
    place: Any = None

    def measure(self) -> Measures:
        return jax.lax.switch(self.place, [own.measure for own in self.operators])

    def product(self, vectors, exponent):
        products = [own.product for own in self.operators]
        return jax.lax.switch(self.place, products, vectors, exponent)


class Reading(NamedTuple):
    """What is read off each matrix; see `Measures` and `lanczos`.

    `ended` says that all recurrences of the matrix broke down before their last step.
    """

    diagonal: Float[Array, "matrices probes steps"]
    beside: Float[Array, "matrices probes steps"]
    ended: Bool[Array, " matrices"]
    measures: Measures


def quadrature_spectra(
    kernels: Mapping[str, Any],
    layers: Sequence[Layer],
    conv_norm: int | float,
    method: quadrature,
) -> Spectra:
    """Estimate the spectral densities of layers, many of them at once.

    The peak of temporary memory is that of the vectors: about 3·probes·steps·n numbers
    for each matrix of those that are read together, which are 256 MiB of basis or one
    stack. A kernel is copied only where fewer than half of the slices of a stack are
    asked for (their range), or if it is float16.

    There is one row per layer, in the order given. Where a kernel has fewer distinct
    eigenvalues than there are steps, all nodes are -inf.
    """
    families = by_kernel(layers)
    operators, slices = [], []
    for (path, axes, part), members in families.items():
        indices = [layers[i].index for i in members]
        kernel, places = _cropped(kernels[path], axes, indices)
        operators.append(Operator(kernel, axes, part))
        slices.append(places)
    groups = _groups(operators, method)
    read = [_read([operators[i] for i in group], method) for group in groups]
    read = jax.tree.map(_joined, *read)

    operator_of, first, start = {}, np.zeros(len(layers), int), 0
    for i in np.concatenate(groups):
        members = list(families.values())[i]
        operator_of |= dict.fromkeys(members, operators[i])
        first[members] = start + slices[i] * operators[i].pooled
        start += operators[i].count
    return _pooled(read, [operator_of[i] for i in range(len(layers))], first, conv_norm)


def estimate_key(kernels: Mapping[str, Any], layer: Layer) -> tuple:
    """Return what layers must share that `estimate_one_of` chooses from."""
    operator = Operator(kernels[layer.path], layer.axes, layer.part)
    sizes = ("large", operator.n, operator.pooled, operator.dtype)
    key = (*sizes, bool(layer.axes.pooled))
    return (*key, layer.path, layer.axes, layer.part) if layer.axes.stacked else key


def estimate_one_of(
    kernels: Mapping[str, Any],
    layers: Sequence[Layer],
    place: Int[Array, ""],
    conv_norm: int | float,
    method: quadrature,
) -> Spectra:
    """Estimate the spectral density of one of several layers with one `estimate_key`.

    Products with all of the kernels are compiled, into one recurrence. The slice of a
    stack is copied; one of a stack that is sharded along the stacked axis moves.
    """
    like = layers[0]
    if like.axes.stacked:
        cuts = [functools.partial(_slice, kernels[x.path], x) for x in layers]
        operator = Operator(jax.lax.switch(place, cuts), like.axes, like.part)
    else:
        own = [Operator(kernels[x.path], x.axes, x.part) for x in layers]
        operator = _OneOf(own[0].kernel, like.axes, like.part, own, place)
    read = _read([operator], method)
    return _pooled(read, [operator], np.zeros(1, int), conv_norm)


def _slice(kernel, layer: Layer):
    """Return one slice of a stack, as a stack of one."""
    for axis, index in zip(layer.axes.stacked, layer.index, strict=True):
        kernel = jax.lax.slice_in_dim(kernel, index, index + 1, axis=axis)
    return kernel


def _cropped(kernel, axes: MatrixAxes, indices: Sequence[tuple[int, ...]]):
    """Cut the slices off a stack before and after those that are asked for.

    Half of the slices or more are left as they are, since cutting is copying.

    Returns:
        The kernel; the number of each slice that is asked for in it.
    """
    if not axes.stacked:
        return kernel, np.zeros(len(indices), int)
    asked = np.asarray(indices).T
    start, stop = asked[0].min(), asked[0].max() + 1
    if 2 * (stop - start) < kernel.shape[axes.stacked[0]]:
        kernel = jax.lax.slice_in_dim(kernel, start, stop, axis=axes.stacked[0])
        asked[0] -= start
    sizes = [kernel.shape[axis] for axis in axes.stacked]
    return kernel, np.ravel_multi_index(tuple(asked), sizes)


def _joined(*columns):
    """Put columns together, in the widest of their dtypes."""
    dtype = max((column.dtype for column in columns), key=lambda own: own.itemsize)
    return jnp.concatenate([column.astype(dtype) for column in columns])


def _groups(operators: Sequence[Operator], method: quadrature) -> list[list[int]]:
    """Number the operators that are read together: of one size, in few bytes."""
    kinds = [(own.n, own.dtype.itemsize) for own in operators]
    groups: list[list[int]] = []
    room, kind = 0, None
    for i in sorted(range(len(operators)), key=kinds.__getitem__):
        size = operators[i].count * method.probes * method.steps * math.prod(kinds[i])
        if kinds[i] != kind or size > room:
            groups.append([])
            room, kind = _BASIS_BYTES, kinds[i]
        groups[-1].append(i)
        room -= size
    return groups


def _read(operators: Sequence[Operator], method: quadrature) -> Reading:
    """Run one recurrence for all matrices of operators of one size."""
    columns = [operator.measure() for operator in operators]
    measures = jax.tree.map(lambda *parts: jnp.concatenate(parts), *columns)
    finite = measures.finite[:, None, None]
    n, dtype = operators[0].n, operators[0].dtype
    signs = {own.pooled: sign_probes(own.pooled, method.probes, n) for own in operators}
    # Slices of a stack share their probes.
    start = jnp.concatenate(
        [
            jnp.tile(signs[own.pooled], (own.count // own.pooled, 1, 1))
            for own in operators
        ]
    )
    ends = np.cumsum([own.count for own in operators])

    def product(vectors):
        products = []
        for own, end in zip(operators, ends, strict=True):
            members = slice(end - own.count, end)
            products.append(own.product(vectors[members], measures.exponent[members]))
        return jnp.where(finite, replicated(jnp.concatenate(products)), 0)

    # A matrix with fewer rows than steps has no more vectors.
    steps = min(method.steps, n)
    missing = [(0, 0), (0, 0), (0, method.steps - steps)]
    with jax.named_scope("lanczos"):
        diagonal, beside = lanczos(product, start.astype(dtype), steps)
    ended = (beside[..., : steps - 1] == 0).any(axis=2).all(axis=1)
    diagonal, beside = jnp.pad(diagonal, missing), jnp.pad(beside, missing)
    return Reading(diagonal, beside, ended, measures)


def sign_probes(pooled: int, probes: int, n: int) -> Float[Array, "pooled probes n"]:
    """Draw random signs / sqrt(n): the same at every call, others for each matrix."""
    key = jax.random.key(0, impl="threefry2x32")
    return jax.random.rademacher(key, (pooled, probes, n), float) / math.sqrt(n)


def _pooled(
    read: Reading, operators: Sequence[Operator], first, conv_norm: int | float
) -> Spectra:
    """Go from matrices to layers, bringing the matrices of each to one unit.

    `first` is the number of the first matrix of each layer, whose operator is given.
    """
    dtype, (_, probes, steps) = read.diagonal.dtype, read.diagonal.shape
    logs, weights = _log_nodes(read)
    pooled, n = np.asarray([(operator.pooled, operator.n) for operator in operators]).T
    eps = np.asarray([jnp.finfo(operator.dtype).eps for operator in operators], float)
    factor = [conv_norm if operator.axes.pooled else 1 for operator in operators]
    # Layers with fewer matrices repeat their last one, with weight 0.
    slots = np.arange(pooled.max())
    members = first[:, None] + np.minimum(slots, pooled[:, None] - 1)
    own = slots < pooled[:, None]
    exponent, finite, square_sum = (column[members] for column in read.measures)
    unit = exponent.max(axis=1)
    finite = finite.all(axis=1)
    offset = 2 * math.log(2) * (exponent - unit[:, None]).astype(dtype)
    square_sum = jnp.where(own, square_sum * jnp.exp(offset), 0).sum(axis=1)
    own = own[..., None, None]
    logs = logs[members] + offset[..., None, None]
    logs = jnp.where(own & _to_nodes(finite), logs, -jnp.inf)
    log_top = logs.max(axis=(1, 2, 3))
    log_noise = np.log(8 * eps).astype(dtype)
    weights = weights[members]
    # Past an invariant subspace, what rounding left of a residual can lead to nodes of
    # no weight between the others.
    hidden = weights <= _to_nodes(eps.astype(dtype))
    hidden |= logs <= _to_nodes(log_top + log_noise)
    # Between fewer distinct eigenvalues than steps there is no density to estimate.
    hidden |= _to_nodes(read.ended[members].all(axis=1))
    weights = weights * (own / _to_nodes(pooled * probes).astype(dtype))
    logs = jnp.where(hidden, -jnp.inf, logs)
    logs, weights = jax.lax.sort((logs, weights), num_keys=1)
    samples = (len(members), -1, steps)
    known = log_top > -jnp.inf
    square_sum = jnp.where(finite, square_sum, 0)
    stable_rank = square_sum / jnp.exp(jnp.where(known, log_top, 0))
    return Spectra(
        log_eigenvalues=logs.reshape(samples),
        weights=weights.reshape(samples),
        count=pooled * n,
        factor=np.asarray(factor, dtype),
        exponent=unit,
        finite=finite,
        log_top=log_top,
        stable_rank=jnp.where(known, stable_rank, 0),
        log_noise=log_noise,
    )


def _log_nodes(read: Reading):
    """Return the logarithms of the nodes of each matrix, and their weights."""
    shape = read.diagonal.shape
    rows = [row.reshape(-1, shape[-1]) for row in (read.diagonal, read.beside)]
    with jax.named_scope("finish"):
        nodes, weights = (x.reshape(shape) for x in gauss_quadrature(*rows))
    logs = jnp.log(jnp.where(nodes > 0, nodes, 1))
    return jnp.where(nodes > 0, logs, -jnp.inf), weights


def _to_nodes(column):
    """Let a column of the layers broadcast against (layers, slots, probes, nodes)."""
    return column[:, None, None, None]


def lanczos(
    product: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    start: Float[Array, "matrices probes n"],
    steps: int,
) -> tuple[
    Float[Array, "matrices probes steps"], Float[Array, "matrices probes steps"]
]:
    r"""Run the Lanczos recurrence of many matrices A and unit vectors q_0 at once.

        r_j = A q_j - (A q_j)ᵀ[q_0 ... q_j] [q_0 ... q_j],   q_{j+1} = r_j / |r_j|,

    orthogonalized twice against all vectors so far. Where a residual is no more than
    rounding noise, 8·eps of |T|, the q's span an invariant subspace: there the
    recurrence ends, and zeros follow, which are eigenvalues 0 of weight 0.

    Returns:
        The diagonal of T, q_jᵀ A q_j; and its other diagonals, |r_j|, of which the last
        is not part of T.

    >>> squares = jnp.asarray([1.0, 4.0])
    >>> start = jnp.full((1, 1, 2), 0.5**0.5)
    >>> diagonal, beside = lanczos(lambda q: q * squares, start, 2)
    >>> print(*(np.asarray(row).round(3) for row in (diagonal, beside)))
    [[[2.5 2.5]]] [[[1.5 0. ]]]
    """
    eps = jnp.finfo(start.dtype).eps
    columns = jnp.zeros_like(start, shape=(*start.shape[:2], steps))

    def step(j, carry):
        q, basis, diagonal, beside, largest = carry
        basis = jax.lax.dynamic_update_index_in_dim(basis, q, j, axis=2)
        r = product(q)
        a = jnp.sum(q * r, axis=-1)
        for _ in range(2):
            along = jnp.einsum("mpjn,mpn->mpj", basis, r, precision=_HIGHEST)
            r -= jnp.einsum("mpjn,mpj->mpn", basis, along, precision=_HIGHEST)
        b = jnp.sqrt(jnp.sum(r**2, axis=-1))
        largest = jnp.maximum(largest, jnp.abs(a) + b)
        # Twice is enough only while a residual is well above the rounding of A q.
        goes_on = b > 8 * eps * largest
        b = jnp.where(goes_on, b, 0)
        q = jnp.where(goes_on, 1 / jnp.where(goes_on, b, 1), 0)[..., None] * r
        diagonal = jax.lax.dynamic_update_index_in_dim(diagonal, a, j, axis=2)
        beside = jax.lax.dynamic_update_index_in_dim(beside, b, j, axis=2)
        return q, basis, diagonal, beside, largest

    basis = jnp.zeros_like(start, shape=(*columns.shape, start.shape[-1]))
    carry = (start, basis, columns, columns, columns[..., 0])
    _, _, diagonal, beside, _ = jax.lax.fori_loop(0, steps, step, carry)
    return diagonal, beside


def gauss_quadrature(
    diagonal: Float[Array, "rows steps"], beside: Float[Array, "rows steps"]
) -> tuple[Float[Array, "rows steps"], Float[Array, "rows steps"]]:
    """Return nodes and weights of tridiagonal matrices, as `lanczos` returns them.

    They are ascending eigenvalues, and squared first components of eigenvectors.

    >>> nodes, weights = gauss_quadrature(jnp.full((1, 2), 2.5), jnp.full((1, 2), 1.5))
    >>> print(*(np.asarray(row).round(3) for row in (nodes, weights)))
    [[1. 4.]] [[0.5 0.5]]
    """
    steps = diagonal.shape[-1]
    above = beside[:, :, None] * jnp.eye(steps, k=1, dtype=beside.dtype)[None]
    whole = diagonal[:, :, None] * jnp.eye(steps, dtype=beside.dtype)[None]
    matrices = whole + above + above.swapaxes(1, 2)
    return over_devices(_eigenpairs, [matrices])[0]


def _eigenpairs(buckets):
    """Decompose; on CPU one matrix per call, since two batched ones can deadlock."""
    [matrices] = buckets

    def pairs(matrices):
        nodes, vectors = jnp.linalg.eigh(matrices)
        return nodes, vectors[..., 0, :] ** 2

    one_by_one = functools.partial(jax.lax.map, pairs)
    return [jax.lax.platform_dependent(matrices, cpu=one_by_one, default=pairs)]


def _powers(exponent, dtype):
    """Return 2^-exponent as a product of two numbers that are normal ones."""
    half = exponent // 2
    one = jnp.ones_like(exponent, dtype)
    return jnp.ldexp(one, -half), jnp.ldexp(one, half - exponent)


def _rows_times(factor, vectors):
    """Multiply vectors by the factor of their matrix."""
    return factor[(...,) + (None,) * (vectors.ndim - factor.ndim)] * vectors
