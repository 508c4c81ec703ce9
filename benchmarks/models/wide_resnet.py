"""Wide residual networks for small images, with norms before convolutions.

A 3x3 stem, three stages of pre-activation blocks, a norm, global average pooling, and
one linear head. All convolutions have biases, and there is no dropout. As in the
published experiments, the second convolution of a block has its stride, a shortcut is a
1x1 convolution of the block's input without a norm, and the last norm moves its
averages nine times as fast as the others. Inputs are NHWC.

References:
    Zagoruyko & Komodakis, `Wide Residual Networks
    <https://arxiv.org/abs/1605.07146>`_, 2016
"""

from collections.abc import Sequence

from flax import nnx
from jax import Array

from benchmarks.models.parts import Parts


class PreActivationBlock(nnx.Module):
    """Norm, ReLU, 3x3 convolution, twice, and a shortcut around them."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int):
        self.bn1 = parts.norm(inputs)
        self.conv1 = parts.conv(inputs, outputs, 3, bias=True)
        self.bn2 = parts.norm(outputs)
        self.conv2 = parts.conv(outputs, outputs, 3, stride, bias=True)
        reshapes = stride != 1 or inputs != outputs
        self.shortcut = (
            parts.conv(inputs, outputs, 1, stride, bias=True) if reshapes else None
        )

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Return F(x) + shortcut(x)."""
        y = self.conv1(nnx.relu(self.bn1(x, use_running_average=not train)))
        y = self.conv2(nnx.relu(self.bn2(y, use_running_average=not train)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class WideResNet(nnx.Module):
    """Stages of blocks; every stage but the first halves the resolution.

    Args:
        parts: builds the layers.
        channels: channels of the stem, then of each stage.
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
        stem, *widths = channels
        self.conv1 = parts.conv(image_channels, stem, 3, bias=True)
        self.blocks = parts.stages(PreActivationBlock, stem, widths, blocks)
        self.bn1 = parts.norm(widths[-1], momentum=0.1)
        self.linear = parts.head(widths[-1], num_classes)

    def __call__(self, images: Array, *, train: bool) -> Array:
        """Return the logits (batch, num_classes) of images (batch, H, W, channels)."""
        x = self.conv1(images)
        for block in self.blocks:
            x = block(x, train=train)
        x = nnx.relu(self.bn1(x, use_running_average=not train))
        return self.linear(x.mean((1, 2)))
