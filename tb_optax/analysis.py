"""The analysis: from parameters to spectral metrics and multipliers of the layers."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float

from tb_optax.assignment import Assign, layer_of_leaf, linear
from tb_optax.checks import check_int, check_number
from tb_optax.devices import mesh_of, on_mesh, placed
from tb_optax.find import find_layers
from tb_optax.lanczos import Spectrum, exact, quadrature
from tb_optax.layers import Layer, expand_stacks
from tb_optax.leaves import Leaf, leaves_of, shapes_of
from tb_optax.pipeline import (
    Metric,
    Options,
    assigned_table,
    layer_spectra,
    layer_table,
)
from tb_optax.power_law import Fit, fit_median
from tb_optax.spectrum import SINGULAR_VALUES
from tb_optax.table import METRICS, Analysis


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
        layers, kernels = self.resolve(params)
        self.warn_if_ineffective(layers, kernels)
        kernels = placed(kernels, self.mesh)
        return _analyze(kernels, layers, self.options, mesh_of(kernels, self.mesh))

    def resolve(self, params: Any) -> tuple[tuple[Layer, ...], dict[str, Any]]:
        """The layers in `params`, stacks expanded, and their kernels by path.

        Raises:
            ValueError: if there is none, or one does not fit the parameters.
        """
        leaves = leaves_of(params)
        layers = find_layers(params) if self.layers is None else self.layers
        spectrum = self.options.spectrum
        layers = _checked_layers(layers, leaves, self.max_dim, spectrum.above)
        layer_of_leaf(layers, shapes_of(leaves))
        return layers, {layer.path: leaves[layer.path].value for layer in layers}

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
    r"""A spectral analysis: a pure jitted function from parameters to `Analysis`.

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
    """Empirical spectral densities: all eigenvalues of each layer.

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
