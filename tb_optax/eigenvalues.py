"""Eigenvalues of symmetric tridiagonal matrices, in batches.

Bisection on Sturm counts: the count of negative pivots of T - xI is the number of
eigenvalues below x. All shifts of all matrices advance together, so that one short loop
serves a whole batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tb_optax.hidden import hidden
from tb_optax.scale import integer_like

# Rows of a step of the loop that counts eigenvalues, an even number.
ROWS = 8

# Above all pivots whose size matters.
_HUGE = 1e30


def tridiagonal_eigenvalues(
    forms: Float[Array, "matrices vectors n"], sizes: Int[np.ndarray, " matrices"]
) -> Float[Array, "matrices n"]:
    """Ascending eigenvalues of symmetric tridiagonal matrices of several sizes.

    One count on a grid of n points finds the cell of every eigenvalue at once;
    bisection of the cells then halves all intervals together, until they are
    narrower than the rounding error of a count.

    Args:
        forms: the matrices, as `reduction.HOUSEHOLDER` has them: their diagonals, and
            what is beside them, whose signs do not matter, behind a number that is not
            read. Nothing is read before the last columns, as many as the size.
        sizes: of the matrices.

    Returns:
        The eigenvalues, each within a few eps·|λ|_max, and behind those of a smaller
        matrix numbers without meaning.

    >>> matrix = jnp.asarray([[[2.0, 2.0], [0.0, 1.0]]])
    >>> print(tridiagonal_eigenvalues(matrix, np.asarray([2])).round(4))
    [[1. 3.]]
    """
    dtype = forms.dtype
    groups = _groups(sizes)
    # Intervals of each matrix, some more than it has eigenvalues.
    matrix = np.concatenate([np.repeat(g.matrix, g.lanes) for g in groups])
    width, (_, start) = np.bincount(matrix), np.unique(matrix, return_index=True)
    first = jnp.asarray(start[matrix], jnp.int32)
    interval = jnp.arange(len(matrix), dtype=jnp.int32)
    # As many cells, a power of two, from -2 to 2, where all eigenvalues are.
    cells = 2.0 ** np.floor(np.log2(width))
    cell = jnp.asarray((4 / cells)[matrix], dtype)
    rows, unit = _prepared(forms, sizes)
    rows = [rows[group.matrix, :, -group.steps * ROWS :] for group in groups]

    def grid(number):
        return number.astype(dtype) * cell - 2

    def narrow(i, state):
        """Counts at below + cell·scale: first the grid, then middles of intervals."""
        below, scale = state
        shifts = below + cell * scale
        parts = jnp.split(shifts, np.cumsum([group.total for group in groups])[:-1])
        counts = [
            _count_below(own, part.reshape(-1, group.lanes)).reshape(-1)
            for group, own, part in zip(groups, rows, parts, strict=True)
        ]
        # They ascend over all matrices, as the intervals do.
        keys = first + jnp.concatenate(counts)

        def locate():
            return grid(_number_up_to(keys, interval, first, width.max()))

        def halve():
            return jnp.where(keys <= interval, shifts, below)

        return jax.lax.cond(i == 0, locate, halve), scale / 2

    # A few bits beyond those of λ_max: small eigenvalues can be as exact as that.
    bits = jnp.finfo(dtype).nmant * 9 // 8 + 3
    halvings = max(0, bits - int(np.log2(cells.min())))
    scale = jnp.ones_like(forms, shape=())
    state = grid(interval - first) * scale, scale
    below, scale = jax.lax.fori_loop(0, 1 + halvings, narrow, state)
    place = np.minimum(np.arange(forms.shape[2]), width[:, None] - 1)
    found = (below + cell * scale)[start[:, None] + place]
    return found * unit[:, None]


class _Group(NamedTuple):
    """Matrices of similar sizes, whose rows are counted in one loop.

    Attributes:
        matrix: of each block of intervals.
        steps: of that loop, each of ROWS rows.
        lanes: intervals of a block.
    """

    matrix: Int[np.ndarray, " blocks"]
    steps: int
    lanes: int

    @property
    def total(self) -> int:
        """Number of intervals."""
        return len(self.matrix) * self.lanes


def _groups(sizes: Int[np.ndarray, " matrices"]) -> list[_Group]:
    """Sizes up to 256, up to 1024, up to 4096, ...

    A loop takes a tenth of a second to compile; running over rows that a matrix does
    not have takes less than that.
    """
    number = np.ceil(np.log2(np.maximum(sizes, 256)) / 2)
    groups = []
    for own in (np.flatnonzero(number == k) for k in np.unique(number)):
        lanes = max(64, int(sizes[own].min()) // 4)
        steps = -(-int(sizes[own].max()) // ROWS)
        groups.append(_Group(np.repeat(own, -(-sizes[own] // lanes)), steps, lanes))
    return groups


def _number_up_to(keys, bounds, start, most):
    """How many of ascending keys from `start` on, at most `most`, are up to a bound.

    As `jnp.searchsorted` from the right, less `start`, in fewer kernels and steps.
    """
    steps = int(most).bit_length()

    def double(i, end):
        ahead = end + (1 << (steps - 1 - i))
        last = keys[jnp.minimum(ahead, len(keys)) - 1]
        return jnp.where((ahead <= len(keys)) & (last <= bounds), ahead, end)

    return jax.lax.fori_loop(0, steps, double, start + jnp.zeros_like(keys)) - start


def _prepared(forms, sizes):
    """Brings all matrices to |λ| < 2, and their rows to a multiple of ROWS.

    Returns:
        Rows (d_k, e²_{k-1}), those before the first above all eigenvalues, as
        (matrices, 2, rows); what all were divided by.
    """
    forms = jnp.pad(forms, ((0, 0), (0, 0), (-forms.shape[2] % ROWS, 0)))
    n = forms.shape[2]
    column, start = np.arange(n), (n - sizes)[:, None]
    beside = jnp.where(column > start, jnp.abs(forms[:, 1]), 0)
    # Gershgorin's discs hold all eigenvalues.
    reach = jnp.abs(forms[:, 0]) + beside + jnp.pad(beside[:, 1:], ((0, 0), (0, 1)))
    within = column >= start
    unit = _power_of_two(jnp.max(jnp.where(within, reach, 0), axis=1))
    divisor = jnp.where(unit == 0, 1, unit)[:, None]
    diagonal = jnp.where(within, forms[:, 0] / divisor, 3)
    squared = jnp.maximum((beside / divisor) ** 2, _smallest(forms.dtype))
    return jnp.stack([diagonal, squared], axis=1), unit


def _power_of_two(x):
    """The power of two at or below a number, exact to divide by; 0 for 0."""
    info = jnp.finfo(x.dtype)
    integer = integer_like(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, integer) & ~integer(2**info.nmant - 1)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def _smallest(dtype) -> float:
    """The square of a number far below the rounding error of 1."""
    return float(jnp.finfo(dtype).eps) ** 2 / 2**14


def _count_below(
    rows: Float[Array, "blocks 2 rows"], shifts: Float[Array, "blocks lanes"]
) -> Int[Array, "blocks lanes"]:
    """Number of eigenvalues below each shift, by Sylvester's law of inertia.

    The pivots of T - xI are q_k = a_k - e²_{k-1} / q_{k-1}, a_k = d_k - x; as many are
    negative as there are eigenvalues below x. Two at a time they need one division:

        q_k = a_k - e²_{k-1} · y
        1 / q_{k+1} = q_k / (a_{k+1} q_k - e²_k) = y'

    No e² is zero, so that not both vanish: nothing is 0 / 0. Where q_{k+1} does, the
    next pivot is infinite, and a huge number instead: a change of d_{k+1} by e² divided
    by that.
    """
    huge = shifts.dtype.type(_HUGE)

    def next_pivots(step, carry):
        inverse, count = carry
        for place in hidden(range(0, ROWS, 2)):
            own = jax.lax.dynamic_slice_in_dim(rows, step * ROWS + place, 2, axis=2)
            (first, before), (second, between) = own.transpose(2, 1, 0)[..., None]
            pivot = first - shifts - before * inverse
            bounded = jax.lax.clamp(-huge, pivot, huge)
            product = (second - shifts) * bounded - between
            inverse = bounded / product
            count = count + jnp.signbit(pivot) + jnp.signbit(inverse)
        return inverse, count

    # What there was before the first row does not matter.
    start = shifts, jnp.zeros_like(shifts, jnp.int32)
    _, count = jax.lax.fori_loop(0, rows.shape[2] // ROWS, next_pivots, start)
    return count
