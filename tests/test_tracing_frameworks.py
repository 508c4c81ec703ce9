"""`trace_layers` on models of every framework, each against its exact list."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from framework_models import IMAGE, MODELS, ResNet, linen, model
from jax.sharding import PartitionSpec as P
from notation import array, arrays, each, in_any_order, layers

from tb_optax import trace_layers

_QKV = ("query", "key", "value")
_RESNET = (
    "stem/kernel:ppio<bn/ "
    "block0/conv1/kernel:ppio<block0/bn1/ block0/conv2/kernel:ppio<block0/bn2/ "
    "block1/conv1/kernel:ppio<block1/bn1/ block1/conv2/kernel:ppio<block1/bn2/ "
    "block1/conv3/kernel:ppio<block1/bn3/ head/kernel<.bias"
)
_NNX_RESNET = "conv1/kernel:ppio<bn1/ "
for _i in range(8):
    for _path in ("conv1", "conv2", "shortcut/conv1")[: 3 if _i in (2, 4, 6) else 2]:
        _path = f"blocks/{_i}/{_path}"
        _NNX_RESNET += f"{_path}/kernel:ppio<{_path.replace('conv', 'bn')}/ "
_SCANNED_BLOCK = (
    "blocks/up/kernel[#]:sio<.bias,blocks/norm/ blocks/down/kernel[#]:sio<.bias"
)
# The model and `norms`, with the layers that must be found.
TRACED = {
    "linen_cnn after": (
        "Conv_0/kernel:ppio<.bias,BatchNorm_0/ Conv_1/kernel:ppio<GroupNorm_0/ "
        "Conv_2/kernel:ppio<.bias Conv_3/kernel:ppio<.bias,LayerNorm_0/ "
        "ConvTranspose_0/kernel:ppio<.bias Dense_1/kernel<.bias Dense_0/kernel<.bias"
    ),
    "linen_resnet after": _RESNET,
    # In evaluation too, where norms are only affine.
    "linen_resnet none": re.sub(r"<\S*bn\d?/", "", _RESNET),
    "linen_vit after": (
        "patches/kernel:ppio<.bias,norm1/ qkv/kernel<.bias "
        "out/kernel<.bias,scale,norm/ head/kernel<.bias"
    ),
    # One layer for the tied embedding, where it is the head.
    "linen_gpt after": (
        f"{each(_QKV, 'mha0/#/kernel:ioo<.bias')} mha0/out/kernel:iio<.bias,norm0b/ "
        "up0/kernel<.bias down0/kernel<.bias,norm1a/scale "
        f"{each(_QKV, 'mha1/#/kernel:ioo')} mha1/out/kernel:iio<norm1b/scale "
        "up1/kernel<.bias down1/kernel<.bias,norm/ embed/embedding:oi"
    ),
    "linen_gpt before": (
        "mha0/query/kernel:ioo<.bias,norm0a/ mha0/key/kernel:ioo<.bias "
        "mha0/value/kernel:ioo<.bias mha0/out/kernel:iio<.bias "
        "up0/kernel<.bias,norm0b/ down0/kernel<.bias "
        "mha1/query/kernel:ioo<norm1a/scale mha1/key/kernel:ioo "
        "mha1/value/kernel:ioo mha1/out/kernel:iio "
        "up1/kernel<.bias,norm1b/scale down1/kernel<.bias embed/embedding:oi<norm/"
    ),
    "linen_recurrent after": (
        f"{each('ifgo', 'OptimizedLSTMCell_0/h#/kernel<.bias')} "
        f"{each('ifgo', 'OptimizedLSTMCell_0/i#/kernel')} "
        f"{each('rz', 'GRUCell_0/i#/kernel<.bias GRUCell_0/h#/kernel')} "
        "GRUCell_0/in/kernel<.bias GRUCell_0/hn/kernel<.bias head/kernel<.bias"
    ),
    "linen_normalized after": (
        "first/kernel<.bias,WeightNorm_0/first/kernel/scale second/kernel<.bias"
    ),
    # Slice after slice, as the blocks run.
    "linen_scan before": (
        f"stem/kernel<.bias {each(3, _SCANNED_BLOCK)} head/kernel<.bias,norm/"
    ),
    "nnx_stack after": f"{each(3, 'blocks/kernel[#]:sio<.bias')} head/kernel<.bias",
    "nnx_lora after": "linear/kernel<.bias linear/lora/lora_a linear/lora/lora_b",
    "nnx_resnet after": f"{_NNX_RESNET} linear/kernel<.bias",
    "equinox_cnn after": (
        "conv1/weight:oipp<.bias,norm1/weight,norm1/bias conv2/weight:oipp "
        "depthwise/weight:oipp<.bias up/weight:oipp<.bias "
        "conv1d/weight:oip<.bias,ln/weight,ln/bias layers/0/weight:oi<.bias "
        "layers/2/weight:oi"
    ),
    "equinox_spectral_norm after": "layer/weight:oi<.bias",
    "haiku_cnn after": (
        "conv2_d/w:ppio<.b,batch_norm/offset,batch_norm/scale "
        "conv2_d_1/w:ppio<group_norm/offset,group_norm/scale "
        "depthwise_conv2_d/w:ppio<.b "
        "conv2_d_transpose/w:ppoi<.b,layer_norm/offset,layer_norm/scale "
        "mlp/~/linear_0/w<.b mlp/~/linear_1/w<.b"
    ),
}


@pytest.mark.parametrize(
    ("name", "norms", "expected"),
    [
        (name, norms, expected)
        for key, expected in TRACED.items()
        for base, norms in [key.split()]
        for name in MODELS
        # In evaluation and in other types the layers are the same.
        if name.partition(" in ")[0] == base
    ],
)
def test_layers_of_every_framework(name, norms, expected):
    params, forward, inputs = model(name)
    found = trace_layers(forward, params, *inputs, norms=norms)
    assert in_any_order(found) == layers(expected)


def test_an_nnx_model_is_called_as_it_is():
    params, _, inputs = model("nnx_stack")
    expected = layers(TRACED["nnx_stack after"])
    assert trace_layers(params, *inputs) == expected


def test_nnx_models_in_a_dict():
    """Statistics are no parameters there either, and paths begin with the keys."""
    params, forward, inputs = model("nnx_resnet")

    def both(models, *inputs):
        return forward(models["actor"], *inputs)

    found = trace_layers(both, {"actor": params}, *inputs)
    alone = trace_layers(forward, params, *inputs)
    expected = [f"actor/{path}" for path in alone.notes]
    assert list(found.notes) == expected
    assert [layer.path for layer in found] == [f"actor/{own.path}" for own in alone]


@pytest.mark.parametrize("train", [True, False])
def test_state_that_is_closed_over_is_a_constant(train):
    """As state that is passed is data."""
    params, forward, (state, keys, x) = linen(ResNet(), IMAGE, train=train)
    state = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), state)

    def closed(params, keys, x):
        return forward(params, state, keys, x)

    assert in_any_order(trace_layers(closed, params, keys, x)) == layers(_RESNET)


def test_under_a_mesh():
    """Sharding constraints, shard_map and its gathers move no axes."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def forward(params, x):
        constrain = jax.lax.with_sharding_constraint
        first = constrain(params["first"], jax.NamedSharding(mesh, P(None, "d")))
        x = constrain(jnp.tanh(x @ first), jax.NamedSharding(mesh, P("d", None)))

        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(P("d"), P(None, "d")), out_specs=P("d")
        )
        def run(x, kernel):
            kernel = jax.lax.all_gather(kernel, "d", axis=1, tiled=True)
            return jax.lax.psum(x @ kernel, ()) + params["bias"]

        return run(x, params["second"])

    found = trace_layers(
        forward, arrays("first 16x8, second 8x4, bias 4"), array(5, 16)
    )
    assert found == layers("first second<bias")
