"""Models by name, and their layers in the order of the forward pass."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from flax import nnx

import tb_optax
from benchmarks.models.families import VGG, Plan, ResNet, WideResNet

Model: TypeAlias = ResNet | VGG | WideResNet
Name = Literal[
    "resnet4",
    "resnet8",
    "resnet14",
    "resnet18",
    "resnet34",
    "vgg16",
    "vgg19",
    "wrn16_8",
    "wrn28_6",
]
Init = Literal["flax", "torch"]
Compute = Literal["float32", "bfloat16"]

NAMES = get_args(Name)


_SMALL = (16, 32, 64)
_LARGE = (64, 128, 256, 512)

# Channels and blocks of each stage.
_SIZES: dict[str, tuple[Callable[..., Model], Sequence[int], Sequence[int]]] = {
    "resnet4": (ResNet, _SMALL[:1], (1,)),  # For tests.
    "resnet8": (ResNet, _SMALL, (1, 1, 1)),
    "resnet14": (ResNet, _SMALL, (2, 2, 2)),
    "resnet18": (ResNet, _LARGE, (2, 2, 2, 2)),
    "resnet34": (ResNet, _LARGE, (3, 4, 6, 3)),
    "vgg16": (VGG, (*_LARGE, 512), (2, 2, 3, 3, 3)),
    "vgg19": (VGG, (*_LARGE, 512), (2, 2, 4, 4, 4)),
    "wrn16_8": (WideResNet, (16, 128, 256, 512), (2, 2, 2)),
    "wrn28_6": (WideResNet, (16, 96, 192, 384), (4, 4, 4)),
}


def build(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    image_channels: int = 3,
    init: str = "flax",
    compute: str = "float32",
    rngs: nnx.Rngs,
) -> Model:
    """Build a model.

    Args:
        name: one of `NAMES`.
        num_classes: number of logits.
        width: factor on the channels of every layer.
        image_channels: 3 for color images, 1 for gray ones.
        init: "flax" or "torch": whose default initialization the weights get. The
            published experiments use PyTorch's.
        compute: "float32" or "bfloat16": the type that layers compute in. Weights,
            running averages, and the mean and variance of a batch stay in float32.
        rngs: random numbers for the initial weights.

    Returns:
        A module that is called as `model(images, train=...)`, with images in NHWC.

    Raises:
        ValueError: if there is no such model, initialization, or type.
    """
    for what, given, allowed in (
        ("model", name, NAMES),
        ("init", init, get_args(Init)),
        ("compute", compute, get_args(Compute)),
    ):
        if given not in allowed:
            raise ValueError(f"{what} is {given!r}; allowed: {', '.join(allowed)}")
    family, channels, blocks = _SIZES[name]
    channels = [max(1, round(width * count)) for count in channels]
    sizes = channels, blocks, image_channels, num_classes
    model = family(Plan(*sizes, rngs, torch=init == "torch"))
    model.set_attributes(dtype=jnp.dtype(compute))
    return model


def layers_in_order(model: Any, *, norms: bool = True) -> tuple[tb_optax.Layer, ...]:
    """Return the layers of a model in the order of execution.

    Its values may be abstract. `norms` says whether the parameters of a norm follow the
    layer before it.
    """
    first = model.convs[0] if isinstance(model, VGG) else model.conv1
    shape = (1, 8, 8, first.in_features)
    return tb_optax.trace_layers(
        lambda model, images: model(images, train=False),
        model,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        norms="after" if norms else "none",
    )
