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
    eigenvalue_counts,
    estimated_table,
    exact_table,
    is_large,
    layer_matrices,
    sizes_of,
    smoothed_alpha,
)
from tb_optax.lanczos import Spectrum, estimate_key, estimate_one_of, exact
from tb_optax.layers import Layer, MatrixAxes
from tb_optax.leaves import computing_dtype
from tb_optax.submatrices import Windows, cut_of


def piece_starts(
    layers: Sequence[Layer],
    shapes: Mapping[str, Any],
    pieces: int,
    spectrum: Spectrum = exact(),
    cut: Windows = None,
):
    """Cut the layers into runs of about equal cost.

    The cost of a layer is that of its Gram matrices and their tridiagonal forms,
    pooled·n²·(m + 4/3 n), or that of the products of `quadrature`,
    pooled·2·steps·probes·n·m. A layer larger than its share is a piece of its own.

    Args:
        layers: layers, stacks expanded.
        shapes: shape of every kernel by path.
        pieces: how many runs, some of them empty where there are fewer layers.
        spectrum: how the layers are read.
        cut: windows that they are cut into.

    Returns:
        int32 array (pieces + 1,): piece p is layers[starts[p]:starts[p + 1]].

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
    """Compute one piece of a refresh: alphas of its layers, and at its end multipliers.

    Layers are analyzed one by one. Those whose matrices agree in shape and dtype share
    one compiled analysis, whatever their number; large ones share a recurrence.

    Args:
        kernels: kernels by path, as they are at this step.
        piece: which piece, 0..pieces - 1.
        multipliers: those in force.
        alpha: exponents; those of earlier pieces belong to this refresh.
        weight: of the past in an exponential average of alpha; None replaces it.
        layers: layers, stacks expanded.
        options: what to compute; its metric is alpha.
        pieces: steps of a whole refresh.

    Returns:
        Multipliers, new ones from all alphas after the last piece; alphas.
    """
    matrices = [functools.partial(layer_matrices, kernels, layer) for layer in layers]
    kinds = _kinds(kernels, layers, options)
    kind_of, place_of = np.zeros((2, len(layers)), np.int32)
    for number, members in enumerate(kinds.values()):
        kind_of[members], place_of[members] = number, np.arange(len(members))

    def alpha_of(pooled, members, place):
        own = jax.lax.switch(place, [matrices[i] for i in members])
        axes = MatrixAxes((1,), (2,), **{"pooled" if pooled else "stacked": (0,)})
        alone = (Layer("", axes, index=() if pooled else (0,)),)
        return exact_table({"": own}, alone, options).alpha[0].astype(alpha.dtype)

    def alpha_of_large(members, place):
        own = tuple(layers[i] for i in members)
        method: Any = options.spectrum
        spectra = estimate_one_of(kernels, own, place, options.conv_norm, method)
        return estimated_table(spectra, own[:1], options).alpha[0].astype(alpha.dtype)

    analyses = []
    for members in kinds.values():
        like = layers[members[0]]
        if is_large(like, kernels[like.path].shape, options):
            analysis = functools.partial(alpha_of_large, members)
        else:
            analysis = functools.partial(alpha_of, bool(like.axes.pooled), members)
        analyses.append(analysis)

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
        counts = jnp.asarray(eigenvalue_counts(layers, shapes, options))
        scores = alpha.astype(computing_dtype(*kernels.values()))
        rows = tuple(zip(layers, sizes_of(layers, shapes), strict=True))
        found, _ = assign_multipliers(scores, alpha > 0, counts, options, rows)
        return found.astype(multipliers.dtype)

    return jax.lax.cond(piece == pieces - 1, assign, lambda: multipliers), alpha


def _kinds(kernels, layers: Sequence[Layer], options: Options) -> dict[Any, list[int]]:
    """Group the layers that share one compiled analysis."""
    kinds: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        if is_large(layer, kernels[layer.path].shape, options):
            key = estimate_key(kernels, layer)
        else:
            own = jax.eval_shape(functools.partial(layer_matrices, kernels, layer))
            key = (own.shape, own.dtype, bool(layer.axes.pooled))
        kinds.setdefault(key, []).append(i)
    return kinds
