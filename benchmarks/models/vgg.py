"""VGG for small images: convolutions with BatchNorm, and one linear head.

Convolutions have biases. After each stage, a 2x2 maximum halves the resolution, so that
32 x 32 pixels end as one position. Of larger images, the head sees the mean of the
positions that are left. Inputs are NHWC.

References:
    Simonyan & Zisserman, `Very Deep Convolutional Networks for Large-Scale Image
    Recognition <https://arxiv.org/abs/1409.1556>`_, 2014
"""

from collections.abc import Sequence

from flax import nnx
from jax import Array

from benchmarks.models.parts import Parts


class VGG(nnx.Module):
    """Stages of 3x3 convolutions, each with a norm and a ReLU.

    Args:
        parts: builds the layers.
        channels: channels of each stage.
        blocks: convolutions of each stage.
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
        self.stages = tuple(blocks)
        self.convs, self.norms = nnx.List([]), nnx.List([])
        inputs = image_channels
        for outputs, count in zip(channels, blocks, strict=True):
            for _ in range(count):
                self.convs.append(parts.conv(inputs, outputs, 3, bias=True))
                self.norms.append(parts.norm(outputs))
                inputs = outputs
        self.linear = parts.head(inputs, num_classes)

    def __call__(self, images: Array, *, train: bool) -> Array:
        """Return the logits (batch, num_classes) of images (batch, H, W, channels)."""
        x = images
        layers = zip(self.convs, self.norms, strict=True)
        for count in self.stages:
            for _ in range(count):
                convolve, normalize = next(layers)
                x = nnx.relu(normalize(convolve(x), use_running_average=not train))
            # An odd side is rounded up, so that smaller images pass too.
            x = nnx.max_pool(x, (2, 2), (2, 2), "SAME")
        return self.linear(x.mean((1, 2)))
