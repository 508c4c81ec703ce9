"""Submatrices of equal shape, so that exponents do not depend on the aspect ratio."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tb_optax.checks import check_int, check_number
from tb_optax.layers import Layer


class Cut(NamedTuple):
    """The matrices of one layer, all of one shape, inputs first.

    They are in blocks, each of which pools its matrices and has a fit of its own.
    """

    blocks: int
    matrices: int
    shape: tuple[int, int]

    @property
    def eigenvalue_count(self) -> int:
        """The number of eigenvalues of the layer, over all blocks."""
        return self.blocks * self.matrices * min(self.shape)


@dataclasses.dataclass(frozen=True)
class windows:
    r"""Take the spectra of submatrices with a fixed ratio of sides (FARMS).

    The exponent of a random matrix depends on its aspect ratio alone.

    A kernel without pooled axes, (in, out), is covered by overlapping windows of `rows`
    outputs and int(rows·ratio) inputs. Along a side of s entries, a window of w has
    the starts

        min(a·step, s - w),  a = 0, 1, ...,  step = max(1, (s - w) // (count - 1)),

    at most `count` of them. The eigenvalues of all windows share one ESD and one fit.

    A convolution is cut position by position: with R >= C the sides of a position's
    matrix, R // C blocks follow each other along the longer side, C x floor(C·ratio)
    where ratio <= 1, and else floor(C / ratio) x C; what is left over is not used.
    The positions of a block share one ESD. Columns of the table are means over the
    blocks that can be fitted, counts are sums.

    The published code differs in three places, which `published=True` restores: a side
    that is shorter than its window counts whole here, where a negative start there
    takes only its last w - s entries if s > w / 2; a `count` of 1 is one window here,
    and an error there; C·ratio is C // (1/ratio) there, which rounds 14 to 13.

    Args:
        ratio: inputs of a window for each of its outputs, a finite number > 0.
        rows: outputs of a window, an int >= 1; it does not bind convolutions.
        count: most windows along a side, an int >= 1, or None with `step`.
        step: entries between two windows, an int >= 1, in place of `count`: starts
            are 0, step, ..., and the far edge may be left out.
        published: whether to cut exactly as the published code does.

    Raises:
        ValueError: if a field is out of range, or not one of count and step is given.

    >>> windows(rows=2000, count=10)
    windows(ratio=1.0, rows=2000, count=10, step=None, published=False)

    References:
        Hu et al, `Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias
        <https://arxiv.org/abs/2506.06280>`_, 2025
    """

    ratio: int | float = 1.0
    rows: int = 100
    count: int | None = 9
    step: int | None = None
    published: bool = False

    def __post_init__(self):
        check_number("ratio", self.ratio, above=0)
        check_int("rows", self.rows, at_least=1)
        if (self.count is None) == (self.step is None):
            msg = (
                f"windows need count or step, one of them None, got count = "
                f"{self.count!r} and step = {self.step!r}."
            )
            raise ValueError(msg)
        if self.count is not None:
            check_int("count", self.count, at_least=2 if self.published else 1)
        else:
            check_int("step", self.step, at_least=1)

    def cut_of(self, inputs: int, outputs: int, positions: int | None) -> Cut:
        """Return the geometry of a kernel; `positions` is None without pooled axes."""
        if positions is None:
            (columns, width), (rows, height) = self._grid(inputs, outputs)
            return Cut(1, len(rows) * len(columns), (width, height))
        height, width = self._block(min(inputs, outputs))
        shape = (width, height) if outputs >= inputs else (height, width)
        return Cut(max(inputs, outputs) // min(inputs, outputs), positions, shape)

    def cut(
        self, stack: Float[Array, "layers pooled inputs outputs"], pooled: bool
    ) -> Float[Array, "blocks matrices rows columns"]:
        """Cut matrices; the blocks of a layer follow each other."""
        inputs, outputs = stack.shape[2:]
        if not pooled:
            (columns, width), (rows, height) = self._grid(inputs, outputs)
            # (rows, columns, layers, 1, inputs, outputs)
            cut = _slices(_slices(stack, 2, columns, width), 4, rows, height)
            cut = jnp.moveaxis(cut[:, :, :, 0], 2, 0)
            return cut.reshape(len(stack), -1, *cut.shape[3:])
        cut = self.cut_of(inputs, outputs, stack.shape[1])
        width, height = cut.shape
        if outputs >= inputs:
            stack = stack[:, :, :width, : cut.blocks * height]
            stack = stack.reshape(*stack.shape[:3], cut.blocks, height)
            stack = jnp.moveaxis(stack, 3, 1)
        else:
            stack = stack[:, :, : cut.blocks * width, :height]
            stack = stack.reshape(*stack.shape[:2], cut.blocks, width, height)
            stack = jnp.moveaxis(stack, 2, 1)
        return stack.reshape(-1, *stack.shape[2:])

    def _grid(self, inputs: int, outputs: int):
        """Return where windows start, and their size, along inputs and outputs."""
        columns = self._starts(inputs, max(1, int(self.rows * self.ratio)))
        return columns, self._starts(outputs, self.rows)

    def _starts(self, size: int, window: int) -> tuple[list[int], int]:
        """Return where windows start along a side, and how much of it each takes."""
        if size < window and self.published and self.count is not None:
            first = max(0, 2 * size - window)
            return [first], size - first
        room = size - window
        if room <= 0 or self.count == 1:
            return [0], min(size, window)
        step = self.step or max(1, room // ((self.count or 0) - 1))
        number = min(self.count or size, room // step + 1)
        return [min(a * step, room) for a in range(number)], window

    def _block(self, side: int) -> tuple[int, int]:
        """Return the longer and shorter side's share of a block of a convolution."""
        if self.ratio > 1:
            rows = side // self.ratio if self.published else side / self.ratio
            return max(1, math.floor(rows)), side
        columns = side // (1 / self.ratio) if self.published else side * self.ratio
        return side, max(1, math.floor(columns))


# None takes kernels whole.
Windows: TypeAlias = windows | None


def cut_of(layer: Layer, shape: tuple[int, ...], cut: Windows) -> Cut:
    """Return the geometry of a layer's matrices in a kernel of this shape.

    >>> from tb_optax import MatrixAxes
    >>> conv = Layer("conv", MatrixAxes((2,), (3,), pooled=(0, 1)))
    >>> cut_of(conv, (3, 3, 16, 32), None)
    Cut(blocks=1, matrices=9, shape=(16, 32))
    >>> cut_of(conv, (3, 3, 16, 32), windows())
    Cut(blocks=2, matrices=9, shape=(16, 16))
    """
    inputs, outputs = layer.matrix_shape(shape)
    positions = math.prod(shape[axis] for axis in layer.axes.pooled)
    if cut is None:
        return Cut(1, positions, (inputs, outputs))
    return cut.cut_of(inputs, outputs, positions if layer.axes.pooled else None)


def _slices(array, axis: int, starts: Sequence[int], size: int):
    """Stack slices of one axis along a new first axis."""
    return jax.vmap(
        lambda start: jax.lax.dynamic_slice_in_dim(array, start, size, axis)
    )(jnp.asarray(np.asarray(starts, np.int32)))
