"""How weights start: by Flax's rules or by PyTorch's."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

Initialise = Callable[[Array, tuple[int, ...], DTypeLike], Array]


class Initialisation(NamedTuple):
    """The draws of a layer.

    Attributes:
        kernel: draws a kernel, inputs on the axis before the last.
        bias: from the fan-in of the kernel to what draws the bias.
    """

    kernel: Initialise
    bias: Callable[[int], Initialise]


def _zeros(fan_in: int) -> Initialise:
    del fan_in
    return nnx.initializers.zeros_init()


def _uniform_by_fan_in(fan_in: int) -> Initialise:
    bound = fan_in**-0.5

    def draw(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32):
        symmetric = 2 * nnx.initializers.uniform(1.0)(key, shape, dtype) - 1
        return (bound * symmetric).astype(dtype)

    return draw


# Normal kernels of variance 1 / fan-in, truncated, and biases of 0.
FLAX = Initialisation(nnx.initializers.lecun_normal(), _zeros)

# Kernels and biases uniform within 1 / sqrt(fan-in): kaiming_uniform with a = sqrt(5)
# has the gain sqrt(2 / (1 + a²)) = sqrt(1/3) and the bound sqrt(3) gain / sqrt(fan-in).
TORCH = Initialisation(
    nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), _uniform_by_fan_in
)

INITIALISATIONS = {"flax": FLAX, "torch": TORCH}
