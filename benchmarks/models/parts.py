"""Convolutions, norms and heads as all models of this package have them."""

from collections.abc import Callable, Sequence

from flax import nnx

from benchmarks.models.convolution import convolution
from benchmarks.models.initialisation import Initialisation


def conv(
    inputs: int,
    outputs: int,
    size: int,
    stride: int = 1,
    *,
    bias: bool,
    init: Initialisation,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Build a size x size convolution that keeps the resolution at stride 1."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=bias,
        conv_general_dilated=convolution,
        kernel_init=init.kernel,
        bias_init=init.bias(inputs * size**2),
        rngs=rngs,
    )


def norm(channels: int, *, momentum: float = 0.9, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Build a BatchNorm; PyTorch counts momentum from the other end: its 0.1 is 0.9."""
    return nnx.BatchNorm(channels, momentum=momentum, epsilon=1e-5, rngs=rngs)


def residual_stages(
    block: Callable[..., nnx.Module],
    inputs: int,
    channels: Sequence[int],
    blocks: Sequence[int],
    *,
    init: Initialisation,
    rngs: nnx.Rngs,
) -> nnx.List:
    """Build stages of residual blocks; all but the first halve the resolution.

    Args:
        block: `(inputs, outputs, stride)` to a block.
        inputs: channels that come in.
        channels: channels of each stage.
        blocks: blocks of each stage.
        init: how weights start.
        rngs: random numbers for the initial weights.
    """
    built = nnx.List([])
    for stage, (outputs, count) in enumerate(zip(channels, blocks, strict=True)):
        for position in range(count):
            stride = 2 if stage > 0 and position == 0 else 1
            built.append(block(inputs, outputs, stride, init=init, rngs=rngs))
            inputs = outputs
    return built


def head(
    inputs: int, num_classes: int, *, init: Initialisation, rngs: nnx.Rngs
) -> nnx.Linear:
    """Build the linear layer that gives the logits."""
    return nnx.Linear(
        inputs,
        num_classes,
        kernel_init=init.kernel,
        bias_init=init.bias(inputs),
        rngs=rngs,
    )
