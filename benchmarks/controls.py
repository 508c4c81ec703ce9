"""Controls: they keep the mean of a method, and change which layer gets what."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import tb_optax

# From multipliers (layers,), which of them are tuned (layers,), and a seed.
Control = Callable[[Array, Array, Array | int], Array]


def averaged(multipliers: Array, tuned: Array, seed: Array | int) -> Array:
    """Give every tuned layer the mean of the tuned layers."""
    del seed
    return jnp.where(tuned, _mean(multipliers, tuned), multipliers)


def shuffled(multipliers: Array, tuned: Array, seed: Array | int) -> Array:
    """Permute the multipliers of the tuned layers, the same way at every refresh."""
    place = jnp.arange(len(multipliers))
    drawn = jax.random.permutation(jax.random.key(seed), place)
    # Tuned layers first, in the order of the network and in the drawn order.
    after = len(multipliers) + place
    givers = jnp.argsort(jnp.where(tuned, drawn, after))
    takers = jnp.argsort(jnp.where(tuned, place, after))
    return multipliers.at[takers].set(multipliers[givers])


def reversed_order(multipliers: Array, tuned: Array, seed: Array | int) -> Array:
    """Reverse the map, and scale it so that the mean stays.

        m_i <- mean(m) (low + high - m_i) / mean(low + high - m)

    with the smallest and the largest multiplier as `low` and `high`.
    """
    del seed
    low = jnp.min(multipliers, where=tuned, initial=jnp.inf)
    high = jnp.max(multipliers, where=tuned, initial=-jnp.inf)
    mirrored = low + high - multipliers
    scaled = mirrored * _mean(multipliers, tuned) / _mean(mirrored, tuned)
    return jnp.where(tuned, scaled, multipliers)


def controlled(
    method: optax.GradientTransformationExtraArgs,
    hold: optax.GradientTransformationExtraArgs,
    control: Control,
    seed: Array | int,
) -> optax.GradientTransformation:
    """Apply a method whose multipliers a control changes at every update.

    Args:
        method: refreshes its multipliers by itself, and has the state. Layers that it
            has fitted count as tuned: none may be too small.
        hold: has the same layers and target, and refreshes nothing.
        control: what is done to the multipliers.
        seed: for the control.
    """

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        _, state = method.update(updates, state, params)
        own = tb_optax.get_state(state)
        changed = control(own.multipliers, own.alpha > 0, seed)
        held: Any = tb_optax.set_multipliers(hold.init(params or {}), changed)
        updates, _ = hold.update(updates, held, params)
        return updates, state

    return optax.GradientTransformation(method.init, update_fn)


def _mean(multipliers: Array, tuned: Array) -> Array:
    """Return the mean of the tuned multipliers; 1 if there is none."""
    count = jnp.sum(tuned)
    total = jnp.sum(jnp.where(tuned, multipliers, 0))
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 1)
