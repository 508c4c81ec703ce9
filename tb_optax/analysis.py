"""The analysis: from parameters to spectral metrics and multipliers of the layers.

params -> layers -> spectra -> power laws -> metrics -> multipliers
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

from tb_optax.checks import check_function, check_int, check_number
from tb_optax.find import find_layers
from tb_optax.lanczos import Spectrum, exact, quadrature, quadrature_spectra
from tb_optax.layers import Layer, expand_stacks, layer_of_leaf
from tb_optax.leaves import Leaf, is_array, leaves_of, path_of, shapes_of
from tb_optax.maps import Assign, Groups, Rows, apply_map, grouped, linear
from tb_optax.marchenko_pastur import random_alpha
from tb_optax.power_law import Fit, PowerLaw, fit_median
from tb_optax.sharding import mesh_of, on_mesh, placed
from tb_optax.spectrum import (
    GRAM,
    SINGULAR_VALUES,
    Route,
    Spectra,
    entropies,
    layer_spectra,
)
from tb_optax.submatrices import Cut, Windows, cut_of, windows

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
        alpha_error: (alpha - 1) / sqrt(tail_size), the standard error for independent
            eigenvalues; 0 where not fitted. It is an upper bound: those of a matrix
            repel each other, and at initialization alpha scatters 3 to 20 times less.
        random_alpha: what the fit finds in an untrained matrix of this shape, with
            independent entries; 0 with another fit than `fit_median`.
        alpha_hat: alpha·log10 λ_max.
        ks_distance: Kolmogorov-Smirnov distance of the fit; 0 where not fitted.
        xmin: smallest λ of the tail; 0 where not fitted.
        tail_size: number of λ in the tail; 0 where not fitted.
        eigenvalue_count: N, before any floor.
        spectral_norm: σ_max = sqrt(λ_max). (The published code's is λ_max.)
        frobenius_norm: sqrt(Σλ). (The published code's `norm` is Σλ.)
        stable_rank: Σλ / λ_max; 0 for a zero or non-finite kernel.
        effective_rank: exp(-Σ p ln p) with p = σ / Σσ; 0 as above.
        entropy: -Σ p ln p / ln(r + 6e-5) with p = λ / Σλ + 6e-5 and r the number of
            σ > 6e-5·σ_max, near 1 where all λ are equal; 0 as above. (In the published
            code of AlphaDecay r counts σ > 6e-5, so that it depends on the scale.)
        multipliers: factor on the updates of the layer; 1 where not tuned.
        fitted: whether the fit can be trusted: finite kernel, not all zero, alpha
            finite and at most 1e4, xmin above the rounding noise.
        tuned: fitted, enough eigenvalues, and inside the domain of the map.
    """

    layers: tuple[Layer, ...] = dataclasses.field(metadata={"static": True})
    alpha: Float[Array, " layers"]
    alpha_error: Float[Array, " layers"]
    random_alpha: Float[Array, " layers"]
    alpha_hat: Float[Array, " layers"]
    ks_distance: Float[Array, " layers"]
    xmin: Float[Array, " layers"]
    tail_size: Int[Array, " layers"]
    eigenvalue_count: Int[Array, " layers"]
    spectral_norm: Float[Array, " layers"]
    frobenius_norm: Float[Array, " layers"]
    stable_rank: Float[Array, " layers"]
    effective_rank: Float[Array, " layers"]
    entropy: Float[Array, " layers"]
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
    """Return the multipliers of the leaves that have an owner, by path."""
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
    windows: Windows = None
    groups: Groups | None = None


class Resolved(NamedTuple):
    """The layers of an analysis in given parameters.

    Attributes:
        layers: stacks expanded, one per multiplier.
        kernels: by path; or the parameters, where a function makes them of these.
        owners: which layer each part of each leaf belongs to; see `layer_of_leaf`.
    """

    layers: tuple[Layer, ...]
    kernels: Any
    owners: dict[str, Int[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class LayerAnalysis:
    """A spectral analysis; `layer_analysis` makes one."""

    layers: tuple[Layer, ...] | None
    options: Options
    max_dim: int
    mesh: Mesh | AbstractMesh | None = None
    kernels: Callable[[Any], Any] | None = None
    _warned: set[str] = dataclasses.field(
        default_factory=set, init=False, repr=False, compare=False
    )

    def __call__(self, params: Any) -> Analysis:
        """Analyze the layers of `params`."""
        layers, kernels, _ = self.resolve(params)
        self.warn_if_ineffective(layers, kernels)
        return self.run(layers, kernels)

    def run(
        self, layers: tuple[Layer, ...], kernels: Any, past: Any = None
    ) -> Analysis:
        """Analyze what `resolve` returns.

        `past` holds earlier alphas and their weight in an exponential average.
        """
        kernels = placed(self.kernels_of(layers, kernels), self.mesh)
        mesh = mesh_of(kernels, self.mesh)
        return _analyze(kernels, layers, self.options, mesh, past)

    def kernels_of(self, layers: Sequence[Layer], kernels: Any) -> dict[str, Any]:
        """Return the kernels by path, from what `resolve` returns."""
        if self.kernels is None:
            return kernels
        leaves = leaves_of(self.kernels(kernels))
        return {layer.path: leaves[layer.path].value for layer in layers}

    def resolve(self, params: Any, *, may_be_none: bool = False) -> Resolved:
        """Find the layers in `params`, stacks expanded, their kernels and leaves.

        Args:
            params: the parameters.
            may_be_none: return no layers, instead of raising, where none were given
                and none are found.

        Raises:
            ValueError: if there is none, or one does not fit the parameters.
        """
        own = leaves_of(params)
        tree, leaves = params, own
        if self.kernels is not None:
            params = jax.tree.map(lambda x: x if is_array(x) else None, params)
            tree = jax.eval_shape(self.kernels, params)
            leaves = leaves_of(tree)
        layers = find_layers(tree) if self.layers is None else self.layers
        if may_be_none and self.layers is None and not layers:
            return Resolved((), {}, {})
        layers = _checked_layers(layers, leaves)
        for layer in layers:
            _check_side(layer, leaves[layer.path].shape, self.max_dim, self.options)
        owners = layer_of_leaf(layers, shapes_of(leaves) | shapes_of(own))
        owners = {path: owner for path, owner in owners.items() if path in own}
        if self.kernels is None:
            params = {layer.path: own[layer.path].value for layer in layers}
        return Resolved(layers, params, owners)

    def warn_if_ineffective(self, layers: Sequence[Layer], kernels: Any) -> None:
        """Warn, once per analysis, if the sizes of the layers leave nothing to tune."""
        if self.kernels is not None and layers:
            kernels = jax.eval_shape(
                lambda tree: self.kernels_of(layers, tree), kernels
            )
        message = _ineffective(layers, kernels, self.options)
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
    windows: Windows = None,
    groups: Groups | None = None,
    kernels: Callable[[Any], Any] | None = None,
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
        assign: `linear(...)`, `sqrt()`, `log2()`, `step(...)`, `sigmoid(...)`,
            `standard_sigmoid(...)`, `mean_one(...)`, `nested(...)` or a function
            `(metric, tuned) -> multipliers`; with the attribute `needs_layers = True`
            it gets a third argument, one (Layer, number of weights) per layer.
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
            spectra of large ones from products with vectors. It needs a fit with a
            method `fit_weighted`, as `fit_median` has, and goes neither with
            `eigenvalue_floor`, with `windows`, nor with the metric `ks_distance`.
        windows: `windows(...)` takes the spectra of submatrices of one aspect ratio;
            None those of whole kernels.
        groups: a function from `Layer` to the name of a group, such as `by_block`:
            the map acts on the means of the metric over the tuned layers of each group,
            and all of them get its multiplier. Layers of the name None stay at 1.
        kernels: a pure function from the parameters to the tree that is analyzed, such
            as W + B·A or W - W_0. The paths of layers are paths in that tree, while
            `follows` names leaves of the parameters; the leaf of a layer's own path is
            scaled if the parameters have it.

    Returns:
        `analyze(params) -> Analysis`, which can be called inside `jit` too;
        `jax.eval_shape(analyze, params).layers` gives its layers without work.

    Raises:
        ValueError: if an option is out of range or does not go with `spectrum`; when
            called, if a layer or a follower is not in the parameters or does not fit
            them, or if a kernel differs along an axis of a `shard_map` around the call.

    Warns:
        UserWarning: once per analysis, when it is first traced, if no layer or only
            one has `min_eigenvalues`, so that every multiplier stays 1, or if a
            transform with `layers=None` finds no layer, and passes updates unchanged.

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
    layers = None if layers is None else tuple(layers)
    for layer in layers or ():
        if not isinstance(layer, Layer):
            msg = f"layers must hold Layer objects, got {layer!r}."
            raise ValueError(msg)
    if not isinstance(metric, str):
        check_function("metric", metric)
    elif metric not in METRICS:
        msg = f"metric must be one of {', '.join(METRICS)}, got {metric!r}."
        raise ValueError(msg)
    check_function("fit", fit)
    check_function("assign", assign)
    check_int("min_eigenvalues", min_eigenvalues, at_least=0)
    check_int("max_dim", max_dim, at_least=1)
    check_number("conv_norm", conv_norm, above=0)
    if eigenvalue_floor is not None:
        check_number("eigenvalue_floor", eigenvalue_floor, above=0)
    for name, function in (("groups", groups), ("kernels", kernels)):
        if function is not None:
            check_function(name, function, kind="a function or None")
    options = Options(
        fit,
        metric,
        assign,
        min_eigenvalues,
        eigenvalue_floor,
        conv_norm,
        spectrum,
        windows,
        groups,
    )
    _check_together(options)
    return LayerAnalysis(layers, options, max_dim, mesh, kernels)


def relative_alpha(analysis: Analysis) -> Float[Array, " layers"]:
    """Return alpha / random_alpha, a metric without the bias of the aspect ratio.

    Args:
        analysis: the table.

    Returns:
        1 for an untrained matrix of any shape, up to about 1.5/n for a smaller side of
        n, and 0 for what is not fitted.

    Raises:
        ValueError: if the table has no `random_alpha`: that needs `fit_median`.

    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 256))}
    >>> table = layer_analysis(min_eigenvalues=0, metric=relative_alpha)
    >>> with warnings.catch_warnings(action="ignore"):  # One layer alone stays at 1.
    ...     print(relative_alpha(table(params)).round(1))
    [1.]
    """
    random = analysis.random_alpha
    if not isinstance(random, jax.core.Tracer):
        _check_random("random_alpha", random, bool(np.any(np.asarray(random) > 0)))
    known = random > 0
    return jnp.where(known, analysis.alpha / jnp.where(known, random, 1), 0)


def _check_random(name: str, value: Any, known: bool) -> None:
    if not known:
        msg = (
            f"relative_alpha needs fit_median(...), for which alone the exponent of a "
            f"random matrix is known, got {name} = {value}; pass metric='alpha', or "
            f"fit=fit_median()."
        )
        raise ValueError(msg)


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


def _check_together(options: Options) -> None:
    """Raise ValueError unless the options go with the spectrum and the metric."""
    fit, cut, spectrum = options.fit, options.windows, options.spectrum
    if options.metric is relative_alpha:
        _check_random("fit", fit, isinstance(fit, fit_median))
    if cut is not None and not isinstance(cut, windows):
        msg = f"windows must be windows(...) or None, got {cut!r}."
        raise ValueError(msg)
    if not isinstance(spectrum, exact | quadrature):
        msg = f"spectrum must be exact() or quadrature(...), got {spectrum!r}."
        raise ValueError(msg)
    if isinstance(spectrum, exact):
        return
    if cut is not None:
        msg = (
            f"windows = {cut} cut kernels into small matrices, which spectrum = "
            f"{spectrum} does not read; pass spectrum=exact()."
        )
        raise ValueError(msg)
    takes_weights = callable(getattr(fit, "fit_weighted", None))
    if not takes_weights or getattr(fit, "absolute", False):
        name, remedy = "fit", "pass fit_median(...)"
    elif options.metric == "ks_distance":
        name, remedy = "metric", "pass another metric, such as 'alpha'"
    elif options.eigenvalue_floor is not None:
        name, remedy = "eigenvalue_floor", "leave it out"
    else:
        return
    msg = (
        f"{name} = {getattr(options, name)!r} needs single eigenvalues, but spectrum = "
        f"{spectrum} estimates their density; {remedy}, or spectrum=exact()."
    )
    raise ValueError(msg)


def _checked_layers(
    layers: Sequence[Layer], leaves: Mapping[str, Leaf]
) -> tuple[Layer, ...]:
    """Expand stacks, and check that there is a layer and that kernels hold numbers."""
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
    return layers


def _check_side(layer: Layer, shape, max_dim: int, options: Options) -> None:
    """Raise ValueError if matrices are too large to be decomposed."""
    side = min(cut_of(layer, shape, options.windows).shape)
    if max_dim < side <= options.spectrum.above:
        msg = (
            f"layer {layer.name!r} needs the eigenvalues of a {side} x {side} matrix, "
            f"above max_dim = {max_dim}; estimate them by spectrum=quadrature(), leave "
            f"it out of `layers`, raise max_dim, or split it into parts "
            f"(`Layer.part`)."
        )
        raise ValueError(msg)


def _ineffective(
    layers: Sequence[Layer], kernels: Mapping[str, Any], options: Options
) -> str | None:
    """Say why no multiplier can differ from 1; None if at least two layers can."""
    if not layers:
        return (
            "no layer to balance: the parameters hold no kernel that the rules of "
            "find_layers know, so TempBalance changes nothing. Name the layers: pass "
            "layer_analysis(layers) with layers = find_layers(params, axes=...) or "
            "trace_layers(...)."
        )
    cuts, least = cuts_of(layers, kernels, options.windows), options.min_eigenvalues
    counts = [cut.eigenvalue_count for cut in cuts]
    tunable = [i for i, count in enumerate(counts) if count >= least]
    if len(tunable) > 1:
        return None
    fewest, *more = sorted(counts)
    remedy = f"Pass layer_analysis(..., min_eigenvalues={fewest}) to tune every layer."
    if not tunable:
        between = " to ".join(map(str, sorted({fewest, max(counts)})))
        have = f"all {len(layers)} have" if more else "the only one has"
        return (
            f"no layer reaches min_eigenvalues = {least}: {have} {between} "
            f"eigenvalues, so every multiplier stays 1 and TempBalance changes "
            f"nothing. {remedy}"
        )
    if more:
        others = f"the other {len(more)} have at most {sorted(counts)[-2]}"
    else:
        others, remedy = "there is no other layer", "Give the analysis more layers."
    name, count = layers[tunable[0]].name, counts[tunable[0]]
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
    past: Any = None,
) -> Analysis:
    def analyze(kernels, past):
        table = layer_table(kernels, layers, options)
        if past is not None:
            alpha = smoothed_alpha(table.alpha, *past)
            table = dataclasses.replace(table, alpha=alpha)
        return assigned_table(table, options, sizes_of(layers, kernels))

    return on_mesh(mesh, analyze, kernels, past)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _eigenvalues(kernels, layers: tuple[Layer, ...], conv_norm, mesh):
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
    exactly = [i for i, is_one in enumerate(large) if not is_one]
    estimated = [i for i, is_one in enumerate(large) if is_one]
    parts = []
    if exactly:
        parts.append(exact_columns(kernels, [layers[i] for i in exactly], options))
    if estimated:
        own = [layers[i] for i in estimated]
        method: Any = options.spectrum
        spectra = quadrature_spectra(kernels, own, options.conv_norm, method)
        parts.append(measured(spectra, options))
    columns = parts[0]
    if len(parts) > 1:
        place = np.argsort(exactly + estimated)
        columns = jax.tree.map(lambda *own: jnp.concatenate(own)[place], *parts)
    random: Any = 0.0
    if isinstance(options.fit, fit_median):
        random = [
            random_alpha(*sorted(cut.shape), cut.matrices * min(cut.shape), options.fit)
            for cut in cuts_of(layers, kernels, options.windows)
        ]
    return untuned_table(layers, columns, random)


def untuned_table(
    layers: tuple[Layer, ...], columns: Mapping[str, Any], random_alpha: Any = 0.0
) -> Analysis:
    """Make the table from what the spectra tell; every multiplier is 1."""
    alpha = columns["alpha"]
    size = jnp.maximum(columns["tail_size"], 1).astype(alpha.dtype)
    random_alpha = jnp.asarray(random_alpha, alpha.dtype)
    return Analysis(
        layers=layers,
        **columns,
        alpha_error=jnp.where(alpha > 0, (alpha - 1) / jnp.sqrt(size), 0),
        random_alpha=jnp.broadcast_to(random_alpha, alpha.shape),
        multipliers=jnp.ones_like(alpha),
        tuned=jnp.zeros_like(columns["fitted"]),
    )


def is_large(layer: Layer, shape: tuple[int, ...], options: Options) -> bool:
    """Return whether a layer's spectrum is estimated from products alone."""
    return min(layer.matrix_shape(shape)) > options.spectrum.above


def exact_columns(
    kernels: Mapping[str, Any], layers: Sequence[Layer], options: Options
) -> dict[str, Any]:
    """Return what the spectra of layers tell whose matrices are decomposed."""
    cut, route = options.windows, route_of(options)
    spectra = layer_spectra(kernels, layers, options.conv_norm, route, cut)
    blocks = [own.blocks for own in cuts_of(layers, kernels, cut)]
    layer_of_row = np.repeat(np.arange(len(layers)), blocks)
    return _averaged(measured(spectra, options), layer_of_row, len(layers))


def _averaged(
    columns: dict[str, Any], layer_of_row: Int[np.ndarray, " rows"], layers: int
) -> dict[str, Any]:
    """Average columns with one row per block over the blocks of each layer.

    What a fit has found is averaged over the blocks that could be fitted; counts are
    sums; norms are averaged as λ, in units of their largest, so that nothing overflows.
    """
    if layers == len(layer_of_row):
        return columns
    fitted, segments = columns["fitted"], jnp.asarray(layer_of_row)

    def total(column):
        return jax.ops.segment_sum(column, segments, layers)

    def mean(column):
        return total(column) / jnp.asarray(np.bincount(layer_of_row), column.dtype)

    fits = total(fitted.astype(jnp.int32))

    def mean_of_fits(column):
        number = jnp.maximum(fits, 1).astype(column.dtype)
        return total(jnp.where(fitted, column, 0)) / number

    def mean_square(column):
        top = jax.ops.segment_max(column, segments, layers)
        unit = jnp.where(top > 0, top, 1)
        return unit * jnp.sqrt(mean((column / unit[layer_of_row]) ** 2))

    ways = {
        mean_of_fits: ("alpha", "alpha_hat", "ks_distance", "xmin"),
        mean: ("stable_rank", "effective_rank", "entropy"),
        mean_square: ("spectral_norm", "frobenius_norm"),
        total: ("tail_size", "eigenvalue_count"),
    }
    means = {name: way(columns[name]) for way, names in ways.items() for name in names}
    return means | {"fitted": fits > 0}


def cuts_of(
    layers: Sequence[Layer], kernels: Mapping[str, Any], cut: Windows
) -> list[Cut]:
    """Return the geometry of the matrices of each layer."""
    return [cut_of(layer, kernels[layer.path].shape, cut) for layer in layers]


def sizes_of(layers: Sequence[Layer], kernels: Mapping[str, Any]) -> list[int]:
    """Return the number of weights of each layer."""
    cuts = cuts_of(layers, kernels, None)
    return [cut.matrices * math.prod(cut.shape) for cut in cuts]


def smoothed_alpha(
    alpha: Float[Array, "..."], past: Float[Array, "..."], weight: Float[Array, ""]
) -> Float[Array, "..."]:
    """Average new alphas with those of the past; what was or is not fitted is new."""
    past, weight = past.astype(alpha.dtype), weight.astype(alpha.dtype)
    mean = weight * past + (1 - weight) * alpha
    return jnp.where((past > 0) & (alpha > 0), mean, alpha)


def route_of(options: Options) -> Route:
    """Choose singular values where small eigenvalues decide, else Gram matrices.

    They decide in a fit of the whole spectrum, above a floor, for entropies, and for
    `ks_distance`, a small difference whose error near xmin no later step averages out.
    """
    whole = getattr(options.fit, "whole_spectrum", False)
    exacting = options.metric in ("ks_distance", "entropy", "effective_rank")
    precise = whole or options.eigenvalue_floor or exacting
    return SINGULAR_VALUES if precise else GRAM


def measured(spectra: Spectra, options: Options) -> dict[str, Any]:
    """Fit each row, and return the columns of the table that its spectrum tells.

    What is not fitted has alpha 0 and no tail.
    """
    absolute = getattr(options.fit, "absolute", False)
    with jax.named_scope("fit"):
        law = _fit(spectra, options)
        for name, column in zip(PowerLaw._fields, law, strict=True):
            _check_shape(f"fit ({name})", column, (len(spectra.count),))
    dtype = law.alpha.dtype
    fitted = _is_fitted(law, spectra, absolute)
    is_zero = spectra.log_top == -jnp.inf
    log_top = jnp.where(is_zero, 0, spectra.log_top)
    sigma = jnp.where(is_zero, 0, jnp.exp(log_top / 2)) * jnp.sqrt(spectra.factor)
    frobenius = sigma * jnp.sqrt(spectra.stable_rank)
    alpha = jnp.where(fitted, law.alpha, 0).astype(dtype)
    xmin = law.xmin if absolute else spectra.absolute(law.xmin)
    entropy, effective_rank = entropies(spectra)
    return {
        "alpha": alpha,
        "alpha_hat": alpha * (log_top + spectra.log_unit()) / math.log(10),
        "ks_distance": jnp.where(fitted, law.ks_distance, 0).astype(dtype),
        "xmin": jnp.where(fitted, xmin, 0).astype(dtype),
        "tail_size": jnp.where(fitted, law.tail_size, 0).astype(jnp.int32),
        "eigenvalue_count": jnp.asarray(spectra.count),
        "spectral_norm": jnp.ldexp(sigma, spectra.exponent),
        "frobenius_norm": jnp.ldexp(frobenius, spectra.exponent),
        "stable_rank": spectra.stable_rank,
        "effective_rank": effective_rank.astype(dtype),
        "entropy": entropy.astype(dtype),
        "fitted": fitted,
    }


def _fit(spectra: Spectra, options: Options) -> PowerLaw:
    """Fit the eigenvalues above the floor, or the nodes of an estimate."""
    fit: Any = options.fit
    logs, kept = spectra.log_eigenvalues, spectra.weights
    if logs.ndim == 3:
        return fit.fit_weighted(logs, kept, spectra.count)
    log_unit = spectra.log_unit()[:, None]
    if options.eigenvalue_floor is not None:
        above = kept & (logs + log_unit > math.log(options.eigenvalue_floor))
        kept = jnp.where(above.any(axis=-1, keepdims=True), above, kept)
    return fit(logs + log_unit if getattr(fit, "absolute", False) else logs, kept)


def _is_fitted(
    law: PowerLaw, spectra: Spectra, absolute: bool
) -> Bool[Array, " layers"]:
    """Return whether each fit can be trusted; False for whatever is NaN."""
    in_range = (law.xmin > 0) & (law.xmin < jnp.inf)
    log_xmin = jnp.log(jnp.where(in_range, law.xmin, 1))
    log_first = -jnp.inf
    if absolute:
        # Such an xmin can leave the range of the dtype: then the tail tells.
        log_xmin = log_xmin - spectra.log_unit()
        logs = spectra.log_eigenvalues
        width = logs.shape[-1]
        first = jnp.clip(width - law.tail_size, 0, width - 1)[:, None]
        log_first = jnp.take_along_axis(logs, first, axis=-1)[:, 0]
    log_xmin = jnp.where(in_range, log_xmin, log_first)
    return (
        spectra.finite
        & (spectra.log_top > -jnp.inf)
        & (law.alpha > 0)
        & (law.alpha <= MAX_ALPHA)
        & (log_xmin > spectra.log_top + spectra.log_noise)
    )


def assigned_table(
    table: Analysis, options: Options, sizes: Sequence[int] = ()
) -> Analysis:
    """Fill in the multipliers that the map gives to the metric.

    The sizes are numbers of weights, for maps that need layers.
    """
    metric = options.metric
    scores = getattr(table, metric) if isinstance(metric, str) else metric(table)
    _check_shape("metric", scores, table.alpha.shape)
    rows = tuple(zip(table.layers, sizes, strict=False))
    scores = scores.astype(table.alpha.dtype)
    multipliers, tuned = assign_multipliers(
        scores, table.fitted, table.eigenvalue_count, options, rows
    )
    return dataclasses.replace(table, multipliers=multipliers, tuned=tuned)


def assign_multipliers(
    scores: Float[Array, " layers"],
    fitted: Bool[Array, " layers"],
    eigenvalue_count: Int[Array, " layers"],
    options: Options,
    rows: Rows,
) -> tuple[Float[Array, " layers"], Bool[Array, " layers"]]:
    """Compute multipliers, and which layers are tuned: the others have 1."""
    groups = options.groups
    tuned = fitted & (eigenvalue_count >= options.min_eigenvalues)
    tuned = tuned & jnp.isfinite(scores)
    if groups is not None and not getattr(options.assign, "ungrouped", False):
        tuned &= np.asarray([groups(layer) is not None for layer, _ in rows])
    assign = grouped(options.assign, groups)
    with jax.named_scope("assign"):
        multipliers = apply_map(assign, jnp.where(tuned, scores, 1), tuned, rows)
    _check_shape("assign", multipliers, scores.shape)
    tuned = tuned & jnp.isfinite(multipliers)
    return jnp.where(tuned, multipliers, 1).astype(scores.dtype), tuned


def _check_shape(name: str, column, shape: tuple[int, ...]) -> None:
    if jnp.shape(column) != shape:
        msg = (
            f"{name} must return shape {shape}, one per layer, got {jnp.shape(column)}."
        )
        raise ValueError(msg)
