"""The models of the benchmarks, their convolution and the steps that train them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")

from benchmarks import arms, configs, data, loop, models  # noqa: E402
from benchmarks.data.augment import Preparation  # noqa: E402
from benchmarks.models.convolution import NHWC, convolution  # noqa: E402


def parameter_count(name, num_classes, width=1.0):
    model = nnx.eval_shape(
        lambda: models.build(
            name, num_classes=num_classes, width=width, rngs=nnx.Rngs(0)
        )
    )
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return sum(leaf.size for leaf in leaves)


def test_resnet18_has_the_published_number_of_parameters():
    assert parameter_count("resnet18", 100) == 11_220_132


def test_width_scales_every_layer():
    # Stem 3x3x3x16 with its norm; blocks of 16, 32, 64, 128; head 128x10 with bias.
    def block(inputs, outputs):
        count = 9 * inputs * outputs + 9 * outputs**2 + 4 * outputs
        return count + (inputs * outputs + 2 * outputs) * (inputs != outputs)

    blocks = [(16, 16), (16, 16), (16, 32), (32, 32)]
    blocks += [(32, 64), (64, 64), (64, 128), (128, 128)]
    expected = 27 * 16 + 32 + sum(block(*sizes) for sizes in blocks) + 1290
    assert parameter_count("resnet18", 10, width=0.25) == expected


def test_unknown_model_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="'resnet1'; allowed: resnet8, resnet14"):
        models.build("resnet1", num_classes=10, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", models.NAMES)
def test_layers_are_in_execution_order_and_norms_follow(name):
    calls = []

    def record(function, path):
        def recorded(*args, **kwargs):
            calls.append(path)
            return function(*args, **kwargs)

        return recorded

    def run(images):
        model = models.build(name, num_classes=10, rngs=nnx.Rngs(0))
        layers.extend(models.layers_in_order(model))
        for path, module in nnx.iter_modules(model):
            if isinstance(module, nnx.Conv | nnx.Linear):
                path = "/".join(map(str, (*path, "kernel")))
                module.promote_dtype = record(module.promote_dtype, path)
        return model(images, train=False)

    layers = []
    jax.eval_shape(run, jnp.ones((2, 8, 8, 3)))
    assert [layer.path for layer in layers] == calls
    for layer in layers[:-1]:
        norm = layer.path.replace("conv", "bn").removesuffix("/kernel")
        assert set(layer.follows) == {f"{norm}/scale", f"{norm}/bias"}
    assert layers[-1].follows == ("linear/bias",)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "padding"), [(1, 0), (3, 1), (3, "SAME"), (5, 0)])
@pytest.mark.parametrize("side", [7, 8])
def test_convolution_and_its_gradients_are_those_of_jax(size, padding, stride, side):
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    keys = jax.random.split(jax.random.key(0), 2)
    images = jax.random.normal(keys[0], (4, side, side, 3))
    kernel = jax.random.normal(keys[1], (size, size, 3, 5))

    def loss(function):
        def apply(images, kernel):
            y = function(
                images, kernel, (stride, stride), padding, dimension_numbers=NHWC
            )
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(apply, (0, 1), has_aux=True)(images, kernel)

    ours, theirs = loss(convolution), loss(jax.lax.conv_general_dilated)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", models.NAMES)
def test_two_steps_of_every_model_have_a_finite_loss(name):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 8, 8, 3), np.uint8)
    labels = rng.integers(0, 10, 8, np.int32)
    preparation = Preparation.of(images, pad=1, flip=True)
    dataset = data.Dataset(images, labels, images, labels, 10, preparation)
    width = 0.125 if name == "resnet18" else 0.5
    config = dataclasses.replace(
        configs.DIGITS, model=name, width=width, epochs=2, batch_size=4
    )
    program = loop.make_program(config, arms.ARMS["tb"], dataset)
    start = jax.device_get(program.start())
    losses = []
    for epoch in (1, 0, 0):
        state = program.start()
        state, scores = program.train(state, images, labels, jnp.int32(epoch))
        losses.append(float(scores.loss))
    assert np.isfinite(losses).all()
    # The order of the rows and their augmentation hang on seed and epoch alone.
    assert losses[0] != losses[1] == losses[2]
    for before, after in zip(
        jax.tree.leaves(start.params), jax.tree.leaves(state.params), strict=True
    ):
        assert np.isfinite(after).all()
        assert not np.array_equal(before, after)
