"""From kernels to the table of an analysis: spectra, fits, metrics, multipliers."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tb_optax.assignment import Assign
from tb_optax.lanczos import Spectrum, WeightedSpectra, exact, quadrature_spectra
from tb_optax.layers import Layer, MatrixAxes
from tb_optax.metrics import metrics_table
from tb_optax.power_law import Fit, PowerLaw
from tb_optax.spectrum import (
    GRAM,
    SINGULAR_VALUES,
    Route,
    Spectra,
    as_matrices,
    compute_spectra,
)
from tb_optax.table import COLUMNS, Analysis

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


def layer_table(
    kernels: Mapping[str, Any], layers: tuple[Layer, ...], options: Options
) -> Analysis:
    """The table of the layers, before any multiplier is assigned.

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
    """Whether the spectrum of a layer is estimated from products alone."""
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
    """As `fitted_table`, from weighted nodes."""
    fit: Any = options.fit
    with jax.named_scope("fit"):
        law = fit.fit_weighted(spectra.log_nodes, spectra.weights, spectra.count)
        for name, column in zip(PowerLaw._fields, law, strict=True):
            _check_shape(f"fit ({name})", column, (len(layers),))
    return metrics_table(layers, spectra, law, absolute=False)


def route_of(options: Options) -> Route:
    """Singular values where small eigenvalues decide, else Gram matrices.

    They decide in a fit of the whole spectrum, behind a floor, and for `ks_distance`,
    a small difference whose error near xmin no later step averages out.
    """
    whole = getattr(options.fit, "whole_spectrum", False)
    precise = whole or options.eigenvalue_floor or options.metric == "ks_distance"
    return SINGULAR_VALUES if precise else GRAM


def fitted_table(
    spectra: Spectra, layers: tuple[Layer, ...], options: Options
) -> Analysis:
    """The table of the layers, before any multiplier is assigned."""
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
    """The table with the multipliers that the map gives to its metric."""
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
    """Multipliers, and which layers are tuned: the others have 1."""
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
    """The matrices of one layer."""
    kernel = _part_of(kernels[layer.path], layer.part)
    stack = as_matrices(kernel, layer.axes)
    return stack[_slices(kernel, layer.axes)[layer.index]]


def layer_spectra(
    kernels: Mapping[str, Any],
    layers: Sequence[Layer],
    conv_norm: int | float,
    route: Route,
) -> Spectra:
    """Spectra of the layers, those of one kernel read as one stack."""
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
    """Number of each slice of the stacked axes, by index."""
    sizes = [kernel.shape[axis] for axis in axes.stacked]
    return np.arange(math.prod(sizes)).reshape(sizes)


def _check_shape(name: str, column, shape: tuple[int, ...]) -> None:
    if jnp.shape(column) != shape:
        msg = (
            f"{name} must return shape {shape}, one per layer, got {jnp.shape(column)}."
        )
        raise ValueError(msg)
