"""Residual networks for small images, built as for CIFAR.

A 3x3 stem without pooling, stages of basic blocks, global average pooling and one
linear head.  Convolutions have no biases; where a block changes its shape, the
shortcut is a 1x1 convolution with a BatchNorm.  Inputs are NHWC, of any resolution:
the published networks for 64 x 64 pixels are those for 32 x 32.

References:
    He et al, `Deep Residual Learning for Image Recognition
    <https://arxiv.org/abs/1512.03385>`_, 2015
"""

from collections.abc import Sequence

from flax import nnx
from jax import Array

from benchmarks.models.initialisation import FLAX, Initialisation
from benchmarks.models.parts import conv, head, norm, residual_stages


class Shortcut(nnx.Module):
    """The 1x1 convolution around a block that changes the shape."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        init: Initialisation,
        rngs: nnx.Rngs,
    ):
        self.conv1 = conv(inputs, outputs, 1, stride, bias=False, init=init, rngs=rngs)
        self.bn1 = norm(outputs, rngs=rngs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Project x to the shape behind the block."""
        return self.bn1(self.conv1(x), use_running_average=not train)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        init: Initialisation,
        rngs: nnx.Rngs,
    ):
        self.conv1 = conv(inputs, outputs, 3, stride, bias=False, init=init, rngs=rngs)
        self.bn1 = norm(outputs, rngs=rngs)
        self.conv2 = conv(outputs, outputs, 3, bias=False, init=init, rngs=rngs)
        self.bn2 = norm(outputs, rngs=rngs)
        reshapes = stride != 1 or inputs != outputs
        self.shortcut = (
            Shortcut(inputs, outputs, stride, init=init, rngs=rngs)
            if reshapes
            else None
        )

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Return relu(F(x) + shortcut(x))."""
        y = nnx.relu(self.bn1(self.conv1(x), use_running_average=not train))
        y = self.bn2(self.conv2(y), use_running_average=not train)
        if self.shortcut is not None:
            x = self.shortcut(x, train=train)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """Stages of basic blocks; every stage but the first halves the resolution.

    Args:
        channels: channels of each stage; the stem has those of the first.
        blocks: blocks of each stage.
        image_channels: channels of the images.
        num_classes: number of logits.
        init: how weights start.
        rngs: random numbers for the initial weights.
    """

    def __init__(
        self,
        channels: Sequence[int],
        blocks: Sequence[int],
        *,
        image_channels: int,
        num_classes: int,
        init: Initialisation = FLAX,
        rngs: nnx.Rngs,
    ):
        self.image_channels = image_channels
        self.conv1 = conv(
            image_channels, channels[0], 3, bias=False, init=init, rngs=rngs
        )
        self.bn1 = norm(channels[0], rngs=rngs)
        self.blocks = residual_stages(
            BasicBlock, channels[0], channels, blocks, init=init, rngs=rngs
        )
        self.linear = head(channels[-1], num_classes, init=init, rngs=rngs)

    def __call__(self, images: Array, *, train: bool) -> Array:
        """Return the logits (batch, num_classes) of images (batch, H, W, channels)."""
        x = nnx.relu(self.bn1(self.conv1(images), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train=train)
        return self.linear(x.mean((1, 2)))
