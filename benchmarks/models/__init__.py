"""Models by name, and their layers in the order of the forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import tb_optax
from benchmarks.models.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class _Plan:
    channels: tuple[int, ...]
    blocks: tuple[int, ...]


_RESNETS = {
    "resnet8": _Plan(channels=(16, 32, 64), blocks=(1, 1, 1)),
    "resnet14": _Plan(channels=(16, 32, 64), blocks=(2, 2, 2)),
    "resnet18": _Plan(channels=(64, 128, 256, 512), blocks=(2, 2, 2, 2)),
}

NAMES = tuple(_RESNETS)


def build(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    image_channels: int = 3,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build a model.

    Args:
        name: one of `NAMES`.
        num_classes: number of logits.
        width: factor on the channels of every layer.
        image_channels: 3 for colour, 1 for grey images.
        rngs: random numbers for the initial weights.

    Returns:
        A module that is called as `model(images, train=...)`, images NHWC.
    """
    if name not in _RESNETS:
        msg = f"model is {name!r}; allowed: {', '.join(NAMES)}"
        raise ValueError(msg)
    plan = _RESNETS[name]
    return ResNet(
        [max(1, round(width * channels)) for channels in plan.channels],
        plan.blocks,
        image_channels=image_channels,
        num_classes=num_classes,
        rngs=rngs,
    )


def layers_in_order(model: ResNet) -> tuple[tb_optax.Layer, ...]:
    """Return the layers of a model in the order of execution."""
    shape = (1, 8, 8, model.image_channels)
    return tb_optax.trace_layers(
        lambda model, images: model(images, train=False),
        model,
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
