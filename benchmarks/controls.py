"""Controls: TempBalance with its multipliers averaged or dealt out at random.

Each is a function from an analysis to an analysis of the same layers, whose
multipliers differ.  Both keep what TempBalance does to the learning rate on average,
and drop what it does by layer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import tb_optax

Analyze = Callable[[optax.Params], tb_optax.Analysis]
Seed = int | Array


def averaged(analyze: Analyze, seed: Seed) -> Analyze:
    """Give every layer the mean multiplier of the tuned layers; 1 if there are none.

    Args:
        analyze: the analysis of TempBalance.
        seed: not used.

    Returns:
        The analysis with one multiplier for all.
    """
    del seed

    def averaging(params: optax.Params) -> tb_optax.Analysis:
        analysis = analyze(params)
        count = jnp.sum(analysis.tuned)
        total = jnp.sum(jnp.where(analysis.tuned, analysis.multipliers, 0))
        mean = jnp.where(count > 0, total / jnp.maximum(count, 1), 1)
        multipliers = jnp.full_like(analysis.multipliers, mean)
        return dataclasses.replace(analysis, multipliers=multipliers)

    return averaging


def shuffled(analyze: Analyze, seed: Seed) -> Analyze:
    """Permute the multipliers of the tuned layers, at every refresh in the same way.

    Args:
        analyze: the analysis of TempBalance.
        seed: of the permutation.

    Returns:
        The analysis with the same multipliers at other layers.
    """

    def shuffling(params: optax.Params) -> tb_optax.Analysis:
        analysis = analyze(params)
        place = jnp.arange(len(analysis.layers))
        drawn = jax.random.permutation(jax.random.key(seed), place)
        # Tuned layers first, in their order and in the drawn one; then all others.
        behind = len(analysis.layers) + place
        givers = jnp.argsort(jnp.where(analysis.tuned, drawn, behind))
        takers = jnp.argsort(jnp.where(analysis.tuned, place, behind))
        multipliers = analysis.multipliers
        multipliers = multipliers.at[takers].set(multipliers[givers])
        return dataclasses.replace(analysis, multipliers=multipliers)

    return shuffling


def scale_by_one_multiplier(analyze: Analyze) -> optax.GradientTransformation:
    """Scale all updates by the one multiplier that an averaged analysis sets.

        u <- m u  for every leaf, the first and the last layer among them.

    Args:
        analyze: an analysis that gives all layers the same multiplier.

    Returns:
        A transform with the state of `tb_optax.scale_by_temp_balance`, refreshed by
        `tb_optax.set_multipliers`.
    """
    balance = tb_optax.scale_by_temp_balance(analyze, interval=None)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        _, following = balance.update(updates, state, params)
        scaled = jax.tree.map(
            lambda leaf: (state.multipliers[0] * leaf).astype(leaf.dtype), updates
        )
        return scaled, following

    return optax.GradientTransformation(balance.init, update_fn)
