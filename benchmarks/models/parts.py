"""Convolutions, norms, and heads as all models of this package have them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

Initialize = Callable[[Array, tuple[int, ...], DTypeLike], Array]


class Initialization(NamedTuple):
    """How kernels are drawn, and biases, given the fan-in of their layer."""

    kernel: Initialize
    bias: Callable[[int], Initialize]


def _uniform_by_fan_in(fan_in: int) -> Initialize:
    bound = fan_in**-0.5

    def draw(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32):
        symmetric = 2 * nnx.initializers.uniform(1.0)(key, shape, dtype) - 1
        return (bound * symmetric).astype(dtype)

    return draw


# Truncated normal kernels of variance 1 / fan-in, and zero biases.
FLAX = Initialization(
    nnx.initializers.lecun_normal(), lambda _: nnx.initializers.zeros_init()
)

# Kernels and biases uniform within 1 / sqrt(fan-in): kaiming_uniform with a = sqrt(5)
# has the gain sqrt(2 / (1 + a²)) = sqrt(1/3) and the bound sqrt(3) gain / sqrt(fan-in).
TORCH = Initialization(
    nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), _uniform_by_fan_in
)


class Plan(NamedTuple):
    """The sizes of a network.

    Attributes:
        channels: channels of each stage; in a wide network, of the stem first.
        blocks: blocks of each stage; in VGG, convolutions.
        image_channels: channels of the images.
        num_classes: number of logits.
    """

    channels: Sequence[int]
    blocks: Sequence[int]
    image_channels: int
    num_classes: int


class Parts(NamedTuple):
    """A builder of layers, from how their weights are drawn and random numbers."""

    init: Initialization
    rngs: nnx.Rngs

    def conv(
        self, inputs: int, outputs: int, size: int, stride: int = 1, *, bias: bool
    ) -> nnx.Conv:
        """Build a size x size convolution that keeps the resolution at stride 1."""
        return nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides=stride,
            padding=size // 2,
            use_bias=bias,
            kernel_init=self.init.kernel,
            bias_init=self.init.bias(inputs * size**2),
            rngs=self.rngs,
        )

    def norm(self, channels: int, *, momentum: float = 0.9) -> nnx.BatchNorm:
        """Build a BatchNorm. PyTorch's momentum is 1 minus Flax's: 0.1 is 0.9 here."""
        return nnx.BatchNorm(channels, momentum=momentum, epsilon=1e-5, rngs=self.rngs)

    def head(self, inputs: int, num_classes: int) -> nnx.Linear:
        """Build the linear layer that gives the logits."""
        return nnx.Linear(
            inputs,
            num_classes,
            kernel_init=self.init.kernel,
            bias_init=self.init.bias(inputs),
            rngs=self.rngs,
        )

    def stages(
        self,
        block: Callable[["Parts", int, int, int], nnx.Module],
        inputs: int,
        plan: Plan,
    ) -> nnx.List:
        """Build stages of residual blocks; all but the first halve the resolution.

        A block is built from parts, inputs, outputs, and stride.
        """
        built = nnx.List([])
        for stage, (outputs, count) in enumerate(
            zip(plan.channels, plan.blocks, strict=True)
        ):
            for position in range(count):
                stride = 2 if stage > 0 and position == 0 else 1
                built.append(block(self, inputs, outputs, stride))
                inputs = outputs
        return built
