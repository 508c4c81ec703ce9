"""What becomes of every leaf of a parameter tree."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tb_optax.assignment import layer_of_leaf
from tb_optax.layers import Layer, expand_stacks
from tb_optax.leaves import leaves_of, shapes_of
from tb_optax.naming import read_leaves


def describe(
    params: Any, layers: Sequence[Layer], *, min_eigenvalues: int = 50
) -> list[dict[str, Any]]:
    """Every leaf with its layer, or why it has none.

    Args:
        params: the parameters, arrays or `jax.ShapeDtypeStruct`.
        layers: layers, stacked ones with or without an index.
        min_eigenvalues: as in `layer_analysis`; says which layers stay untuned.

    Returns:
        One dict per leaf, in the order of the tree: `leaf` (path), `shape`,
        `dtype`, `layer` (name, or names joined by a comma; empty for none) and
        `note` (how it belongs to the layer, or why to none).

    Raises:
        ValueError: if a layer or a follower is not in the parameters.

    >>> import jax.numpy as jnp
    >>> from tb_optax import find_layers
    >>> params = {"Dense_0": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)},
    ...           "LayerNorm_0": {"scale": jnp.ones(64)}}
    >>> for row in describe(params, find_layers(params)):
    ...     print(row["leaf"], "|", row["layer"], "|", row["note"])
    Dense_0/bias | Dense_0/kernel | follows
    Dense_0/kernel | Dense_0/kernel | 64 eigenvalues
    LayerNorm_0/scale |  | norm
    """
    leaves = leaves_of(params)
    shapes = shapes_of(leaves)
    layers = expand_stacks(layers, shapes)
    owners = layer_of_leaf(layers, shapes)
    readings = read_leaves(leaves)
    rows = []
    for path, leaf in leaves.items():
        own = [layers[i] for i in np.unique(owners.get(path, [])).astype(int) if i >= 0]
        if own:
            note = _note(own[0], path, leaf.shape, min_eigenvalues)
        else:
            reading = readings[path]
            note = (
                "not in the list" if reading.axes or reading.unclear else reading.reason
            )
        rows.append(
            {
                "leaf": path,
                "shape": leaf.shape if leaf.is_array else None,
                "dtype": str(leaf.value.dtype) if leaf.is_array else None,
                "layer": _names(own),
                "note": note,
            }
        )
    return rows


def _note(layer: Layer, path: str, shape: tuple[int, ...], least: int) -> str:
    if path != layer.path:
        return "follows"
    count = layer.eigenvalue_count(shape)
    few = f", too few of at least {least}: not tuned" if count < least else ""
    return f"{count} eigenvalues{few}"


def _names(layers: Sequence[Layer]) -> str:
    """Names of the layers of a leaf, the first and the last of many."""
    names = [layer.name for layer in layers]
    return ", ".join(names if len(names) <= 3 else [names[0], "...", names[-1]])
