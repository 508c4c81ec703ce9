"""The state of the transform, and how to reach it inside an optimizer state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tb_optax.analysis import Analysis
from tb_optax.layers import Layer, expand_stacks
from tb_optax.leaves import is_array, leaves_of, listing, path_of, shapes_of


class TempBalanceState(NamedTuple):
    """State of `scale_by_temp_balance`, the same structure from `init` on.

    The vectors have one entry per layer and JAX's default float dtype, whatever
    the parameters are; `jax.eval_shape(analyze, params).layers` names the entries.

    Attributes:
        count: number of updates so far.
        multipliers: factor on the updates of each layer; 1 before the first
            refresh and for what is not tuned.
        alpha: exponent of each layer at the last refresh, averaged over refreshes
            where they are smoothed; 0 before the first refresh and for what is not
            fitted.
        target: multipliers of the last refresh, at which a ramp ends. From
            `set_multipliers` to the next update, while `refreshed` equals `count`, it
            holds those at which a ramp starts instead; `get_state` returns the end.
        refreshed: the count at the last refresh; 0 before the first.
    """

    count: Int[Array, ""]
    multipliers: Float[Array, " layers"]
    alpha: Float[Array, " layers"]
    target: Float[Array, " layers"]
    refreshed: Int[Array, ""]


# Which of several states: its place in their order, or its path in the error message.
Which: TypeAlias = int | str | None


def get_state(opt_state: Any, which: Which = None) -> TempBalanceState:
    """Find a `TempBalanceState` inside an optimizer state.

    Args:
        opt_state: state of any chain, wrapped, masked or partitioned, of Optax or
            of an `nnx.Optimizer`.
        which: where there are several, such as one of `scale_by_temp_balance` and one
            of `add_balanced_weight_decay`: the position of one in their order, or its
            path, which the error message lists. None expects a single one.

    Returns:
        The state, its arrays unwrapped.

    Raises:
        ValueError: if there is none, none of that name, more than one and `which` is
            None, or if it lacks fields, as a checkpoint of version 0.1 does.

    >>> import optax
    >>> from tb_optax import temp_balance
    >>> tx = temp_balance(optax.sgd(0.1), interval=10)
    >>> int(get_state(tx.init({"kernel": jnp.ones((8, 8))})).count)
    0
    """
    state = TempBalanceState(*map(_unwrap, _find_state(opt_state, which)))
    if not isinstance(state.count, jax.Array | np.ndarray):  # Shapes or shardings.
        return state
    _, target = ends_of_ramp(state)
    return state._replace(target=target)


def get_multipliers(opt_state: Any, which: Which = None) -> Float[Array, " layers"]:
    """Find the multipliers inside an optimizer state; see `get_state`."""
    return _unwrap(_find_state(opt_state, which).multipliers)


def set_multipliers(opt_state: Any, multipliers: Any, which: Which = None) -> Any:
    """Set new multipliers in an optimizer state, for a refresh by the host.

    A transform with a `ramp` moves to them from those in force, starting with its next
    update.

    Args:
        opt_state: state of any chain; see `get_state`.
        multipliers: an `Analysis`, which sets alpha too, or one number per layer.
        which: see `get_state`.

    Returns:
        The same state with the numbers copied and cast into it, so that a jitted
        step neither recompiles nor donates them away.

    Raises:
        ValueError: if there is not one number per layer, one is not finite, or the
            state is absent or ambiguous.

    >>> import optax
    >>> from tb_optax import temp_balance
    >>> params = {"a": {"kernel": jnp.ones((8, 8))}}
    >>> tx = temp_balance(optax.sgd(0.1), interval=None)
    >>> state = set_multipliers(tx.init(params), [1.25])
    >>> print(get_multipliers(state))
    [1.25]
    """
    found = _find_state(opt_state, which)
    old = TempBalanceState(*map(_unwrap, found))
    if isinstance(multipliers, Analysis):
        check_length(old.multipliers, multipliers.layers)
        vector, alpha = as_vectors(multipliers, old)
    else:
        if not isinstance(multipliers, jax.Array):
            multipliers = np.asarray(multipliers, float)
            if not np.isfinite(multipliers).all():
                msg = f"multipliers must be finite, got {multipliers}."
                raise ValueError(msg)
        if multipliers.shape != old.multipliers.shape:
            msg = (
                f"multipliers must have shape {old.multipliers.shape}, one per layer, "
                f"got {multipliers.shape}."
            )
            raise ValueError(msg)
        vector = jnp.array(multipliers, old.multipliers.dtype)
        alpha = old.alpha
    in_force, _ = ends_of_ramp(old)
    new = old._replace(
        multipliers=vector,
        alpha=alpha,
        target=jnp.copy(in_force),
        refreshed=jnp.copy(old.count),
    )
    new = TempBalanceState(*map(_rewrap, found, new))
    return jax.tree.map(
        lambda node: new if node is found else node, opt_state, is_leaf=_is_state
    )


def log_dict(
    opt_state: Any,
    layers: Sequence[Layer],
    params: Any = None,
    *,
    learning_rate: Any = None,
    factor: Callable[[Layer], int | float] | None = None,
    which: Which = None,
) -> dict[str, Float[Array, ""]]:
    """Return alpha and multiplier of every layer as scalars by name, for a logger.

    Nothing is copied to the host: a logger that converts them later waits then.

    Args:
        opt_state: state of any chain; see `get_state`.
        layers: the layers that the analysis was given, stacked ones with or without
            an index, or `jax.eval_shape(analyze, params).layers`.
        params: the parameters, or their shapes. Only needed where several stacks are
            listed without an index and the optimizer keeps no copy of the parameters'
            shapes, as SGD without momentum.
        learning_rate: the schedule of the optimizer, or a scalar; adds the rate in
            force, that of the last update: learning rate times multiplier. A schedule
            is evaluated at the number of updates before it. Pass a scalar where the
            optimizer counts otherwise, such as
            `opt_state.hyperparams["learning_rate"]` of `optax.inject_hyperparams`.
        factor: a function from `Layer` to the fixed factor that the rest of the chain
            has for it; adds the factors, which the rates in force then include.
        which: see `get_state`.

    Returns:
        `{"alpha/<layer>": ..., "multiplier/<layer>": ...}`, stacks slice by slice, and
        `"factor/<layer>"` and `"learning_rate/<layer>"` if they are asked for.

    Raises:
        ValueError: if the state has another number of layers, the sizes of stacks
            cannot be told, or the learning rate is no scalar.

    >>> import optax
    >>> from tb_optax import find_layers, temp_balance
    >>> params = {"a": {"kernel": jnp.ones((8, 8))}}
    >>> tx = temp_balance(optax.sgd(0.1), interval=None)
    >>> for name, value in log_dict(tx.init(params), find_layers(params)).items():
    ...     print(name, value)
    alpha/a/kernel 0.0
    multiplier/a/kernel 1.0
    >>> schedule = optax.cosine_decay_schedule(0.1, 100)
    >>> rates = log_dict(tx.init(params), find_layers(params), learning_rate=schedule)
    >>> print(rates["learning_rate/a/kernel"])
    0.1
    """
    state = get_state(opt_state, which)
    shapes = shapes_of(leaves_of(params)) if params is not None else None
    layers = _with_slices(layers, state.multipliers.size, opt_state, shapes)
    check_length(state.multipliers, layers)
    names = [layer.name for layer in layers]
    columns = {"alpha": state.alpha, "multiplier": state.multipliers}
    in_force = state.multipliers
    if factor is not None:
        factors = [factor(layer) for layer in layers]
        columns["factor"] = jnp.asarray(factors, in_force.dtype)
        in_force = in_force * columns["factor"]
    if learning_rate is not None:
        if callable(learning_rate):
            learning_rate = learning_rate(jnp.maximum(state.count - 1, 0))
        if jnp.shape(learning_rate) != ():
            msg = (
                f"learning_rate must be a schedule or a scalar, got shape "
                f"{jnp.shape(learning_rate)}."
            )
            raise ValueError(msg)
        columns["learning_rate"] = learning_rate * in_force
    return {
        f"{column}/{name}": value
        for column, values in columns.items()
        for name, value in zip(names, jnp.unstack(values), strict=True)
    }


def check_length(multipliers: Float[Array, " layers"], layers: Sequence[Layer]) -> None:
    """Raise ValueError unless there is one multiplier per layer."""
    if multipliers.shape != (len(layers),):
        names = [layer.name for layer in layers]
        msg = (
            f"the state holds {multipliers.size} multipliers, but there are "
            f"{len(layers)} layers: {', '.join(names[:8])}"
            f"{', ...' if len(names) > 8 else ''}. Call init with the parameters that "
            f"update gets, name stacked layers slice by slice, as "
            f"jax.eval_shape(analyze, params).layers does, and leave out layers that "
            f"optax.masked or optax.partition masks."
        )
        raise ValueError(msg)


def _with_slices(
    layers: Sequence[Layer],
    count: int,
    opt_state: Any,
    shapes: Mapping[str, tuple[int, ...] | None] | None,
) -> Sequence[Layer]:
    """Expand stacks that are listed without an index.

    Their sizes are those of `shapes`; or else of moments in the optimizer state, which
    have the paths and shapes of the parameters; or else, of a single stack, what the
    other layers leave of `count`.
    """
    stacks = [layer for layer in layers if layer.axes.stacked and not layer.index]
    if not stacks:
        return layers
    if shapes is None:
        shapes = _shapes_of_moments(opt_state, stacks)
        path, axes = stacks[0].path, stacks[0].axes
        alone = all(stack.path == path for stack in stacks)
        if path not in shapes and alone and len(axes.stacked) == 1:
            size, left = divmod(count - (len(layers) - len(stacks)), len(stacks))
            known = np.zeros(axes.rank, int)
            known[axes.stacked[0]] = size if left == 0 else 0
            shapes = {path: tuple(known.tolist())}
    missing = [path for path in {x.path: None for x in stacks} if path not in shapes]
    if missing:
        msg = (
            f"the optimizer state does not tell how many slices {listing(missing)} "
            f"have: call log_dict(opt_state, layers, params), or pass the layers of "
            f"jax.eval_shape(analyze, params).layers."
        )
        raise ValueError(msg)
    expanded = [
        expand_stacks([layer], shapes) if layer in stacks else [layer]
        for layer in layers
    ]
    return [layer for slices in expanded for layer in slices]


def _shapes_of_moments(
    opt_state: Any, stacks: Sequence[Layer]
) -> dict[str, tuple[int, ...] | None]:
    """Find shapes of kernels by the paths of moments: `0/mu/blocks/kernel`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(opt_state)
    return {
        stack.path: tuple(leaf.shape)
        for keys, leaf in flat
        for stack in stacks
        if is_array(leaf)
        and len(leaf.shape) == stack.axes.rank
        and path_of(keys).endswith(f"/{stack.path}")
    }


def as_vectors(analysis: Analysis, state: TempBalanceState):
    """Copy multipliers and alpha of an analysis to vectors like the state's."""
    return (
        jnp.array(analysis.multipliers, state.multipliers.dtype),
        jnp.array(analysis.alpha, state.alpha.dtype),
    )


def _is_state(node) -> bool:
    return isinstance(node, TempBalanceState)


def _find_state(opt_state, which: Which) -> TempBalanceState:
    flat, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_is_state)
    found = {path_of(keys): node for keys, node in flat if _is_state(node)}
    if not found:
        check_fields(opt_state)
        msg = (
            "there is no TempBalanceState in the optimizer state: is "
            "scale_by_temp_balance in the chain?"
        )
        raise ValueError(msg)
    if which is None and len(found) > 1:
        msg = (
            f"there are {len(found)} TempBalanceStates in the optimizer state, at "
            f"{listing(found)}: pass which= one of these paths or its position, or "
            f"the part that holds the one you mean."
        )
        raise ValueError(msg)
    places = {**dict(enumerate(found.values())), **found}
    place = 0 if which is None else which
    if place not in places:
        msg = (
            f"which must be a position below {len(found)} or one of the paths "
            f"{listing(found)}, got which = {which!r}."
        )
        raise ValueError(msg)
    return places[place]


def check_fields(state: Any) -> None:
    """Raise ValueError for a state, or one inside a state, of version 0.1.

    It was read from a checkpoint as a dict, or as another NamedTuple.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    paths = {path_of(keys): None for keys, _ in flat}
    suffix = "/multipliers"
    parents = [f"/{p}"[: -len(suffix)] for p in paths if f"/{p}".endswith(suffix)]
    for parent in parents:
        names = TempBalanceState._fields
        missing = [n for n in names if f"{parent}/{n}".removeprefix("/") not in paths]
        if missing:
            msg = (
                f"the state at {parent.removeprefix('/') or 'the top'!r} has no "
                f"{' and no '.join(missing)}, as those that tb_optax 0.1 has saved: "
                f"make it TempBalanceState(count, multipliers, alpha, "
                f"target=multipliers, refreshed=0), as docs/devices.md shows."
            )
            raise ValueError(msg)


def ends_of_ramp(
    state: TempBalanceState,
) -> tuple[Float[Array, "*states layers"], Float[Array, "*states layers"]]:
    """Return the multipliers at which a ramp goes on, and those at which it ends."""
    # Of a population too, whose states are stacked.
    set_by_host = jnp.equal(state.refreshed, state.count)[..., None]
    here = jnp.where(set_by_host, state.target, state.multipliers)
    return here, jnp.where(set_by_host, state.multipliers, state.target)


def _unwrap(value):
    """Return the array inside an nnx variable; anything else as it is."""
    return value.get_value() if hasattr(value, "get_value") else value


def _rewrap(old, value):
    """Return `value` in an nnx variable like `old`, where `old` is one."""
    return old.replace(value) if hasattr(old, "get_value") else value
