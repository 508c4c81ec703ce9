"""The analysis: from parameters to spectral metrics and multipliers of the layers.

    params -> layers -> spectra -> power laws -> metrics -> multipliers

`layer_analysis` makes an analysis, `Analysis` is the table that it returns.
"""

import dataclasses
import functools
import math
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int

from tb_optax.checks import check_int, check_number
from tb_optax.find import find_layers
from tb_optax.lanczos import (
    Spectrum,
    WeightedSpectra,
    exact,
    quadrature,
    quadrature_spectra,
)
from tb_optax.layers import Layer, MatrixAxes, expand_stacks, layer_of_leaf
from tb_optax.leaves import Leaf, leaves_of, path_of, shapes_of
from tb_optax.maps import Assign, linear
from tb_optax.power_law import Fit, PowerLaw, fit_median
from tb_optax.sharding import mesh_of, on_mesh, placed
from tb_optax.spectrum import (
    GRAM,
    SINGULAR_VALUES,
    Route,
    Spectra,
    as_matrices,
    compute_spectra,
)

# An exponent above this says that all eigenvalues are equal but for rounding.
MAX_ALPHA = 1e4


@typing.no_type_check  # JAX unflattens it with tracers, shapes and placeholders.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Analysis:
    """One row per layer: what its spectrum says, and the multiplier that follows.

    λ are the eigenvalues of a layer, pooled over its matrices, scaled by
    `conv_norm` where axes are pooled. Columns in λ units may overflow to infinity
    where a kernel is huge; those in σ units do not.

    Attributes:
        layers: the layers, stacks expanded; static.
        alpha: exponent of the fitted power law; 0 where not fitted.
        alpha_hat: alpha·log10 λ_max.
        ks_distance: Kolmogorov-Smirnov distance of the fit; 0 where not fitted.
        xmin: smallest λ of the tail; 0 where not fitted.
        tail_size: number of λ in the tail; 0 where not fitted.
        eigenvalue_count: N, before any floor.
        spectral_norm: σ_max = sqrt(λ_max). (The published code's is λ_max.)
        frobenius_norm: sqrt(Σλ). (The published code's `norm` is Σλ.)
        stable_rank: Σλ / λ_max; 0 for a zero or non-finite kernel.
        multipliers: factor on the updates of the layer; 1 where not tuned.
        fitted: whether the fit can be trusted: finite kernel, not all zero, alpha
            finite and at most 1e4, xmin above the rounding noise.
        tuned: fitted, enough eigenvalues, and inside the domain of the map.
    """

    layers: tuple[Layer, ...] = dataclasses.field(metadata={"static": True})
    alpha: Float[Array, " layers"]
    alpha_hat: Float[Array, " layers"]
    ks_distance: Float[Array, " layers"]
    xmin: Float[Array, " layers"]
    tail_size: Int[Array, " layers"]
    eigenvalue_count: Int[Array, " layers"]
    spectral_norm: Float[Array, " layers"]
    frobenius_norm: Float[Array, " layers"]
    stable_rank: Float[Array, " layers"]
    multipliers: Float[Array, " layers"]
    fitted: Bool[Array, " layers"]
    tuned: Bool[Array, " layers"]

    def leaf_multipliers(self, params: Any) -> Any:
        """Return the multiplier of every leaf, as a tree like `params`.

        Args:
            params: the parameters, or any tree with their paths and shapes.

        Returns:
            For each array a scalar, or an array that broadcasts against it where
            slices or parts of it belong to different layers; 1 where no layer does.
        """
        owners = layer_of_leaf(self.layers, shapes_of(leaves_of(params)))
        by_path = leaf_multipliers(owners, self.multipliers)
        one = jnp.ones((), self.multipliers.dtype)
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: by_path.get(path_of(keys), one), params
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the table as plain dicts, one per layer, for pandas or a logger."""
        columns = jax.device_get({name: getattr(self, name) for name in COLUMNS})
        plain = {name: column.tolist() for name, column in columns.items()}
        return [
            {"layer": layer.name} | {name: plain[name][i] for name in COLUMNS}
            for i, layer in enumerate(self.layers)
        ]


COLUMNS = tuple(f.name for f in dataclasses.fields(Analysis) if f.name != "layers")
# The columns that a map can act on.
METRICS = tuple(
    name for name in COLUMNS if name not in ("multipliers", "fitted", "tuned")
)


def leaf_multipliers(
    owners: Mapping[str, Int[np.ndarray, "..."]], multipliers: Float[Array, " layers"]
) -> dict[str, Float[Array, "..."]]:
    """Return the multipliers of the leaves that belong to a layer, by path.

    Args:
        owners: what `layer_of_leaf` says of each leaf.
        multipliers: one per layer.
    """
    padded = jnp.append(multipliers, jnp.ones((), multipliers.dtype))
    return {
        path: padded[owner if owner.size > 1 else owner.item()]
        for path, owner in owners.items()
    }


Metric: TypeAlias = str | Callable[[Analysis], Float[Array, " layers"]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What an analysis computes; `layer_analysis` documents and checks each field."""

    fit: Fit
    metric: Metric
    assign: Assign
    min_eigenvalues: int
    eigenvalue_floor: int | float | None
    conv_norm: int | float
    spectrum: Spectrum = exact()


class Resolved(NamedTuple):
    """The layers of an analysis in given parameters.

    Attributes:
        layers: stacks expanded, one per multiplier.
        kernels: their kernels, by path.
        owners: which layer each part of each leaf belongs to; see `layer_of_leaf`.
    """

    layers: tuple[Layer, ...]
    kernels: dict[str, Any]
    owners: dict[str, Int[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class LayerAnalysis:
    """A spectral analysis; `layer_analysis` makes one."""

    layers: tuple[Layer, ...] | None
    options: Options
    max_dim: int
    mesh: Mesh | AbstractMesh | None = None
    _warned: set[str] = dataclasses.field(
        default_factory=set, init=False, repr=False, compare=False
    )

    def __call__(self, params: Any) -> Analysis:
        """Analyze the layers of `params`."""
        layers, kernels, _ = self.resolve(params)
        self.warn_if_ineffective(layers, kernels)
        return self.run(layers, kernels)

    def run(self, layers: tuple[Layer, ...], kernels: Mapping[str, Any]) -> Analysis:
        """Analyze layers that are resolved already."""
        kernels = placed(kernels, self.mesh)
        return _analyze(kernels, layers, self.options, mesh_of(kernels, self.mesh))

    def resolve(self, params: Any) -> Resolved:
        """Find the layers in `params`, stacks expanded, their kernels and leaves.

        Raises:
            ValueError: if there is none, or one does not fit the parameters.
        """
        leaves = leaves_of(params)
        layers = find_layers(params) if self.layers is None else self.layers
        spectrum = self.options.spectrum
        layers = _checked_layers(layers, leaves, self.max_dim, spectrum.above)
        owners = layer_of_leaf(layers, shapes_of(leaves))
        kernels = {layer.path: leaves[layer.path].value for layer in layers}
        return Resolved(layers, kernels, owners)

    def warn_if_ineffective(
        self, layers: Sequence[Layer], kernels: Mapping[str, Any]
    ) -> None:
        """Warn, once per analysis, if the sizes of the layers leave nothing to tune."""
        message = _ineffective(layers, kernels, self.options.min_eigenvalues)
        if message and message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=3)


def layer_analysis(
    layers: Sequence[Layer] | None = None,
    *,
    fit: Fit = fit_median(),
    metric: Metric = "alpha",
    assign: Assign = linear(0.5, 1.5),
    min_eigenvalues: int = 50,
    eigenvalue_floor: int | float | None = None,
    conv_norm: int | float = 0.5,
    max_dim: int = 16384,
    mesh: Mesh | AbstractMesh | None = None,
    spectrum: Spectrum = exact(),
) -> LayerAnalysis:
    r"""Make a spectral analysis: a pure jitted function from parameters to `Analysis`.

    For each layer: the eigenvalues λ = σ² of its matrices, pooled over positions
    and scaled by `conv_norm` there; a power law p(λ) ∝ λ^-alpha fitted to their
    tail; and over all layers the map from the metric M to multipliers, for example

        low + (high - low)·(M - min M) / (max M - min M).

    Analyses of equal options compare equal and share one compilation.

    Args:
        layers: the layers to tune, in the order of the table; None finds them by
            `find_layers` in the parameters of each call. The published method
            leaves out the first and the last layer of the network.
        fit: `fit_median(...)`, `fit_min_ks()`, `fit_peak(...)` or a function
            `(log_eigenvalues, valid) -> PowerLaw`.
        metric: column of the table that the map acts on, or a function of the
            Analysis that returns one number per layer.
        assign: `linear(...)`, `sqrt()`, `log2()`, `step(...)` or a function
            `(metric, tuned) -> multipliers`.
        min_eigenvalues: a layer with fewer is not tuned, an int >= 0.
        eigenvalue_floor: fit only λ above it (all, if none is); None keeps all,
            1e-5 is the published zero filter. Norms and N are of all λ.
        conv_norm: factor on λ where axes are pooled, a finite number > 0.
        max_dim: largest smaller side of a matrix, an int >= 1; a larger one is an
            error, since its eigenvalues cost O(max_dim³). It does not bind what
            `quadrature` reads.
        mesh: the devices to spread the eigenproblems over; None takes the mesh that
            is set by `jax.set_mesh`, or that of the parameters, where JAX tells it.
            Sharded parameters need nothing else: the table is the same on all devices.
        spectrum: `exact()` decomposes all kernels; `quadrature(...)` estimates the
            spectra of large ones from products with vectors, without gathering them
            where they are sharded. It needs a fit that takes weighted eigenvalues,
            by a method `fit_weighted` as `fit_median` has, and goes neither with
            `eigenvalue_floor` nor with the metric `ks_distance`, which is 0 there.

    Returns:
        `analyze(params) -> Analysis`, which can be called inside `jit` too;
        `jax.eval_shape(analyze, params).layers` gives its layers without work.

    Raises:
        ValueError: if an option is out of range or does not go with `spectrum`; when
            called, if a layer or a
            follower is not in the parameters or does not fit them, or if a kernel
            differs along an axis of a `shard_map` around the call.

    Warns:
        UserWarning: once per analysis, when it is first traced, if no layer or only
            one has `min_eigenvalues`, so that every multiplier stays 1.

    >>> key = jax.random.key(0)
    >>> params = {"a": {"kernel": jax.random.normal(key, (128, 64))},
    ...           "b": {"kernel": jax.random.normal(key, (64, 64))}}
    >>> analysis = layer_analysis()(params)
    >>> [row["multipliers"] for row in analysis.rows()]
    [1.5, 0.5]

    References:
        Zhou et al, `Temperature Balancing, Layer-wise Weight Analysis, and Neural
        Network Training <https://arxiv.org/abs/2312.00359>`_, 2023
    """
    if layers is not None:
        layers = tuple(layers)
        for layer in layers:
            if not isinstance(layer, Layer):
                msg = f"layers must hold Layer objects, got {layer!r}."
                raise ValueError(msg)
    if isinstance(metric, str) and metric not in METRICS:
        msg = f"metric must be one of {', '.join(METRICS)}, got {metric!r}."
        raise ValueError(msg)
    for name, function in (("fit", fit), ("assign", assign), ("metric", metric)):
        if not callable(function) and not isinstance(function, str):
            msg = f"{name} must be a function, got {function!r}."
            raise ValueError(msg)
    check_int("min_eigenvalues", min_eigenvalues, at_least=0)
    check_int("max_dim", max_dim, at_least=1)
    check_number("conv_norm", conv_norm, above=0)
    if eigenvalue_floor is not None:
        check_number("eigenvalue_floor", eigenvalue_floor, above=0)
    _check_spectrum(spectrum, fit, metric, eigenvalue_floor)
    options = Options(
        fit=fit,
        metric=metric,
        assign=assign,
        min_eigenvalues=min_eigenvalues,
        eigenvalue_floor=eigenvalue_floor,
        conv_norm=conv_norm,
        spectrum=spectrum,
    )
    return LayerAnalysis(layers, options, max_dim, mesh)


def esd(
    params: Any, layers: Sequence[Layer], *, conv_norm: int | float = 0.5
) -> list[Float[np.ndarray, " n"]]:
    """Compute empirical spectral densities: all eigenvalues of each layer.

    They are squared singular values, exact to the smallest, for plots and studies.

    Args:
        params: the parameters.
        layers: layers, stacked ones with or without an index.
        conv_norm: factor on λ where axes are pooled.

    Returns:
        One ascending array per layer, stacks expanded.

    Raises:
        ValueError: if a layer is not in the parameters or does not fit them.

    >>> from tb_optax import MatrixAxes
    >>> dense = MatrixAxes((0,), (1,))
    >>> esd({"w": jnp.diag(jnp.asarray([3.0, 1.0]))}, [Layer("w", dense)])
    [array([1., 9.], dtype=float32)]
    """
    check_number("conv_norm", conv_norm, above=0)
    leaves = leaves_of(params)
    layers = _checked_layers(layers, leaves)
    kernels = {layer.path: leaves[layer.path].value for layer in layers}
    mesh = mesh_of(kernels, None)
    table = _eigenvalues(kernels, layers, conv_norm, mesh)
    eigenvalues, count = jax.device_get(table)
    return [row[len(row) - n :] for row, n in zip(eigenvalues, count, strict=True)]


def _check_spectrum(spectrum, fit, metric, eigenvalue_floor) -> None:
    """Raise ValueError unless the other options can do with such a spectrum."""
    if not isinstance(spectrum, exact | quadrature):
        msg = f"spectrum must be exact() or quadrature(...), got {spectrum!r}."
        raise ValueError(msg)
    if isinstance(spectrum, exact):
        return
    takes_weights = callable(getattr(fit, "fit_weighted", None))
    if not takes_weights or getattr(fit, "absolute", False):
        name, value, remedy = "fit", fit, "pass fit_median(...)"
    elif metric == "ks_distance":
        name, value, remedy = "metric", metric, "pass another metric, such as 'alpha'"
    elif eigenvalue_floor is not None:
        name, value, remedy = "eigenvalue_floor", eigenvalue_floor, "leave it out"
    else:
        return
    msg = (
        f"{name} = {value!r} needs single eigenvalues, but spectrum = {spectrum} "
        f"estimates their density; {remedy}, or spectrum=exact()."
    )
    raise ValueError(msg)


def _checked_layers(
    layers: Sequence[Layer],
    leaves: Mapping[str, Leaf],
    max_dim: int | None = None,
    above: int | float = math.inf,
) -> tuple[Layer, ...]:
    """Expand stacks and check that every kernel is fit for its way to a spectrum."""
    given, layers = layers, expand_stacks(layers, shapes_of(leaves))
    if not layers:
        why = (
            f"the kernels of all {len(given)} layers are masked out of the parameters."
            if given
            else "the parameters hold no kernel that the rules of find_layers know, or "
            "`layers` is empty."
        )
        msg = f"there is no layer to balance: {why}"
        raise ValueError(msg)
    for layer in layers:
        kernel = leaves[layer.path].value
        if not jnp.issubdtype(kernel.dtype, jnp.floating) or kernel.size == 0:
            msg = (
                f"layer {layer.name!r}: a kernel must be floating and not empty, got "
                f"{kernel.dtype} of shape {kernel.shape}; take it out of `layers`."
            )
            raise ValueError(msg)
        side = min(layer.matrix_shape(kernel.shape))
        if max_dim is not None and max_dim < side <= above:
            msg = (
                f"layer {layer.name!r} needs the eigenvalues of a {side} x {side} "
                f"matrix, above max_dim = {max_dim}; estimate them by "
                f"spectrum=quadrature(), leave it out of `layers`, raise max_dim, or "
                f"split it into parts (`Layer.part`)."
            )
            raise ValueError(msg)
    return layers


def _ineffective(
    layers: Sequence[Layer], kernels: Mapping[str, Any], least: int
) -> str | None:
    """Say why no multiplier can differ from 1; None if at least two layers can."""
    counts = [layer.eigenvalue_count(kernels[layer.path].shape) for layer in layers]
    tunable = [i for i, count in enumerate(counts) if count >= least]
    if len(tunable) > 1:
        return None
    sizes = sorted(counts)
    if not tunable:
        between = " to ".join(map(str, sorted({sizes[0], sizes[-1]})))
        have = f"all {len(layers)} have" if len(layers) > 1 else "the only one has"
        return (
            f"no layer reaches min_eigenvalues = {least}: {have} {between} "
            f"eigenvalues, so every multiplier stays 1 and TempBalance changes "
            f"nothing. Pass layer_analysis(..., min_eigenvalues={sizes[0]}) to tune "
            f"every layer."
        )
    name, count = layers[tunable[0]].name, counts[tunable[0]]
    others = (
        f"the other {len(layers) - 1} have at most {sizes[-2]}"
        if len(layers) > 1
        else "there is no other layer"
    )
    remedy = (
        f"Pass layer_analysis(..., min_eigenvalues={sizes[0]}) to tune every layer."
        if len(layers) > 1
        else "Give the analysis more layers."
    )
    return (
        f"only one layer can be tuned: {name!r} with {count} eigenvalues reaches "
        f"min_eigenvalues = {least}, {others}. A layer with nothing to be compared "
        f"with keeps multiplier 1 under the maps of this library. {remedy}"
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _analyze(
    kernels: dict[str, Any],
    layers: tuple[Layer, ...],
    options: Options,
    mesh: AbstractMesh | None,
) -> Analysis:
    def analyze(kernels):
        return assigned_table(layer_table(kernels, layers, options), options)

    return on_mesh(mesh, analyze, kernels)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _eigenvalues(
    kernels,
    layers: tuple[Layer, ...],
    conv_norm: int | float,
    mesh: AbstractMesh | None,
):
    def eigenvalues(kernels):
        spectra = layer_spectra(kernels, layers, conv_norm, SINGULAR_VALUES)
        return spectra.absolute(jnp.exp(spectra.log_eigenvalues)), spectra.count

    return on_mesh(mesh, eigenvalues, kernels)


# --- stages ------------------------------------------------------------------------


def layer_table(
    kernels: Mapping[str, Any], layers: tuple[Layer, ...], options: Options
) -> Analysis:
    """Make the table of the layers, before any multiplier is assigned.

    Large layers are estimated, the others decomposed.
    """
    large = [is_large(layer, kernels[layer.path].shape, options) for layer in layers]
    tables, order = [], []
    for reads, table_of in ((False, _exact_table), (True, _estimated_table)):
        own = [i for i, is_one in enumerate(large) if is_one == reads]
        if own:
            tables.append(table_of(kernels, tuple(layers[i] for i in own), options))
            order += own
    if len(tables) == 1:
        return tables[0]
    place = np.argsort(order)
    columns = {
        name: jnp.concatenate([getattr(table, name) for table in tables])[place]
        for name in COLUMNS
    }
    return Analysis(layers=layers, **columns)


def is_large(layer: Layer, shape: tuple[int, ...], options: Options) -> bool:
    """Return whether a layer's spectrum is estimated from products alone."""
    return min(layer.matrix_shape(shape)) > options.spectrum.above


def _exact_table(kernels, layers, options):
    spectra = layer_spectra(kernels, layers, options.conv_norm, route_of(options))
    return fitted_table(spectra, layers, options)


def _estimated_table(kernels, layers, options):
    estimate = quadrature_spectra(kernels, layers, options.conv_norm, options.spectrum)
    return estimated_table(estimate, layers, options)


def estimated_table(
    spectra: WeightedSpectra, layers: tuple[Layer, ...], options: Options
) -> Analysis:
    """Make the same table as `fitted_table`, from weighted nodes."""
    fit: Any = options.fit
    with jax.named_scope("fit"):
        law = fit.fit_weighted(spectra.log_nodes, spectra.weights, spectra.count)
        for name, column in zip(PowerLaw._fields, law, strict=True):
            _check_shape(f"fit ({name})", column, (len(layers),))
    return metrics_table(layers, spectra, law, absolute=False)


def route_of(options: Options) -> Route:
    """Choose singular values where small eigenvalues decide, else Gram matrices.

    They decide in a fit of the whole spectrum, above a floor, and for `ks_distance`,
    a small difference whose error near xmin no later step averages out.
    """
    whole = getattr(options.fit, "whole_spectrum", False)
    precise = whole or options.eigenvalue_floor or options.metric == "ks_distance"
    return SINGULAR_VALUES if precise else GRAM


def fitted_table(
    spectra: Spectra, layers: tuple[Layer, ...], options: Options
) -> Analysis:
    """Fit every layer, and make the table before any multiplier is assigned."""
    fit, floor = options.fit, options.eigenvalue_floor
    absolute = getattr(fit, "absolute", False)
    with jax.named_scope("fit"):
        logs = spectra.log_eigenvalues
        log_unit = spectra.log_unit()[:, None]
        kept = spectra.is_eigenvalue()
        if floor is not None:
            above = kept & (logs + log_unit > math.log(floor))
            kept = jnp.where(above.any(axis=-1, keepdims=True), above, kept)
        law = fit(logs + log_unit if absolute else logs, kept)
        for name, column in zip(PowerLaw._fields, law, strict=True):
            _check_shape(f"fit ({name})", column, (len(layers),))
    return metrics_table(layers, spectra, law, absolute=absolute)


def assigned_table(table: Analysis, options: Options) -> Analysis:
    """Fill in the multipliers that the map gives to the metric."""
    metric = options.metric
    scores = getattr(table, metric) if isinstance(metric, str) else metric(table)
    _check_shape("metric", scores, table.alpha.shape)
    multipliers, tuned = assign_multipliers(
        scores.astype(table.alpha.dtype), table.fitted, table.eigenvalue_count, options
    )
    return dataclasses.replace(table, multipliers=multipliers, tuned=tuned)


def assign_multipliers(
    scores: Float[Array, " layers"],
    fitted: Bool[Array, " layers"],
    eigenvalue_count: Int[Array, " layers"],
    options: Options,
) -> tuple[Float[Array, " layers"], Bool[Array, " layers"]]:
    """Compute multipliers, and which layers are tuned: the others have 1."""
    tuned = fitted & (eigenvalue_count >= options.min_eigenvalues)
    tuned = tuned & jnp.isfinite(scores)
    with jax.named_scope("assign"):
        multipliers = options.assign(jnp.where(tuned, scores, 1), tuned)
    _check_shape("assign", multipliers, scores.shape)
    tuned = tuned & jnp.isfinite(multipliers)
    return jnp.where(tuned, multipliers, 1).astype(scores.dtype), tuned


def layer_matrices(
    kernels: Mapping[str, Any], layer: Layer
) -> Float[Array, "pooled rows columns"]:
    """Read a kernel as the matrices of one layer."""
    kernel = _part_of(kernels[layer.path], layer.part)
    stack = as_matrices(kernel, layer.axes)
    return stack[_slices(kernel, layer.axes)[layer.index]]


def layer_spectra(
    kernels: Mapping[str, Any],
    layers: Sequence[Layer],
    conv_norm: int | float,
    route: Route,
) -> Spectra:
    """Compute spectra of the layers, those of one kernel read as one stack."""
    groups: dict[tuple, list[int]] = {}
    for position, layer in enumerate(layers):
        groups.setdefault((layer.path, layer.axes, layer.part), []).append(position)
    stacks, factors, order = [], [], []
    for (path, axes, part), members in groups.items():
        kernel = _part_of(kernels[path], part)
        stack = as_matrices(kernel, axes)
        slices = _slices(kernel, axes)
        wanted = np.asarray([slices[layers[i].index] for i in members])
        if not np.array_equal(wanted, np.arange(len(stack))):
            stack = stack[wanted]
        stacks.append(stack)
        factors.append(conv_norm if axes.pooled else 1.0)
        order += members
    spectra = compute_spectra(stacks, factors, route)
    if order == sorted(order):
        return spectra
    return jax.tree.map(lambda column: column[np.argsort(order)], spectra)


def _part_of(kernel, part):
    if part is None:
        return kernel
    axis, start, stop = part
    return jax.lax.slice_in_dim(kernel, start, stop, axis=axis)


def _slices(kernel, axes: MatrixAxes) -> np.ndarray:
    """Number the slices of the stacked axes, by index."""
    sizes = [kernel.shape[axis] for axis in axes.stacked]
    return np.arange(math.prod(sizes)).reshape(sizes)


def _check_shape(name: str, column, shape: tuple[int, ...]) -> None:
    if jnp.shape(column) != shape:
        msg = (
            f"{name} must return shape {shape}, one per layer, got {jnp.shape(column)}."
        )
        raise ValueError(msg)


def metrics_table(
    layers: tuple[Layer, ...],
    spectra: Spectra | WeightedSpectra,
    law: PowerLaw,
    *,
    absolute: bool,
) -> Analysis:
    """Derive the columns of the table, before any multiplier is assigned.

    Args:
        layers: the layers, one per row.
        spectra: their spectra or estimates of them, each in the unit of its own kernel.
        law: the fits.
        absolute: whether the fits were given eigenvalues in absolute units.

    Returns:
        Analysis with multipliers 1 and nothing tuned; what is not fitted has alpha 0
        and no tail.
    """
    exponent, dtype = spectra.exponent, law.alpha.dtype
    if isinstance(spectra, Spectra):
        log_top, stable_rank = spectra.log_eigenvalues[:, -1], _stable_rank(spectra)
        log_first = _log_first(law, spectra)
    else:
        log_top, stable_rank = spectra.log_top, spectra.stable_rank()
        log_first = jnp.full_like(log_top, -jnp.inf)
    fitted = _is_fitted(law, spectra, log_top, log_first, absolute)
    is_zero = log_top == -jnp.inf
    log_top = jnp.where(is_zero, 0, log_top)
    sigma = jnp.where(is_zero, 0, jnp.exp(log_top / 2)) * jnp.sqrt(spectra.factor)
    alpha = jnp.where(fitted, law.alpha, 0).astype(dtype)
    xmin = law.xmin if absolute else spectra.absolute(law.xmin)
    return Analysis(
        layers=layers,
        alpha=alpha,
        alpha_hat=alpha * (log_top + spectra.log_unit()) / math.log(10),
        ks_distance=jnp.where(fitted, law.ks_distance, 0).astype(dtype),
        xmin=jnp.where(fitted, xmin, 0).astype(dtype),
        tail_size=jnp.where(fitted, law.tail_size, 0).astype(jnp.int32),
        eigenvalue_count=jnp.asarray(spectra.count),
        spectral_norm=jnp.ldexp(sigma, exponent),
        frobenius_norm=jnp.ldexp(sigma * jnp.sqrt(stable_rank), exponent),
        stable_rank=stable_rank,
        multipliers=jnp.ones_like(alpha),
        fitted=fitted,
        tuned=jnp.zeros_like(fitted),
    )


def _stable_rank(spectra: Spectra) -> Float[Array, " layers"]:
    """Σλ / λ_max; 0 where there is no spectrum."""
    logs = spectra.log_eigenvalues
    is_zero = logs[:, -1:] == -jnp.inf
    counted = spectra.is_eigenvalue() & ~is_zero
    relative = logs - jnp.where(is_zero, 0, logs[:, -1:])
    return jnp.where(counted, jnp.exp(relative), 0).sum(axis=-1)


def _log_first(law: PowerLaw, spectra: Spectra) -> Float[Array, " layers"]:
    """Return the smallest eigenvalue of each tail."""
    logs = spectra.log_eigenvalues
    width = logs.shape[-1]
    first = jnp.clip(width - law.tail_size, 0, width - 1)[:, None]
    return jnp.take_along_axis(logs, first, axis=-1)[:, 0]


def _is_fitted(
    law: PowerLaw,
    spectra: Spectra | WeightedSpectra,
    log_top: Float[Array, " layers"],
    log_first: Float[Array, " layers"],
    absolute: bool,
) -> Bool[Array, " layers"]:
    """Return whether each fit can be trusted; False for whatever is NaN."""
    # An absolute xmin can leave the range of the dtype: then its tail tells.
    in_range = (law.xmin > 0) & (law.xmin < jnp.inf)
    log_xmin = jnp.log(jnp.where(in_range, law.xmin, 1))
    log_xmin = log_xmin - (spectra.log_unit() if absolute else 0)
    log_xmin = jnp.where(in_range, log_xmin, log_first)
    return (
        spectra.finite
        & (log_top > -jnp.inf)
        & (law.alpha > 0)
        & (law.alpha <= MAX_ALPHA)
        & (log_xmin > log_top + spectra.log_noise)
    )
