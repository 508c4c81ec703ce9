"""The Optax transform that scales each layer's updates by its multiplier."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tb_optax.analysis import (
    Analysis,
    LayerAnalysis,
    Resolved,
    layer_analysis,
    leaf_multipliers,
)
from tb_optax.checks import check_int
from tb_optax.layers import layer_of_leaf
from tb_optax.leaves import is_array, leaves_of, path_of, shapes_of
from tb_optax.sharding import mesh_of, on_mesh
from tb_optax.spread import spread_refresh
from tb_optax.state import TempBalanceState, as_vectors, check_length

# An array is what `optax.inject_hyperparams` passes.
Interval: TypeAlias = int | np.integer | jax.Array | None
Analyze: TypeAlias = Callable[[Any], Analysis]


def scale_by_temp_balance(
    analyze: Analyze | None = None, *, interval: Interval, spread: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scale the updates of every layer by its multiplier (TempBalance).

    With u the incoming update of a leaf that belongs to layer i,

        u <- m_i · u,   m = assign(alpha(params)) refreshed at count % interval == 0,

    count 0 included, from the parameters that come in. It acts on whatever the
    transforms before it make of the gradient: place it **after** momentum, Adam and
    weight decay, before or after the learning rate. Before momentum it is a different
    method; before Adam it has no effect. `temp_balance` places it for you.

    Args:
        analyze: `layer_analysis(...)`, or a function from parameters to `Analysis`;
            None is `layer_analysis()`.
        interval: updates between two refreshes, an int >= 1; None never refreshes:
            do it yourself by `set_multipliers(opt_state, analyze(params))`.
        spread: cut each refresh but the first into `interval` pieces, one per step,
            so that no step is slow. A piece is a run of whole layers, analysed from
            the parameters of its own step; `alpha` in the state fills piece by
            piece, and the new multipliers take effect together with the last, at
            count % interval == 0. Needs an int interval and the metric alpha.

    Returns:
        A transform whose `update` needs `params` and ignores extra arguments.

    Raises:
        ValueError: if interval is below 1, or `spread` does not go with the rest; in
            `update`, if params is None, there is
            no layer to balance, or a layer is not in the parameters.

    >>> params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (64, 64))},
    ...           "b": {"kernel": jax.random.normal(jax.random.key(1), (64, 128))}}
    >>> tx = optax.chain(optax.sgd(0.1), scale_by_temp_balance(interval=100))
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> from tb_optax import get_multipliers
    >>> print(get_multipliers(state))
    [0.5 1.5]

    References:
        Zhou et al, `Temperature Balancing, Layer-wise Weight Analysis, and Neural
        Network Training <https://arxiv.org/abs/2312.00359>`_, 2023
    """
    if analyze is None:
        analyze = layer_analysis()
    if not callable(analyze):
        msg = (
            f"analyze must be a function such as layer_analysis(...), got {analyze!r}."
        )
        raise ValueError(msg)
    # Inside inject_hyperparams the interval is an array, whose value is not known.
    if interval is not None and not isinstance(interval, jax.Array):
        check_int("interval", interval, at_least=1)

    if spread:
        _check_spread(analyze, interval)

    def init_fn(params: optax.Params) -> TempBalanceState:
        try:
            count = len(_resolve(analyze, params).layers)
        except ValueError:
            # Trees of placeholders pass through here; `update` tells what is wrong.
            count = 0
        return TempBalanceState(
            count=jnp.zeros((), jnp.int32),
            multipliers=jnp.ones((count,), float),
            alpha=jnp.zeros((count,), float),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TempBalanceState]:
        del extra_args
        if params is None:
            msg = (
                "scale_by_temp_balance needs the parameters: call "
                "update(updates, state, params)."
            )
            raise ValueError(msg)
        plan = _resolve(analyze, params)
        check_length(state.multipliers, plan.layers)
        multipliers, alpha = state.multipliers, state.alpha
        if interval is not None:
            if isinstance(analyze, LayerAnalysis):
                analyze.warn_if_ineffective(plan.layers, plan.kernels)
            if spread:
                multipliers, alpha = _spread(
                    analyze, plan.layers, interval, state, plan.kernels
                )
            else:
                due = state.count % interval == 0
                multipliers, alpha = _refreshed(
                    analyze, plan.layers, due, state, plan.kernels
                )
        by_path = leaf_multipliers(plan.owners, multipliers)

        def scale(keys, update):
            multiplier = by_path.get(path_of(keys))
            if multiplier is None or not is_array(update):
                return update
            return (update * multiplier).astype(update.dtype)

        updates = jax.tree_util.tree_map_with_path(scale, updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, TempBalanceState(count, multipliers, alpha)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def temp_balance(
    optimizer: optax.GradientTransformation,
    analyze: Analyze | None = None,
    *,
    interval: Interval,
    spread: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Chain an optimizer with TempBalance in its right place, last.

        optax.chain(optimizer, scale_by_temp_balance(analyze, ...))

    Args:
        optimizer: any Optax optimizer, learning rate and weight decay included.
        analyze: see `scale_by_temp_balance`.
        interval: see `scale_by_temp_balance`.
        spread: see `scale_by_temp_balance`.

    Returns:
        The chain.

    >>> tx = temp_balance(optax.adamw(1e-3), interval=500)
    """
    return optax.chain(
        optimizer, scale_by_temp_balance(analyze, interval=interval, spread=spread)
    )


def _resolve(analyze: Analyze, params: Any) -> Resolved:
    """Find the layers of `params` and their leaves, once for a whole update.

    The kernels of a function of the user are all arrays of the parameters.
    """
    arrays = jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, params)
    if isinstance(analyze, LayerAnalysis):
        return analyze.resolve(arrays)
    layers = jax.eval_shape(analyze, arrays).layers
    return Resolved(layers, arrays, layer_of_leaf(layers, shapes_of(leaves_of(arrays))))


# Compiled once, whether `update` is jitted or not.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _refreshed(analyze, layers, due, state: TempBalanceState, kernels):
    """Recompute multipliers and alpha if a refresh is due."""
    return jax.lax.cond(
        due,
        lambda: as_vectors(_analyzed(analyze, layers, kernels), state),
        lambda: (state.multipliers, state.alpha),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _spread(
    analyze: LayerAnalysis, layers, interval: int, state: TempBalanceState, kernels
):
    """Compute this step's piece of a refresh; at count 0 the whole of it."""

    def one_piece():
        refresh = functools.partial(
            spread_refresh, layers=layers, options=analyze.options, pieces=interval
        )
        piece = (state.count - 1) % interval
        mesh = mesh_of(kernels, analyze.mesh)
        return on_mesh(mesh, refresh, kernels, piece, state.multipliers, state.alpha)

    return jax.lax.cond(
        state.count == 0,
        lambda: as_vectors(_analyzed(analyze, layers, kernels), state),
        one_piece,
    )


def _analyzed(analyze, layers, kernels) -> Analysis:
    if isinstance(analyze, LayerAnalysis):
        return analyze.run(layers, kernels)
    return analyze(kernels)


def _check_spread(analyze, interval) -> None:
    if not isinstance(interval, (int, np.integer)):
        msg = f"spread=True needs an int interval, got interval = {interval!r}."
        raise ValueError(msg)
    metric = analyze.options.metric if isinstance(analyze, LayerAnalysis) else None
    if metric != "alpha":
        msg = (
            f"spread=True needs a layer_analysis(...) with metric='alpha', which is "
            f"all that the state carries from piece to piece, got "
            f"{metric or analyze!r}."
        )
        raise ValueError(msg)
