"""`find_layers` and `describe` on models of Flax linen, Flax nnx, Equinox and Haiku."""
# ruff: noqa: D101, D102  # The names of the models say what they are.

import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tb_optax
from tb_optax import MatrixAxes

DENSE = MatrixAxes((0,), (1,))
DENSE_TRANSPOSED = MatrixAxes((1,), (0,))
HWIO = MatrixAxes((2,), (3,), pooled=(0, 1))
OIHW = MatrixAxes((1,), (0,), pooled=(2, 3))
QUERY = MatrixAxes((0,), (1, 2))
OUT = MatrixAxes((0, 1), (2,))
STACKED_DENSE = MatrixAxes((1,), (2,), stacked=(0,))

IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
SEQUENCE = jax.ShapeDtypeStruct((2, 5, 16), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


def linen_params(module: nn.Module, *inputs: Any) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def nnx_params(make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    return nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)


def equinox_params(make: Callable[[Any], Any]) -> Any:
    return eqx.filter_eval_shape(make, jax.random.key(0))


def haiku_params(forward: Callable[..., Any], *inputs: Any) -> Any:
    init = hk.transform_with_state(forward).init
    return jax.eval_shape(init, jax.random.key(0), *inputs)[0]


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x))
        x = nn.GroupNorm(2)(nn.Conv(6, (3, 3), use_bias=False)(x))
        x = nn.Conv(6, (3, 3), feature_group_count=6)(x)
        x = nn.LayerNorm()(nn.Conv(4, (1, 1), feature_group_count=2)(x))
        x = nn.ConvTranspose(5, (3, 3))(x).mean((1, 2))
        # The number in a name tells the order of construction, not of execution.
        return nn.Dense(3)(nn.relu(nn.Dense(7)(x)))


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 16)
        x = embed(tokens)
        # pyrefly: ignore [unsupported-operation]
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        # pyrefly: ignore [unsupported-operation]
        x = x + nn.MultiHeadDotProductAttention(4, use_bias=False)(nn.RMSNorm()(x))
        return embed.attend(nn.Dense(16)(x))


class LinenRecurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden: Any = nn.RNN(nn.LSTMCell(6))(x)
        return nn.RNN(nn.GRUCell(5))(hidden)


class LinenWeightNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(4))(x)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(16)(nn.LayerNorm()(x)), None


class LinenScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=5,
        )
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(3, name="head")(x)


class LinenScannedAttention(nn.Module):
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        def block(attention, x, _):
            return attention(x), None

        attention = nn.MultiHeadDotProductAttention(4, use_bias=self.use_bias)
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )(attention, x, None)[0]


class LinenExperts(nn.Module):
    @nn.compact
    def __call__(self, x):
        experts = self.param("experts", nn.initializers.normal(), (3, 16, 8))
        return jnp.einsum("bld,edf->ebf", x, experts)


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(
            4, 6, (3, 3), feature_group_count=2, use_bias=False, rngs=rngs
        )
        self.norm2 = nnx.GroupNorm(6, 2, rngs=rngs)
        self.depthwise = nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs)
        self.up = nnx.ConvTranspose(6, 5, (3, 3), rngs=rngs)
        self.ln = nnx.LayerNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs) for _ in range(11)])
        self.head = nnx.Sequential(
            nnx.Linear(5, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 3, rngs=rngs)
        )


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 16, rngs=rngs)
        self.value = nnx.Linear(16, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=16, normalize_qk=True, use_bias=False, rngs=rngs
        )
        self.cross = nnx.MultiHeadAttention(num_heads=4, in_features=16, rngs=rngs)


class NnxRecurrent(nnx.Module):
    def __init__(self, rngs):
        self.gru = nnx.GRUCell(3, 6, rngs=rngs)
        self.lstm = nnx.OptimizedLSTMCell(3, 6, rngs=rngs)


class NnxTied(nnx.Module):
    """The same layer under two names is one leaf."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.second = self.first


class NnxLoRA(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.LoRALinear(8, 6, lora_rank=2, rngs=rngs)


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        @nnx.vmap
        def make(key):
            return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

        self.stack = make(jax.random.split(rngs.params(), 5))


class EquinoxCNN(eqx.Module):
    conv1: eqx.nn.Conv2d
    bn1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    norm2: eqx.nn.GroupNorm
    depthwise: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    ln: eqx.nn.LayerNorm
    conv1d: eqx.nn.Conv1d
    layers: list
    activation: Callable

    def __init__(self, key):
        self.conv1 = eqx.nn.Conv2d(3, 4, 3, key=key)
        self.bn1 = eqx.nn.BatchNorm(4, "batch", mode="ema")
        self.conv2 = eqx.nn.Conv2d(4, 6, 3, groups=2, use_bias=False, key=key)
        self.norm2 = eqx.nn.GroupNorm(2, 6)
        self.depthwise = eqx.nn.Conv2d(6, 6, 3, groups=6, key=key)
        self.up = eqx.nn.ConvTranspose2d(6, 5, 3, key=key)
        self.ln = eqx.nn.LayerNorm(5)
        self.conv1d = eqx.nn.Conv1d(5, 5, 3, key=key)
        self.layers = [
            eqx.nn.Linear(5, 5, key=key),
            jax.nn.relu,
            eqx.nn.Linear(5, 2, use_bias=False, key=key),
        ]
        self.activation = jax.nn.relu


class EquinoxTransformer(eqx.Module):
    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    gru: eqx.nn.GRUCell
    lstm: eqx.nn.LSTMCell
    norm: eqx.nn.RMSNorm

    def __init__(self, key):
        self.embedding = eqx.nn.Embedding(7, 16, key=key)
        self.attention = eqx.nn.MultiheadAttention(4, 16, use_output_bias=True, key=key)
        self.gru = eqx.nn.GRUCell(16, 4, key=key)
        self.lstm = eqx.nn.LSTMCell(16, 4, use_bias=False, key=key)
        self.norm = eqx.nn.RMSNorm(16)


class EquinoxOwn(eqx.Module):
    """Matrices of a user's own modules: a bias of the right size tells them."""

    weight: jax.Array
    bias: jax.Array | None


class EquinoxTied(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, key):
        layers = (
            eqx.nn.Embedding(7, 4, key=key),
            eqx.nn.Linear(4, 7, use_bias=False, key=key),
        )
        self.shared = eqx.nn.Shared(
            layers, lambda pair: pair[1].weight, lambda pair: pair[0].weight
        )


def haiku_cnn(x):
    x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(4, 3)(x), True)
    x = hk.GroupNorm(3)(hk.Conv2D(6, 3, with_bias=False)(x))
    x = hk.DepthwiseConv2D(2, 3)(x)
    x = hk.LayerNorm(-1, True, True)(hk.Conv2DTranspose(12, 3)(x))
    return hk.nets.MLP([7, 3])(x.mean((1, 2)))


def haiku_attention(tokens):
    x = hk.Embed(11, 16)(tokens)
    w_init = hk.initializers.VarianceScaling()
    return hk.MultiHeadAttention(4, 4, w_init=w_init)(x, x, x)


def haiku_lstm(x):
    core = hk.LSTM(6)
    return hk.dynamic_unroll(core, x, core.initial_state(5))[0]


def haiku_gru(x):
    core = hk.GRU(6)
    return hk.dynamic_unroll(core, x, core.initial_state(5))[0]


def module(path: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{path}/{name}" for name in names)


def with_bias(axes: MatrixAxes, *paths: str, name: str = "bias") -> dict[str, Any]:
    """Layers with the bias of their module."""
    return {
        path: (axes, (f"{path.rpartition('/')[0]}/{name}".lstrip("/"),))
        for path in paths
    }


def bare(axes: MatrixAxes, *paths: str) -> dict[str, Any]:
    return dict.fromkeys(paths, (axes, ()))


# What each model holds: its params, and in order the axes and followers of its layers.
FOUND = {
    "linen_cnn": (
        lambda: linen_params(LinenCNN(), IMAGE),
        with_bias(HWIO, "ConvTranspose_0/kernel")
        | {
            "Conv_0/kernel": (
                HWIO,
                ("BatchNorm_0/bias", "BatchNorm_0/scale", "Conv_0/bias"),
            )
        }
        | bare(HWIO, "Conv_1/kernel")
        | with_bias(HWIO, "Conv_2/kernel", "Conv_3/kernel")
        | with_bias(DENSE, "Dense_0/kernel", "Dense_1/kernel"),
    ),
    "linen_transformer": (
        lambda: linen_params(LinenTransformer(), TOKENS),
        with_bias(DENSE, "Dense_0/kernel")
        | with_bias(QUERY, "MultiHeadDotProductAttention_0/key/kernel")
        | with_bias(OUT, "MultiHeadDotProductAttention_0/out/kernel")
        | with_bias(
            QUERY,
            "MultiHeadDotProductAttention_0/query/kernel",
            "MultiHeadDotProductAttention_0/value/kernel",
        )
        | bare(QUERY, "MultiHeadDotProductAttention_1/key/kernel")
        | bare(OUT, "MultiHeadDotProductAttention_1/out/kernel")
        | bare(
            QUERY,
            "MultiHeadDotProductAttention_1/query/kernel",
            "MultiHeadDotProductAttention_1/value/kernel",
        ),
    ),
    "linen_recurrent": (
        lambda: linen_params(LinenRecurrent(), SEQUENCE),
        with_bias(DENSE, "GRUCell_0/hn/kernel")
        | bare(DENSE, "GRUCell_0/hr/kernel", "GRUCell_0/hz/kernel")
        | with_bias(DENSE, *module("GRUCell_0", "in/kernel", "ir/kernel", "iz/kernel"))
        | with_bias(
            DENSE,
            *module("LSTMCell_0", "hf/kernel", "hg/kernel", "hi/kernel", "ho/kernel"),
        )
        | bare(
            DENSE,
            *module("LSTMCell_0", "if/kernel", "ig/kernel", "ii/kernel", "io/kernel"),
        ),
    ),
    "linen_weight_norm": (
        lambda: linen_params(LinenWeightNorm(), SEQUENCE),
        with_bias(DENSE, "Dense_0/kernel"),
    ),
    "nnx_cnn": (
        lambda: nnx_params(NnxCNN),
        {"conv1/kernel": (HWIO, ("bn1/bias", "bn1/scale", "conv1/bias"))}
        | {"conv2/kernel": (HWIO, ("norm2/bias", "norm2/scale"))}
        | with_bias(HWIO, "depthwise/kernel")
        | with_bias(DENSE, "head/layers/0/kernel", "head/layers/2/kernel")
        | with_bias(DENSE, *(f"layers/{i}/kernel" for i in range(11)))
        | with_bias(HWIO, "up/kernel"),
    ),
    "nnx_attention": (
        lambda: nnx_params(NnxAttention),
        bare(QUERY, "attention/key/kernel")
        | bare(OUT, "attention/out/kernel")
        | bare(QUERY, "attention/query/kernel", "attention/value/kernel")
        | with_bias(QUERY, "cross/key/kernel")
        | with_bias(OUT, "cross/out/kernel")
        | with_bias(QUERY, "cross/query/kernel", "cross/value/kernel")
        | with_bias(DENSE, "value/kernel"),
    ),
    "nnx_recurrent": (
        lambda: nnx_params(NnxRecurrent),
        bare(DENSE, "gru/dense_h/kernel")
        | with_bias(DENSE, "gru/dense_i/kernel")
        | with_bias(DENSE, "lstm/dense_h/kernel")
        | bare(DENSE, "lstm/dense_i/kernel"),
    ),
    "nnx_tied": (lambda: nnx_params(NnxTied), with_bias(DENSE, "first/kernel")),
    "equinox_cnn": (
        lambda: equinox_params(EquinoxCNN),
        {"conv1/weight": (OIHW, ("conv1/bias", "bn1/weight", "bn1/bias"))}
        | {"conv2/weight": (OIHW, ("norm2/weight", "norm2/bias"))}
        | with_bias(OIHW, "depthwise/weight", "up/weight")
        | with_bias(MatrixAxes((1,), (0,), pooled=(2,)), "conv1d/weight")
        | with_bias(DENSE_TRANSPOSED, "layers/0/weight")
        | bare(DENSE_TRANSPOSED, "layers/2/weight"),
    ),
    "equinox_transformer": (
        lambda: equinox_params(EquinoxTransformer),
        bare(
            DENSE_TRANSPOSED,
            "attention/query_proj/weight",
            "attention/key_proj/weight",
            "attention/value_proj/weight",
        )
        | with_bias(DENSE_TRANSPOSED, "attention/output_proj/weight")
        | bare(
            DENSE_TRANSPOSED,
            *module("gru", "weight_ih", "weight_hh"),
            *module("lstm", "weight_ih", "weight_hh"),
        ),
    ),
    "equinox_mlp": (
        lambda: equinox_params(lambda key: eqx.nn.MLP(4, 3, 8, 2, key=key)),
        with_bias(DENSE_TRANSPOSED, *(f"layers/{i}/weight" for i in range(3))),
    ),
    "equinox_own_module": (
        lambda: EquinoxOwn(jnp.ones((6, 4)), jnp.ones(6)),
        with_bias(DENSE_TRANSPOSED, "weight"),
    ),
    "equinox_tied": (lambda: equinox_params(EquinoxTied), {}),
    "haiku_cnn": (
        lambda: haiku_params(haiku_cnn, IMAGE),
        {
            "conv2_d/w": (
                HWIO,
                ("batch_norm/offset", "batch_norm/scale", "conv2_d/b"),
            )
        }
        | bare(HWIO, "conv2_d_1/w")
        | with_bias(HWIO, "conv2_d_transpose/w", name="b")
        | with_bias(HWIO, "depthwise_conv2_d/w", name="b")
        | with_bias(DENSE, "mlp/~/linear_0/w", "mlp/~/linear_1/w", name="b"),
    ),
    "haiku_attention": (
        lambda: haiku_params(haiku_attention, TOKENS),
        with_bias(
            DENSE,
            *(
                f"multi_head_attention/{n}/w"
                for n in ("key", "linear", "query", "value")
            ),
            name="b",
        ),
    ),
    "haiku_lstm": (
        lambda: haiku_params(haiku_lstm, SEQUENCE),
        with_bias(DENSE, "lstm/linear/w", name="b"),
    ),
}

every_model = pytest.mark.parametrize(("make", "expected"), FOUND.values(), ids=FOUND)


@every_model
def test_layers_found(make, expected):
    layers = tb_optax.find_layers(make())
    found = [(layer.path, (layer.axes, layer.follows)) for layer in layers]
    assert found == list(expected.items())
    assert all(layer.index == () and layer.part is None for layer in layers)


def leaf_names(params: Any) -> list[str]:
    """Every leaf with its path, told apart from `describe`'s own reading."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None)
    names = []
    for keys, _ in flat:
        own = [str(next(iter(vars_of(key)))) for key in keys]
        boxed = own[-1] == "value" and isinstance(keys[-1], jax.tree_util.GetAttrKey)
        names.append("/".join(own[:-1] if boxed else own))
    return names


def vars_of(key: Any) -> list[Any]:
    """The only field of a key of a path, whatever its kind."""
    return [getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)]


@every_model
def test_describe_tells_of_every_leaf_once(make, expected):
    params = make()
    rows = tb_optax.describe(params, tb_optax.find_layers(params), min_eigenvalues=4)
    arrays = {row["leaf"] for row in rows if row["shape"] is not None}
    # What is no array comes last.
    in_order = sorted(leaf_names(params), key=lambda leaf: leaf not in arrays)
    assert [row["leaf"] for row in rows] == in_order
    owners = {path: path for path in expected}
    for path, (_, follows) in expected.items():
        owners |= dict.fromkeys(follows, path)
    for row in rows:
        assert row["layer"] == owners.get(row["leaf"], "")
        if row["leaf"] in expected:
            assert re.fullmatch(r"\d+ eigenvalues(, too few.*)?", row["note"])
        elif row["leaf"] in owners:
            assert row["note"] == "follows"
        else:
            assert row["note"] not in ("follows", "")


REASONS = {
    "linen_cnn": {
        "norm": [
            *module("GroupNorm_0", "bias", "scale"),
            *module("LayerNorm_0", "bias", "scale"),
        ]
    },
    "linen_transformer": {
        "embedding": ["Embed_0/embedding"],
        "norm": [*module("LayerNorm_0", "bias", "scale"), "RMSNorm_0/scale"],
    },
    "linen_weight_norm": {"rank < 2": ["WeightNorm_0/Dense_0/kernel/scale"]},
    "nnx_cnn": {"norm": module("ln", "bias", "scale")},
    "nnx_attention": {
        "norm": ["attention/key_ln/scale", "attention/query_ln/scale"],
        "embedding": ["embed/embedding"],
    },
    "equinox_cnn": {
        "not an array": [
            "bn1/axis_name",
            "bn1/inference",
            "layers/1",
            "activation",
        ],
        "norm": module("ln", "weight", "bias"),
    },
    "equinox_transformer": {
        "embedding": ["embedding/weight"],
        "norm": module("norm", "weight", "bias"),
        "bias": ["gru/bias"],
        "rank < 2": ["gru/bias_n"],
    },
    "equinox_tied": {"embedding": ["shared/pytree/0/weight"]},
    "haiku_cnn": {
        "norm": [
            *module("group_norm", "offset", "scale"),
            *module("layer_norm", "offset", "scale"),
        ]
    },
    "haiku_attention": {"embedding": ["embed/embeddings"]},
}


@pytest.mark.parametrize("model", REASONS)
def test_describe_tells_why_a_leaf_has_no_layer(model):
    params = FOUND[model][0]()
    notes: dict[str, list[str]] = {}
    for row in tb_optax.describe(params, tb_optax.find_layers(params)):
        if not row["layer"]:
            # The kind of leaf comes first, then what there is to say of it.
            kind = row["note"].partition(":")[0]
            notes.setdefault(kind, []).append(row["leaf"])
    for note, leaves in REASONS[model].items():
        assert set(leaves) <= set(notes[note])


SCANNED_ATTENTION = {
    f"MultiHeadDotProductAttention_0/{name}/kernel": shape
    for name, shape in (
        ("key", (3, 16, 4, 4)),
        ("out", (3, 4, 4, 16)),
        ("query", (3, 16, 4, 4)),
        ("value", (3, 16, 4, 4)),
    )
}
# What the rules cannot read: params, the leaves that the error names, in order.
UNCLEAR = {
    "linen_scan": (
        lambda: linen_params(LinenScan(), SEQUENCE),
        {"blocks/Dense_0/kernel": (5, 16, 16)},
    ),
    "linen_scanned_attention": (
        lambda: linen_params(LinenScannedAttention(use_bias=True), SEQUENCE),
        SCANNED_ATTENTION,
    ),
    "linen_scanned_attention_without_bias": (
        lambda: linen_params(LinenScannedAttention(use_bias=False), SEQUENCE),
        SCANNED_ATTENTION,
    ),
    "linen_dense_general": (
        lambda: linen_params(nn.DenseGeneral((2, 4)), SEQUENCE),
        {"kernel": (16, 2, 4)},
    ),
    "linen_conv_1d": (
        lambda: linen_params(nn.Conv(5, (3,)), SEQUENCE),
        {"kernel": (3, 16, 5)},
    ),
    "linen_conv_local": (
        lambda: linen_params(nn.ConvLocal(5, (3,)), SEQUENCE),
        {"kernel": (5, 48, 5)},
    ),
    "linen_experts": (
        lambda: linen_params(LinenExperts(), SEQUENCE),
        {"experts": (3, 16, 8)},
    ),
    "nnx_stack": (lambda: nnx_params(NnxStack), {"stack/kernel": (5, 4, 4)}),
    "nnx_einsum": (
        lambda: nnx_params(
            lambda rngs: nnx.Einsum("nta,hab->nthb", (4, 2, 5), (4, 5), rngs=rngs)
        ),
        {"kernel": (4, 2, 5)},
    ),
    "nnx_linear_general": (
        lambda: nnx_params(lambda rngs: nnx.LinearGeneral(8, (2, 4), rngs=rngs)),
        {"kernel": (8, 2, 4)},
    ),
    "nnx_lora": (
        lambda: nnx.state(nnx.eval_shape(lambda: NnxLoRA(nnx.Rngs(0)))),
        {"linear/lora/lora_a": (8, 2), "linear/lora/lora_b": (2, 6)},
    ),
    "equinox_vmapped_linear": (
        lambda: equinox_params(
            lambda key: eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 6, key=k))(
                jax.random.split(key, 5)
            )
        ),
        {"weight": (5, 6, 4)},
    ),
    "equinox_vmapped_conv": (
        lambda: equinox_params(
            lambda key: eqx.filter_vmap(lambda k: eqx.nn.Conv2d(4, 6, 3, key=k))(
                jax.random.split(key, 5)
            )
        ),
        {"weight": (5, 6, 4, 3, 3)},
    ),
    "equinox_own_module_without_bias": (
        lambda: EquinoxOwn(jnp.ones((6, 4)), None),
        {"weight": (6, 4)},
    ),
    "haiku_gru": (
        lambda: haiku_params(haiku_gru, SEQUENCE),
        {"gru/w_h": (6, 18), "gru/w_i": (16, 18)},
    ),
    "haiku_layer_stack": (
        lambda: haiku_params(
            lambda x: hk.experimental.layer_stack(3, name="stack")(
                lambda h: hk.Linear(16)(h)
            )(x),
            SEQUENCE,
        ),
        {"stack/linear/w": (3, 16, 16)},
    ),
    "haiku_conv_1d": (
        lambda: haiku_params(lambda x: hk.Conv1D(4, 3)(x), SEQUENCE),
        {"conv1_d/w": (3, 16, 4)},
    ),
}


@pytest.mark.parametrize(("make", "leaves"), UNCLEAR.values(), ids=UNCLEAR)
def test_unclear_leaves_are_named_and_can_be_left_out(make, leaves):
    params = make()
    with pytest.raises(ValueError, match="cannot tell how to read") as raised:
        tb_optax.find_layers(params)
    message = str(raised.value)
    named = re.findall(r"^ +'(.*?)' of shape (\(.*?\)): ", message, re.MULTILINE)
    assert named == [(path, str(shape)) for path, shape in leaves.items()]
    assert f"axes={{'{next(iter(leaves))}': MatrixAxes(" in message
    layers = tb_optax.find_layers(params, axes=dict.fromkeys(leaves))
    assert not {layer.path for layer in layers} & set(leaves)
    rows = {row["leaf"]: row for row in tb_optax.describe(params, layers)}
    assert all(rows[path]["layer"] == "" for path in leaves)


def test_axes_settle_a_scanned_stack():
    """Each slice is a layer, and its bias follows slice by slice."""
    params = linen_params(LinenScan(), SEQUENCE)
    layers = tb_optax.find_layers(params, axes={"blocks/*/kernel": STACKED_DENSE})
    assert [(layer.path, layer.axes, layer.follows) for layer in layers] == [
        ("blocks/Dense_0/kernel", STACKED_DENSE, ("blocks/Dense_0/bias",)),
        ("head/kernel", DENSE, ("head/bias",)),
    ]
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    expanded = jax.eval_shape(analyze, params).layers
    assert [layer.name for layer in expanded] == [
        *(f"blocks/Dense_0/kernel[{i}]" for i in range(5)),
        "head/kernel",
    ]
    multipliers = jax.eval_shape(lambda p: analyze(p).leaf_multipliers(p), params)
    assert multipliers["blocks"]["Dense_0"]["kernel"].shape == (5, 1, 1)
    assert multipliers["blocks"]["Dense_0"]["bias"].shape == (5, 1)
    assert multipliers["blocks"]["LayerNorm_0"]["scale"].shape == ()


def test_describe_marks_what_is_frozen_and_what_is_missing():
    params = {
        "first": {"kernel": jnp.ones((9, 8)), "bias": jnp.ones(8)},
        "norm": {"scale": jnp.ones(8), "bias": jnp.ones(8)},
        "second": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)},
        "odd": {"kernel": jnp.ones((2, 8, 8))},
        "activation": jnp.tanh,
    }
    layers = [tb_optax.Layer("first/kernel", DENSE)]
    trainable = dict.fromkeys(params, True) | {"first": False}
    for mask in (trainable, jax.tree.broadcast(trainable, params)):
        rows = tb_optax.describe(params, layers, trainable=mask)
        notes = {row["leaf"]: row["note"] for row in rows}
        assert list(notes)[-1] == "activation"
        assert notes["first/bias"] == "frozen, and not in the list"
        assert notes["first/kernel"].startswith("8 eigenvalues, too few of at least 50")
        assert "FROZEN BUT IN THE LIST" in notes["first/kernel"]
    notes = {row["leaf"]: row["note"] for row in tb_optax.describe(params, layers)}
    assert notes["first/kernel"] == "8 eigenvalues, too few of at least 50: not tuned"
    assert notes["first/bias"].endswith("'first/kernel' does not name it in `follows`")
    assert notes["second/bias"].endswith("'second/kernel' is not in the list")
    assert notes["second/kernel"].startswith("NOT IN THE LIST: a kernel with 8 eigen")
    assert notes["odd/kernel"].startswith("NOT IN THE LIST, multiplier 1: a kernel of")
    assert notes["norm/scale"].startswith("norm: no layer names it in `follows`")
    for wrong in ({"first": False}, dict.fromkeys(params, 1)):
        with pytest.raises(ValueError, match="trainable must"):
            tb_optax.describe(params, layers, trainable=wrong)


def test_a_stack_is_described_by_its_first_and_last_slice():
    params = linen_params(LinenScan(), SEQUENCE)
    layers = tb_optax.find_layers(params, axes={"blocks/*/kernel": STACKED_DENSE})
    rows = {row["leaf"]: row for row in tb_optax.describe(params, layers)}
    name = "blocks/Dense_0/kernel"
    assert rows[name]["layer"] == f"{name}[0], ..., {name}[4]"
    assert rows["blocks/Dense_0/bias"]["layer"] == f"{name}[0], ..., {name}[4]"
    assert rows["blocks/LayerNorm_0/scale"]["note"].startswith("norm: no layer names")


def test_axes_settle_scanned_attention():
    params = linen_params(LinenScannedAttention(use_bias=True), SEQUENCE)
    query = MatrixAxes((1,), (2, 3), stacked=(0,))
    out = MatrixAxes((1, 2), (3,), stacked=(0,))
    layers = tb_optax.find_layers(params, axes={"*/out/kernel": out, "*/kernel": query})
    found = {layer.path.split("/")[1]: layer for layer in layers}
    assert {name: layer.axes for name, layer in found.items()} == {
        "key": query,
        "out": out,
        "query": query,
        "value": query,
    }
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    multipliers = jax.eval_shape(lambda p: analyze(p).leaf_multipliers(p), params)[
        "MultiHeadDotProductAttention_0"
    ]
    assert multipliers["query"]["bias"].shape == (3, 1, 1)
    assert multipliers["out"]["bias"].shape == (3, 1)


def test_axes_settle_a_vmapped_equinox_layer():
    params = UNCLEAR["equinox_vmapped_linear"][0]()
    axes = MatrixAxes((2,), (1,), stacked=(0,))
    (layer,) = tb_optax.find_layers(params, axes={"weight": axes})
    assert (layer.axes, layer.follows) == (axes, ("bias",))


def test_a_pattern_without_a_match_is_an_error():
    params = linen_params(LinenScan(), SEQUENCE)
    with pytest.raises(ValueError, match=r"no leaf matches 'block/\*'.*'head/kernel'"):
        tb_optax.find_layers(params, axes={"block/*": None, "*/Dense_0/kernel": None})


def test_a_pattern_of_another_rank_is_an_error():
    params = linen_params(LinenScan(), SEQUENCE)
    with pytest.raises(ValueError, match=r"rank 3, 'head/kernel' has shape \(16, 3\)"):
        tb_optax.find_layers(params, axes={"*kernel": STACKED_DENSE})


def test_the_first_pattern_that_matches_wins():
    params = linen_params(LinenScan(), SEQUENCE)
    axes = {"head/kernel": None, "blocks/*/kernel": STACKED_DENSE, "*kernel": None}
    (layer,) = tb_optax.find_layers(params, axes=axes)
    assert layer.path == "blocks/Dense_0/kernel"


def test_boxed_params_have_the_paths_of_bare_ones():
    """`nn.with_partitioning` boxes a leaf; its path is the same."""

    class Partitioned(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(8, kernel_init=init)(x)

    boxed = linen_params(Partitioned(), SEQUENCE)
    assert isinstance(boxed["Dense_0"]["kernel"], nn.Partitioned)
    layers = tb_optax.find_layers(boxed)
    assert layers == tb_optax.find_layers(nn.unbox(boxed))
    assert layers[0].path == "Dense_0/kernel"
    assert layers[0].follows == ("Dense_0/bias",)


@pytest.mark.parametrize("make", [NnxCNN, NnxAttention, NnxRecurrent])
def test_every_form_of_an_nnx_model_has_the_same_layers(make):
    """As nodes, plain arrays, or a whole state, whose statistics do not follow."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    layers = tb_optax.find_layers(params)
    assert tb_optax.find_layers(nnx.as_pure(params)) == layers
    assert tb_optax.find_layers(nnx.to_pure_dict(params)) == layers
    assert tb_optax.find_layers(nnx.state(model)) == layers
    # The model itself has its leaves in another order.
    assert set(tb_optax.find_layers(model)) == set(layers)


@pytest.mark.parametrize(
    "make",
    [EquinoxCNN, EquinoxTransformer, lambda key: eqx.nn.MLP(4, 3, 8, 2, key=key)],
    ids=["cnn", "transformer", "mlp"],
)
def test_filtered_equinox_models_have_the_layers_of_raw_ones(make):
    model = jax.tree.map(
        lambda leaf: (
            jnp.zeros(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf
        ),
        equinox_params(make),
    )
    filtered = eqx.filter(model, eqx.is_inexact_array)
    assert tb_optax.find_layers(filtered) == tb_optax.find_layers(model)
    assert jax.tree.leaves(filtered) != jax.tree.leaves(model)


def test_depthwise_kernels_count_their_positions():
    """A (3, 3, 1, 6) kernel has nine 1 x 6 matrices: nine eigenvalues."""
    params = linen_params(LinenCNN(), IMAGE)
    rows = tb_optax.describe(params, tb_optax.find_layers(params), min_eigenvalues=1)
    notes = {row["leaf"]: row["note"] for row in rows}
    assert notes["Conv_2/kernel"] == "9 eigenvalues"
    assert notes["Conv_3/kernel"] == "3 eigenvalues"
    assert notes["ConvTranspose_0/kernel"] == "36 eigenvalues"
