"""The models of the benchmarks, and the steps that train them."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import eight_images

from benchmarks import configs, loop, models
from benchmarks.arms import ARMS
from benchmarks.models.families import VGG, Plan, ResNet, WideResNet


def parameter_count(name, num_classes, width=1.0):
    model = nnx.eval_shape(
        lambda: models.build(
            name, num_classes=num_classes, width=width, rngs=nnx.Rngs(0)
        )
    )
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_220_132),
        ("resnet34", 21_328_292),
        ("vgg16", 14_774_436),
        ("wrn16_8", 11_012_036),
        ("wrn28_6", 13_185_508),
    ],
)
def test_models_have_the_published_number_of_parameters(name, count):
    assert parameter_count(name, 100) == count


@pytest.mark.parametrize("width", [0.5, 1.0, 1.5])
def test_vgg19_has_the_parameters_of_sixteen_convolutions(width):
    sizes = [3, *[64] * 2, *[128] * 2, *[256] * 4, *[512] * 8]
    sizes = [3, *(round(width * size) for size in sizes[1:])]
    # Each convolution has a bias and a norm.
    count = sum(9 * a * b + 3 * b for a, b in itertools.pairwise(sizes))
    assert parameter_count("vgg19", 100, width) == count + (sizes[-1] + 1) * 100


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_resnets_take_64_pixels(name):
    def run(images):
        model = models.build(name, num_classes=200, width=0.125, rngs=nnx.Rngs(0))
        return model(images, train=True)

    assert jax.eval_shape(run, jnp.ones((2, 64, 64, 3))).shape == (2, 200)


def test_torch_initialization_is_uniform_within_the_root_of_the_fan_in():
    plan = Plan((256,), (1,), 3, 512, nnx.Rngs(0), torch=True)
    for module, fan_in in (
        (plan.conv(64, 512, 3, bias=True), 9 * 64),
        (plan.head(), 256),
    ):
        for leaf in (module.kernel, module.bias):
            assert leaf is not None
            values = np.asarray(leaf.get_value(), np.float64) * np.sqrt(fan_in)
            assert np.abs(values).max() <= 1 + 1e-6
            # Relative standard deviation of the mean square of n uniform numbers:
            # sqrt((1/5 - 1/9) / n) / (1/3); of their mean: sqrt(1 / (3 n)).
            assert abs(3 * np.mean(values**2) - 1) < 5 * np.sqrt(0.8 / values.size)
            assert abs(values.mean()) < 5 / np.sqrt(3 * values.size)


def test_build_passes_the_initialization_on():
    def bias(init):
        model = models.build(
            "resnet4", num_classes=10, width=0.4, init=init, rngs=nnx.Rngs(0)
        )
        assert model.linear.bias is not None
        return model.linear.bias.get_value()

    flax, torch = jax.jit(lambda: (bias("flax"), bias("torch")))()
    assert not np.any(flax)
    assert np.all(np.abs(torch) <= 6**-0.5)
    assert np.any(torch)


def test_norms_have_the_momentum_and_epsilon_of_pytorch():
    for name in ("resnet18", "vgg16", "wrn16_8"):
        build = functools.partial(models.build, name, num_classes=10)
        model = nnx.eval_shape(lambda build=build: build(rngs=nnx.Rngs(0)))
        norms = {
            "/".join(map(str, path)): module
            for path, module in nnx.iter_modules(model)
            if isinstance(module, nnx.BatchNorm)
        }
        assert {norm.epsilon for norm in norms.values()} == {1e-5}
        # Published: the last norm of a wide network has PyTorch's momentum 0.9.
        wide = {"bn1": 0.1} if name == "wrn16_8" else {}
        momenta = {path: norm.momentum for path, norm in norms.items()}
        assert momenta == dict.fromkeys(norms, 0.9) | wide


def test_unknown_model_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="'resnet1'; allowed: resnet4, resnet8"):
        models.build("resnet1", num_classes=10, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'keras'; allowed: flax, torch"):
        models.build("resnet8", num_classes=10, init="keras", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["resnet14", "vgg16", "wrn16_8"])
def test_layers_are_in_execution_order_and_norms_follow(name):
    calls = []

    def record(function, path, module):
        def recorded(*args, **kwargs):
            calls.append((path, module))
            return function(*args, **kwargs)

        return recorded

    def run(images):
        model = models.build(name, num_classes=10, rngs=nnx.Rngs(0))
        layers.extend(models.layers_in_order(model))
        for path, module in nnx.iter_modules(model):
            if isinstance(module, nnx.Conv | nnx.Linear | nnx.BatchNorm):
                path = "/".join(map(str, path))
                module.promote_dtype = record(module.promote_dtype, path, module)
        return model(images, train=False)

    layers = []
    jax.eval_shape(run, jnp.ones((2, 8, 8, 3)))
    expected = {}
    for path, module in calls:
        if isinstance(module, nnx.BatchNorm):
            expected[next(reversed(expected))] |= {f"{path}/scale", f"{path}/bias"}
        else:
            biases = set() if module.bias is None else {f"{path}/bias"}
            expected[f"{path}/kernel"] = biases
    assert [layer.path for layer in layers] == list(expected)
    assert {layer.path: set(layer.follows) for layer in layers} == expected


@pytest.mark.parametrize(
    ("name", "family", "channels"),
    [
        ("resnet4", ResNet, (4, 6)),
        ("vgg16", VGG, (4, 6)),
        ("wrn16_8", WideResNet, (4, 4, 6)),
    ],
)
def test_two_steps_of_every_family_move_all_weights(
    name, family, channels, monkeypatch
):
    """Steps of a small network of each kind: the named ones have more of the same."""
    sizes = {name: (family, channels, (1, 1))}
    monkeypatch.setattr(models, "_SIZES", sizes)
    dataset = eight_images()
    config = dataclasses.replace(configs.DIGITS, model=name, batch_size=8)
    program = loop.make_program(config, ARMS["cal"], dataset)
    rows = dataset.parts["train"]
    train, start, losses = program.epoch(rows, 1), program.start(0, 0.1), []
    states = [jax.tree.map(jnp.copy, start)]
    for epoch in range(2):
        states, [scores] = train(states, rows, epoch)
        losses.append(float(scores.loss))
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]
    for before, after in zip(
        jax.tree.leaves((start.params, start.batch_stats)),
        jax.tree.leaves((states[0].params, states[0].batch_stats)),
        strict=True,
    ):
        assert np.isfinite(after).all()
        assert not np.array_equal(before, after)
