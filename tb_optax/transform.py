"""The Optax transform that scales each layer's updates by its multiplier."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tb_optax.analysis import (
    Analysis,
    LayerAnalysis,
    Resolved,
    layer_analysis,
    leaf_multipliers,
)
from tb_optax.checks import check_function, check_int, check_number
from tb_optax.layers import layer_of_leaf
from tb_optax.leaves import is_array, leaves_of, path_of, shapes_of
from tb_optax.sharding import mesh_of, on_mesh
from tb_optax.spread import spread_refresh
from tb_optax.state import (
    TempBalanceState,
    as_vectors,
    check_fields,
    check_length,
    ends_of_ramp,
)

# An array is what `optax.inject_hyperparams` passes.
Interval: TypeAlias = int | np.integer | jax.Array | None
Number: TypeAlias = int | float | np.number | jax.Array
Analyze: TypeAlias = Callable[[Any], Analysis]


def scale_by_temp_balance(
    analyze: Analyze | None = None,
    *,
    interval: Interval,
    spread: bool = False,
    start: Number = 0,
    stop: Number | None = None,
    ramp: Number = 0,
    smoothing: Number = 0.0,
    weight_decay: Number = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale the updates of every layer by its multiplier (TempBalance).

    With u the incoming update of a leaf that belongs to layer i,

        u <- m_i · u,   m = assign(alpha(params)) refreshed at count % interval == 0,

    count 0 included, from the parameters that come in. It acts on whatever the
    transforms before it make of the gradient: place it **after** momentum, Adam and
    weight decay, before or after the learning rate. Before momentum it is a different
    method; before Adam it has no effect. `temp_balance` places it for you.

    With a weight decay it balances both by one analysis: u <- m_i·(u + decay·m_i·p),
    p the parameter. It then belongs **between** Adam and the learning rate, since a
    decay is added to updates that are subtracted later.

    All numbers may be arrays, traced ones too, as `optax.inject_hyperparams` passes
    them; their ranges are not checked then.

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
        start: the first count at which a refresh may be, an int >= 0; the multipliers
            are 1 until then.
        stop: the last count at which one may be, an int >= start; the multipliers
            stay afterwards. None never stops.
        ramp: updates over which the multipliers move linearly from those in force to
            those of a refresh, that of the refresh included, an int >= 0. 0 and 1 take
            them at once.
        smoothing: weight of the past in alpha, a number >= 0 and < 1:
            alpha <- smoothing·alpha + (1 - smoothing)·(alpha of the refresh), for
            layers that are fitted at both. Needs an interval and the metric alpha.
        weight_decay: coefficient of a balanced weight decay, a number >= 0.
        mask: which leaves decay, a tree of booleans or a function from parameters to
            one, as in `optax.add_decayed_weights`; None is all of them.

    Returns:
        A transform whose `update` needs `params` and ignores extra arguments.

    Raises:
        ValueError: if a number is out of its range, or the options do not go together;
            in `update`, if params is None, a layer is not in the parameters, or the
            state is one of version 0.1.

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
    name = "scale_by_temp_balance"
    when = _Refresh(name, analyze, interval, spread, start, stop, ramp, smoothing)
    return _transform(when, weight_decay, mask, scales=True)


def add_balanced_weight_decay(
    weight_decay: Number,
    analyze: Analyze | None = None,
    *,
    interval: Interval,
    mask: Any = None,
    spread: bool = False,
    start: Number = 0,
    stop: Number | None = None,
    ramp: Number = 0,
    smoothing: Number = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Add a weight decay with the multiplier of each layer on it (AlphaDecay).

    With u the incoming update and p the parameter of a leaf that belongs to layer i,

        u <- u + weight_decay · m_i · p,

    and m_i = 1 for what belongs to none. As `optax.add_decayed_weights`, it is
    decoupled between Adam and the learning rate, and an L2 penalty before Adam.

    Args:
        weight_decay: coefficient of the decay, a number >= 0.
        analyze: see `scale_by_temp_balance`, as for all that follows but `mask`.
        interval: updates between two refreshes.
        mask: which leaves decay, a tree of booleans or a function from parameters to
            one, as in `optax.add_decayed_weights`; None is all of them.
        spread: whether to cut a refresh into pieces.
        start: the first count at which a refresh may be.
        stop: the last one.
        ramp: updates over which the multipliers move to those of a refresh.
        smoothing: weight of the past in alpha.

    Returns:
        A transform whose `update` needs `params`, with a `TempBalanceState`.

    Raises:
        ValueError: as `scale_by_temp_balance`.

    >>> params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (64, 64))},
    ...           "b": {"kernel": jax.random.normal(jax.random.key(1), (64, 128))}}
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(),
    ...     add_balanced_weight_decay(0.1, interval=100),
    ...     optax.scale_by_learning_rate(1e-3),
    ... )
    >>> updates, state = tx.update(params, tx.init(params), params)

    References:
        He et al, `AlphaDecay: Module-wise Weight Decay for Heavy-Tailed Balancing in
        LLMs <https://arxiv.org/abs/2506.14562>`_, 2025
    """
    name = "add_balanced_weight_decay"
    when = _Refresh(name, analyze, interval, spread, start, stop, ramp, smoothing)
    return _transform(when, weight_decay, mask, scales=False)


def temp_balance(
    optimizer: optax.GradientTransformation,
    analyze: Analyze | None = None,
    *,
    interval: Interval,
    spread: bool = False,
    start: Number = 0,
    stop: Number | None = None,
    ramp: Number = 0,
    smoothing: Number = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Chain an optimizer with TempBalance in its right place, last.

        optax.chain(optimizer, scale_by_temp_balance(analyze, ...))

    Args:
        optimizer: any Optax optimizer, learning rate and weight decay included.
        analyze: see `scale_by_temp_balance`.
        interval: see `scale_by_temp_balance`.
        spread: see `scale_by_temp_balance`.
        start: see `scale_by_temp_balance`.
        stop: see `scale_by_temp_balance`.
        ramp: see `scale_by_temp_balance`.
        smoothing: see `scale_by_temp_balance`.

    Returns:
        The chain.

    >>> tx = temp_balance(optax.adamw(1e-3), interval=500)
    """
    balance = scale_by_temp_balance(
        analyze,
        interval=interval,
        spread=spread,
        start=start,
        stop=stop,
        ramp=ramp,
        smoothing=smoothing,
    )
    return optax.chain(optimizer, balance)


@dataclasses.dataclass
class _Refresh:
    """When and from what the multipliers of a state are renewed.

    The fields are the arguments of `scale_by_temp_balance`; `name` is that of the
    transform, for messages.
    """

    name: str
    analyze: Any
    interval: Any
    spread: bool
    start: Any
    stop: Any
    ramp: Any
    smoothing: Any

    def __post_init__(self):
        """Put the default analysis in, and check that the options go together."""
        if self.analyze is None:
            self.analyze = layer_analysis()
        kind = "a function such as layer_analysis(...)"
        check_function("analyze", self.analyze, kind=kind)
        # Inside inject_hyperparams numbers are arrays, whose values are not known.
        for name, value, least in (
            ("interval", self.interval, 1),
            ("start", self.start, 0),
            ("stop", self.stop, 0 if isinstance(self.start, jax.Array) else self.start),
            ("ramp", self.ramp, 0),
        ):
            if value is not None and not isinstance(value, jax.Array):
                check_int(name, value, at_least=int(least))
        if not isinstance(self.smoothing, jax.Array):
            check_number("smoothing", self.smoothing, at_least=0, below=1)
        for name, unused in (("start", 0), ("stop", None), ("smoothing", 0)):
            value = getattr(self, name)
            if self.interval is None and _is_known(value) and value != unused:
                msg = (
                    f"{name} = {value!r} needs an interval, got interval = None: the "
                    f"host decides when it refreshes, and what it sets is taken as it "
                    f"is; leave {name} out."
                )
                raise ValueError(msg)
        if self.spread and not isinstance(self.interval, int | np.integer):
            msg = f"spread=True needs an int interval, got interval = {self.interval}."
            raise ValueError(msg)
        if self.spread:
            _check_alpha("spread=True", self.analyze)
        if _is_known(self.smoothing) and self.smoothing != 0:
            _check_alpha(f"smoothing = {self.smoothing!r}", self.analyze)

    def init(self, params: optax.Params) -> TempBalanceState:
        """Return the state before the first update."""
        try:
            count = len(_resolve(self.analyze, params).layers)
        except ValueError:
            # Trees of placeholders pass through here; `update` tells what is wrong.
            count = 0
        return TempBalanceState(
            count=jnp.zeros((), jnp.int32),
            multipliers=jnp.ones((count,), float),
            alpha=jnp.zeros((count,), float),
            target=jnp.ones((count,), float),
            refreshed=jnp.zeros((), jnp.int32),
        )

    def advance(
        self, state: Any, params: optax.Params
    ) -> tuple[dict[str, Float[Array, "..."]], TempBalanceState]:
        """Return the multipliers of this update by path of leaf, and the next state."""
        if not isinstance(state, TempBalanceState):
            check_fields(state)
        plan = _resolve(self.analyze, params)
        check_length(state.multipliers, plan.layers)
        if not plan.layers:
            self.analyze.warn_if_ineffective(plan.layers, plan.kernels)
            count = jnp.asarray(optax.safe_increment(state.count))
            return {}, state._replace(count=count)
        here, target = ends_of_ramp(state)
        # Without a ramp whatever the state says is in force, as after `optax.tree.set`.
        target = jnp.where(self.ramp > 1, target, state.multipliers)
        alpha, refreshed = state.alpha, state.refreshed
        if self.interval is not None:
            if isinstance(self.analyze, LayerAnalysis):
                self.analyze.warn_if_ineffective(plan.layers, plan.kernels)
            whole, piece, ends = self._due(state.count)
            target, alpha = _refreshed(
                self.analyze,
                plan.layers,
                self.interval if self.spread else None,
                whole,
                piece,
                state._replace(multipliers=target),
                plan.kernels,
                self._weight(),
            )
            refreshed = jnp.where(ends, state.count, refreshed)
        multipliers = target
        if isinstance(self.ramp, jax.Array) or self.ramp > 1:
            # In so many equal steps, this one included.
            left = jnp.asarray(refreshed + self.ramp - state.count, here.dtype)
            moved = here + (target - here) / jnp.maximum(left, 1)
            multipliers = jnp.where(left > 1, moved, target).astype(here.dtype)
        count = jnp.asarray(optax.safe_increment(state.count))
        state = TempBalanceState(count, multipliers, alpha, target, refreshed)
        return leaf_multipliers(plan.owners, multipliers), state

    def _weight(self) -> Number | None:
        """Return the weight of the past in alpha; None where it has none."""
        unused = not isinstance(self.smoothing, jax.Array) and self.smoothing == 0
        return None if unused or _metric_of(self.analyze) != "alpha" else self.smoothing

    def _due(self, count):
        """Return whether all of a refresh is due, a piece of it, and its end.

        With pieces, the first refresh is whole.
        """
        interval = self.interval
        if not self.spread:
            due = self._allows(count) & (count % interval == 0)
            return due, None, due
        first = -(-self.start // interval) * interval
        end = -(-count // interval) * interval  # Of the refresh it belongs to.
        active = self._allows(jnp.where(count < first, -1, end))
        return active & (count == first), active, active & (count == end)

    def _allows(self, count) -> jax.Array:
        """Return whether `start` and `stop` allow a refresh at a count."""
        after = jnp.asarray(count >= self.start)
        return after if self.stop is None else after & (count <= self.stop)


def _is_known(value: Any) -> bool:
    """Return whether a value is known while it is traced."""
    return not isinstance(value, jax.core.Tracer)


def _transform(
    refresh: _Refresh, weight_decay: Number, mask: Any, *, scales: bool
) -> optax.GradientTransformationExtraArgs:
    """Make the transform that adds a balanced weight decay, and may scale the sum."""
    if not isinstance(weight_decay, jax.Array):
        check_number("weight_decay", weight_decay, at_least=0)
    decays = isinstance(weight_decay, jax.Array) or weight_decay > 0
    of_mask = optax.add_decayed_weights(1.0, mask)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TempBalanceState]:
        del extra_args
        if params is None:
            msg = (
                f"{refresh.name} needs the parameters: call "
                f"update(updates, state, params)."
            )
            raise ValueError(msg)
        by_path, state = refresh.advance(state, params)
        terms = updates
        if decays:
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros_like(leaf) if is_array(leaf) else leaf, updates
            )
            terms, _ = of_mask.update(zeros, of_mask.init(params), params)

        def change(keys, update, term):
            multiplier = by_path.get(path_of(keys))
            if not is_array(update):
                return update
            dtype = update.dtype
            with jax.numpy_dtype_promotion("standard"):
                if decays:
                    factor = weight_decay * (1 if multiplier is None else multiplier)
                    update = (update + factor * term).astype(dtype)
                if scales and multiplier is not None:
                    update = (update * multiplier).astype(dtype)
            return update

        return jax.tree_util.tree_map_with_path(change, updates, terms), state

    return optax.GradientTransformationExtraArgs(refresh.init, update_fn)


def _resolve(analyze: Analyze, params: Any) -> Resolved:
    """Find the layers of `params` and their leaves, once for a whole update.

    The kernels of a function of the user are all arrays of the parameters.
    """
    arrays = jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, params)
    if isinstance(analyze, LayerAnalysis):
        return analyze.resolve(arrays, may_be_none=True)
    layers = jax.eval_shape(analyze, arrays).layers
    if not layers:
        msg = "analyze must return an Analysis with at least one layer, got none."
        raise ValueError(msg)
    return Resolved(layers, arrays, layer_of_leaf(layers, shapes_of(leaves_of(arrays))))


# Compiled once, whether `update` is jitted or not.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _refreshed(
    analyze, layers, pieces, whole, piece, state: TempBalanceState, kernels, weight
):
    """Recompute multipliers and alpha: all, if that is due, or a piece if one is.

    A refresh has so many pieces; None for none.
    """
    vectors = (state.multipliers, state.alpha)
    weight = None if weight is None else jnp.asarray(weight)

    def all_layers():
        if isinstance(analyze, LayerAnalysis):
            past = None if weight is None else (state.alpha, weight)
            return as_vectors(analyze.run(layers, kernels, past), state)
        return as_vectors(analyze(kernels), state)

    def one_piece():
        refresh = functools.partial(
            spread_refresh, layers=layers, options=analyze.options, pieces=pieces
        )
        number = (state.count - 1) % pieces
        own = analyze.kernels_of(layers, kernels)
        mesh = mesh_of(own, analyze.mesh)
        return on_mesh(mesh, refresh, own, number, *vectors, weight)

    def at_most_a_piece():
        if pieces is None:
            return vectors
        return jax.lax.cond(piece, one_piece, lambda: vectors)

    return jax.lax.cond(whole, all_layers, at_most_a_piece)


def _metric_of(analyze):
    """Return the metric of an analysis; None for a function of the user."""
    return analyze.options.metric if isinstance(analyze, LayerAnalysis) else None


def _check_alpha(option: str, analyze) -> None:
    """Raise ValueError unless the analysis ranks by what the state carries."""
    metric = _metric_of(analyze)
    if metric != "alpha":
        msg = (
            f"{option} needs a layer_analysis(...) with metric='alpha', which is all "
            f"that the state carries from step to step, got {metric or analyze!r}; "
            f"leave it out, or rank by alpha."
        )
        raise ValueError(msg)
