"""`trace_layers` on models of every framework, each against its exact list."""
# ruff: noqa: D101, D102  # The names of the models say what they are.

import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from benchmarks import models
from tb_optax import Layer, MatrixAxes, trace_layers

DENSE = MatrixAxes((0,), (1,))
DENSE_TRANSPOSED = MatrixAxes((1,), (0,))
HWIO = MatrixAxes((2,), (3,), pooled=(0, 1))
OIHW = MatrixAxes((1,), (0,), pooled=(2, 3))
QUERY = MatrixAxes((0,), (1, 2))
OUT = MatrixAxes((0, 1), (2,))
STACK = MatrixAxes((1,), (2,), stacked=(0,))

IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
SEQUENCE = jax.ShapeDtypeStruct((2, 5, 16), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


def dense(path: str, *follows: str) -> Layer:
    return Layer(f"{path}/kernel", DENSE, (*follows, f"{path}/bias"))


def conv(path: str, norm: str = "") -> Layer:
    """A convolution without a bias and the norm behind it."""
    norms = (f"{norm}/bias", f"{norm}/scale") if norm else ()
    return Layer(f"{path}/kernel", HWIO, norms)


def scales(norm: str) -> tuple[str, str]:
    return f"{norm}/bias", f"{norm}/scale"


def trace_linen(model: nn.Module, *inputs: Any, norms="after", **options: Any) -> Any:
    """Traces a linen model; its other collections and random numbers are inputs."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    init = functools.partial(model.init, **options)
    variables = jax.eval_shape(init, keys, *inputs)
    params = variables.pop("params")

    def forward(params, state, keys, *inputs):
        variables = {"params": params, **state}
        mutable = list(state)
        return model.apply(variables, *inputs, rngs=keys, mutable=mutable, **options)

    return trace_layers(forward, params, variables, keys, *inputs, norms=norms)


def check(found: tuple[Layer, ...], expected: list[Layer]) -> None:
    """Asserts the same layers in the same order; followers in any order."""
    assert [(layer.path, layer.index) for layer in found] == [
        (layer.path, layer.index) for layer in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.axes == other.axes, one.path
        assert sorted(one.follows) == sorted(other.follows), one.path


class Block(nn.Module):
    width: int
    stride: int
    train: bool

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=not self.train)
        strides = (self.stride, self.stride)
        y = nn.Conv(self.width, (3, 3), strides, use_bias=False, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = nn.Conv(self.width, (3, 3), use_bias=False, name="conv2")(y)
        y = norm(name="bn2")(y)
        if x.shape != y.shape:
            x = nn.Conv(self.width, (1, 1), strides, use_bias=False, name="conv3")(x)
            x = norm(name="bn3")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(use_running_average=not train, name="bn")
        x = nn.Conv(8, (7, 7), (2, 2), use_bias=False, name="stem")(x)
        x = nn.max_pool(nn.relu(norm(x)), (3, 3), (2, 2), "SAME")
        for stage in range(2):
            for block in range(2 - stage):
                stride = 2 if stage and not block else 1
                x = Block(8 * 2**stage, stride, train, name=f"block{stage}_{block}")(x)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


RESNET = [
    conv("stem", "bn"),
    *(
        conv(f"{block}/conv{i}", f"{block}/bn{i}")
        for block, count in (("block0_0", 2), ("block0_1", 2), ("block1_0", 3))
        for i in range(1, count + 1)
    ),
    dense("head"),
]


@pytest.mark.parametrize("train", [True, False])
def test_linen_resnet(train):
    check(trace_linen(ResNet(), IMAGE, train=train), RESNET)


@pytest.mark.parametrize("train", [True, False])
def test_linen_resnet_without_norms(train):
    """In evaluation too, where norms are only affine."""
    found = trace_linen(ResNet(), IMAGE, train=train, norms="none")
    expected = [Layer(layer.path, layer.axes) for layer in RESNET[:-1]]
    check(found, [*expected, RESNET[-1]])


@pytest.mark.parametrize("train", [True, False])
def test_linen_resnet_by_closure(train):
    """State that is closed over is a constant, as state that is passed is data."""
    model = ResNet()
    init = functools.partial(model.init, train=train)
    variables = jax.eval_shape(init, jax.random.key(0), IMAGE)
    params = variables.pop("params")
    state = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)

    def forward(params, x):
        variables = {"params": params, **state}
        return model.apply(variables, x, train=train, mutable=["batch_stats"])

    check(trace_layers(forward, params, IMAGE), RESNET)


@pytest.mark.parametrize("train", [True, False])
def test_nnx_resnet18(train):
    model = nnx.eval_shape(
        lambda: models.build("resnet18", num_classes=10, width=0.125, rngs=nnx.Rngs(0))
    )
    paths = ["conv1"]
    for i in range(8):
        paths += [f"blocks/{i}/conv1", f"blocks/{i}/conv2"]
        paths += [f"blocks/{i}/shortcut/conv1"] * (i in (2, 4, 6))
    expected = [conv(path, path.replace("conv", "bn")) for path in paths]
    found = trace_layers(lambda model, x: model(x, train=train), model, IMAGE)
    check(found, [*expected, dense("linear")])


class PreActivation(nn.Module):
    """A wide ResNet: every norm comes before the convolution that it feeds."""

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        for i, width in enumerate((8, 16)):
            y = nn.relu(norm(name=f"norm{i}a")(x))
            if x.shape[-1] != width:
                x = nn.Conv(width, (1, 1), use_bias=False, name=f"short{i}")(y)
            y = nn.Conv(width, (3, 3), use_bias=False, name=f"conv{i}a")(y)
            y = nn.relu(norm(name=f"norm{i}b")(y))
            y = nn.Dropout(0.1, deterministic=not train)(y)
            x = x + nn.Conv(width, (3, 3), use_bias=False, name=f"conv{i}b")(y)
        x = nn.relu(norm(name="norm")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("train", [True, False])
def test_pre_activation_norms(train):
    trace = functools.partial(trace_linen, PreActivation(), IMAGE, train=train)
    check(
        trace(),
        [
            conv("stem", "norm0a"),
            conv("conv0a", "norm0b"),
            conv("conv0b", "norm1a"),
            conv("short1"),
            conv("conv1a", "norm1b"),
            conv("conv1b", "norm"),
            dense("head"),
        ],
    )
    check(
        trace(norms="before"),
        [
            conv("stem"),
            conv("conv0a", "norm0a"),
            conv("conv0b", "norm0b"),
            conv("short1", "norm1a"),
            conv("conv1a"),
            conv("conv1b", "norm1b"),
            dense("head", *scales("norm")),
        ],
    )


class VGG(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (8, "pool", 16, 16, "pool"):
            if width == "pool":
                x = nn.max_pool(x, (2, 2), (2, 2))
            else:
                x = nn.BatchNorm(use_running_average=False)(nn.Conv(width, (3, 3))(x))
                x = nn.relu(x)
        x = x.reshape(len(x), -1)
        x = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(20)(x)))
        return nn.Dense(10)(x)


def test_vgg_with_norms():
    convolutions = [
        Layer(f"Conv_{i}/kernel", HWIO, (f"Conv_{i}/bias", *scales(f"BatchNorm_{i}")))
        for i in range(3)
    ]
    found = trace_linen(VGG(), IMAGE)
    check(found, [*convolutions, dense("Dense_0"), dense("Dense_1")])


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for _ in range(3):
            y = nn.relu(nn.BatchNorm(use_running_average=False)(x))
            y = nn.Conv(4, (3, 3), use_bias=False)(y)
            x = jnp.concatenate([x, y], axis=-1)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def test_densenet():
    expected = [conv(f"Conv_{i}", f"BatchNorm_{i}") for i in range(4)]
    check(trace_linen(DenseNet(), IMAGE), [*expected, dense("head")])
    expected = [conv("Conv_0")]
    expected += [conv(f"Conv_{i + 1}", f"BatchNorm_{i}") for i in range(3)]
    head = dense("head", *scales("BatchNorm_3"))
    check(trace_linen(DenseNet(), IMAGE, norms="before"), [*expected, head])


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="stem_norm")(nn.Conv(8, (4, 4), (4, 4), name="stem")(x))
        y = nn.Conv(8, (7, 7), feature_group_count=8, name="depthwise")(x)
        y = nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm(name="norm")(y)))
        y = nn.Dense(8, name="down")(y)
        return x + self.param("gamma", nn.initializers.ones, (8,)) * y


def test_convnext():
    def biased(path, *follows):
        return Layer(f"{path}/kernel", HWIO, (f"{path}/bias", *follows))

    check(
        trace_linen(ConvNeXt(), IMAGE),
        [
            biased("stem", *scales("stem_norm")),
            biased("depthwise", *scales("norm")),
            dense("up"),
            dense("down", "gamma"),
        ],
    )
    check(
        trace_linen(ConvNeXt(), IMAGE, norms="before"),
        [
            biased("stem"),
            biased("depthwise", *scales("stem_norm")),
            dense("up", *scales("norm")),
            dense("down", "gamma"),
        ],
    )


class ViT(nn.Module):
    """Fused qkv, a class token, positions and layer scale."""

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal()
        x = nn.Conv(16, (8, 8), (8, 8), name="patches")(x).reshape(len(x), -1, 16)
        token = self.param("token", normal, (1, 1, 16))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("positions", normal, (1, 17, 16))
        y = nn.LayerNorm(name="norm1")(x)
        qkv = nn.Dense(48, name="qkv")(y).reshape(*y.shape[:2], 3, 4, 4)
        y = nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        y = nn.Dense(16, name="out")(y.reshape(x.shape))
        x = x + y * self.param("scale", nn.initializers.ones, (16,))
        y = nn.Dense(32, name="up")(nn.LayerNorm(name="norm2")(x))
        x = x + nn.Dense(16, name="down")(nn.gelu(y))
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


def test_vit():
    patches = ("patches/bias", *scales("norm1"))
    check(
        trace_linen(ViT(), IMAGE),
        [
            Layer("patches/kernel", HWIO, patches),
            dense("qkv"),
            dense("out", "scale", *scales("norm2")),
            dense("up"),
            dense("down", *scales("norm")),
            dense("head"),
        ],
    )


class GPT(nn.Module):
    """Pre-norm blocks and a head that is the embedding."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 16, dtype=self.dtype, name="embed")
        positions = nn.Embed(5, 16, dtype=self.dtype, name="positions")
        # pyrefly: ignore [unsupported-operation]
        x: Any = embed(tokens) + positions(jnp.arange(5))
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        for i in range(2):
            attention = nn.MultiHeadDotProductAttention(
                4, dtype=self.dtype, dropout_rate=0.1, name=f"attention{i}"
            )
            y = norm(name=f"norm{i}a")(x)
            mask = nn.make_causal_mask(tokens)
            x = x + attention(y, mask=mask, deterministic=False)
            y = nn.Dense(32, dtype=self.dtype, name=f"up{i}")(norm(name=f"norm{i}b")(x))
            x = x + nn.Dense(16, dtype=self.dtype, name=f"down{i}")(nn.gelu(y))
        return embed.attend(norm(name="norm")(x))


def attention(path: str, *follows: str) -> list[Layer]:
    return [
        Layer(f"{path}/query/kernel", QUERY, (f"{path}/query/bias", *follows)),
        Layer(f"{path}/key/kernel", QUERY, (f"{path}/key/bias",)),
        Layer(f"{path}/value/kernel", QUERY, (f"{path}/value/bias",)),
    ]


def attended(path: str, *follows: str) -> Layer:
    return Layer(f"{path}/out/kernel", OUT, (f"{path}/out/bias", *follows))


TIED = Layer("embed/embedding", DENSE_TRANSPOSED)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gpt(dtype):
    """One layer for the tied embedding, where it is the head."""
    check(
        trace_linen(GPT(dtype), TOKENS),
        [
            *attention("attention0"),
            attended("attention0", *scales("norm0b")),
            dense("up0"),
            dense("down0", *scales("norm1a")),
            *attention("attention1"),
            attended("attention1", *scales("norm1b")),
            dense("up1"),
            dense("down1", *scales("norm")),
            TIED,
        ],
    )


def test_gpt_with_norms_before_their_layers():
    check(
        trace_linen(GPT(), TOKENS, norms="before"),
        [
            *attention("attention0", *scales("norm0a")),
            attended("attention0"),
            dense("up0", *scales("norm0b")),
            dense("down0"),
            *attention("attention1", *scales("norm1a")),
            attended("attention1"),
            dense("up1", *scales("norm1b")),
            dense("down1"),
            Layer(TIED.path, TIED.axes, scales("norm")),
        ],
    )


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def llama(params, tokens):
    """RMSNorm, rotary positions, grouped queries, SwiGLU, a head of its own."""
    x = params["embed"][tokens]
    angles = jnp.arange(5)[:, None] * jnp.asarray([1.0, 0.1])

    def rotate(x):
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    for block in params["blocks"]:
        y = rms_norm(x, block["attention_norm"])
        q = rotate(jnp.einsum("btd,dhk->bthk", y, block["wq"]))
        k = rotate(jnp.einsum("btd,dhk->bthk", y, block["wk"]))
        v = jnp.einsum("btd,dhk->bthk", y, block["wv"])
        q = q.reshape(2, 5, 2, 2, 4)
        logits = jnp.einsum("btghk,bsgk->bghts", q, k) / 2
        mask = jnp.tril(jnp.ones((5, 5), bool))
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e30))
        y = jnp.einsum("bghts,bsgk->btghk", weights, v).reshape(2, 5, 4, 4)
        x = x + jnp.einsum("bthk,hkd->btd", y, block["wo"])
        y = rms_norm(x, block["mlp_norm"])
        x = x + (jax.nn.silu(y @ block["w1"]) * (y @ block["w3"])) @ block["w2"]
    return rms_norm(x, params["norm"]) @ params["head"]


def llama_params(blocks):
    shapes = {
        "attention_norm": (16,),
        "wq": (16, 4, 4),
        "wk": (16, 2, 4),
        "wv": (16, 2, 4),
        "wo": (4, 4, 16),
        "mlp_norm": (16,),
        "w1": (16, 24),
        "w3": (16, 24),
        "w2": (24, 16),
    }
    arrays = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    outside = {"embed": (11, 16), "norm": (16,), "head": (16, 11)}
    arrays_outside = {
        k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in outside.items()
    }
    return {"blocks": [arrays] * blocks, **arrays_outside}


def test_llama():
    def block(i):
        path = f"blocks/{i}"
        return [
            Layer(f"{path}/wq", QUERY, (f"{path}/attention_norm",)),
            Layer(f"{path}/wk", QUERY),
            Layer(f"{path}/wv", QUERY),
            Layer(f"{path}/wo", OUT),
            Layer(f"{path}/w1", DENSE, (f"{path}/mlp_norm",)),
            Layer(f"{path}/w3", DENSE),
            Layer(f"{path}/w2", DENSE),
        ]

    found = trace_layers(llama, llama_params(2), TOKENS, norms="before")
    check(found, [*block(0), *block(1), Layer("head", DENSE, ("norm",))])
    found = trace_layers(llama, llama_params(1), TOKENS)
    norms = {
        "blocks/0/wo": ("blocks/0/mlp_norm",),
        "blocks/0/w2": ("norm",),
    }
    plain = [Layer(x.path, x.axes, norms.get(x.path, ())) for x in block(0)]
    check(found, [*plain, Layer("head", DENSE)])


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(6), name="lstm")(x)
        return nn.Dense(3, name="head")(x)


def test_lstm_with_kernels_side_by_side():
    cell = "OptimizedLSTMCell_0"
    gates = [
        Layer(f"{cell}/h{g}/kernel", DENSE, (f"{cell}/h{g}/bias",)) for g in "ifgo"
    ]
    inputs = [Layer(f"{cell}/i{g}/kernel", DENSE) for g in "ifgo"]
    found = trace_linen(Recurrent(), SEQUENCE)
    paths = [layer.path for layer in found]
    assert sorted(paths[:-1]) == sorted(layer.path for layer in gates + inputs)
    by_path = {layer.path: layer for layer in [*gates, *inputs, dense("head")]}
    check(found, [by_path[path] for path in paths])
    assert paths[-1] == "head/kernel"


class ScanBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(32, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(16, name="down")(nn.gelu(y)), None


class ScanStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="stem")(x)
        blocks = nn.scan(
            nn.remat(ScanBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x))


def test_linen_scan_with_remat():
    """Slice after slice, as the blocks run; norms before their layers."""
    expected = [dense("stem")]
    for i in range(3):
        up = ("blocks/up/bias", *scales("blocks/norm"))
        expected.append(Layer("blocks/up/kernel", STACK, up, index=(i,)))
        down = ("blocks/down/bias",)
        expected.append(Layer("blocks/down/kernel", STACK, down, index=(i,)))
    expected.append(dense("head", *scales("norm")))
    check(trace_linen(ScanStack(), SEQUENCE, norms="before"), expected)


class NnxStack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(16, 16, rngs=rngs)

        self.blocks = make(rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return jnp.tanh(block(x))

        return self.head(self.dropout(run(self.blocks, x)))


def test_nnx_vmapped_and_scanned():
    model = nnx.eval_shape(lambda: NnxStack(nnx.Rngs(0)))
    expected = [
        Layer("blocks/kernel", STACK, ("blocks/bias",), index=(i,)) for i in range(3)
    ]
    check(trace_layers(model, SEQUENCE), [*expected, dense("head")])


def ragged_moe(params, x):
    sizes = jnp.asarray([3, 0, 1, 1])
    hidden = jax.nn.silu(jax.lax.ragged_dot(x, params["w1"], sizes))
    return jax.lax.ragged_dot(hidden, params["w2"], sizes)


def test_ragged_experts():
    """Rows of each group meet their own kernel; each expert is a layer."""
    shapes = {"w1": (4, 16, 8), "w2": (4, 8, 16)}
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    x = jax.ShapeDtypeStruct((5, 16), jnp.float32)
    expected = [Layer("w1", STACK), Layer("w2", STACK)]
    check(trace_layers(ragged_moe, params, x), expected)


class LoRA(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.LoRALinear(
            16, 6, lora_rank=2, lora_param_type=nnx.Param, rngs=rngs
        )

    def __call__(self, x):
        return self.linear(x)


def test_lora():
    """Two products of their own beside the kernel, or a part of it."""
    model = nnx.eval_shape(lambda: LoRA(nnx.Rngs(0)))
    found = trace_layers(model, SEQUENCE)
    assert {layer.path: layer.axes for layer in found} == {
        "linear/kernel": DENSE,
        "linear/lora/lora_a": DENSE,
        "linear/lora/lora_b": DENSE,
    }
    shapes = {"w": (16, 6), "a": (16, 2), "b": (2, 6)}
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    found = trace_layers(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), params, SEQUENCE)
    check(found, [Layer("w", DENSE, ("a", "b"))])


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.WeightNorm(nn.Dense(8, name="first"))(x))
        return nn.SpectralNorm(nn.Dense(4, name="second"))(x, update_stats=True)


def test_weight_norm_and_spectral_norm():
    """The power iteration uses its kernel both ways, and makes no layers."""
    gain = "WeightNorm_0/first/kernel/scale"
    expected = [dense("first", gain), dense("second")]
    check(trace_linen(Normalized(), SEQUENCE), expected)


class EquinoxCNN(eqx.Module):
    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    norm2: eqx.nn.GroupNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        self.conv1 = eqx.nn.Conv2d(3, 4, 3, key=key)
        self.norm1 = eqx.nn.GroupNorm(2, 4)
        self.conv2 = eqx.nn.Conv2d(4, 6, 3, groups=2, use_bias=False, key=key)
        self.norm2 = eqx.nn.GroupNorm(2, 6)
        self.head = eqx.nn.Linear(6, 3, key=key)

    def __call__(self, x):
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        x = jax.nn.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((1, 2)))


def test_equinox_cnn():
    model = eqx.filter_eval_shape(EquinoxCNN, jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, 3, 16, 16), jnp.float32)

    def paths(norm):
        return f"{norm}/weight", f"{norm}/bias"

    check(
        trace_layers(lambda model, x: jax.vmap(model)(x), model, images),
        [
            Layer("conv1/weight", OIHW, ("conv1/bias", *paths("norm1"))),
            Layer("conv2/weight", OIHW, paths("norm2")),
            Layer("head/weight", DENSE_TRANSPOSED, ("head/bias",)),
        ],
    )


@pytest.mark.parametrize("train", [True, False])
def test_haiku_resnet(train):
    def forward(x, train):
        net = hk.nets.ResNet(
            (1, 1, 1, 1),
            10,
            resnet_v2=False,
            bottleneck=False,
            channels_per_group=(8, 8, 8, 8),
        )
        return net(x, is_training=train)

    net = hk.transform_with_state(forward)
    params, state = jax.eval_shape(
        functools.partial(net.init, train=True), jax.random.key(0), IMAGE
    )

    def apply(params, state, x):
        return net.apply(params, state, None, x, train)

    def block(group, name, norm):
        path = f"res_net/~/block_group_{group}/~/block_0/~/"
        norms = (f"{path}{norm}/offset", f"{path}{norm}/scale")
        return Layer(f"{path}{name}/w", HWIO, norms)

    initial = "res_net/~/initial_"
    norms = (f"{initial}batchnorm/offset", f"{initial}batchnorm/scale")
    expected = [Layer(f"{initial}conv/w", HWIO, norms)]
    for group in range(4):
        expected.append(block(group, "shortcut_conv", "shortcut_batchnorm"))
        expected.append(block(group, "conv_0", "batchnorm_0"))
        expected.append(block(group, "conv_1", "batchnorm_1"))
    expected.append(Layer("res_net/~/logits/w", DENSE, ("res_net/~/logits/b",)))
    check(trace_layers(apply, params, state, IMAGE), expected)


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

    shapes = {"first": (16, 8), "second": (8, 4), "bias": (4,)}
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    x = jax.ShapeDtypeStruct((5, 16), jnp.float32)
    expected = [Layer("first", DENSE), Layer("second", DENSE, ("bias",))]
    check(trace_layers(forward, params, x), expected)
