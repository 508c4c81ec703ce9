"""Layers as plain data: kernels, how to read them as matrices, and what they own."""

import dataclasses
import itertools
import math
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
from jaxtyping import Int

from tb_optax.leaves import listing


@dataclasses.dataclass(frozen=True, repr=False)
class _Compact:
    """A repr that leaves defaults out and can be pasted back into code."""

    def __repr__(self):
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                shown.append(repr(value))
            elif value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class MatrixAxes(_Compact):
    """Which axes of a kernel make its matrices; every axis is in exactly one field.

    | kernel | shape | `MatrixAxes` |
    |---|---|---|
    | Flax Dense | (in, out) | `((0,), (1,))` |
    | Flax Conv | (h, w, in, out) | `((2,), (3,), pooled=(0, 1))` |
    | PyTorch, Equinox Conv | (out, in, h, w) | `((1,), (0,), pooled=(2, 3))` |
    | attention query | (in, heads, dim) | `((0,), (1, 2))` |
    | attention out | (heads, dim, out) | `((0, 1), (2,))` |
    | scanned Dense | (layers, in, out) | `((1,), (2,), stacked=(0,))` |

    Attributes:
        reduction: axes that are summed over, the inputs.
        output: axes of the outputs.
        pooled: axes whose slices share one ESD, the positions of a convolution.
        stacked: axes whose slices are layers of their own.

    Raises:
        ValueError: if the fields are not a partition of range(rank), or there is no
            input or no output.
    """

    reduction: tuple[int, ...]
    output: tuple[int, ...]
    pooled: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()

    def __post_init__(self):
        fields = (self.reduction, self.output, self.pooled, self.stacked)
        if not all(isinstance(field, tuple) for field in fields):
            msg = f"every field of MatrixAxes must be a tuple of ints, got {self}."
            raise ValueError(msg)
        if sorted(sum(fields, ())) != list(range(self.rank)):
            msg = (
                f"every axis must be in exactly one field: together they must be "
                f"0..{self.rank - 1}, got {self}."
            )
            raise ValueError(msg)
        if not self.reduction or not self.output:
            msg = f"a kernel needs a reduction and an output axis, got {self}."
            raise ValueError(msg)

    @property
    def rank(self) -> int:
        """Number of axes of the kernel."""
        fields = (self.reduction, self.output, self.pooled, self.stacked)
        return sum(map(len, fields))


def check_rank(axes: MatrixAxes, path: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless axes that the user gives fit a leaf of this shape."""
    if axes.rank != len(shape):
        msg = (
            f"axes: {axes} is for kernels of rank {axes.rank}, {path!r} has shape "
            f"{shape}."
        )
        raise ValueError(msg)


@dataclasses.dataclass(frozen=True, repr=False)
class Layer(_Compact):
    """A kernel, or a slice or part of one, with the leaves that follow it.

    Attributes:
        path: path of the kernel, `keystr(path, simple=True, separator="/")`.
        axes: how to read the kernel as matrices.
        follows: paths of the leaves that share the layer's multiplier.
        index: which slice of the stacked axes; empty stands for all of them.
        part: `(axis, start, stop)`, one piece of an output axis, as in fused qkv.

    Raises:
        ValueError: if index or part do not fit the axes.
    """

    path: str
    axes: MatrixAxes
    follows: tuple[str, ...] = ()
    index: tuple[int, ...] = ()
    part: tuple[int, int, int] | None = None

    def __post_init__(self):
        if not isinstance(self.follows, tuple) or not isinstance(self.index, tuple):
            msg = (
                f"layer {self.path!r}: follows and index must be tuples, got follows = "
                f"{self.follows!r}, index = {self.index!r}."
            )
            raise ValueError(msg)
        if self.index and len(self.index) != len(self.axes.stacked):
            msg = (
                f"layer {self.path!r}: index must be empty or name one slice of each "
                f"stacked axis {self.axes.stacked}, got index = {self.index}."
            )
            raise ValueError(msg)
        if self.part is not None:
            axis, start, stop = self.part
            if axis not in self.axes.output or not 0 <= start < stop:
                msg = (
                    f"layer {self.path!r}: part must be (axis, start, stop) with axis "
                    f"among the outputs {self.axes.output} and 0 <= start < stop, got "
                    f"part = {self.part}."
                )
                raise ValueError(msg)

    @property
    def name(self) -> str:
        """The path, then slice and part: "blocks/qkv[3]{0:64}"."""
        index = f"[{','.join(map(str, self.index))}]" if self.index else ""
        part = f"{{{self.part[1]}:{self.part[2]}}}" if self.part else ""
        return f"{self.path}{index}{part}"

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return rows and columns of the layer's matrices in a kernel of this shape."""
        sizes = list(shape)
        if self.part is not None:
            axis, start, stop = self.part
            sizes[axis] = stop - start
        rows = math.prod(sizes[axis] for axis in self.axes.reduction)
        return rows, math.prod(sizes[axis] for axis in self.axes.output)

    def eigenvalue_count(self, shape: tuple[int, ...]) -> int:
        """Return N of the layer in a kernel of this shape, pooled over positions."""
        pooled = math.prod(shape[axis] for axis in self.axes.pooled)
        return pooled * min(self.matrix_shape(shape))


class Layers(tuple[Layer, ...]):
    """A tuple of layers that knows the verdict on every leaf of the parameters.

    It is equal to the plain tuple, prints and hashes like it; slices keep the notes,
    which say of each leaf that it is a layer, which layer it follows, or why neither.

    >>> layers = Layers([Layer("w", MatrixAxes((0,), (1,)))], {"b": "not used"})
    >>> layers[:0], layers[:0].notes["b"]
    ((), 'not used')
    """

    _notes: dict[str, str]

    def __new__(cls, layers: Iterable[Layer] = (), notes: Mapping[str, str] = {}):
        """Make a list of some layers, with the verdict on every leaf."""
        own = super().__new__(cls, layers)
        own._notes = dict(notes)
        return own

    def __getnewargs__(self):
        return (tuple(self),)

    @property
    def notes(self) -> Mapping[str, str]:
        """The verdict on every leaf, by path."""
        return types.MappingProxyType(self._notes)

    @overload
    def __getitem__(self, key: SupportsIndex, /) -> Layer: ...

    @overload
    def __getitem__(self, key: slice, /) -> "Layers": ...

    def __getitem__(self, key, /):
        """Return a layer, or the layers of a slice with the same notes."""
        found = super().__getitem__(key)
        return Layers(found, self._notes) if isinstance(key, slice) else found


def expand_stacks(
    layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...] | None]
) -> tuple[Layer, ...]:
    """Replace every stacked layer by its slices, in order.

    A layer whose kernel is masked, as `optax.masked` and `optax.partition` mask
    frozen leaves, is left out.

    Args:
        layers: layers, each with or without an index.
        shapes: shape of every leaf by path; None where a mask stands.

    Raises:
        ValueError: if a kernel is absent or does not fit its layer.

    >>> stack = Layer("w", MatrixAxes((1,), (2,), stacked=(0,)))
    >>> [layer.name for layer in expand_stacks([stack], {"w": (2, 8, 4)})]
    ['w[0]', 'w[1]']
    """
    expanded = []
    for layer in layers:
        if layer.path in shapes and shapes[layer.path] is None:
            continue
        shape = _kernel_shape(layer, shapes)
        slices = itertools.product(*(range(shape[a]) for a in layer.axes.stacked))
        for index in [layer.index] if layer.index else slices:
            expanded.append(dataclasses.replace(layer, index=index))
    return tuple(expanded)


def _kernel_shape(layer, shapes) -> tuple[int, ...]:
    shape = shapes.get(layer.path)
    if shape is None:
        msg = (
            f"layer {layer.path!r} is not in the parameters; take it out of `layers`, "
            f"or name it as one of their paths: {listing(shapes)}."
        )
        raise ValueError(msg)
    if len(shape) != layer.axes.rank:
        msg = (
            f"layer {layer.path!r}: {layer.axes} is for kernels of rank "
            f"{layer.axes.rank}, the parameter has shape {shape}."
        )
        raise ValueError(msg)
    for axis, index in zip(layer.axes.stacked, layer.index, strict=False):
        if not 0 <= index < shape[axis]:
            msg = (
                f"layer {layer.path!r}: index {layer.index} is outside the stacked "
                f"axes {layer.axes.stacked} of shape {shape}."
            )
            raise ValueError(msg)
    if layer.part is not None and layer.part[2] > shape[layer.part[0]]:
        msg = (
            f"layer {layer.path!r}: part {layer.part} passes the end of axis "
            f"{layer.part[0]} of shape {shape}."
        )
        raise ValueError(msg)
    return shape


def by_kernel(layers: Sequence[Layer]) -> dict[tuple[Any, ...], list[int]]:
    """Number the layers that are slices of one kernel, by its path, axes and part."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for position, layer in enumerate(layers):
        found.setdefault((layer.path, layer.axes, layer.part), []).append(position)
    return found


def layer_of_leaf(
    layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...] | None]
) -> dict[str, Int[np.ndarray, "..."]]:
    """Say which layer each part of each leaf belongs to.

    Args:
        layers: one entry per multiplier, stacks expanded.
        shapes: shape of every leaf by path; None where a mask stands.

    Returns:
        For every leaf of a layer, an int array that broadcasts against the leaf:
        the position of the layer in `layers`, -1 where no layer has the part.

    Raises:
        ValueError: if a follower is nowhere, has a shape that does not fit its
            layer's stack or part, or if two layers claim the same part of a leaf.

    >>> dense = MatrixAxes((1,), (2,), stacked=(0,))
    >>> blocks = [Layer("w", dense, ("b",), index=(i,)) for i in range(3)]
    >>> layer_of_leaf(blocks, {"w": (3, 8, 4), "b": (3, 4)})["b"].tolist()
    [[0], [1], [2]]
    """
    owners: dict[str, Any] = {}
    for position, layer in enumerate(layers):
        for path in (layer.path, *layer.follows):
            if path not in shapes:
                msg = (
                    f"{path!r}, which follows layer {layer.name!r}, is not in the "
                    f"parameters; take it out of the layer's `follows`."
                )
                raise ValueError(msg)
            shape = shapes[path]
            if shape is None:
                continue
            where = _part_of_leaf(layer, path, shape, shapes[layer.path])
            owner = owners.get(path, np.full((1,) * len(shape), -1))
            wanted = [
                n if chosen != slice(None) else 1
                for n, chosen in zip(shape, where, strict=True)
            ]
            both = np.broadcast_shapes(owner.shape, tuple(wanted))
            owner = np.broadcast_to(owner, both).copy()
            taken = owner[where]
            if (taken >= 0).any():
                other = layers[int(taken.max())]
                msg = (
                    f"{path!r} belongs to two layers, {other.name!r} and "
                    f"{layer.name!r}; keep one of them, or take the path out of "
                    f"one layer's `follows`."
                )
                raise ValueError(msg)
            owner[where] = position
            owners[path] = owner
    return owners


def _part_of_leaf(layer, path, shape, kernel_shape) -> tuple[slice, ...]:
    """Return the slices of a leaf, one per axis, that belong to a layer."""
    where = [slice(None)] * len(shape)
    axes = layer.axes
    for axis, index in zip(axes.stacked, layer.index, strict=True):
        if axis >= len(shape) or shape[axis] != kernel_shape[axis]:
            msg = (
                f"{path!r} of shape {shape} follows one slice of {layer.path!r}, "
                f"stacked along axis {axis} of its shape {kernel_shape}, but is not "
                f"stacked alike; take it out of the layer's `follows`."
            )
            raise ValueError(msg)
        where[axis] = slice(index, index + 1)
    if layer.part is not None:
        axis, start, stop = layer.part
        if path != layer.path:
            axis = _output_axis_of_follower(layer, path, shape, kernel_shape)
        if axis is not None:
            where[axis] = slice(start, stop)
    return tuple(where)


def _output_axis_of_follower(layer, path, shape, kernel_shape) -> int | None:
    """Find the axis of a follower that runs along the split output axis.

    None where it runs along the inputs, as a norm before the kernel does: such a
    follower belongs to one part, whole.
    """
    free = [axis for axis in range(len(shape)) if axis not in layer.axes.stacked]
    outputs = layer.axes.output
    if tuple(shape[axis] for axis in free) == tuple(kernel_shape[a] for a in outputs):
        return free[outputs.index(layer.part[0])]
    wide = [axis for axis in free if shape[axis] != 1]
    if len(wide) == 1 and shape[wide[0]] == kernel_shape[layer.part[0]]:
        return wide[0]
    inputs = [kernel_shape[axis] for axis in layer.axes.reduction]
    if [shape[axis] for axis in wide] == inputs:
        return None
    msg = (
        f"{path!r} of shape {shape} follows a part of {layer.path!r} of shape "
        f"{kernel_shape}, but has no axis like its output axis {layer.part[0]}; take "
        f"it out of the layer's `follows`."
    )
    raise ValueError(msg)


def parts_of(
    layer: Layer, shape: Sequence[int], split: tuple[int, int | Sequence[int]] | None
) -> list[Layer]:
    """Cut a layer along an output axis: into so many parts, or into parts of sizes.

    Raises:
        ValueError: if the axis is no output, or the parts do not add up to it.
    """
    if split is None:
        return [layer]
    axis, parts = split
    if axis not in layer.axes.output:
        msg = (
            f"split: {layer.path!r} has the output axes {layer.axes.output}, got axis "
            f"{axis}."
        )
        raise ValueError(msg)
    size = shape[axis]
    if isinstance(parts, int):
        sizes = [size // parts] * parts if parts > 0 else []
    else:
        sizes = list(parts)
    if sum(sizes) != size or any(part < 1 for part in sizes):
        msg = (
            f"split: axis {axis} of {layer.path!r} has {size} outputs, which do not "
            f"fall into {parts} parts; give a divisor, or sizes that add up."
        )
        raise ValueError(msg)
    stops = itertools.accumulate(sizes)
    return [
        dataclasses.replace(layer, part=(axis, stop - size, stop))
        for size, stop in zip(sizes, stops, strict=True)
    ]


def with_followers(
    layers: Sequence[Layer],
    targets: Mapping[str, tuple[str, bool]],
    shapes: Mapping[str, tuple[int, ...]],
    across: Collection[str] = (),
) -> tuple[list[Layer], list[str]]:
    """Attach followers to layers; each is cut into slices and parts as its kernel is.

    A target is the path of a follower's kernel, and whether it feeds it, as a norm
    does: then it follows the first part alone, and the first slice if it is no stack.
    Those that run `across` are no stacks, whatever their sizes.

    Returns:
        The layers, and the paths of the leaves that follow none.
    """
    follows: dict[Layer, list[str]] = {}
    first: dict[Layer, list[str]] = {}
    cannot = []
    for path, (kernel, feeding) in targets.items():
        own = [layer for layer in layers if layer.path == kernel]
        if feeding:
            own = list({layer.index: layer for layer in reversed(own)}.values())
        fit = path not in across
        fit = fit and all(_fits(layer, path, shapes, whole=feeding) for layer in own)
        if fit:
            for layer in own:
                follows.setdefault(layer, []).append(path)
        elif feeding and len(own) == 1 and own[0].axes.stacked and not own[0].index:
            first.setdefault(own[0], []).append(path)
        else:
            cannot.append(path)
    found = []
    for layer in layers:
        alone = first.get(layer, [])
        own = expand_stacks([layer], shapes) if alone else [layer]
        for one in own:
            more = (*follows.get(layer, ()), *alone)
            found.append(dataclasses.replace(one, follows=more))
            alone = []
    return found, cannot


def _fits(
    layer: Layer, path: str, shapes: Mapping[str, tuple[int, ...]], *, whole: bool
) -> bool:
    """Whether a leaf can be cut into the slices of a layer, and into its parts too."""
    index = layer.index or (0,) * len(layer.axes.stacked)
    alone = dataclasses.replace(layer, index=index, follows=(path,))
    own = {p: shapes[p] for p in (layer.path, path)}
    try:
        layer_of_leaf([alone], own)
        if layer.part is None:
            return True
        axis = _output_axis_of_follower(layer, path, own[path], own[layer.path])
        return whole == (axis is None)
    except ValueError:
        return False
