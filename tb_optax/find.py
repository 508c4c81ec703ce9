"""The rules that find layers in a parameter tree by names and shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from tb_optax.layers import Layer, MatrixAxes, check_rank
from tb_optax.leaves import Leaf, leaves_of, match_paths, natural


class Reading(NamedTuple):
    """What the rules say of a leaf.

    Attributes:
        axes: how to read it as matrices; None for what is no kernel.
        reason: why it is no kernel ("embedding", "look-up table", "norm", "bias",
            "rank < 2", "complex", ...), or why that is unclear.
        unclear: whether the rules cannot tell.
    """

    axes: MatrixAxes | None
    reason: str = ""
    unclear: bool = False


def find_layers(
    params: Any, *, axes: Mapping[str, MatrixAxes | None] | None = None
) -> tuple[Layer, ...]:
    """Find the layers of a parameter tree by documented rules over its names.

    Flax (linen and nnx) and Haiku:

    | leaf | read as |
    |---|---|
    | `kernel`, `w` of rank 2 | (in, out) |
    | `kernel`, `w` of rank 4 with a sign of a convolution | (h, w, in, out) |
    | `kernel` of rank 3 under query, key, value | (in, heads, dim) |
    | `kernel` of rank 3 under out | (heads, dim, out) |

    Signs of a convolution are `conv` in the name or the class of its module, a bias of
    the last size, and a sibling with `conv` in its name.  They do not count for modules
    called einsum, dense, linear, attention or local, nor for query, key, value and out
    without a bias.  A rank-3 kernel counts as attention only where its bias or its
    siblings have the shapes that attention gives them.

    Equinox, where a leaf is an attribute:

    | leaf | read as |
    |---|---|
    | `weight` of a Linear, `weight_ih`, `weight_hh` of a recurrent cell | (out, in) |
    | `weight` of rank 2 with a `bias` of its first size | (out, in) |
    | `weight` of rank >= 3 | (out, in, positions...) |

    PyTorch and Hugging Face, where keys have dots (`model.layers.0.mlp.fc1.weight`):

    | leaf | read as |
    |---|---|
    | `weight` of rank 2, also `in_proj_weight`, `weight_ih_l0` | (out, in) |
    | `weight` of rank 2 with a bias of its last size only (`Conv1D`) | (in, out) |
    | `weight` of rank 2 without a bias, in a module named as a table | an embedding |
    | `weight` of rank >= 3 with a sign of a convolution | (out, in, positions...) |
    | the same with a bias of its second size (transposed) | (in, out, positions...) |

    A matrix without a bias in a module called `w`, which says nothing, is an error.
    Modules named as tables are those with `emb`, `wte`, `wpe`, `shared`, `token` or
    `relative_attention_bias` in their last name.  Once a `Conv1D` is seen, all modules
    of its last name are (GPT-2 has square ones).  Signs of a convolution are `conv` or
    `patch_embed` in the key, for rank >= 4 a bias of the first size, or a norm with
    running statistics of that size that comes next in a sequence.

    Embeddings, tables, norms, biases, vectors, integers and complex numbers are no
    kernels.  Anything else with two axes longer than 1 is an error.  No reading may
    contradict the shape of the bias in the same module.

    A bias follows the only kernel of its module, or that of its name (`bias_ih_l0`,
    `weight_ih_l0`).  A norm follows the sibling convolution of its name with `conv` for
    `bn`, `norm` or `batchnorm` (`Conv_3` and `BatchNorm_3`, `conv1` and `bn1`, in Haiku
    `conv2_d_1` and `batch_norm_1`) if it has as many elements as that convolution has
    outputs.

    The layers come in the order of the tree, which for dicts is alphabetical, with
    numbers inside dotted keys in numeric order: not the order of execution, and no
    guide to which layer is first or last.

    Args:
        params: any pytree of arrays or `jax.ShapeDtypeStruct`, or a flat dict of them.
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
    >>> find_layers({"h.0.fc.weight": jnp.zeros((32, 8)), "h.0.fc.bias": jnp.zeros(32)})
    (Layer('h.0.fc.weight', MatrixAxes((1,), (0,)), follows=('h.0.fc.bias',)),)
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
    follows = _followers(leaves, kernels)
    dotted = any(leaf.dotted for leaf in leaves.values())
    paths = sorted(kernels, key=natural) if dotted else kernels
    return tuple(Layer(path, kernels[path], follows.get(path, ())) for path in paths)


def read_leaves(
    leaves: Mapping[str, Leaf], axes: Mapping[str, MatrixAxes | None] | None = None
) -> dict[str, Reading]:
    """Read every leaf of a tree, by pattern or else by rule."""
    given = match_paths("axes", axes, leaves)
    modules: Modules = {}
    for leaf in leaves.values():
        modules.setdefault(leaf.module, {})[leaf.name] = leaf
    return {
        path: _given(leaf, given[path]) if path in given else _read(leaf, modules)
        for path, leaf in leaves.items()
    }


# The leaves of every module, by their own names.
Modules: TypeAlias = dict[tuple[str, ...], dict[str, Leaf]]


def _given(leaf: Leaf, axes: MatrixAxes | None) -> Reading:
    if axes is None:
        return Reading(None, "left out by axes=")
    if leaf.value is None:
        return Reading(None, "masked or None")
    check_rank(axes, leaf.path, leaf.shape)
    return Reading(axes)


BIASES = ("bias", "b")
NORM_LEAVES = ("scale", "offset", "gamma", "beta")
# Not the running mean and variance.
_LEARNED_NORM_LEAVES = (*NORM_LEAVES, *BIASES, "weight")

_DENSE = MatrixAxes((0,), (1,))
_DENSE_TRANSPOSED = MatrixAxes((1,), (0,))
_CONV = MatrixAxes((2,), (3,), pooled=(0, 1))
_ATTENTION_IN = MatrixAxes((0,), (1, 2))
_ATTENTION_OUT = MatrixAxes((0, 1), (2,))


def _conv_transposed(rank: int) -> MatrixAxes:
    """Return the axes of a convolution with outputs first: OIHW for rank 4."""
    return MatrixAxes((1,), (0,), pooled=tuple(range(2, rank)))


def _read(leaf: Leaf, modules: Modules) -> Reading:
    """Read one leaf by the rules of `find_layers`."""
    nothing = _no_numbers(leaf)
    if nothing:
        return Reading(None, nothing)
    if leaf.name in NORM_LEAVES:
        return Reading(None, "norm")
    if leaf.name in BIASES or (leaf.dotted and _PYTORCH_BIAS.fullmatch(leaf.name)):
        return Reading(None, "norm" if _is_of_norm(leaf, modules) else "bias")
    if leaf.name in ("kernel", "w") and not leaf.attribute:
        return _read_kernel(leaf, modules)
    if leaf.name in ("weight", "weight_ih", "weight_hh") and leaf.attribute:
        return _read_equinox(leaf, modules[leaf.module])
    if leaf.dotted and _PYTORCH_WEIGHT.fullmatch(leaf.name):
        return _read_pytorch(leaf, modules)
    if "embed" in leaf.name.lower():
        return Reading(None, "embedding")
    if sum(size > 1 for size in leaf.shape) < 2:
        return Reading(None, "rank < 2")
    if leaf.dotted and _is_table(leaf.name):
        return Reading(None, "look-up table")
    return _unclear(f"a matrix or more under the unknown name {leaf.name!r}")


def _no_numbers(leaf: Leaf) -> str:
    """Say why a leaf holds no real numbers; empty if it does."""
    if leaf.value is None:
        return "masked or None"
    if not leaf.is_array:
        return "not an array"
    if jnp.issubdtype(leaf.value.dtype, jnp.complexfloating):
        return "complex"
    if not jnp.issubdtype(leaf.value.dtype, jnp.floating):
        return "not floating"
    return "" if math.prod(leaf.shape) else "empty"


def _unclear(reason: str) -> Reading:
    return Reading(None, reason, unclear=True)


def _shape_of(leaves: Mapping[str, Leaf], *names: str) -> tuple[int, ...] | None:
    for name in names:
        if name in leaves and leaves[name].is_array:
            return leaves[name].shape
    return None


# --- Flax and Haiku: inputs before outputs ------------------------------------------

# Modules whose kernels of rank 4 are no convolutions, or do not share their positions.
_NO_CONV = re.compile("einsum|dense|linear|attention|attn|local")


def _read_kernel(leaf: Leaf, modules: Modules) -> Reading:
    """Read a `kernel` (Flax) or `w` (Haiku)."""
    shape = leaf.shape
    bias = _shape_of(modules[leaf.module], *BIASES)
    role = leaf.module[-1] if leaf.module else ""
    if len(shape) < 2:
        return Reading(None, "rank < 2")
    if len(shape) == 3 and role in ("query", "key", "value", "out"):
        return _read_attention(leaf, modules, role, bias)
    if len(shape) not in (2, 4):
        return _unclear(f"a kernel of rank {len(shape)} not under an attention name")
    if bias is not None and bias != shape[-1:]:
        return _unclear(f"its bias of shape {bias} is not one of {shape[-1]} outputs")
    if len(shape) == 2:
        return Reading(_DENSE)
    if _is_convolution(leaf, modules, bias):
        return Reading(_CONV)
    return _unclear("a kernel of rank 4 without a sign of a convolution")


def _is_convolution(leaf: Leaf, modules: Modules, bias) -> bool:
    """Whether a `kernel` of rank 4 has a sign of a convolution."""
    name = leaf.module[-1].lower() if leaf.module else ""
    names = [name, *(cls.__name__.lower() for cls in type(leaf.owner).__mro__)]
    if any(map(_NO_CONV.search, names)):
        return False
    if bias is not None or any("conv" in one for one in names):
        return True
    return name not in ("query", "key", "value", "out") and any(
        module[:-1] == leaf.module[:-1]
        and "conv" in module[-1].lower()
        and len(_shape_of(members, leaf.name) or ()) == 4
        for module, members in modules.items()
        if module
    )


def _read_attention(leaf: Leaf, modules: Modules, role: str, bias) -> Reading:
    """Read a rank-3 kernel: heads are outputs of query, key, value, inputs of out."""
    shape = leaf.shape
    around = leaf.module[:-1]

    def kernel_shape(name):
        found = _shape_of(modules.get((*around, name), {}), leaf.name)
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


# --- Equinox: outputs before inputs -------------------------------------------------

_EQUINOX_LINEAR = {"Linear", "GRUCell", "LSTMCell"}
_EQUINOX_NORM = {"LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"}


def _read_equinox(leaf: Leaf, module: Mapping[str, Leaf]) -> Reading:
    """Read a `weight` attribute."""
    shape = leaf.shape
    rank = len(shape)
    classes = _equinox_classes(leaf)
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
    convolution = bool(classes & {"Conv", "ConvTranspose"})
    if convolution and rank != leaf.owner.num_spatial_dims + 2:
        return _unclear(f"rank {rank} in an Equinox convolution: a stack of layers?")
    if rank == 2 and bias is None:
        return _unclear("a matrix without a bias: a linear layer or an embedding?")
    return Reading(_conv_transposed(rank))


def _equinox_classes(leaf: Leaf) -> set[str]:
    """Return the names of the Equinox classes of the module that holds a leaf."""
    return {
        base.__name__
        for base in type(leaf.owner).__mro__
        if base.__module__.partition(".")[0] == "equinox"
    }


# --- PyTorch and Hugging Face: dotted keys, outputs before inputs ---------------------

_PYTORCH_WEIGHT = re.compile(
    r"weight|(in|q|k|v)_proj_weight|weight_[ih]h_l\d+(_reverse)?"
)
_PYTORCH_BIAS = re.compile(r"(.+_)?bias|bias_([kv]|[ih]h_l\d+(_reverse)?)")
_TABLE = re.compile(
    "embed|(^|_)emb|wte|wpe|^shared$|token|table|rel_pos|relative_attention_bias"
    "|attention_biases|quer(y|ies)_feat"
)
_NORM = re.compile("norm|^ln|^bn", re.IGNORECASE)


def _read_pytorch(leaf: Leaf, modules: Modules) -> Reading:
    """Read a `weight` under a key with dots."""
    shape = leaf.shape
    bias = _shape_of(modules[leaf.module], leaf.name.replace("weight", "bias"))
    vector = sum(size > 1 for size in shape) < 2
    if len(shape) < 2 or (vector and len(shape) > 2 and bias != shape[:1]):
        return Reading(None, "norm" if _is_of_norm(leaf, modules) else "rank < 2")
    first, last = bias == shape[:1], bias == shape[1:2]
    if bias is not None and not first and not last:
        return _unclear(f"its bias of shape {bias} is not one of {shape[0]} outputs")
    if len(shape) > 2:
        if not _is_pytorch_convolution(leaf, modules, first):
            return _unclear("a weight of rank >= 3 without a sign of a convolution")
        axes = _conv_transposed(len(shape))
        swapped = MatrixAxes(axes.output, axes.reduction, pooled=axes.pooled)
        return Reading(swapped if last and not first else axes)
    if bias is None and _word(leaf) in ("", "w"):
        return _unclear("a matrix without a bias: a linear layer or an embedding?")
    if bias is None and _is_table(_word(leaf)):
        return Reading(None, "embedding")
    if (last and not first) or (first and last and _named_conv1d(leaf, modules)):
        return Reading(_DENSE)
    return Reading(_DENSE_TRANSPOSED)


def _is_table(name: str) -> bool:
    return bool(_TABLE.search(name)) and not name.endswith(("_out", "_proj"))


def _word(leaf: Leaf) -> str:
    """Return the last name of a leaf's module that is no number; empty if none is."""
    words = [name for name in leaf.module if not name.isdecimal()]
    return words[-1].lower() if words else ""


def _is_pytorch_convolution(leaf: Leaf, modules: Modules, first: bool) -> bool:
    key = ".".join(leaf.module).lower()
    if "conv" in key or "patch_embed" in key or (first and len(leaf.shape) > 3):
        return True
    *around, number = leaf.module or ("",)
    if not number.isdecimal():
        return False
    after = modules.get((*around, str(int(number) + 1)), {})
    return _shape_of(after, "running_mean") == leaf.shape[:1]


def _named_conv1d(leaf: Leaf, modules: Modules) -> bool:
    """Whether the biases of other modules of this name are of the last size only."""
    shapes = [
        (_shape_of(leaves, "weight"), _shape_of(leaves, "bias"))
        for module, leaves in modules.items()
        if module[-1:] == leaf.module[-1:]
    ]
    return any(w is not None and b == w[1:] != w[:1] for w, b in shapes)


def _is_of_norm(leaf: Leaf, modules: Modules) -> bool:
    """Whether a bias or a vector belongs to a norm."""
    module = modules[leaf.module]
    if not module.keys().isdisjoint((*NORM_LEAVES, "running_mean")):
        return True
    if leaf.dotted:
        weight = _shape_of(module, "weight")
        return bool(_NORM.search(_word(leaf))) and (weight is None or len(weight) < 2)
    return not _equinox_classes(leaf).isdisjoint(_EQUINOX_NORM)


# --- followers ----------------------------------------------------------------------


def _followers(
    leaves: Mapping[str, Leaf], kernels: Mapping[str, MatrixAxes]
) -> dict[str, tuple[str, ...]]:
    """Return the paths of the biases and norms that follow each kernel, by names."""
    modules: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in leaves.values():
        if leaf.is_array:
            modules.setdefault(leaf.module, []).append(leaf)
    kernel_of: dict[tuple[str, ...], Leaf] = {}
    followers: dict[str, list[str]] = {}
    for module, members in modules.items():
        inside = {leaf.name: leaf for leaf in members if leaf.path in kernels}
        if len(inside) == 1:
            (kernel_of[module],) = inside.values()
        for leaf in members:
            own = kernel_of.get(module) if leaf.name in BIASES else None
            if leaf.dotted:
                own = inside.get(leaf.name.replace("bias", "weight"), own)
            if own is not None and own is not leaf:
                followers.setdefault(own.path, []).append(leaf.path)
    convolutions = {
        _plain(module): leaf for module, leaf in kernel_of.items() if module
    }
    for module, members in modules.items():
        kernel = convolutions.get(_convolution_of_norm(module))
        if module in kernel_of or kernel is None:
            continue
        outputs = math.prod(kernel.shape[a] for a in kernels[kernel.path].output)
        learned = [leaf for leaf in members if leaf.name in _LEARNED_NORM_LEAVES]
        if all(math.prod(leaf.shape) == outputs for leaf in learned):
            paths = [leaf.path for leaf in learned]
            followers[kernel.path] = [*followers.get(kernel.path, ()), *paths]
    place = {path: i for i, path in enumerate(leaves)}
    return {p: tuple(sorted(f, key=place.__getitem__)) for p, f in followers.items()}


def _plain(module: tuple[str, ...]) -> tuple[str, ...]:
    """`("block", "Conv_3")` -> `("block", "conv_3")`, as Haiku's `conv2_d_3`."""
    return (*module[:-1], re.sub(r"conv([123]_?d|olution)", "conv", module[-1].lower()))


def _convolution_of_norm(module: tuple[str, ...]) -> tuple[str, ...]:
    """`("block", "BatchNorm_3")` -> `("block", "conv_3")`; empty for other names."""
    if not module:
        return ()
    name = module[-1].lower()
    name, count = re.subn(r"normalization|batch_?norm|bn|norm", "conv", name)
    return (*module[:-1], name) if count else ()
