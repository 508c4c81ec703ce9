"""`find_layers` and `describe` on models of Flax linen, Flax nnx, Equinox and Haiku."""

import re
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from framework_models import SEQUENCE, linen, model
from notation import axes, each, in_any_order, layers

import tb_optax


def params_of(name: str) -> Any:
    params = model(name).params
    return nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params


# What each model holds, in the order of the tree.
FOUND = {
    "linen_cnn": (
        "ConvTranspose_0/kernel:ppio<.bias Conv_0/kernel:ppio<.bias,BatchNorm_0/ "
        "Conv_1/kernel:ppio Conv_2/kernel:ppio<.bias Conv_3/kernel:ppio<.bias "
        "Dense_0/kernel<.bias Dense_1/kernel<.bias"
    ),
    "linen_gpt": (
        "down0/kernel<.bias down1/kernel<.bias mha0/key/kernel:ioo<.bias "
        "mha0/out/kernel:iio<.bias mha0/query/kernel:ioo<.bias "
        "mha0/value/kernel:ioo<.bias mha1/key/kernel:ioo mha1/out/kernel:iio "
        "mha1/query/kernel:ioo mha1/value/kernel:ioo up0/kernel<.bias up1/kernel<.bias"
    ),
    "linen_recurrent": (
        "GRUCell_0/hn/kernel<.bias GRUCell_0/hr/kernel GRUCell_0/hz/kernel "
        f"{each(('in', 'ir', 'iz'), 'GRUCell_0/#/kernel<.bias')} "
        f"{each('fgio', 'OptimizedLSTMCell_0/h#/kernel<.bias')} "
        f"{each('fgio', 'OptimizedLSTMCell_0/i#/kernel')} head/kernel<.bias"
    ),
    "linen_normalized": "first/kernel<.bias second/kernel<.bias",
    "nnx_cnn": (
        "conv1/kernel:ppio<.bias,bn1/ conv2/kernel:ppio<norm2/ "
        "depthwise/kernel:ppio<.bias head/layers/0/kernel<.bias "
        f"head/layers/2/kernel<.bias {each(11, 'layers/#/kernel<.bias')} "
        "up/kernel:ppio<.bias"
    ),
    "nnx_parts": (
        "attention/key/kernel:ioo attention/out/kernel:iio attention/query/kernel:ioo "
        "attention/value/kernel:ioo cross/key/kernel:ioo<.bias "
        "cross/out/kernel:iio<.bias cross/query/kernel:ioo<.bias "
        "cross/value/kernel:ioo<.bias gru/dense_h/kernel gru/dense_i/kernel<.bias "
        "lstm/dense_h/kernel<.bias lstm/dense_i/kernel value/kernel<.bias"
    ),
    "nnx_tied": "first/kernel<.bias",
    "equinox_cnn": (
        "conv1/weight:oipp<.bias,norm1/weight,norm1/bias "
        "conv2/weight:oipp<bn2/weight,bn2/bias depthwise/weight:oipp<.bias "
        "up/weight:oipp<.bias conv1d/weight:oip<.bias layers/0/weight:oi<.bias "
        "layers/2/weight:oi"
    ),
    "equinox_transformer": (
        "attention/query_proj/weight:oi attention/key_proj/weight:oi "
        "attention/value_proj/weight:oi attention/output_proj/weight:oi<.bias "
        "gru/weight_ih:oi gru/weight_hh:oi lstm/weight_ih:oi lstm/weight_hh:oi"
    ),
    "equinox_mlp": each(3, "layers/#/weight:oi<.bias"),
    "equinox_own_module": "weight:oi<.bias",
    "equinox_tied": "",
    "haiku_cnn": (
        "conv2_d/w:ppio<.b,batch_norm/offset,batch_norm/scale conv2_d_1/w:ppio "
        "conv2_d_transpose/w:ppio<.b depthwise_conv2_d/w:ppio<.b mlp/~/linear_0/w<.b "
        "mlp/~/linear_1/w<.b"
    ),
    "haiku_attention": each(
        ("key", "linear", "query", "value"), "multi_head_attention/#/w<.b"
    ),
    "haiku_lstm": "lstm/linear/w<.b",
}


def leaf_names(params: Any) -> list[str]:
    """Every leaf with its path, told apart from `describe`'s own reading."""
    flat, _ = jax.tree.flatten_with_path(params, is_leaf=lambda x: x is None)
    read = partial(jax.tree_util.keystr, simple=True, separator="/")
    return [read(keys).removesuffix("/value") for keys, _ in flat]


@pytest.mark.parametrize("name", FOUND)
def test_layers_found(name):
    """They are found in the order of the tree, and every leaf is described once."""
    params, expected = params_of(name), layers(FOUND[name])
    found = tb_optax.find_layers(params)
    assert in_any_order(found) == expected
    names = leaf_names(params)
    for layer in found:
        assert list(layer.follows) == sorted(layer.follows, key=names.index)
    rows = tb_optax.describe(params, found, min_eigenvalues=4)
    arrays = {row["leaf"] for row in rows if row["shape"] is not None}
    # What is no array comes last.
    in_order = sorted(names, key=lambda leaf: leaf not in arrays)
    assert [row["leaf"] for row in rows] == in_order
    kernels = {layer.path for layer in expected}
    owners = {path: own.path for own in expected for path in (own.path, *own.follows)}
    for row in rows:
        assert row["layer"] == owners.get(row["leaf"], "")
        if row["leaf"] in kernels:
            assert re.fullmatch(r"\d+ eigenvalues(, too few.*)?", row["note"])
        elif row["leaf"] in owners:
            assert row["note"] == "follows"
        else:
            assert row["note"] not in ("follows", "")


# Of leaves that have no layer: the kind comes first in their note.
REASONS = {
    "linen_cnn": {"norm": each(("GroupNorm_0", "LayerNorm_0"), "#/bias #/scale")},
    "linen_gpt": {
        "embedding": "embed/embedding positions/embedding",
        "norm": "norm0a/bias norm0a/scale norm1a/scale",
    },
    "linen_normalized": {"rank < 2": "WeightNorm_0/first/kernel/scale"},
    "nnx_cnn": {"norm": "ln/bias ln/scale"},
    "nnx_parts": {
        "norm": "attention/key_ln/scale attention/query_ln/scale",
        "embedding": "embed/embedding",
    },
    "equinox_cnn": {
        "not an array": "bn2/axis_name bn2/inference layers/1 activation",
        "norm": "ln/weight ln/bias",
    },
    "equinox_transformer": {
        "embedding": "embedding/weight",
        "norm": "norm/weight norm/bias",
        "bias": "gru/bias",
        "rank < 2": "gru/bias_n",
    },
    "equinox_tied": {"embedding": "shared/pytree/0/weight"},
    "haiku_cnn": {"norm": each(("group_norm", "layer_norm"), "#/offset #/scale")},
    "haiku_attention": {"embedding": "embed/embeddings"},
}


@pytest.mark.parametrize("name", REASONS)
def test_describe_tells_why_a_leaf_has_no_layer(name):
    params = params_of(name)
    rows = tb_optax.describe(params, tb_optax.find_layers(params))
    kinds = {row["leaf"]: row["note"].partition(":")[0] for row in rows}
    for kind, leaves in REASONS[name].items():
        assert {kinds[leaf] for leaf in leaves.split()} == {kind}


_SCANNED = {
    "mha/key/kernel": (3, 16, 4, 4),
    "mha/out/kernel": (3, 4, 4, 16),
    "mha/query/kernel": (3, 16, 4, 4),
    "mha/value/kernel": (3, 16, 4, 4),
}
# What the rules cannot read: the leaves that the error names, in order.
UNCLEAR = {
    "linen_scan": {"blocks/down/kernel": (3, 32, 16), "blocks/up/kernel": (3, 16, 32)},
    "linen_scanned_attention": _SCANNED,
    "linen_scanned_attention without bias": _SCANNED,
    "linen_dense_general": {"kernel": (16, 2, 4)},
    "linen_conv_1d": {"kernel": (3, 16, 5)},
    "linen_conv_local": {"kernel": (5, 48, 5)},
    "linen_experts": {"experts": (3, 16, 8)},
    "nnx_stack": {"blocks/kernel": (3, 16, 16)},
    "nnx_einsum": {"kernel": (4, 2, 5)},
    "nnx_linear_general": {"kernel": (8, 2, 4)},
    "nnx_lora": {"linear/lora/lora_a": (16, 2), "linear/lora/lora_b": (2, 6)},
    "equinox_vmapped_linear": {"weight": (5, 6, 4)},
    "equinox_vmapped_conv": {"weight": (5, 6, 4, 3, 3)},
    "equinox_own_module without bias": {"weight": (6, 4)},
    "haiku_gru": {"gru/w_h": (6, 18), "gru/w_i": (16, 18)},
    "haiku_layer_stack": {"stack/linear/w": (3, 16, 16)},
    "haiku_conv_1d": {"conv1_d/w": (3, 16, 4)},
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_unclear_leaves_are_named_and_can_be_left_out(name):
    params, leaves = params_of(name), UNCLEAR[name]
    with pytest.raises(ValueError, match="cannot tell how to read") as raised:
        tb_optax.find_layers(params)
    message = str(raised.value)
    named = re.findall(r"^ +'(.*?)' of shape (\(.*?\)): ", message, re.MULTILINE)
    assert named == [(path, str(shape)) for path, shape in leaves.items()]
    assert f"axes={{'{next(iter(leaves))}': MatrixAxes(" in message
    found = tb_optax.find_layers(params, axes=dict.fromkeys(leaves))
    assert not {layer.path for layer in found} & set(leaves)
    rows = {row["leaf"]: row for row in tb_optax.describe(params, found)}
    assert all(rows[path]["layer"] == "" for path in leaves)


def test_axes_settle_a_scanned_stack():
    """Each slice is a layer, and its bias follows slice by slice."""
    params = params_of("linen_scan")
    found = tb_optax.find_layers(params, axes={"blocks/*/kernel": axes("sio")})
    assert found == layers(
        "blocks/down/kernel:sio<.bias blocks/up/kernel:sio<.bias head/kernel<.bias "
        "stem/kernel<.bias"
    )
    analyze = tb_optax.layer_analysis(found, min_eigenvalues=4)
    expanded = jax.eval_shape(analyze, params).layers
    assert [layer.name for layer in expanded] == [
        *(f"blocks/{name}/kernel[{i}]" for name in ("down", "up") for i in range(3)),
        *("head/kernel", "stem/kernel"),
    ]
    tree = jax.eval_shape(lambda p: analyze(p).leaf_multipliers(p), params)["blocks"]
    assert tree["up"]["kernel"].shape == (3, 1, 1)
    assert tree["up"]["bias"].shape == (3, 1)
    assert tree["norm"]["scale"].shape == ()
    rows = {row["leaf"]: row for row in tb_optax.describe(params, found)}
    assert rows["blocks/norm/scale"]["note"].startswith("norm: no layer names")


def test_a_stack_is_described_by_its_first_and_last_slice():
    params = params_of("equinox_vmapped_linear")
    found = tb_optax.find_layers(params, axes={"weight": axes("soi")})
    assert found == layers("weight:soi<.bias")
    rows = {row["leaf"]: row for row in tb_optax.describe(params, found)}
    assert rows["weight"]["layer"] == "weight[0], ..., weight[4]"
    assert rows["bias"]["layer"] == "weight[0], ..., weight[4]"


def test_describe_marks_what_is_frozen_and_what_is_missing():
    params = {
        "first": {"kernel": jnp.ones((9, 8)), "bias": jnp.ones(8)},
        "norm": {"scale": jnp.ones(8), "bias": jnp.ones(8)},
        "second": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)},
        "odd": {"kernel": jnp.ones((2, 8, 8))},
        "activation": jnp.tanh,
    }
    own = layers("first/kernel")
    trainable = dict.fromkeys(params, True) | {"first": False}
    for mask in (trainable, jax.tree.broadcast(trainable, params)):
        rows = tb_optax.describe(params, own, trainable=mask)
        notes = {row["leaf"]: row["note"] for row in rows}
        assert list(notes)[-1] == "activation"
        assert notes["first/bias"] == "frozen, and not in the list"
        assert notes["first/kernel"].startswith("8 eigenvalues, too few of at least 50")
        assert "FROZEN BUT IN THE LIST" in notes["first/kernel"]
    notes = {row["leaf"]: row["note"] for row in tb_optax.describe(params, own)}
    assert notes["first/kernel"] == "8 eigenvalues, too few of at least 50: not tuned"
    assert notes["first/bias"].endswith("'first/kernel' does not name it in `follows`")
    assert notes["second/bias"].endswith("'second/kernel' is not in the list")
    assert notes["second/kernel"].startswith("NOT IN THE LIST: a kernel with 8 eigen")
    assert notes["odd/kernel"].startswith("NOT IN THE LIST, multiplier 1: a kernel of")
    assert notes["norm/scale"].startswith("norm: no layer names it in `follows`")
    for wrong in ({"first": False}, dict.fromkeys(params, 1)):
        with pytest.raises(ValueError, match="trainable must"):
            tb_optax.describe(params, own, trainable=wrong)


def test_axes_settle_scanned_attention():
    params = params_of("linen_scanned_attention")
    given = {"*/out/kernel": axes("siio"), "*/kernel": axes("sioo")}
    found = tb_optax.find_layers(params, axes=given)
    assert found == layers(
        "mha/key/kernel:sioo<.bias mha/out/kernel:siio<.bias "
        "mha/query/kernel:sioo<.bias mha/value/kernel:sioo<.bias"
    )


def test_patterns_for_axes():
    """They must match and fit, and the first that matches wins."""
    params, stack = params_of("linen_scan"), axes("sio")
    with pytest.raises(ValueError, match=r"no leaf matches 'block/\*'.*'head/kernel'"):
        tb_optax.find_layers(params, axes={"block/*": None, "*/up/kernel": None})
    with pytest.raises(ValueError, match=r"rank 3, 'head/kernel' has shape \(16, 3\)"):
        tb_optax.find_layers(params, axes={"*kernel": stack})
    given = {"head/kernel": None, "blocks/up/kernel": stack, "*kernel": None}
    (layer,) = tb_optax.find_layers(params, axes=given)
    assert layer.path == "blocks/up/kernel"


def test_boxed_params_have_the_paths_of_bare_ones():
    """`nn.with_partitioning` boxes a leaf; its path is the same."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    boxed = {"head": linen(nn.Dense(8, kernel_init=init), SEQUENCE).params}
    assert isinstance(boxed["head"]["kernel"], nn.Partitioned)
    found = tb_optax.find_layers(boxed)
    assert found == tb_optax.find_layers(nn.unbox(boxed))
    assert found == layers("head/kernel<.bias")


@pytest.mark.parametrize("name", ["nnx_cnn", "nnx_parts"])
def test_every_form_of_an_nnx_model_has_the_same_layers(name):
    """As nodes, plain arrays, or a whole state, whose statistics do not follow."""
    own = model(name).params
    params = nnx.state(own, nnx.Param)
    found = tb_optax.find_layers(params)
    assert tb_optax.find_layers(nnx.as_pure(params)) == found
    assert tb_optax.find_layers(nnx.to_pure_dict(params)) == found
    assert tb_optax.find_layers(nnx.state(own)) == found
    # The model itself has its leaves in another order.
    assert set(tb_optax.find_layers(own)) == set(found)


@pytest.mark.parametrize("name", ["equinox_cnn", "equinox_transformer", "equinox_mlp"])
def test_filtered_equinox_models_have_the_layers_of_raw_ones(name):
    raw = jax.tree.map(
        lambda leaf: (
            jnp.zeros(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf
        ),
        params_of(name),
    )
    filtered = eqx.filter(raw, eqx.is_inexact_array)
    assert tb_optax.find_layers(filtered) == tb_optax.find_layers(raw)
    assert jax.tree.leaves(filtered) != jax.tree.leaves(raw)


def test_depthwise_kernels_count_their_positions():
    """A (3, 3, 1, 6) kernel has nine 1 x 6 matrices: nine eigenvalues."""
    params = params_of("linen_cnn")
    rows = tb_optax.describe(params, tb_optax.find_layers(params), min_eigenvalues=1)
    notes = {row["leaf"]: row["note"] for row in rows}
    assert notes["Conv_2/kernel"] == "9 eigenvalues"
    assert notes["Conv_3/kernel"] == "3 eigenvalues"
    assert notes["ConvTranspose_0/kernel"] == "36 eigenvalues"
