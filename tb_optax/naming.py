"""The rules that find layers in a parameter tree by names and shapes."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from tb_optax.followers import BIASES, NORM_LEAVES, followers_by_name
from tb_optax.layers import Layer, MatrixAxes
from tb_optax.leaves import Leaf, leaves_of
from tb_optax.patterns import match_paths


class Reading(NamedTuple):
    """What the rules say of a leaf.

    Attributes:
        axes: how to read it as matrices; None for what is no kernel.
        reason: why it is no kernel, or why that is unclear.
        unclear: whether the rules cannot tell.
    """

    axes: MatrixAxes | None
    reason: str = ""
    unclear: bool = False


def find_layers(
    params: Any, *, axes: Mapping[str, MatrixAxes | None] | None = None
) -> tuple[Layer, ...]:
    """Finds the layers of a parameter tree by documented rules over its names.

    | leaf | read as |
    |---|---|
    | `kernel`, `w` of rank 2 | (in, out) |
    | `kernel`, `w` of rank 4, not under an attention name | (h, w, in, out) |
    | `kernel` of rank 3 under query, key, value | (in, heads, dim) |
    | `kernel` of rank 3 under out | (heads, dim, out) |
    | `weight` attribute of an Equinox Linear, recurrent cell | (out, in) |
    | `weight` attribute of rank 2 beside a `bias` of its first size | (out, in) |
    | `weight` attribute of rank >= 3 | (out, in, positions...) |
    | embeddings, norms, biases, vectors, integers | no kernel |
    | anything else with two axes longer than 1 | an error |

    A rank-3 kernel counts as attention only where its bias or its siblings have the
    shapes that attention gives them, and no reading may contradict the shape of the
    bias beside it.  A bias follows the only kernel of its module.  A norm follows
    the sibling convolution of its name with `conv` for `bn`, `norm` or `batchnorm`
    (`Conv_3`/`BatchNorm_3`, `conv1`/`bn1`, `conv_proj`/`norm_proj`, in Haiku
    `conv2_d_1`/`batch_norm_1`) if it has as many elements as that convolution has
    outputs.

    The layers come in the order of the tree, which for dicts is alphabetical: not
    the order of execution, and no guide to which layer is first or last.

    Args:
        params: any pytree of arrays or `jax.ShapeDtypeStruct`.
        axes: fnmatch patterns on paths, each with the axes of the kernels it
            matches, or None for leaves that are no kernels; the first match wins.

    Returns:
        Layers, one for each kernel.

    Raises:
        ValueError: if the rules cannot tell how to read a leaf, or a pattern matches
            nothing or does not fit.

    >>> params = {"Conv_0": {"kernel": jnp.zeros((3, 3, 16, 32))},
    ...           "BatchNorm_0": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}
    >>> (layer,) = find_layers(params)
    >>> print(layer.path, layer.follows)
    Conv_0/kernel ('BatchNorm_0/bias', 'BatchNorm_0/scale')
    """
    leaves = leaves_of(params)
    readings = read_leaves(leaves, axes)
    unclear = [path for path, reading in readings.items() if reading.unclear]
    if unclear:
        listed = "\n".join(
            f"  {path!r} of shape {leaves[path].shape}: {readings[path].reason}"
            for path in unclear
        )
        msg = (
            f"find_layers cannot tell how to read {len(unclear)} leaves:\n{listed}\n"
            f"Pass axes={{{unclear[0]!r}: MatrixAxes(reduction=..., output=..., "
            f"pooled=..., stacked=...)}}, or None for a leaf that is no kernel; "
            f"patterns such as '*/kernel' settle many at once."
        )
        raise ValueError(msg)
    kernels = {p: r.axes for p, r in readings.items() if r.axes is not None}
    followers = followers_by_name(leaves, kernels)
    return tuple(
        Layer(path, axes, followers.get(path, ())) for path, axes in kernels.items()
    )


def read_leaves(
    leaves: Mapping[str, Leaf], axes: Mapping[str, MatrixAxes | None] | None = None
) -> dict[str, Reading]:
    """Reads every leaf of a tree, by pattern or else by rule."""
    given = match_paths("axes", axes, leaves)
    siblings: dict[tuple[str, ...], dict[str, Leaf]] = {}
    for leaf in leaves.values():
        siblings.setdefault(leaf.module, {})[leaf.name] = leaf
    return {
        path: _given(leaf, given[path]) if path in given else _read(leaf, siblings)
        for path, leaf in leaves.items()
    }


def _given(leaf, axes) -> Reading:
    if axes is None:
        return Reading(None, "left out by axes=")
    if leaf.value is None:
        return Reading(None, "masked or None")
    if not leaf.is_array or len(leaf.shape) != axes.rank:
        msg = (
            f"axes: {axes} is for kernels of rank {axes.rank}, {leaf.path!r} has "
            f"shape {leaf.shape}."
        )
        raise ValueError(msg)
    return Reading(axes)


_DENSE = MatrixAxes((0,), (1,))
_DENSE_TRANSPOSED = MatrixAxes((1,), (0,))
_CONV = MatrixAxes((2,), (3,), pooled=(0, 1))
_ATTENTION_IN = MatrixAxes((0,), (1, 2))
_ATTENTION_OUT = MatrixAxes((0, 1), (2,))

_EQUINOX_LINEAR = {"Linear", "GRUCell", "LSTMCell"}
_EQUINOX_NORM = {"LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"}


def _read(leaf: Leaf, siblings) -> Reading:
    """Reads one leaf by the rules of `find_layers`."""
    if leaf.value is None:
        return Reading(None, "masked or None")
    if not leaf.is_array:
        return Reading(None, "not an array")
    if not jnp.issubdtype(leaf.value.dtype, jnp.floating):
        return Reading(None, "not floating")
    if math.prod(leaf.shape) == 0:
        return Reading(None, "empty")
    if leaf.name in NORM_LEAVES:
        return Reading(None, "norm")
    if leaf.name in BIASES:
        beside_norm = not siblings[leaf.module].keys().isdisjoint(NORM_LEAVES)
        norm = beside_norm or not _equinox_classes(leaf).isdisjoint(_EQUINOX_NORM)
        return Reading(None, "norm" if norm else "bias")
    if leaf.name in ("kernel", "w") and not leaf.attribute:
        return _read_kernel(leaf, siblings)
    if leaf.name in ("weight", "weight_ih", "weight_hh") and leaf.attribute:
        return _read_weight(leaf, siblings[leaf.module])
    if "embed" in leaf.name.lower():
        return Reading(None, "embedding")
    if sum(size > 1 for size in leaf.shape) < 2:
        return Reading(None, "rank < 2")
    return _unclear(f"a matrix or more under the unknown name {leaf.name!r}")


def _unclear(reason: str) -> Reading:
    return Reading(None, reason, unclear=True)


def _shape_of(leaves: Mapping[str, Leaf], *names: str) -> tuple[int, ...] | None:
    for name in names:
        if name in leaves and leaves[name].is_array:
            return leaves[name].shape
    return None


def _read_kernel(leaf: Leaf, siblings) -> Reading:
    """A `kernel` (Flax) or `w` (Haiku): inputs before outputs."""
    shape = leaf.shape
    bias = _shape_of(siblings[leaf.module], *BIASES)
    role = leaf.module[-1] if leaf.module else ""
    attention = role in ("query", "key", "value", "out")
    if len(shape) < 2:
        return Reading(None, "rank < 2")
    if len(shape) == 3 and attention:
        return _read_attention(leaf, siblings, role, bias)
    if len(shape) not in (2, 4):
        return _unclear(f"a kernel of rank {len(shape)} not under an attention name")
    if bias is not None and bias != shape[-1:]:
        return _unclear(f"its bias of shape {bias} is not one of {shape[-1]} outputs")
    if len(shape) == 4 and attention and bias is None:
        return _unclear(f"a kernel of rank 4 under the attention name {role!r}")
    return Reading(_DENSE if len(shape) == 2 else _CONV)


def _read_attention(leaf: Leaf, siblings, role: str, bias) -> Reading:
    """A rank-3 kernel: heads are outputs of query, key, value, inputs of out."""
    shape = leaf.shape
    around = leaf.module[:-1]

    def kernel_shape(name):
        found = _shape_of(siblings.get((*around, name), {}), leaf.name)
        return found if found is not None and len(found) == 3 else None

    query, out = kernel_shape("query"), kernel_shape("out")
    if role == "out":
        agrees = [] if query is None else [query[1:] == shape[:2]]
        agrees += [] if bias is None else [bias == shape[2:]]
        axes = _ATTENTION_OUT
    else:
        # Keys and values may have fewer heads than queries, never another size.
        agrees = [] if out is None else [out[1] == shape[2]]
        if role == "query" and out is not None:
            agrees = [out[:2] == shape[1:]]
        agrees += [] if bias is None else [bias == shape[1:]]
        axes = _ATTENTION_IN
    if not agrees or not all(agrees):
        return _unclear(
            f"rank 3 under {role!r}, but bias and siblings do not have the shapes "
            f"of multi-head attention"
        )
    return Reading(axes)


def _read_weight(leaf: Leaf, module: Mapping[str, Leaf]) -> Reading:
    """A `weight` attribute (Equinox): outputs before inputs."""
    shape = leaf.shape
    rank = len(shape)
    classes = _equinox_classes(leaf)
    conv = MatrixAxes((1,), (0,), pooled=tuple(range(2, rank))) if rank > 2 else None
    if "Embedding" in classes:
        return Reading(None, "embedding")
    if classes & _EQUINOX_NORM:
        return Reading(None, "norm")
    if classes & _EQUINOX_LINEAR:
        if rank == 2:
            return Reading(_DENSE_TRANSPOSED)
        return _unclear(f"rank {rank} in an Equinox linear layer: a stack of layers?")
    if rank < 2:
        return Reading(None, "rank < 2")
    bias = _shape_of(module, *BIASES)
    per_output = (shape[0],) + (1,) * (rank - 2)
    if bias is not None and bias != per_output:
        return _unclear(f"its bias of shape {bias} is not one of {shape[0]} outputs")
    if "Conv" in classes or "ConvTranspose" in classes:
        if rank == leaf.owner.num_spatial_dims + 2:
            return Reading(conv)
        return _unclear(f"rank {rank} in an Equinox convolution: a stack of layers?")
    if rank == 2 and bias is None:
        return _unclear("a matrix without a bias: a linear layer or an embedding?")
    return Reading(conv or _DENSE_TRANSPOSED)


def _equinox_classes(leaf: Leaf) -> set[str]:
    """Names of the Equinox classes of the module that holds a leaf."""
    return {
        base.__name__
        for base in type(leaf.owner).__mro__
        if base.__module__.partition(".")[0] == "equinox"
    }
