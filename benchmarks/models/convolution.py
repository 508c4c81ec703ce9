"""A convolution whose gradients stay fast inside a loop on the CPU.

Inside a loop, XLA's CPU compiler has a fast kernel for one layout of convolutions only,
NHWC with HWIO (jax-ml/jax#12868, open since 2022). The forward pass has that layout.
The two gradients, as JAX writes them, do not, so an epoch in one `lax.scan` took 11 to
14 times as long as the same steps one by one. Written with explicit transposes, they
are as fast in a loop as outside. Other backends keep JAX's own gradients.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

NHWC = ("NHWC", "HWIO", "NHWC")

Pair = tuple[int, int]


def convolution(
    inputs: Array,
    kernel: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[Pair],
    **options: Any,
) -> Array:
    """Convolve images; stands in for `lax.conv_general_dilated` in `nnx.Conv`.

    Anything but two spatial dimensions without dilation and groups goes to
    `lax.conv_general_dilated` as it is.
    """
    plain = (
        jax.default_backend() == "cpu"
        and inputs.ndim == 4
        and set(options.get("lhs_dilation") or (1,)) == {1}
        and set(options.get("rhs_dilation") or (1,)) == {1}
        and options.get("feature_group_count", 1) == 1
    )
    if not plain:
        return lax.conv_general_dilated(
            inputs, kernel, window_strides, padding, **options
        )
    strides = (window_strides[0], window_strides[1])
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(
            inputs.shape[1:3], kernel.shape[:2], strides, padding
        )
    (top, bottom), (left, right) = padding
    return _convolution(inputs, kernel, strides, ((top, bottom), (left, right)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolution(
    inputs: Array, kernel: Array, strides: Pair, padding: tuple[Pair, Pair]
) -> Array:
    return lax.conv_general_dilated(
        inputs, kernel, strides, padding, dimension_numbers=NHWC
    )


def _forward(
    inputs: Array, kernel: Array, strides: Pair, padding: tuple[Pair, Pair]
) -> tuple[Array, tuple[Array, Array]]:
    return _convolution(inputs, kernel, strides, padding), (inputs, kernel)


def _backward(
    strides: Pair,
    padding: tuple[Pair, Pair],
    residuals: tuple[Array, Array],
    gradient: Array,
) -> tuple[Array, Array]:
    inputs, kernel = residuals
    input_padding, kernel_padding = [], []
    for axis in range(2):
        size, window = inputs.shape[axis + 1], kernel.shape[axis]
        reach = (gradient.shape[axis + 1] - 1) * strides[axis] + 1
        before = window - 1 - padding[axis][0]
        input_padding.append((before, size + window - 1 - reach - before))
        before = padding[axis][0]
        kernel_padding.append((before, window - 1 + reach - size - before))
    # Each input gathers the gradients of the windows that it was in.
    input_gradient = lax.conv_general_dilated(
        gradient,
        jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
        (1, 1),
        input_padding,
        lhs_dilation=strides,
        dimension_numbers=NHWC,
    )
    # Channels play the batch, images the channels, and the gradient the kernel.
    kernel_gradient = lax.conv_general_dilated(
        inputs.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        (1, 1),
        kernel_padding,
        rhs_dilation=strides,
        dimension_numbers=NHWC,
    )
    return input_gradient, kernel_gradient.transpose(1, 2, 0, 3)


_convolution.defvjp(_forward, _backward)
