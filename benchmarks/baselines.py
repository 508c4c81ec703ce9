"""Baselines that Optax does not have: SNR, SGDP, and Lookahead on plain parameters.

Kernels have their outputs on the last axis, as in Flax. As a matrix, a kernel is
(outputs, everything else).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

_NEEDS_PARAMS = "update needs the parameters: update(updates, state, params)."


class SpectralNormState(NamedTuple):
    """State of `add_spectral_norm_gradient`."""

    count: Array  # shape (), dtype int32: updates so far


def add_spectral_norm_gradient(
    coefficient: float, *, iterations: int = 5, seed: int | Array = 0
) -> optax.GradientTransformation:
    """Add the gradient of a penalty on the squared spectral norm of each kernel (SNR).

    With W the matrix of a kernel, sigma its largest singular value, and u and v the
    singular vectors,

        g <- g + coefficient * sigma u v^T,

    which is the gradient of coefficient / 2 * sigma(W)^2. The three come from a few
    power iterations, which start from a new Gaussian vector at each update. Leaves of
    rank 0 and 1 are left alone.

    Args:
        coefficient: strength of the penalty.
        iterations: power iterations of an update.
        seed: seed of the starting vectors.

    Returns:
        A transform whose `update` needs `params`; it belongs before momentum.

    Raises:
        ValueError: in `update`, if params is None.

    References:
        Yoshida & Miyato, `Spectral Norm Regularization for Improving the
        Generalizability of Deep Learning <https://arxiv.org/abs/1705.10941>`_, 2017
    """

    def init_fn(params: optax.Params) -> SpectralNormState:
        del params
        return SpectralNormState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SpectralNormState]:
        if params is None:
            raise ValueError(_NEEDS_PARAMS)
        gradients, tree = jax.tree.flatten(updates)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        keys = jax.random.split(key, len(gradients))

        def regularized(gradient: Array, kernel: Array, key: Array) -> Array:
            if kernel.ndim < 2:
                return gradient
            matrix = kernel.reshape(-1, kernel.shape[-1]).T
            start = jax.random.normal(key, matrix.shape[:1], matrix.dtype)
            sigma, u, v = power_iteration(matrix, start, iterations)
            term = (coefficient * sigma * jnp.outer(v, u)).reshape(kernel.shape)
            return gradient + term.astype(gradient.dtype)

        rows = zip(gradients, tree.flatten_up_to(params), keys, strict=True)
        count = jnp.asarray(optax.safe_increment(state.count))
        return tree.unflatten([regularized(*row) for row in rows]), SpectralNormState(
            count
        )

    return optax.GradientTransformation(init_fn, update_fn)


def power_iteration(
    matrix: Array, start: Array, iterations: int
) -> tuple[Array, Array, Array]:
    """Estimate the largest singular value of a matrix and its singular vectors.

    Start from u = start / |start|, and repeat:

        v <- W^T u / |W^T u|,    u <- W v / |W v|,    and then sigma = u^T W v.

    Args:
        matrix: W, of shape (rows, columns).
        start: a vector of shape (rows,).
        iterations: number of repetitions, at least 1.

    Returns:
        sigma, u, and v; all of them are 0 for a matrix of zeros.
    """
    precise = jax.lax.Precision.HIGHEST

    def iterate(_: Any, vectors: tuple[Array, Array]) -> tuple[Array, Array]:
        u, _v = vectors
        v = _unit(jnp.matmul(u, matrix, precision=precise))
        return _unit(jnp.matmul(matrix, v, precision=precise)), v

    vectors = _unit(start), jnp.zeros(matrix.shape[1:], matrix.dtype)
    u, v = jax.lax.fori_loop(0, iterations, iterate, vectors)
    return u @ jnp.matmul(matrix, v, precision=precise), u, v


def _unit(vector: Array) -> Array:
    return vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)


def scale_by_sgdp(
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    *,
    delta: float = 0.1,
    decay_ratio: float = 0.1,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Remove the part along a kernel from its momentum where it only adds norm (SGDP).

    With g the gradient and d <- momentum * d + g, a kernel w is taken apart by output
    channel first, then taken as a whole. In the first of these views, of n entries per
    piece, in which all pieces are nearly orthogonal to their gradients,

        max |cos(g, w)| < delta / sqrt(n),

    each piece of the step loses its component along w, and decays less:

        u = d - (w / |w|) <w / |w|, d> + decay_ratio * decay * w,

    else u = d + decay * w, where decay = weight_decay / (1 - momentum). Leaves of rank
    0 and 1 have u = d + decay * w.

    Args:
        momentum: decay of d, below 1, without Nesterov's correction.
        weight_decay: coefficient of w.
        delta: factor on the threshold of the cosine.
        decay_ratio: factor on the decay of a projected kernel.
        eps: smallest product of norms, and the addend to the norm of w.

    Returns:
        A transform whose `update` needs `params`; the learning rate comes after it.

    Raises:
        ValueError: in `update`, if params is None.

    References:
        Heo et al, `AdamP: Slowing Down the Slowdown for Momentum Optimizers on
        Scale-invariant Weights <https://arxiv.org/abs/2006.08217>`_, 2020
    """
    trace = optax.trace(momentum)
    decay = weight_decay / (1 - momentum)

    def moved(step: Array, gradient: Array, weight: Array) -> Array:
        if weight.ndim < 2:
            return step + decay * weight
        channel, whole = tuple(range(weight.ndim - 1)), tuple(range(weight.ndim))
        by_channel = _nearly_orthogonal(gradient, weight, channel, delta, eps)
        by_whole = _nearly_orthogonal(gradient, weight, whole, delta, eps)
        projected = jnp.where(
            by_channel,
            _without_part_along(weight, step, channel, eps),
            _without_part_along(weight, step, whole, eps),
        )
        projects = by_channel | by_whole
        ratio = jnp.where(projects, decay_ratio, 1.0)
        return jnp.where(projects, projected, step) + decay * ratio * weight

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError(_NEEDS_PARAMS)
        steps, state = trace.update(updates, state)
        return jax.tree.map(moved, steps, updates, params), state

    return optax.GradientTransformation(trace.init, update_fn)


def _nearly_orthogonal(
    gradient: Array, weight: Array, axes: tuple[int, ...], delta: float, eps: float
) -> Array:
    product = jnp.sum(gradient * weight, axes, keepdims=True)
    norms = _norm(gradient, axes) * _norm(weight, axes)
    entries = weight.size // product.size
    cosine = jnp.abs(product) / jnp.maximum(norms, eps)
    return cosine.max() < delta / entries**0.5


def _without_part_along(
    weight: Array, step: Array, axes: tuple[int, ...], eps: float
) -> Array:
    direction = weight / (_norm(weight, axes) + eps)
    return step - direction * jnp.sum(direction * step, axes, keepdims=True)


def _norm(array: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.sum(array**2, axes, keepdims=True))


class LookaheadState(NamedTuple):
    """State of `lookahead`.

    Attributes:
        slow: the slow parameters.
        fast: the state of `optax.lookahead`.
    """

    slow: Any
    fast: Any


def lookahead(
    optimizer: optax.GradientTransformation, *, period: int, step_size: float
) -> optax.GradientTransformation:
    """Pull the parameters towards their past after every `period` updates.

    The parameters that are trained are the fast ones; the slow ones are part of the
    state, where `optax.lookahead` wants pairs. After the last update of a period

        slow <- slow + step_size * (fast - slow),    fast <- slow.

    Args:
        optimizer: moves the fast parameters.
        period: updates from one pull to the next.
        step_size: 1 leaves the optimizer as it is.

    Returns:
        A transform whose `update` needs `params`; nothing may follow it in a chain.

    Raises:
        ValueError: in `update`, if params is None.

    References:
        Zhang et al, `Lookahead Optimizer: k steps forward, 1 step back
        <https://arxiv.org/abs/1907.08610>`_, 2019
    """
    pairwise: Any = optax.lookahead(optimizer, period, step_size)

    def init_fn(params: optax.Params) -> LookaheadState:
        slow = jax.tree.map(jnp.copy, params)  # Distinct arrays can both be donated.
        return LookaheadState(slow, pairwise.init(optax.LookaheadParams(params, slow)))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LookaheadState]:
        if params is None:
            raise ValueError(_NEEDS_PARAMS)
        pair = optax.LookaheadParams(params, state.slow)
        moves, fast = pairwise.update(updates, state.fast, pair)
        slow = optax.apply_updates(state.slow, moves.slow)
        return moves.fast, LookaheadState(slow, fast)

    return optax.GradientTransformation(init_fn, update_fn)
