"""Layers read off the forward pass: order, axes and followers."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tb_optax.assignment import layer_of_leaf
from tb_optax.forward.association import POLICIES, followers
from tb_optax.forward.execution import slices_in_order
from tb_optax.forward.interpreter import Interpreter
from tb_optax.forward.program import program_of
from tb_optax.forward.reading import read_kernels
from tb_optax.forward.record import Record
from tb_optax.layers import Layer, MatrixAxes
from tb_optax.patterns import match_paths

Parts = int | Sequence[int]


def trace_layers(
    fn: Callable[..., Any],
    params: Any = None,
    *inputs: Any,
    axes: Mapping[str, MatrixAxes | None] | None = None,
    strict: bool = True,
    norms: str = "after",
    split: Mapping[str, tuple[int, Parts]] | None = None,
) -> tuple[Layer, ...]:
    """Finds the layers of a model in the order in which its forward pass runs them."""
    _check(norms)
    program = program_of(fn, params, inputs)
    arrays = {path: leaf for path, leaf in program.leaves.items() if leaf.is_array}
    shapes = {path: leaf.shape for path, leaf in arrays.items()}
    given = match_paths("axes", axes, arrays)
    parts = match_paths("split", split, arrays)
    record = Record(shapes, given)
    Interpreter(record).run(program.jaxpr, program.values)
    kernels = read_kernels(record)
    if kernels.unclear:
        _complain(kernels.unclear, shapes, strict)
    follows: dict[str, list[str]] = {}
    for path, kernel in followers(record, POLICIES[norms]).items():
        if kernel in kernels.axes and path not in kernels.axes:
            follows.setdefault(kernel, []).append(path)
    layers = []
    for path, index in slices_in_order(record, kernels.axes):
        layer = Layer(path, kernels.axes[path], index=index)
        for piece in _pieces(layer, shapes[path], parts.get(path)):
            fitting = [f for f in follows.get(path, ()) if _fits(piece, f, shapes)]
            layers.append(dataclasses.replace(piece, follows=tuple(fitting)))
    return tuple(layers)


def _check(norms: str) -> None:
    if norms not in POLICIES:
        allowed = ", ".join(map(repr, POLICIES))
        msg = f"norms must be one of {allowed}, got norms = {norms!r}."
        raise ValueError(msg)


def _complain(
    unclear: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], strict: bool
) -> None:
    """Raises for the leaves whose axes cannot be told, or warns and goes on."""
    listed = "\n".join(
        f"  {path!r} of shape {shapes[path]}: {reason}"
        for path, reason in unclear.items()
    )
    first = next(iter(unclear))
    remedy = (
        f"Pass axes={{{first!r}: MatrixAxes(reduction=..., output=..., pooled=..., "
        f"stacked=...)}}, or None for a leaf that is no kernel; patterns such as "
        f"'*/kernel' settle many at once."
    )
    what = f"trace_layers cannot tell how to read {len(unclear)} leaves"
    if strict:
        msg = f"{what}:\n{listed}\n{remedy}"
        raise ValueError(msg)
    warnings.warn(f"{what} and leaves them out:\n{listed}\n{remedy}", stacklevel=3)


def _pieces(
    layer: Layer, shape: tuple[int, ...], split: tuple[int, Parts] | None
) -> list[Layer]:
    """A layer cut along an output axis, or whole."""
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
    pieces, start = [], 0
    for part in sizes:
        pieces.append(dataclasses.replace(layer, part=(axis, start, start + part)))
        start += part
    return pieces


def _fits(layer: Layer, path: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a leaf can be cut as the layer is: into the same slices and parts."""
    index = layer.index or (0,) * len(layer.axes.stacked)
    try:
        layer_of_leaf(
            [dataclasses.replace(layer, index=index, follows=(path,))], shapes
        )
    except ValueError:
        return False
    return True
