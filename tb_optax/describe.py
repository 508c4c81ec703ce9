"""What becomes of every leaf of a parameter tree."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tb_optax.find import Reading, read_leaves
from tb_optax.layers import Layer, Layers, expand_stacks, layer_of_leaf
from tb_optax.leaves import Leaf, leaves_of, listing, shapes_of


def describe(
    params: Any,
    layers: Sequence[Layer],
    *,
    min_eigenvalues: int = 50,
    trainable: Any = None,
) -> list[dict[str, Any]]:
    """Describe every leaf: its layer, or why it has none.

    A matrix that could be a layer and is in no list has a note in capitals. What
    `trace_layers` has found out of a leaf stands before what its name suggests.

    Args:
        params: the parameters, arrays or `jax.ShapeDtypeStruct`.
        layers: layers, stacked ones with or without an index.
        min_eigenvalues: as in `layer_analysis`; says which layers stay untuned.
        trainable: a tree of booleans like `params`, or a prefix of it, as for
            `optax.masked`: False marks the leaves that the optimizer freezes.

    Returns:
        One dict per leaf, arrays in the order of the tree and then what is no array:
        `leaf` (path), `shape`, `dtype`, `layer` (name, or names joined by a comma;
        empty for none) and `note` (how it belongs to the layer, or why to none).

    Raises:
        ValueError: if a layer or a follower is not in the parameters, or `trainable`
            does not fit them.

    >>> import jax.numpy as jnp
    >>> from tb_optax import find_layers
    >>> params = {"Dense_0": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)},
    ...           "Dense_1": {"kernel": jnp.ones((64, 10)), "bias": jnp.ones(10)}}
    >>> for row in describe(params, find_layers(params)[:1]):
    ...     print(row["leaf"], "|", row["layer"], "|", row["note"])
    Dense_0/bias | Dense_0/kernel | follows
    Dense_0/kernel | Dense_0/kernel | 64 eigenvalues
    Dense_1/bias |  | bias: its kernel 'Dense_1/kernel' is not in the list
    Dense_1/kernel |  | NOT IN THE LIST: a kernel with 10 eigenvalues keeps multiplier 1
    """
    leaves = leaves_of(params)
    shapes = shapes_of(leaves)
    frozen = _frozen(params, trainable)
    traced = layers.notes if isinstance(layers, Layers) else {}
    layers = expand_stacks(layers, shapes)
    owners = layer_of_leaf(layers, shapes)
    readings = read_leaves(leaves)
    rows = []
    for path, leaf in leaves.items():
        own = [layers[i] for i in np.unique(owners.get(path, [])).astype(int) if i >= 0]
        if own:
            note = _note_in_list(own[0], leaf, min_eigenvalues, path in frozen)
        elif path in frozen:
            note = "frozen, and not in the list"
        elif path in traced:
            note = _note_traced(traced[path], leaf, readings[path])
        else:
            note = _note_outside(leaf, leaves, readings, layers)
        rows.append(
            {
                "leaf": path,
                "shape": shapes[path],
                "dtype": str(leaf.value.dtype) if leaf.is_array else None,
                "layer": _names(own),
                "note": note,
            }
        )
    return sorted(rows, key=lambda row: row["shape"] is None)


def _frozen(params: Any, trainable: Any) -> set[str]:
    """Return the paths of the leaves that a mask of trainable leaves freezes."""
    if trainable is None:
        return set()
    try:
        mask = leaves_of(jax.tree.broadcast(trainable, params))
    except ValueError as error:
        msg = (
            f"trainable must be a tree of booleans like params, or a prefix of it, "
            f"got {jax.tree.structure(trainable)}: {error}"
        )
        raise ValueError(msg) from None
    kept = {path: leaf.value for path, leaf in mask.items()}
    wrong = [path for path in kept if not isinstance(kept[path], bool | np.bool)]
    if wrong:
        msg = (
            f"trainable must hold booleans, got {kept[wrong[0]]!r} for "
            f"{listing(wrong)}."
        )
        raise ValueError(msg)
    return {path for path in kept if not kept[path]}


def _note_in_list(layer: Layer, leaf: Leaf, least: int, frozen: bool) -> str:
    if leaf.path != layer.path:
        return "follows, frozen" if frozen else "follows"
    count = layer.eigenvalue_count(leaf.shape)
    note = f"{count} eigenvalues"
    if count < least:
        note += f", too few of at least {least}: not tuned"
    if frozen:
        note += ", FROZEN BUT IN THE LIST: it is still ranked; leave it out of `layers`"
    return note


def _note_traced(said: str, leaf: Leaf, reading: Reading) -> str:
    """Say why a leaf belongs to no layer of the list, though it may to one outside."""
    if said == "layer":
        return _note_missing(leaf, reading)
    if said.startswith("unclear: "):
        return f"NOT IN THE LIST, multiplier 1: {said.removeprefix('unclear: ')}"
    return f"{said}, which is not in the list" if said.startswith("follows ") else said


def _note_missing(leaf: Leaf, reading: Reading) -> str:
    """Say that a kernel is in no list."""
    count = ""
    if reading.axes is not None:
        number = Layer(leaf.path, reading.axes).eigenvalue_count(leaf.shape)
        count = f" with {number} eigenvalues"
    return f"NOT IN THE LIST: a kernel{count} keeps multiplier 1"


def _note_outside(
    leaf: Leaf,
    leaves: Mapping[str, Leaf],
    readings: Mapping[str, Reading],
    layers: Sequence[Layer],
) -> str:
    """Say why a leaf belongs to no layer."""
    reading = readings[leaf.path]
    if reading.axes is not None:
        return _note_missing(leaf, reading)
    if reading.unclear:
        return f"NOT IN THE LIST, multiplier 1: {reading.reason}"
    if reading.reason == "norm":
        return (
            "norm: no layer names it in `follows`; trace_layers(..., norms=...) "
            "assigns norms by order"
        )
    if reading.reason != "bias":
        return reading.reason
    kernels = [
        path
        for path, other in leaves.items()
        if other.module == leaf.module and readings[path].axes is not None
    ]
    if len(kernels) != 1:
        return "bias: no layer names it in `follows`"
    if all(layer.path != kernels[0] for layer in layers):
        return f"bias: its kernel {kernels[0]!r} is not in the list"
    return f"bias: the layer {kernels[0]!r} does not name it in `follows`"


def _names(layers: Sequence[Layer]) -> str:
    """Join the names of the layers of a leaf, the first and the last of many."""
    names = [layer.name for layer in layers]
    return ", ".join(names if len(names) <= 3 else [names[0], "...", names[-1]])
