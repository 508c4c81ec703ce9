"""Models of Flax linen, Flax nnx, Equinox and Haiku, small, as users write them.

`test_frameworks_layers` states which layers `find_layers` finds in them by names, and
`test_tracing_frameworks` which ones `trace_layers` finds in their forward passes.
"""
# ruff: noqa: D101, D102  # The names of the models say what they are.

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from notation import array

from benchmarks import models

IMAGE = array(2, 32, 32, 3)
SEQUENCE = array(2, 5, 16)
TOKENS = array(2, 5, dtype=jnp.int32)
KEY = jax.random.key(0)


def not_run(*_: Any) -> Any:
    """Stand for the forward pass of a model that only `find_layers` reads."""
    raise NotImplementedError


class Model(NamedTuple):
    """Parameters and inputs, abstract, of `forward(params, *inputs)`."""

    params: Any
    forward: Callable[..., Any] = not_run
    inputs: tuple[Any, ...] = ()


def linen(module: nn.Module, *inputs: Any, **options: Any) -> Model:
    """A linen model; its other collections and random numbers are inputs."""
    keys = {"params": KEY, "dropout": KEY}
    init = partial(module.init, **options)
    variables = jax.eval_shape(init, keys, *inputs)
    params = variables.pop("params")

    def forward(params, state, keys, *inputs):
        variables = {"params": params, **state}
        mutable = list(state)
        return module.apply(variables, *inputs, rngs=keys, mutable=mutable, **options)

    return Model(params, forward, (variables, keys, *inputs))


def of_nnx(make: Callable[[nnx.Rngs], nnx.Module], *inputs: Any, **options) -> Model:
    """An nnx model; the model itself stands for its parameters."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    return Model(model, lambda model, *args: model(*args, **options), inputs)


def equinox(make: Callable[[Any], Any], *inputs: Any) -> Model:
    model = eqx.filter_eval_shape(make, KEY)
    return Model(model, lambda model, *args: jax.vmap(model)(*args), inputs)


def haiku(call: Callable[..., Any], *inputs: Any, **train: bool) -> Model:
    net = hk.transform_with_state(call)
    init = partial(net.init, **dict.fromkeys(train, True))
    params, state = jax.eval_shape(init, KEY, *inputs)

    def forward(params, state, *inputs):
        return net.apply(params, state, KEY, *inputs, **train)

    return Model(params, forward, (state, *inputs))


# ---- Flax linen ----------------------------------------------------------------------


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x))
        x = nn.max_pool(nn.relu(x), (4, 4), (4, 4))
        x = nn.GroupNorm(2)(nn.Conv(6, (3, 3), use_bias=False)(x))
        x = nn.Conv(6, (3, 3), feature_group_count=6)(x)
        x = nn.LayerNorm()(nn.Conv(4, (1, 1), feature_group_count=2)(x))
        x = nn.ConvTranspose(5, (3, 3))(x).reshape(len(x), -1)
        # The number in a name tells the order of construction, not of execution.
        head = nn.Dense(3)
        return head(nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(7)(x))))


class ResNetBlock(nn.Module):
    width: int
    stride: int
    train: bool

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=not self.train)
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
        x = ResNetBlock(8, 1, train, name="block0")(x)
        x = ResNetBlock(16, 2, train, name="block1")(x)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


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
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


class GPT(nn.Module):
    """Pre-norm blocks and a head that is the embedding."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 16, dtype=self.dtype, name="embed")
        positions = nn.Embed(5, 16, dtype=self.dtype, name="positions")
        # pyrefly: ignore [unsupported-operation]
        x: Any = embed(tokens) + positions(jnp.arange(5))
        for i, norm in enumerate((nn.LayerNorm, nn.RMSNorm)):
            norm = partial(norm, dtype=self.dtype)
            attention = nn.MultiHeadDotProductAttention(
                4, dtype=self.dtype, dropout_rate=0.1, use_bias=not i, name=f"mha{i}"
            )
            y = norm(name=f"norm{i}a")(x)
            mask = nn.make_causal_mask(tokens)
            x = x + attention(y, mask=mask, deterministic=False)
            y = nn.Dense(32, dtype=self.dtype, name=f"up{i}")(norm(name=f"norm{i}b")(x))
            x = x + nn.Dense(16, dtype=self.dtype, name=f"down{i}")(nn.gelu(y))
        return embed.attend(nn.LayerNorm(dtype=self.dtype, name="norm")(x))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        # The kernels of all gates lie side by side in one product.
        hidden: Any = nn.RNN(nn.OptimizedLSTMCell(6), name="lstm")(x)
        return nn.Dense(3, name="head")(nn.RNN(nn.GRUCell(5), name="gru")(hidden))


class Normalized(nn.Module):
    """The power iteration uses its kernel both ways, and makes no layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.WeightNorm(nn.Dense(8, name="first"))(x))
        return nn.SpectralNorm(nn.Dense(4, name="second"))(x, update_stats=True)


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


class ScannedAttention(nn.Module):
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        def block(attention, x, _):
            return attention(x), None

        attention = nn.MultiHeadDotProductAttention(
            4, use_bias=self.use_bias, name="mha"
        )
        return nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )(attention, x, None)[0]


# ---- Flax nnx ------------------------------------------------------------------------


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        conv = partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.conv1 = conv(3, 4)
        self.bn1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = conv(4, 6, feature_group_count=2, use_bias=False)
        self.norm2 = nnx.GroupNorm(6, 2, rngs=rngs)
        self.depthwise = conv(6, 6, feature_group_count=6)
        self.up = nnx.ConvTranspose(6, 5, (3, 3), rngs=rngs)
        self.ln = nnx.LayerNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs) for _ in range(11)])
        self.head = nnx.Sequential(
            nnx.Linear(5, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 3, rngs=rngs)
        )


class NnxParts(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 16, rngs=rngs)
        self.value = nnx.Linear(16, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=16, normalize_qk=True, use_bias=False, rngs=rngs
        )
        self.cross = nnx.MultiHeadAttention(num_heads=4, in_features=16, rngs=rngs)
        self.gru = nnx.GRUCell(3, 6, rngs=rngs)
        self.lstm = nnx.OptimizedLSTMCell(3, 6, rngs=rngs)


def nnx_tied(rngs):
    """The same layer under two names is one leaf."""
    layer = nnx.Linear(4, 4, rngs=rngs)
    return nnx.Dict(first=layer, second=layer)


class NnxLoRA(nnx.Module):
    """Two products of their own beside the kernel."""

    def __init__(self, rngs):
        self.linear = nnx.LoRALinear(
            16, 6, lora_rank=2, lora_param_type=nnx.Param, rngs=rngs
        )

    def __call__(self, x):
        return self.linear(x)


class NnxStack(nnx.Module):
    def __init__(self, rngs):
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


def nnx_resnet(rngs):
    return models.build("resnet18", num_classes=10, width=0.125, rngs=rngs)


# ---- Equinox -------------------------------------------------------------------------


class EquinoxCNN(eqx.Module):
    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    bn2: eqx.nn.BatchNorm
    depthwise: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    ln: eqx.nn.LayerNorm
    conv1d: eqx.nn.Conv1d
    layers: list
    activation: Callable

    def __init__(self, key):
        self.conv1 = eqx.nn.Conv2d(3, 4, 3, key=key)
        self.norm1 = eqx.nn.GroupNorm(2, 4)
        self.conv2 = eqx.nn.Conv2d(4, 6, 3, groups=2, use_bias=False, key=key)
        self.bn2 = eqx.nn.BatchNorm(6, "batch", mode="ema")
        self.depthwise = eqx.nn.Conv2d(6, 6, 3, groups=6, key=key)
        self.up = eqx.nn.ConvTranspose2d(6, 5, 3, key=key)
        self.ln = eqx.nn.LayerNorm(5)
        self.conv1d = eqx.nn.Conv1d(5, 5, 3, padding=1, key=key)
        self.layers = [
            eqx.nn.Linear(5, 5, key=key),
            jax.nn.relu,
            eqx.nn.Linear(5, 2, use_bias=False, key=key),
        ]
        self.activation = jax.nn.relu

    def __call__(self, x):
        x = self.conv2(self.activation(self.norm1(self.conv1(x))))
        x = self.up(self.depthwise(x)).mean(1)
        x = self.ln(self.conv1d(x).mean(1))
        for layer in self.layers:
            x = layer(x)
        return x


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

    weight: Any
    bias: Any = None


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


def equinox_mlp(key):
    return eqx.nn.MLP(4, 3, 8, 2, key=key)


def equinox_spectral_norm() -> Model:
    """Its power iteration stops gradients, and its state is an input."""

    def make(key):
        linear = eqx.nn.Linear(8, 4, key=key)
        spectral = eqx.nn.make_with_state(eqx.nn.SpectralNorm)
        return spectral(linear, "weight", key=key)

    model, state = eqx.filter_eval_shape(make, KEY)
    return Model(model, lambda model, state, x: model(x, state), (state, array(8)))


def equinox_stack(make: Callable[..., Any]) -> Model:
    def stack(key):
        return eqx.filter_vmap(lambda key: make(key=key))(jax.random.split(key, 5))

    return equinox(stack)


# ---- Haiku ---------------------------------------------------------------------------


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


def haiku_unroll(core, x):
    core = core(6)
    return hk.dynamic_unroll(core, x, core.initial_state(5))[0]


def haiku_stack(x):
    layers = hk.experimental.layer_stack(3, name="stack")
    return layers(lambda h: hk.Linear(16)(h))(x)


# ---- Tables --------------------------------------------------------------------------

MODELS: dict[str, Callable[..., Model]] = {
    "linen_cnn": partial(linen, LinenCNN(), IMAGE),
    "linen_resnet": partial(linen, ResNet(), IMAGE, train=True),
    "linen_vit": partial(linen, ViT(), IMAGE),
    "linen_gpt": partial(linen, GPT(), TOKENS),
    "linen_gpt in bfloat16": partial(linen, GPT(jnp.bfloat16), TOKENS),
    "linen_recurrent": partial(linen, Recurrent(), SEQUENCE),
    "linen_normalized": partial(linen, Normalized(), SEQUENCE),
    "linen_scan": partial(linen, ScanStack(), SEQUENCE),
    "linen_scanned_attention": partial(linen, ScannedAttention(True), SEQUENCE),
    "linen_scanned_attention without bias": partial(
        linen, ScannedAttention(False), SEQUENCE
    ),
    "linen_dense_general": partial(linen, nn.DenseGeneral((2, 4)), SEQUENCE),
    "linen_conv_1d": partial(linen, nn.Conv(5, (3,)), SEQUENCE),
    "linen_conv_local": partial(linen, nn.ConvLocal(5, (3,)), SEQUENCE),
    "linen_experts": partial(Model, {"experts": array(3, 16, 8)}),
    "nnx_cnn": partial(of_nnx, NnxCNN),
    "nnx_parts": partial(of_nnx, NnxParts),
    "nnx_tied": partial(of_nnx, nnx_tied),
    "nnx_stack": partial(of_nnx, NnxStack, SEQUENCE),
    "nnx_lora": partial(of_nnx, NnxLoRA, SEQUENCE),
    "nnx_resnet": partial(of_nnx, nnx_resnet, IMAGE, train=True),
    "nnx_einsum": partial(
        of_nnx, lambda rngs: nnx.Einsum("nta,hab->nthb", (4, 2, 5), rngs=rngs)
    ),
    "nnx_linear_general": partial(
        of_nnx, lambda rngs: nnx.LinearGeneral(8, (2, 4), rngs=rngs)
    ),
    "equinox_cnn": partial(equinox, EquinoxCNN, array(2, 3, 16, 16)),
    "equinox_transformer": partial(equinox, EquinoxTransformer),
    "equinox_mlp": partial(equinox, equinox_mlp),
    "equinox_spectral_norm": equinox_spectral_norm,
    "equinox_own_module": partial(Model, EquinoxOwn(array(6, 4), array(6))),
    "equinox_own_module without bias": partial(Model, EquinoxOwn(array(6, 4))),
    "equinox_tied": partial(equinox, EquinoxTied),
    "equinox_vmapped_linear": partial(equinox_stack, partial(eqx.nn.Linear, 4, 6)),
    "equinox_vmapped_conv": partial(equinox_stack, partial(eqx.nn.Conv2d, 4, 6, 3)),
    "haiku_cnn": partial(haiku, haiku_cnn, array(2, 8, 8, 3)),
    "haiku_attention": partial(haiku, haiku_attention, TOKENS),
    "haiku_lstm": partial(haiku, partial(haiku_unroll, hk.LSTM), SEQUENCE),
    "haiku_gru": partial(haiku, partial(haiku_unroll, hk.GRU), SEQUENCE),
    "haiku_layer_stack": partial(haiku, haiku_stack, SEQUENCE),
    "haiku_conv_1d": partial(haiku, lambda x: hk.Conv1D(4, 3)(x), SEQUENCE),
}
for _name in ("linen_resnet", "nnx_resnet"):
    MODELS[f"{_name} in evaluation"] = partial(MODELS[_name], train=False)


@cache
def model(name: str) -> Model:
    return MODELS[name]()
