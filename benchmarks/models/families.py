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

from flax import nnx
from jax import Array

from benchmarks.models.parts import Parts, Plan


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
    """A 3x3 stem without pooling, then stages of basic blocks, without biases.

    Every stage but the first halves the resolution. Where a block changes its shape,
    the shortcut is a 1x1 convolution with a BatchNorm.
    """

    def __init__(self, parts: Parts, plan: Plan):
        self.image_channels = plan.image_channels
        self.conv1 = parts.conv(plan.image_channels, plan.channels[0], 3, bias=False)
        self.bn1 = parts.norm(plan.channels[0])
        self.blocks = parts.stages(BasicBlock, plan.channels[0], plan)
        self.linear = parts.head(plan.channels[-1], plan.num_classes)

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

    def __init__(self, parts: Parts, plan: Plan):
        self.image_channels = plan.image_channels
        self.stages = tuple(plan.blocks)
        self.convs, self.norms = nnx.List([]), nnx.List([])
        inputs = plan.image_channels
        for outputs, count in zip(plan.channels, plan.blocks, strict=True):
            for _ in range(count):
                self.convs.append(parts.conv(inputs, outputs, 3, bias=True))
                self.norms.append(parts.norm(outputs))
                inputs = outputs
        self.linear = parts.head(inputs, plan.num_classes)

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
    """A 3x3 stem, three stages of pre-activation blocks, and a norm, with biases.

    As in the published experiments, nothing is dropped out, the second convolution of a
    block has its stride, a shortcut is a 1x1 convolution of the block's input without a
    norm, and the last norm moves its averages nine times as fast as the others.
    """

    def __init__(self, parts: Parts, plan: Plan):
        self.image_channels = plan.image_channels
        stem, *widths = plan.channels
        plan = plan._replace(channels=widths)
        self.conv1 = parts.conv(plan.image_channels, stem, 3, bias=True)
        self.blocks = parts.stages(PreActivationBlock, stem, plan)
        self.bn1 = parts.norm(widths[-1], momentum=0.1)
        self.linear = parts.head(widths[-1], plan.num_classes)

    def __call__(self, images: Array, *, train: bool) -> Array:
        """Return the logits (batch, num_classes) of images (batch, H, W, channels)."""
        x = self.conv1(images)
        for block in self.blocks:
            x = block(x, train=train)
        x = nnx.relu(self.bn1(x, use_running_average=not train))
        return self.linear(x.mean((1, 2)))
