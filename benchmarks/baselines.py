"""Baselines that Optax does not have: SNR, SGDP, and Lookahead on plain parameters.

Kernels have their outputs on the last axis, as in Flax. As a matrix, a kernel is
(outputs, everything else). The `update` of each transform needs the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


def _transform(init: Any, update: Callable[..., Any]) -> optax.GradientTransformation:
    """Return a transform whose `update` raises `ValueError` without parameters."""

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError("update needs the parameters as its third argument.")
        return update(updates, state, params)

    return optax.GradientTransformation(init, update_fn)


def add_spectral_norm_gradient(
    coefficient: float, *, iterations: int = 5, seed: int | Array = 0
) -> optax.GradientTransformation:
    """Add the gradient of a penalty on the squared spectral norm of each kernel (SNR).

    With W the matrix of a kernel, sigma its largest singular value, and u and v the
    singular vectors,

        g <- g + coefficient * sigma u v^T,

    which is the gradient of coefficient / 2 * sigma(W)^2. The three come from a few
    power iterations, which start from a new Gaussian vector at each update. Leaves of
    rank 0 and 1 are left alone. The transform belongs before momentum; its state is the
    number of updates so far.

    References:
        Yoshida & Miyato, `Spectral Norm Regularization for Improving the
        Generalizability of Deep Learning <https://arxiv.org/abs/1705.10941>`_, 2017
    """

    def regularized(gradient: Array, kernel: Array, key: Array) -> Array:
        if kernel.ndim < 2:
            return gradient
        matrix = kernel.reshape(-1, kernel.shape[-1]).T
        start = jax.random.normal(key, matrix.shape[:1], matrix.dtype)
        sigma, u, v = power_iteration(matrix, start, iterations)
        term = (coefficient * sigma * jnp.outer(v, u)).reshape(kernel.shape)
        return gradient + term.astype(gradient.dtype)

    def update(updates: Any, count: Array, params: Any) -> tuple[Any, Any]:
        gradients, tree = jax.tree.flatten(updates)
        key = jax.random.fold_in(jax.random.key(seed), count)
        keys = jax.random.split(key, len(gradients))
        rows = zip(gradients, tree.flatten_up_to(params), keys, strict=True)
        updates = tree.unflatten([regularized(*row) for row in rows])
        return updates, optax.safe_increment(count)

    return _transform(lambda _: jnp.zeros((), jnp.int32), update)


def power_iteration(
    matrix: Array, start: Array, iterations: int
) -> tuple[Array, Array, Array]:
    """Estimate the largest singular value of a matrix and its singular vectors.

    Start from u = start / |start|, and repeat:

        v <- W^T u / |W^T u|,    u <- W v / |W v|,    and then sigma = u^T W v.

    All of sigma, u, and v are 0 for a matrix of zeros.
    """
    precise = jax.lax.Precision.HIGHEST

    def iterate(_: Any, vectors: tuple[Array, Array]) -> tuple[Array, Array]:
        v = _unit(jnp.matmul(vectors[0], matrix, precision=precise))
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
    0 and 1 have u = d + decay * w. The learning rate comes after the transform.

    Args:
        momentum: decay of d, below 1, without Nesterov's correction.
        weight_decay: coefficient of w.
        delta: factor on the threshold of the cosine.
        decay_ratio: factor on the decay of a projected kernel.
        eps: smallest product of norms, and the addend to the norm of w.

    References:
        Heo et al, `AdamP: Slowing Down the Slowdown for Momentum Optimizers on
        Scale-invariant Weights <https://arxiv.org/abs/2006.08217>`_, 2020
    """
    trace = optax.trace(momentum)
    decay = weight_decay / (1 - momentum)

    def moved(step: Array, gradient: Array, weight: Array) -> Array:
        update, axes = step + decay * weight, tuple(range(weight.ndim))
        # By channel comes last: it takes precedence.
        for view in (axes, axes[:-1]) if weight.ndim > 1 else ():
            norm = jnp.sqrt(jnp.sum(weight**2, view, keepdims=True))
            norms = norm * jnp.sqrt(jnp.sum(gradient**2, view, keepdims=True))
            product = jnp.sum(gradient * weight, view, keepdims=True)
            cosine = (jnp.abs(product) / jnp.maximum(norms, eps)).max()
            unit = weight / (norm + eps)
            across = step - unit * jnp.sum(unit * step, view, keepdims=True)
            orthogonal = cosine < delta / (weight.size // product.size) ** 0.5
            projected = across + decay * decay_ratio * weight
            update = jnp.where(orthogonal, projected, update)
        return update

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        steps, state = trace.update(updates, state)
        return jax.tree.map(moved, steps, updates, params), state

    return _transform(trace.init, update)


class LookaheadState(NamedTuple):
    """The slow parameters, and the state of `optax.lookahead`."""

    slow: Any
    fast: Any


def lookahead(
    optimizer: optax.GradientTransformation, *, period: int, step_size: float
) -> optax.GradientTransformation:
    """Pull the parameters towards their past after every `period` updates.

    The parameters that are trained are the fast ones; the slow ones are part of the
    state, where `optax.lookahead` wants pairs. After the last update of a period

        slow <- slow + step_size * (fast - slow),    fast <- slow.

    Nothing may follow the transform in a chain.

    References:
        Zhang et al, `Lookahead Optimizer: k steps forward, 1 step back
        <https://arxiv.org/abs/1907.08610>`_, 2019
    """
    pairwise: Any = optax.lookahead(optimizer, period, step_size)

    def init(params: Any) -> LookaheadState:
        slow = jax.tree.map(jnp.copy, params)  # Distinct arrays can both be donated.
        return LookaheadState(slow, pairwise.init(optax.LookaheadParams(params, slow)))

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, LookaheadState]:
        pair = optax.LookaheadParams(params, state.slow)
        moves, fast = pairwise.update(updates, state.fast, pair)
        slow = optax.apply_updates(state.slow, moves.slow)
        return moves.fast, LookaheadState(slow, fast)

    return _transform(init, update)
