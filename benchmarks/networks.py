"""Networks as lists of kernels: all that an analysis sees of them.

Kernels are (height, width, inputs, outputs) or (inputs, outputs), in the order of
execution, with neither biases nor norms. Nothing is allocated before `params`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
from flax import nnx

import tb_optax
from benchmarks import models

Shapes = dict[str, tuple[int, ...]]

_DENSE = tb_optax.MatrixAxes((0,), (1,))
_CONV = tb_optax.MatrixAxes((2,), (3,), pooled=(0, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """The kernels of a network.

    Attributes:
        title: what tables call it.
        shapes: shape of each kernel by path, in the order of execution.
    """

    title: str
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def layers(self) -> tuple[tb_optax.Layer, ...]:
        """One layer per kernel."""
        return tuple(
            tb_optax.Layer(path, _CONV if len(shape) == 4 else _DENSE)
            for path, shape in self.shapes.items()
        )

    @property
    def matrices(self) -> int:
        """Number of matrices, one per position of a convolution."""
        return sum(math.prod(shape[:-2]) for shape in self.shapes.values())

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(map(math.prod, self.shapes.values()))

    def params(self, seed: int = 0) -> dict[str, jax.Array]:
        """Draw Gaussian kernels of variance 1 / fan-in, in float32."""
        keys = jax.random.split(jax.random.key(seed), len(self.shapes))
        return {
            path: jax.random.normal(key, shape) * math.prod(shape[:-1]) ** -0.5
            for key, (path, shape) in zip(keys, self.shapes.items(), strict=True)
        }


def of_model(name: str, *, width: float = 1.0) -> Shapes:
    """Return the kernels of a network of `benchmarks.models` with 100 classes."""
    model = nnx.eval_shape(
        lambda: models.build(name, num_classes=100, width=width, rngs=nnx.Rngs(0))
    )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves, _ = jax.tree.flatten_with_path(params)
    shapes = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
    return {
        layer.path.removesuffix("/kernel"): shapes[layer.path].shape
        for layer in models.layers_in_order(model)
    }


def bottleneck_resnet(blocks: Sequence[int]) -> Shapes:
    """Return the kernels of a residual network of bottlenecks, as for ImageNet."""
    shapes = {"conv1": (7, 7, 3, 64)}
    inputs = 64
    for stage, count in enumerate(blocks):
        middle = 64 * 2**stage
        for block in range(count):
            name = f"stage{stage}/block{block}"
            shapes[f"{name}/conv1"] = (1, 1, inputs, middle)
            shapes[f"{name}/conv2"] = (3, 3, middle, middle)
            shapes[f"{name}/conv3"] = (1, 1, middle, 4 * middle)
            if block == 0:
                shapes[f"{name}/shortcut"] = (1, 1, inputs, 4 * middle)
            inputs = 4 * middle
    return {**shapes, "linear": (inputs, 1000)}


def transformer(blocks: int, width: int = 768) -> Shapes:
    """Return the kernels of blocks with four attention and two MLP matrices."""
    shapes: Shapes = {}
    for block in range(blocks):
        for name in ("query", "key", "value", "out"):
            shapes[f"block{block}/attention/{name}"] = (width, width)
        shapes[f"block{block}/mlp/in"] = (width, 4 * width)
        shapes[f"block{block}/mlp/out"] = (4 * width, width)
    return shapes


@functools.cache
def networks() -> Mapping[str, Network]:
    """Return all networks by the names they have on the command line."""
    vision = {"patches": (16, 16, 3, 768), **transformer(12), "head": (768, 1000)}
    gated: Shapes = dict.fromkeys(("query", "key", "value", "out"), (4096, 4096))
    gated |= {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    return {
        "resnet18": Network("ResNet-18", of_model("resnet18")),
        "resnet34": Network("ResNet-34", of_model("resnet34")),
        "vgg16": Network("VGG-16-BN", of_model("vgg16")),
        "wrn16x8": Network("WRN-16-8", of_model("wrn16_8")),
        "wrn28x6": Network("WRN-28-6", of_model("wrn28_6")),
        "vit_b16": Network("ViT-B/16", vision),
        "gpt2": Network("GPT-2 small, 12 blocks", transformer(12)),
        "llm_block": Network("4096-wide LLM block", gated),
        "resnet152": Network("ResNet-152", bottleneck_resnet((3, 8, 36, 3))),
        "tiny": Network(
            "three layers",
            {"conv1": (3, 3, 8, 8), "conv2": (3, 3, 8, 16), "linear": (16, 10)},
        ),
    }
