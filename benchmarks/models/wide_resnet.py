"""Wide residual networks for small images, with norms before convolutions.

A 3x3 stem, three stages of pre-activation blocks, a norm, global average pooling and
one linear head.  All convolutions have biases; nothing is dropped out.  As in the
published experiments, the second convolution of a block has its stride, a shortcut is
a 1x1 convolution of the block's input without a norm, and the last norm moves its
averages nine times as fast as the others.  Inputs are NHWC.

References:
    Zagoruyko & Komodakis, `Wide Residual Networks
    <https://arxiv.org/abs/1605.07146>`_, 2016
"""

from collections.abc import Sequence

from flax import nnx
from jax import Array

from benchmarks.models.initialisation import Initialisation
from benchmarks.models.parts import conv, head, norm, residual_stages


class PreActivationBlock(nnx.Module):
    """Norm, ReLU, 3x3 convolution, twice, and a shortcut around them."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        init: Initialisation,
        rngs: nnx.Rngs,
    ):
        self.bn1 = norm(inputs, rngs=rngs)
        self.conv1 = conv(inputs, outputs, 3, bias=True, init=init, rngs=rngs)
        self.bn2 = norm(outputs, rngs=rngs)
        self.conv2 = conv(outputs, outputs, 3, stride, bias=True, init=init, rngs=rngs)
        self.shortcut = (
            conv(inputs, outputs, 1, stride, bias=True, init=init, rngs=rngs)
            if stride != 1 or inputs != outputs
            else None
        )

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Return F(x) + shortcut(x)."""
        y = self.conv1(nnx.relu(self.bn1(x, use_running_average=not train)))
        y = self.conv2(nnx.relu(self.bn2(y, use_running_average=not train)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class WideResNet(nnx.Module):
    """Stages of blocks; every stage but the first halves the resolution.

    Args:
        channels: channels of the stem, then of each stage.
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
        init: Initialisation,
        rngs: nnx.Rngs,
    ):
        self.image_channels = image_channels
        stem, *widths = channels
        self.conv1 = conv(image_channels, stem, 3, bias=True, init=init, rngs=rngs)
        self.blocks = residual_stages(
            PreActivationBlock, stem, widths, blocks, init=init, rngs=rngs
        )
        self.bn1 = norm(widths[-1], momentum=0.1, rngs=rngs)
        self.linear = head(widths[-1], num_classes, init=init, rngs=rngs)

    def __call__(self, images: Array, *, train: bool) -> Array:
        """Return the logits (batch, num_classes) of images (batch, H, W, channels)."""
        x = self.conv1(images)
        for block in self.blocks:
            x = block(x, train=train)
        x = nnx.relu(self.bn1(x, use_running_average=not train))
        return self.linear(x.mean((1, 2)))
