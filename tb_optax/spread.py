"""A refresh cut into pieces, one per step, so that no step is slow."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tb_optax.analysis import (
    Options,
    assign_multipliers,
    cuts_of,
    exact_columns,
    is_large,
    measured,
    sizes_of,
    smoothed_alpha,
)
from tb_optax.lanczos import Spectrum, estimate_key, estimate_one_of, exact
from tb_optax.layers import Layer, MatrixAxes
from tb_optax.leaves import computing_dtype
from tb_optax.spectrum import layer_matrices
from tb_optax.submatrices import Windows, cut_of


def piece_starts(
    layers: Sequence[Layer],
    shapes: Mapping[str, Any],
    pieces: int,
    spectrum: Spectrum = exact(),
    cut: Windows = None,
) -> Int[np.ndarray, " starts"]:
    """Cut the layers into runs of about equal cost, and return where each starts.

    Piece p is layers[starts[p]:starts[p + 1]]. The cost of a layer is that of its Gram
    matrices and their tridiagonal forms, or that of the products of `quadrature`. A
    layer larger than its share is a piece of its own; some pieces are empty where
    there are fewer layers.

    >>> dense = MatrixAxes((0,), (1,))
    >>> layers = [Layer(name, dense) for name in "abcd"]
    >>> piece_starts(layers, {name: (64, 64) for name in "abcd"}, 2).tolist()
    [0, 2, 4]
    """
    costs = []
    for layer in layers:
        own = cut_of(layer, shapes[layer.path], cut)
        costs.append(own.blocks * own.matrices * spectrum.cost(*sorted(own.shape)))
    middles = np.cumsum(costs) - np.asarray(costs) / 2
    piece_of_layer = (middles / np.sum(costs) * pieces).astype(int)
    return np.searchsorted(piece_of_layer, np.arange(pieces + 1)).astype(np.int32)


def spread_refresh(
    kernels: Mapping[str, Any],
    piece: Int[Array, ""],
    multipliers: Float[Array, " layers"],
    alpha: Float[Array, " layers"],
    weight: Any = None,
    *,
    layers: tuple[Layer, ...],
    options: Options,
    pieces: int,
) -> tuple[Float[Array, " layers"], Float[Array, " layers"]]:
    """Compute one of so many pieces of a refresh.

    Layers are analyzed one by one. Those whose matrices agree in shape and dtype share
    one compiled analysis, whatever their number; large ones share a recurrence. The
    weight is that of the past in an exponential average of alpha; None replaces it.

    Returns:
        Multipliers, new ones from all alphas after the last piece; alphas.
    """
    kinds = _kinds(kernels, layers, options)
    kind_of, place_of = np.zeros((2, len(layers)), np.int32)
    for number, members in enumerate(kinds.values()):
        kind_of[members], place_of[members] = number, np.arange(len(members))

    def alpha_of(members, place):
        own = [layers[i] for i in members]
        if is_large(own[0], kernels[own[0].path].shape, options):
            method: Any = options.spectrum
            spectra = estimate_one_of(kernels, own, place, options.conv_norm, method)
            columns = measured(spectra, options)
        else:
            matrices = [functools.partial(layer_matrices, kernels, x) for x in own]
            pooled = bool(own[0].axes.pooled)
            axes = MatrixAxes((1,), (2,), **{"pooled" if pooled else "stacked": (0,)})
            alone = Layer("", axes, index=() if pooled else (0,))
            chosen = jax.lax.switch(place, matrices)
            columns = exact_columns({"": chosen}, [alone], options)
        return columns["alpha"][0].astype(alpha.dtype)

    analyses = [functools.partial(alpha_of, members) for members in kinds.values()]

    def visit(i, alpha):
        kind, place = jnp.asarray(kind_of)[i], jnp.asarray(place_of)[i]
        found = jax.lax.switch(kind, analyses, place)
        if weight is not None:
            found = smoothed_alpha(found, alpha[i], weight)
        return alpha.at[i].set(found)

    shapes = {path: kernel.shape for path, kernel in kernels.items()}
    starts = piece_starts(layers, shapes, pieces, options.spectrum, options.windows)
    starts = jnp.asarray(starts)
    alpha = jax.lax.fori_loop(starts[piece], starts[piece + 1], visit, alpha)

    def assign():
        cuts = cuts_of(layers, kernels, options.windows)
        counts = jnp.asarray([cut.eigenvalue_count for cut in cuts])
        scores = alpha.astype(computing_dtype(*kernels.values()))
        rows = tuple(zip(layers, sizes_of(layers, kernels), strict=True))
        found, _ = assign_multipliers(scores, alpha > 0, counts, options, rows)
        return found.astype(multipliers.dtype)

    return jax.lax.cond(piece == pieces - 1, assign, lambda: multipliers), alpha


def _kinds(kernels, layers: Sequence[Layer], options: Options) -> dict[Any, list[int]]:
    """Group the layers that share one compiled analysis."""
    kinds: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        kernel = kernels[layer.path]
        if is_large(layer, kernel.shape, options):
            key = estimate_key(kernels, layer)
        else:
            cut = cut_of(layer, kernel.shape, None)
            key = (cut, kernel.dtype, bool(layer.axes.pooled))
        kinds.setdefault(key, []).append(i)
    return kinds
