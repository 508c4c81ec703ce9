"""`trace_layers` on a Keras model, whose parameters are a list without names."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import pytest
from notation import array, axes, layers

from tb_optax import trace_layers

IMAGES = array(2, 16, 16, 3)


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
    assert ["/".join(name.split("/")[-2:]) for name in names] == [
        *("separable/depthwise_kernel", "separable/pointwise_kernel"),
        *("norm/gamma", "norm/beta", "dense/kernel", "dense/bias"),
    ]
    # Each input channel has filters of its own, (height, width, channels, 1).
    assert found == layers("0:ppoi 1:ppio<2,3 4<5")


def test_several_filters_for_each_channel_are_unclear():
    """One matrix of channels and filters, or a stack of vectors?"""
    own = [keras.layers.DepthwiseConv2D(3, depth_multiplier=2)]
    with pytest.raises(ValueError, match=r"'0' of shape \(3, 3, 3, 2\): none of its"):
        trace(own, training=False)
    found, _ = trace(own, training=False, axes={"0": axes("ppio")})
    assert found == layers("0:ppio<1")


def test_layers_have_the_names_of_the_variables():
    """With parameters in a dict by `variable.path`, as README says."""
    second = keras.layers.Dense(16, name="second_by_name")
    first = keras.layers.Dense(4, name="first_by_name")
    model = keras.Sequential([keras.Input((8,)), second, first], name="net")
    params = {v.path: v.value for v in model.trainable_variables}
    state = [v.value for v in model.non_trainable_variables]

    def forward(params, state, x):
        values = [params[v.path] for v in model.trainable_variables]
        return model.stateless_call(values, state, x)

    assert trace_layers(forward, params, state, array(2, 8)) == layers(
        "net/second_by_name/kernel<.bias net/first_by_name/kernel<.bias"
    )
