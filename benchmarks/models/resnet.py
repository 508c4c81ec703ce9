"""Residual networks for small images, built as for CIFAR.

A 3x3 stem without pooling, stages of basic blocks, global average pooling, and one
linear head. Convolutions have no biases. Where a block changes its shape, the shortcut
is a 1x1 convolution with a BatchNorm. Inputs are NHWC, of any resolution: the published
networks for 64 x 64 pixels are those for 32 x 32.

References:
    He et al, `Deep Residual Learning for Image Recognition
    <https://arxiv.org/abs/1512.03385>`_, 2015
"""

from collections.abc import Sequence

from flax import nnx
from jax import Array

from benchmarks.models.parts import Parts


class Shortcut(nnx.Module):
    """The 1x1 convolution around a block that changes the shape."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int):
        self.conv1 = parts.conv(inputs, outputs, 1, stride, bias=False)
        self.bn1 = parts.norm(outputs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Project x to the shape after the block."""
        return self.bn1(self.conv1(x), use_running_average=not train)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int):
        self.conv1 = parts.conv(inputs, outputs, 3, stride, bias=False)
        self.bn1 = parts.norm(outputs)
        self.conv2 = parts.conv(outputs, outputs, 3, bias=False)
        self.bn2 = parts.norm(outputs)
        reshapes = stride != 1 or inputs != outputs
        self.shortcut = Shortcut(parts, inputs, outputs, stride) if reshapes else None

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
        parts: builds the layers.
        channels: channels of each stage; the stem has those of the first.
        blocks: blocks of each stage.
        image_channels: channels of the images.
        num_classes: number of logits.
    """

    def __init__(
        self,
        parts: Parts,
        channels: Sequence[int],
        blocks: Sequence[int],
        *,
        image_channels: int,
        num_classes: int,
    ):
        self.image_channels = image_channels
        self.conv1 = parts.conv(image_channels, channels[0], 3, bias=False)
        self.bn1 = parts.norm(channels[0])
        self.blocks = parts.stages(BasicBlock, channels[0], channels, blocks)
        self.linear = parts.head(channels[-1], num_classes)

    def __call__(self, images: Array, *, train: bool) -> Array:
        """Return the logits (batch, num_classes) of images (batch, H, W, channels)."""
        x = nnx.relu(self.bn1(self.conv1(images), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train=train)
        return self.linear(x.mean((1, 2)))
