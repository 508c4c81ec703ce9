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

    Ubaru, Chen and Saad, `Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature
    <https://doi.org/10.1137/16M1104974>`_, 2017
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
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tb_optax.checks import check_int
from tb_optax.layers import Layer, MatrixAxes
from tb_optax.leaves import computing_dtype
from tb_optax.sharding import over_devices

# Lanczos vectors that are kept at once, in bytes; a stack of matrices is never cut.
_BASIS_BYTES = 2**28

_HIGHEST = jax.lax.Precision.HIGHEST


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


class WeightedSpectra(NamedTuple):
    """Estimated spectral densities of several layers.

    λ = factor · 4^exponent · exp(log_nodes).

    Attributes:
        log_nodes: one ascending row per probe and pooled matrix; -inf for a zero, for
            what rounding noise hides, and for padding; -inf only, where every matrix
            has fewer distinct eigenvalues than there are steps.
        weights: of the nodes; those of a layer sum to 1.
        count: N, number of eigenvalues of each layer.
        factor: `conv_norm` where several matrices are pooled, else 1.
        exponent: power of two near the largest magnitude of each layer.
        finite: whether the kernel is finite; the spectrum is zero where it is not.
        log_top: largest node of each layer, -inf where there is none.
        square_sum: Σλ / (factor · 4^exponent), from the kernel itself.
        log_noise: ln of the smallest λ / λ_max above rounding noise.
    """

    log_nodes: Float[Array, "layers samples steps"]
    weights: Float[Array, "layers samples steps"]
    count: Int[np.ndarray, " layers"]
    factor: Float[np.ndarray, " layers"]
    exponent: Int[Array, " layers"]
    finite: Bool[Array, " layers"]
    log_top: Float[Array, " layers"]
    square_sum: Float[Array, " layers"]
    log_noise: Float[np.ndarray, " layers"]

    def log_unit(self) -> Float[Array, " layers"]:
        """Natural logarithm of the unit of each row."""
        exponent = self.exponent.astype(self.log_nodes.dtype)
        return 2 * math.log(2) * exponent + np.log(self.factor)

    def absolute(self, values: Float[Array, " layers"]) -> Float[Array, " layers"]:
        """Values in the units of the rows, in absolute units; they may overflow."""
        return jnp.ldexp(values * self.factor, 2 * self.exponent)

    def stable_rank(self) -> Float[Array, " layers"]:
        """Σλ / λ_max; 0 where there is no spectrum."""
        known = self.log_top > -jnp.inf
        return jnp.where(
            known, self.square_sum / jnp.exp(jnp.where(known, self.log_top, 0)), 0
        )


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
        """Sizes of the axes along which there are several matrices."""
        return tuple(self.kernel.shape[a] for a in self.axes.stacked + self.axes.pooled)

    @property
    def count(self) -> int:
        """Number of matrices: slice by slice, those of a slice together."""
        return math.prod(self.batch)

    @property
    def pooled(self) -> int:
        """Number of matrices of each slice."""
        return math.prod(self.kernel.shape[axis] for axis in self.axes.pooled)

    @property
    def n(self) -> int:
        """Smaller side of the matrices."""
        return math.prod(self._sizes(self._sides()[0]))

    @property
    def dtype(self) -> Any:
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
        if self.part is not None:
            squares = jnp.where(self._inside(range(squares.ndim)), squares, 0)
        square_sum = jnp.sum(squares, axis=kept, keepdims=True)
        square_sum = jnp.where(finite, square_sum, 0)
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
            vectors = self._contract(_rows_times(half, vectors), side, other)
            return _rows_times(rest, vectors)

        number = vectors.shape[1]
        vectors = vectors.reshape(*self.batch, number, *self._sizes(near))
        vectors = times(self._padded(vectors, near), near, far)
        if self.part is not None and self.part[0] in far:
            inside = self._inside(far)[(None,) * (vectors.ndim - len(far))]
            vectors = jnp.where(inside, vectors, 0)
        vectors = self._cut(times(vectors, far, near), near)
        return vectors.reshape(self.count, number, self.n)

    def _sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the smaller side of the matrices, and those of the other."""
        rows, columns = self.axes.reduction, self.axes.output
        fewer_rows = math.prod(self._sizes(rows)) <= math.prod(self._sizes(columns))
        return (rows, columns) if fewer_rows else (columns, rows)

    def _sizes(self, side: tuple[int, ...]) -> list[int]:
        """Sizes of the axes of one side, of the part only."""
        sizes = {axis: self.kernel.shape[axis] for axis in side}
        if self.part is not None and self.part[0] in side:
            sizes[self.part[0]] = self.part[2] - self.part[1]
        return list(sizes.values())

    def _inside(self, side: Sequence[int]) -> Bool[Array, "..."]:
        """Where the part is, along the last axes of an array, those of a side."""
        assert self.part is not None
        axis, start, stop = self.part
        shape = [self.kernel.shape[axis] if a == axis else 1 for a in side]
        number = jnp.arange(self.kernel.shape[axis]).reshape(shape)
        return (number >= start) & (number < stop)

    def _padded(self, vectors, side):
        """Vectors of the part with zeros where the rest of the kernel is."""
        if self.part is None or self.part[0] not in side:
            return vectors
        axis, start, stop = self.part
        widths = [(0, 0)] * vectors.ndim
        after = self.kernel.shape[axis] - stop
        widths[len(self.batch) + 1 + side.index(axis)] = (start, after)
        return jnp.pad(vectors, widths)

    def _cut(self, vectors, side):
        """Vectors without what belongs to the rest of the kernel."""
        if self.part is None or self.part[0] not in side:
            return vectors
        axis, start, stop = self.part
        place = len(self.batch) + 1 + side.index(axis)
        return jax.lax.slice_in_dim(vectors, start, stop, axis=place)

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
) -> WeightedSpectra:
    """Estimate the spectral densities of layers, many of them at once.

    The peak of temporary memory is that of the vectors: about 3·probes·steps·n numbers
    for each matrix of those that are read together, which are 256 MiB of basis or one
    stack. A kernel is copied only where fewer than half of the slices of a stack are
    asked for (their range), or if it is float16.

    Args:
        kernels: kernels by path, sharded in any way.
        layers: layers, stacks expanded.
        conv_norm: factor on λ where axes are pooled.
        method: how many probes and steps.

    Returns:
        WeightedSpectra, one row per layer, in the order given.
    """
    families: dict[tuple, list[int]] = {}
    for position, layer in enumerate(layers):
        families.setdefault((layer.path, layer.axes, layer.part), []).append(position)
    operators, places = [], []
    for (path, axes, part), members in families.items():
        kernel, slices = _cropped(
            kernels[path], axes, [layers[i].index for i in members]
        )
        operators.append(Operator(kernel, axes, part))
        places.append(slices)
    groups = _groups(operators, method)
    read = [_read([operators[i] for i in group], method) for group in groups]
    read = jax.tree.map(lambda *columns: jnp.concatenate(columns), *read)

    # The number of the first matrix of each layer, and how many it has.
    first, pooled, n = np.zeros((3, len(layers)), int)
    eps = np.zeros(len(layers))
    start = 0
    for i in np.concatenate(groups):
        members = list(families.values())[i]
        pooled[members] = operators[i].pooled
        n[members] = operators[i].n
        eps[members] = jnp.finfo(operators[i].dtype).eps
        first[members] = start + places[i] * operators[i].pooled
        start += operators[i].count
    factor = [conv_norm if layer.axes.pooled else 1.0 for layer in layers]
    return _pooled(read, first, pooled, n, eps, factor)


def estimate_key(kernels: Mapping[str, Any], layer: Layer) -> tuple:
    """What layers must share that `estimate_one_of` chooses from."""
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
) -> WeightedSpectra:
    """Estimate the spectral density of the layer with this number.

    Products with all of the kernels are compiled, into one recurrence. The slice of a
    stack is copied; one of a stack that is sharded along the stacked axis moves.

    Args:
        kernels: kernels by path, sharded in any way.
        layers: layers with one `estimate_key`.
        place: which of them.
        conv_norm: factor on λ where axes are pooled.
        method: how many probes and steps.

    Returns:
        WeightedSpectra, of one row.
    """
    like = layers[0]
    if like.axes.stacked:
        cuts = [functools.partial(_slice, kernels[x.path], x) for x in layers]
        kernel = jax.lax.switch(place, cuts)
        operator = Operator(kernel, like.axes, like.part)
    else:
        operator = _OneOf(
            [Operator(kernels[x.path], x.axes, x.part) for x in layers], place
        )
    read = _read([operator], method)
    factor = [conv_norm if like.axes.pooled else 1.0]
    first, pooled, n = np.asarray([[0], [operator.pooled], [operator.n]])
    eps = np.asarray([jnp.finfo(read.diagonal.dtype).eps])
    return _pooled(read, first, pooled, n, eps, factor)


@dataclasses.dataclass(frozen=True)
class _OneOf:
    """One of several operators of equal sizes, by number."""

    operators: Sequence[Operator]
    place: Int[Array, ""]

    @property
    def count(self) -> int:
        return self.operators[0].count

    @property
    def pooled(self) -> int:
        return self.operators[0].pooled

    @property
    def n(self) -> int:
        return self.operators[0].n

    def measure(self):
        return jax.lax.switch(self.place, [own.measure for own in self.operators])

    def product(self, vectors, exponent):
        products = [own.product for own in self.operators]
        return jax.lax.switch(self.place, products, vectors, exponent)


def _slice(kernel, layer: Layer):
    """One slice of a stack, as a stack of one."""
    for axis, index in zip(layer.axes.stacked, layer.index, strict=True):
        kernel = jax.lax.slice_in_dim(kernel, index, index + 1, axis=axis)
    return kernel


def _groups(operators: Sequence[Operator], method: quadrature) -> list[list[int]]:
    """Numbers of the operators that are read together: of one size, in few bytes."""
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


def _read(operators: Sequence[Operator | _OneOf], method: quadrature) -> Reading:
    """One recurrence for all matrices of operators of one size."""
    columns = [operator.measure() for operator in operators]
    measures = jax.tree.map(lambda *parts: jnp.concatenate(parts), *columns)
    finite = measures.finite[:, None, None]
    n, dtype = operators[0].n, measures.square_sum.dtype
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
        return jnp.where(finite, _replicated(jnp.concatenate(products)), 0)

    # A matrix with fewer rows than steps has no more vectors.
    steps = min(method.steps, n)
    missing = [(0, 0), (0, 0), (0, method.steps - steps)]
    with jax.named_scope("lanczos"):
        diagonal, beside = lanczos(product, start.astype(dtype), steps)
    ended = (beside[..., : steps - 1] == 0).any(axis=2).all(axis=1)
    diagonal, beside = jnp.pad(diagonal, missing), jnp.pad(beside, missing)
    return Reading(diagonal, beside, ended, measures)


def sign_probes(pooled: int, probes: int, n: int) -> Float[Array, "pooled probes n"]:
    """Random signs / sqrt(n): the same at every call, others for each pooled matrix."""
    key = jax.random.key(0, impl="threefry2x32")
    return jax.random.rademacher(key, (pooled, probes, n), float) / math.sqrt(n)


def _pooled(read: Reading, first, pooled, n, eps, factor) -> WeightedSpectra:
    """From matrices to layers, the matrices of each in one unit."""
    dtype, shape = read.diagonal.dtype, read.diagonal.shape
    rows = [row.reshape(-1, shape[-1]) for row in (read.diagonal, read.beside)]
    with jax.named_scope("finish"):
        nodes, weights = (x.reshape(shape) for x in gauss_quadrature(*rows))
    # Layers with fewer matrices repeat their last one, with weight 0.
    slots = np.arange(pooled.max())
    members = first[:, None] + np.minimum(slots, pooled[:, None] - 1)
    own = (slots < pooled[:, None])[..., None, None]
    exponent, finite, square_sum = (column[members] for column in read.measures)
    unit = exponent.max(axis=1)
    finite = finite.all(axis=1)
    offset = 2 * math.log(2) * (exponent - unit[:, None]).astype(dtype)
    logs = jnp.log(jnp.where(nodes > 0, nodes, 1))
    logs = jnp.where(nodes > 0, logs, -jnp.inf)[members] + offset[..., None, None]
    logs = jnp.where(own & finite[:, None, None, None], logs, -jnp.inf)
    log_top = logs.max(axis=(1, 2, 3))
    log_noise = np.log(8 * eps).astype(dtype)
    weights = weights[members]
    # Past an invariant subspace, what rounding left of a residual can lead to nodes of
    # no weight between the others.
    hidden = weights <= eps.astype(dtype)[:, None, None, None]
    hidden |= logs <= (log_top + log_noise)[:, None, None, None]
    # Between fewer distinct eigenvalues than steps there is no density to estimate.
    hidden |= read.ended[members].all(axis=1)[:, None, None, None]
    samples = (len(members), -1, shape[-1])
    share = own / (pooled * shape[1])[:, None, None, None].astype(dtype)
    square_sum = jnp.where(own[..., 0, 0], square_sum * jnp.exp(offset), 0)
    logs, weights = jax.lax.sort(
        (jnp.where(hidden, -jnp.inf, logs), weights * share), num_keys=1
    )
    return WeightedSpectra(
        log_nodes=logs.reshape(samples),
        weights=weights.reshape(samples),
        count=pooled * n,
        factor=np.asarray(factor, dtype),
        exponent=unit,
        finite=finite,
        log_top=log_top,
        square_sum=jnp.where(finite, square_sum.sum(axis=1), 0),
        log_noise=log_noise,
    )


def _cropped(kernel, axes: MatrixAxes, indices: Sequence[tuple[int, ...]]):
    """A stack without the slices before and after those that are asked for.

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


_barrier = jax.lax.optimization_barrier


def _replicated(vectors):
    """Vectors, of which every device has all; kernels stay as they are."""
    if not jax.sharding.get_abstract_mesh().auto_axes:
        return vectors
    return jax.lax.with_sharding_constraint(vectors, PartitionSpec())


def lanczos(
    product: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    start: Float[Array, "matrices probes n"],
    steps: int,
) -> tuple[
    Float[Array, "matrices probes steps"], Float[Array, "matrices probes steps"]
]:
    r"""The Lanczos recurrence of many symmetric matrices and start vectors at once.

        r_j = A q_j - (A q_j)ᵀ[q_0 ... q_j] [q_0 ... q_j],   q_{j+1} = r_j / |r_j|,

    orthogonalized twice against all vectors so far. Where a residual is no more than
    rounding noise, 8·eps of |T|, the q's span an invariant subspace: there the
    recurrence ends, and zeros follow, which are eigenvalues 0 of weight 0.

    Args:
        product: multiplies all vectors by their matrices A.
        start: vectors of norm 1.
        steps: how many steps, at least 1.

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
    """Nodes and weights of tridiagonal matrices, as `lanczos` returns them.

    Args:
        diagonal: of each matrix.
        beside: its other diagonals; the last number is not read.

    Returns:
        Eigenvalues, ascending, and squared first components of the eigenvectors.

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
    """On CPU, one matrix per call of LAPACK: two batched calls can deadlock."""
    [matrices] = buckets

    def pairs(matrices):
        nodes, vectors = jnp.linalg.eigh(matrices)
        return nodes, vectors[..., 0, :] ** 2

    def one_by_one(matrices):
        return jax.lax.map(pairs, matrices)

    return [jax.lax.platform_dependent(matrices, cpu=one_by_one, default=pairs)]


def _powers(exponent, dtype):
    """2^-exponent as a product of two numbers that are normal ones."""
    half = exponent // 2
    one = jnp.ones_like(exponent, dtype)
    return jnp.ldexp(one, -half), jnp.ldexp(one, half - exponent)


def _rows_times(factor, vectors):
    """Vectors times the factor of their matrix."""
    return factor[(...,) + (None,) * (vectors.ndim - factor.ndim)] * vectors
