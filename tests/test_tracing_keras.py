"""`trace_layers` on a Keras model, whose parameters are a list without names."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import pytest

from tb_optax import Layer, MatrixAxes, trace_layers

HWIO = MatrixAxes((2,), (3,), pooled=(0, 1))
# Each input channel has filters of its own, (height, width, channels, 1).
DEPTHWISE = MatrixAxes((3,), (2,), pooled=(0, 1))
IMAGES = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)


def trace(layers, *, training, **options):
    model = keras.Sequential([keras.Input((16, 16, 3)), *layers])
    params = [variable.value for variable in model.trainable_variables]
    state = [variable.value for variable in model.non_trainable_variables]

    def forward(params, state, images):
        return model.stateless_call(params, state, images, training=training)

    names = [variable.path for variable in model.trainable_variables]
    return trace_layers(forward, params, state, IMAGES, **options), names


@pytest.mark.parametrize("training", [True, False])
def test_separable_convolution(training):
    found, names = trace(
        [
            keras.layers.SeparableConv2D(8, 3, use_bias=False, name="separable"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5, name="dense"),
        ],
        training=training,
    )
    short = ["/".join(name.split("/")[-2:]) for name in names]
    assert short == [
        "separable/depthwise_kernel",
        "separable/pointwise_kernel",
        "norm/gamma",
        "norm/beta",
        "dense/kernel",
        "dense/bias",
    ]
    assert found == (
        Layer("0", DEPTHWISE),
        Layer("1", HWIO, ("2", "3")),
        Layer("4", MatrixAxes((0,), (1,)), ("5",)),
    )


def test_several_filters_for_each_channel_are_unclear():
    """One matrix of channels and filters, or a stack of vectors?"""
    layers = [keras.layers.DepthwiseConv2D(3, depth_multiplier=2)]
    with pytest.raises(ValueError, match=r"'0' of shape \(3, 3, 3, 2\): none of its"):
        trace(layers, training=False)
    found, _ = trace(layers, training=False, axes={"0": HWIO})
    assert found == (Layer("0", HWIO, ("1",)),)


def test_layers_have_the_names_of_the_variables():
    """With parameters in a dict by `variable.path`, as README says."""
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, name="second_by_name"),
            keras.layers.Dense(4, name="first_by_name"),
        ],
        name="net",
    )
    params = {v.path: v.value for v in model.trainable_variables}
    state = [v.value for v in model.non_trainable_variables]

    def forward(params, state, x):
        values = [params[v.path] for v in model.trainable_variables]
        return model.stateless_call(values, state, x)

    dense = MatrixAxes((0,), (1,))
    assert trace_layers(forward, params, state, jnp.ones((2, 8))) == (
        Layer("net/second_by_name/kernel", dense, ("net/second_by_name/bias",)),
        Layer("net/first_by_name/kernel", dense, ("net/first_by_name/bias",)),
    )
