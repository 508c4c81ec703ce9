"""A refresh cut into pieces, one per step, so that no step is slow."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tb_optax.lanczos import Spectrum, estimate_key, estimate_one_of, exact
from tb_optax.layers import Layer, MatrixAxes
from tb_optax.pipeline import (
    Options,
    assign_multipliers,
    estimated_table,
    fitted_table,
    is_large,
    layer_matrices,
    layer_spectra,
    route_of,
)


def piece_starts(
    layers: Sequence[Layer],
    shapes: Mapping[str, Any],
    pieces: int,
    spectrum: Spectrum = exact(),
):
    """Cuts the layers into runs of about equal cost.

    The cost of a layer is that of its Gram matrices and their tridiagonal forms,
    pooled·n²·(m + 4/3 n), or that of the products of `quadrature`,
    pooled·2·steps·probes·n·m. A layer larger than its share is a piece of its own.

    Args:
        layers: layers, stacks expanded.
        shapes: shape of every kernel by path.
        pieces: how many runs, some of them empty where there are fewer layers.
        spectrum: how the layers are read.

    Returns:
        int32 array (pieces + 1,): piece p is layers[starts[p]:starts[p + 1]].

    >>> dense = MatrixAxes((0,), (1,))
    >>> layers = [Layer(name, dense) for name in "abcd"]
    >>> piece_starts(layers, {name: (64, 64) for name in "abcd"}, 2).tolist()
    [0, 2, 4]
    """
    costs = []
    for layer in layers:
        rows, columns = layer.matrix_shape(shapes[layer.path])
        n, m = min(rows, columns), max(rows, columns)
        pooled = layer.eigenvalue_count(shapes[layer.path]) / n
        costs.append(pooled * spectrum.cost(n, m))
    middles = np.cumsum(costs) - np.asarray(costs) / 2
    piece_of_layer = (middles / np.sum(costs) * pieces).astype(int)
    return np.searchsorted(piece_of_layer, np.arange(pieces + 1)).astype(np.int32)


def spread_refresh(
    kernels: Mapping[str, Any],
    piece: Int[Array, ""],
    multipliers: Float[Array, " layers"],
    alpha: Float[Array, " layers"],
    *,
    layers: tuple[Layer, ...],
    options: Options,
    pieces: int,
) -> tuple[Float[Array, " layers"], Float[Array, " layers"]]:
    """One piece of a refresh: alphas of its layers, multipliers after the last.

    Args:
        kernels: kernels by path, as they are at this step.
        piece: which piece, 0..pieces - 1.
        multipliers: those in force.
        alpha: exponents, those of this refresh in the pieces before.
        layers: layers, stacks expanded.
        options: what to compute; its metric is alpha.
        pieces: steps of a whole refresh.

    Returns:
        Multipliers, new ones from all alphas after the last piece, and alphas.
    """
    shapes = {path: kernel.shape for path, kernel in kernels.items()}
    starts = jnp.asarray(piece_starts(layers, shapes, pieces, options.spectrum))
    alpha = _refresh_alphas(
        kernels, layers, options, alpha, starts[piece], starts[piece + 1]
    )

    def assign():
        counts = [layer.eigenvalue_count(shapes[layer.path]) for layer in layers]
        dtype = jnp.result_type(jnp.float32, *kernels.values())
        new, _ = assign_multipliers(
            alpha.astype(dtype), alpha > 0, jnp.asarray(counts), options
        )
        return new.astype(multipliers.dtype)

    return jax.lax.cond(piece == pieces - 1, assign, lambda: multipliers), alpha


def _refresh_alphas(kernels, layers, options: Options, alpha, start, stop):
    """Exponents with those of layers[start:stop] computed anew, one by one.

    Code is compiled once for each shape of matrices, whatever the number of layers.
    """
    kinds: dict[tuple, list[int]] = {}
    for i, layer in enumerate(layers):
        if is_large(layer, kernels[layer.path].shape, options):
            key = ("large", *estimate_key(kernels, layer))
            kinds.setdefault(key, []).append(i)
            continue
        matrices = jax.eval_shape(
            functools.partial(layer_matrices, layer=layer), kernels
        )
        key = (matrices.shape, matrices.dtype, bool(layer.axes.pooled))
        kinds.setdefault(key, []).append(i)
    kind_of, place_in = np.zeros((2, len(layers)), np.int32)
    for number, members in enumerate(kinds.values()):
        kind_of[members] = number
        place_in[members] = np.arange(len(members))

    def alpha_of_kind(members: Sequence[int], pooled: bool):
        """From the place of a layer among its kind to its exponent."""
        matrices = [
            functools.partial(layer_matrices, kernels, layers[i]) for i in members
        ]
        alone = Layer("", MatrixAxes((1,), (2,), stacked=(0,)), index=(0,))
        if pooled:
            alone = Layer("", MatrixAxes((1,), (2,), pooled=(0,)))

        def compute(place):
            kernels = {alone.path: jax.lax.switch(place, matrices)}
            spectra = layer_spectra(
                kernels, (alone,), options.conv_norm, route_of(options)
            )
            table = fitted_table(spectra, (alone,), options)
            return table.alpha[0].astype(alpha.dtype)

        return compute

    def alpha_of_large_kind(members: Sequence[int]):
        method: Any = options.spectrum
        own = tuple(layers[i] for i in members)

        def compute(place):
            estimate = estimate_one_of(kernels, own, place, options.conv_norm, method)
            table = estimated_table(estimate, own[:1], options)
            return table.alpha[0].astype(alpha.dtype)

        return compute

    kind_alphas = [
        alpha_of_large_kind(members)
        if key[0] == "large"
        else alpha_of_kind(members, key[2])
        for key, members in kinds.items()
    ]

    def visit(i, alpha):
        kind, place = jnp.asarray(kind_of)[i], jnp.asarray(place_in)[i]
        return alpha.at[i].set(jax.lax.switch(kind, kind_alphas, place))

    return jax.lax.fori_loop(start, stop, visit, alpha)
