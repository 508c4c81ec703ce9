"""Networks for small images, built as for CIFAR: ResNets, VGG, and wide ResNets.

Inputs are NHWC, of any resolution: the published networks for 64 x 64 pixels are those
for 32 x 32. Every network ends with one linear head on the mean of all positions.

References:
    He et al, `Deep Residual Learning for Image Recognition
    <https://arxiv.org/abs/1512.03385>`_, 2015
    Simonyan & Zisserman, `Very Deep Convolutional Networks for Large-Scale Image
    Recognition <https://arxiv.org/abs/1409.1556>`_, 2014
    Zagoruyko & Komodakis, `Wide Residual Networks
    <https://arxiv.org/abs/1605.07146>`_, 2016
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import Array


class Plan(NamedTuple):
    """The sizes of a network, and a builder of its layers.

    Attributes:
        channels: channels of each stage; in a wide network, of the stem first.
        blocks: blocks of each stage; in VGG, convolutions.
        image_channels: channels of the images.
        num_classes: number of logits.
        rngs: random numbers for the initial weights.
        torch: whether they are drawn as PyTorch draws them, instead of as Flax does.
    """

    channels: Sequence[int]
    blocks: Sequence[int]
    image_channels: int
    num_classes: int
    rngs: nnx.Rngs
    torch: bool = False

    def conv(
        self, inputs: int, outputs: int, size: int, stride: int = 1, *, bias: bool
    ) -> nnx.Conv:
        """Build a size x size convolution that keeps the resolution at stride 1."""
        drawn = self._initialization(inputs * size**2)
        options: dict[str, Any] = {"strides": stride, "padding": size // 2} | drawn
        return nnx.Conv(
            inputs, outputs, (size, size), use_bias=bias, **options, rngs=self.rngs
        )

    def norm(self, channels: int, *, momentum: float = 0.9) -> nnx.BatchNorm:
        """Build a BatchNorm. PyTorch's momentum is 1 minus Flax's: 0.1 is 0.9 here."""
        return nnx.BatchNorm(channels, momentum=momentum, epsilon=1e-5, rngs=self.rngs)

    def head(self) -> nnx.Linear:
        """Build the linear layer that gives the logits."""
        inputs = self.channels[-1]
        options = self._initialization(inputs)
        return nnx.Linear(inputs, self.num_classes, **options, rngs=self.rngs)

    def _initialization(self, fan_in: int) -> dict[str, Any]:
        """Return how a kernel and a bias are drawn.

        Flax: truncated normal kernels of variance 1 / fan-in, and zero biases. PyTorch:
        both uniform within 1 / sqrt(fan-in): kaiming_uniform with a = sqrt(5) has the
        gain sqrt(2 / (1 + a²)) = sqrt(1/3) and the bound sqrt(3) gain / sqrt(fan-in).
        """
        if not self.torch:
            return {"kernel_init": nnx.initializers.lecun_normal()}

        def uniform(key: Array, shape: Sequence[int], dtype, *_) -> Array:
            bound = fan_in**-0.5
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return {"kernel_init": uniform, "bias_init": uniform}

    def stages(
        self, block: Callable[..., nnx.Module], inputs: int, channels: Sequence[int]
    ) -> nnx.List:
        """Build stages of residual blocks; all but the first halve the resolution.

        A block is built from a plan, inputs, outputs, and stride.
        """
        built = nnx.List([])
        for outputs, count in zip(channels, self.blocks, strict=True):
            for position in range(count):
                halves = len(built) > 0 and position == 0
                built.append(block(self, inputs, outputs, 2 if halves else 1))
                inputs = outputs
        return built


class Shortcut(nnx.Module):
    """The 1x1 convolution around a block that changes the shape."""

    def __init__(self, plan: Plan, inputs: int, outputs: int, stride: int):
        self.conv1 = plan.conv(inputs, outputs, 1, stride, bias=False)
        self.bn1 = plan.norm(outputs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Project x to the shape after the block."""
        return self.bn1(self.conv1(x), use_running_average=not train)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, plan: Plan, inputs: int, outputs: int, stride: int):
        self.conv1 = plan.conv(inputs, outputs, 3, stride, bias=False)
        self.bn1 = plan.norm(outputs)
        self.conv2 = plan.conv(outputs, outputs, 3, bias=False)
        self.bn2 = plan.norm(outputs)
        reshapes = stride != 1 or inputs != outputs
        self.shortcut = Shortcut(plan, inputs, outputs, stride) if reshapes else None

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Return relu(F(x) + shortcut(x))."""
        y = nnx.relu(self.bn1(self.conv1(x), use_running_average=not train))
        y = self.bn2(self.conv2(y), use_running_average=not train)
        return nnx.relu(
            y + (x if self.shortcut is None else self.shortcut(x, train=train))
        )


class ResNet(nnx.Module):
    """A 3x3 stem without pooling, then stages of basic blocks, without biases.

    Every stage but the first halves the resolution. Where a block changes its shape,
    the shortcut is a 1x1 convolution with a BatchNorm.
    """

    def __init__(self, plan: Plan):
        stem = plan.channels[0]
        self.conv1 = plan.conv(plan.image_channels, stem, 3, bias=False)
        self.bn1 = plan.norm(stem)
        self.blocks = plan.stages(BasicBlock, stem, plan.channels)
        self.linear = plan.head()

    def __call__(self, images: Array, *, train: bool) -> Array:
        """Return the logits (batch, num_classes) of images (batch, H, W, channels)."""
        x = nnx.relu(self.bn1(self.conv1(images), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train=train)
        return self.linear(x.mean((1, 2)))


class VGG(nnx.Module):
    """Stages of 3x3 convolutions with biases, each with a norm and a ReLU.

    After each stage, a 2x2 maximum halves the resolution.
    """

    def __init__(self, plan: Plan):
        self.stages = tuple(plan.blocks)
        self.convs, self.norms = nnx.List([]), nnx.List([])
        inputs = plan.image_channels
        for outputs, count in zip(plan.channels, plan.blocks, strict=True):
            for _ in range(count):
                self.convs.append(plan.conv(inputs, outputs, 3, bias=True))
                self.norms.append(plan.norm(outputs))
                inputs = outputs
        self.linear = plan.head()

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


class PreActivationBlock(nnx.Module):
    """Norm, ReLU, 3x3 convolution, twice, and a shortcut around them."""

    def __init__(self, plan: Plan, inputs: int, outputs: int, stride: int):
        self.bn1 = plan.norm(inputs)
        self.conv1 = plan.conv(inputs, outputs, 3, bias=True)
        self.bn2 = plan.norm(outputs)
        self.conv2 = plan.conv(outputs, outputs, 3, stride, bias=True)
        reshapes = stride != 1 or inputs != outputs
        self.shortcut = (
            plan.conv(inputs, outputs, 1, stride, bias=True) if reshapes else None
        )

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Return F(x) + shortcut(x)."""
        y = self.conv1(nnx.relu(self.bn1(x, use_running_average=not train)))
        y = self.conv2(nnx.relu(self.bn2(y, use_running_average=not train)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class WideResNet(nnx.Module):
    """A 3x3 stem, three stages of pre-activation blocks, and a norm, with biases.

    As in the published experiments, nothing is dropped out, the second convolution of a
    block has its stride, a shortcut is a 1x1 convolution of the block's input without a
    norm, and the last norm moves its averages nine times as fast as the others.
    """

    def __init__(self, plan: Plan):
        stem, *channels = plan.channels
        self.conv1 = plan.conv(plan.image_channels, stem, 3, bias=True)
        self.blocks = plan.stages(PreActivationBlock, stem, channels)
        self.bn1 = plan.norm(channels[-1], momentum=0.1)
        self.linear = plan.head()

    def __call__(self, images: Array, *, train: bool) -> Array:
        """Return the logits (batch, num_classes) of images (batch, H, W, channels)."""
        x = self.conv1(images)
        for block in self.blocks:
            x = block(x, train=train)
        x = nnx.relu(self.bn1(x, use_running_average=not train))
        return self.linear(x.mean((1, 2)))
