"""Lookahead as a transform of plain parameters: `optax.lookahead` wants pairs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


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

    The parameters that are trained are the fast ones, and the slow ones are part of
    the state.  After the last update of a period

        slow <- slow + step_size * (fast - slow),    fast <- slow.

    Args:
        optimizer: what moves the fast parameters.
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
            msg = "update needs the parameters: update(updates, state, params)."
            raise ValueError(msg)
        pair = optax.LookaheadParams(params, state.slow)
        moves, fast = pairwise.update(updates, state.fast, pair)
        slow = optax.apply_updates(state.slow, moves.slow)
        return moves.fast, LookaheadState(slow, fast)

    return optax.GradientTransformation(init_fn, update_fn)
