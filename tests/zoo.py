"""Small models of the kinds that `trace_layers` once read wrongly.

Each model is a few lines of plain JAX in the manner of a published one, and states what
must be found in it: the layers in order of execution with their axes and followers, and
the leaves that are neither.  The expectations follow from what the program computes.
Where two answers are defensible a comment says why, and an error that names the leaf is
accepted in place of the list.
"""

import dataclasses
import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tb_optax import Layer, MatrixAxes
from tb_optax.leaves import leaves_of

DENSE = MatrixAxes((0,), (1,))
TRANSPOSED = MatrixAxes((1,), (0,))
HWIO = MatrixAxes((2,), (3,), pooled=(0, 1))
WIO = MatrixAxes((1,), (2,), pooled=(0,))
QUERY = MatrixAxes((0,), (1, 2))
OUT = MatrixAxes((0, 1), (2,))
STACK = MatrixAxes((1,), (2,), stacked=(0,))
STACKED_HWIO = MatrixAxes((3,), (4,), pooled=(1, 2), stacked=(0,))


@dataclasses.dataclass(frozen=True)
class Case:
    """A program and what must be found in it.

    Attributes:
        forward: the program.
        params: its parameters, abstract.
        inputs: its inputs, abstract.
        options: of `trace_layers`.
        layers: what must be found; None where an error is the only right answer.
        none: leaves that are no layer and follow none.
        free: vectors that may follow a layer or none, for which no rule is written.
        named: leaves that an error must name, the first of them first.  With `layers`
            as well, either answer is right.
        says: what the error must contain.
    """

    forward: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    layers: tuple[Layer, ...] | None
    none: frozenset[str]
    free: frozenset[str]
    named: tuple[str, ...]
    says: str


CASES: dict[str, Case] = {}


AXES = {
    "dense": DENSE,
    "turned": TRANSPOSED,
    "hwio": HWIO,
    "wio": WIO,
    "query": QUERY,
    "out": OUT,
    "stack": STACK,
    "stacked_hwio": STACKED_HWIO,
}


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def shapes(text: str) -> dict[str, tuple[int, ...]]:
    """`"wq wk 8x8, b 8, scale ()"`: names, then their shape."""
    found = {}
    for group in text.split(", "):
        *names, sizes = group.split()
        shape = () if sizes == "()" else tuple(map(int, sizes.split("x")))
        found |= dict.fromkeys(names, shape)
    return found


def layers_of(text: str) -> list[Layer]:
    """`"w1<b1,g w2 conv:hwio"`: paths with axes, if not dense, and followers."""
    found = []
    for entry in text.split():
        kernel, _, follows = entry.partition("<")
        path, _, axes = kernel.partition(":")
        found.append(layer(path, follows.replace(",", " "), AXES[axes or "dense"]))
    return found


def arrays(tree: Any) -> Any:
    """Shapes, or a tree of them, as abstract arrays."""

    def is_shape(node):
        return isinstance(node, tuple) and all(isinstance(n, int) for n in node)

    return jax.tree.map(
        lambda leaf: array(*leaf) if is_shape(leaf) else leaf, tree, is_leaf=is_shape
    )


def layer(path: str, follows: str = "", axes: MatrixAxes = DENSE, **fields) -> Layer:
    return Layer(path, axes, tuple(follows.split()), **fields)


def slices(count: int, *layers: Layer) -> list[Layer]:
    """Slice after slice of a loop over stacks."""
    return [
        dataclasses.replace(layer, index=(i,)) for i in range(count) for layer in layers
    ]


def case(
    kind: str,
    params: Any,
    *inputs: Any,
    layers: Any = None,
    none: str = "",
    free: str = "",
    named: str = "",
    says: str = "",
    given: tuple[dict[str, MatrixAxes | None], ...] = (),
    before: Any = None,
    **options: Any,
):
    """Enters a program into the table; several of them may stand over one function.

    Each of `given` enters it again with these axes, which settle it: the same layers
    but for what is None.  `before` enters it with its layers for norms="before".
    """
    params = arrays(shapes(params) if isinstance(params, str) else params)
    leaves = set(leaves_of(params))

    def enter(forward, options, layers, none, named=""):
        layers = layers_of(layers) if isinstance(layers, str) else layers
        name = f"{kind}: {forward.__name__}"
        for option, value in options.items():
            name += f" {option}={sorted(value) if isinstance(value, dict) else value}"
        if name in CASES:
            name += "".join(f" {x.shape[0]}" for x in inputs[:1])
        assert name not in CASES, name
        CASES[name] = Case(
            forward,
            params,
            inputs,
            options,
            None if layers is None else tuple(layers),
            frozenset(none),
            frozenset(free.split()),
            tuple(named.split()),
            says,
        )

    def others(layers):
        """Leaves that have no place, where the list for other options is complete."""
        owned = {path for own in layers for path in (own.path, *own.follows)}
        return leaves - owned - set(free.split())

    def enter_all(forward):
        found = layers_of(layers) if isinstance(layers, str) else layers
        enter(forward, options, found, none.split(), named)
        for axes in given:
            out = {path for path in leaves if first_match(axes, path, DENSE) is None}
            kept = [
                dataclasses.replace(
                    own, follows=tuple(f for f in own.follows if f not in out)
                )
                for own in found
                if own.path not in out
            ]
            enter(forward, {**options, "axes": axes}, kept, others(kept))
        if before is not None:
            own = layers_of(before) if isinstance(before, str) else before
            enter(forward, {**options, "norms": "before"}, own, others(own))
        return forward

    return enter_all


def first_match(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """What the first pattern says that matches a path."""
    found = [v for p, v in patterns.items() if fnmatch.fnmatchcase(path, p)]
    return found[0] if found else default


X = array(2, 5, 8)
IMAGE = array(2, 8, 8, 3)
TOKENS = array(2, 5, dtype=jnp.int32)
KEY = jax.eval_shape(lambda: jax.random.key(0))


def heads(x, count: int = 2):
    return x.reshape(*x.shape[:-1], count, -1)


def joined(x):
    return x.reshape(*x.shape[:-2], -1)


def attend(q, k, v, bias=0.0):
    """Attention of (batch, time, heads, dim)."""
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
    return joined(jnp.einsum("bhqk,bkhd->bqhd", weights, v))


def layer_norm(x, scale, offset=0.0, axis: Any = -1):
    x = x - x.mean(axis, keepdims=True)
    return x * lax.rsqrt((x**2).mean(axis, keepdims=True) + 1e-6) * scale + offset


def rms_norm(x, scale):
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def group_norm(x, scale, offset, groups: int = 2):
    y = x.reshape(*x.shape[:-1], groups, -1)
    y = y - y.mean((1, 2, 4), keepdims=True)
    y = y * lax.rsqrt((y**2).mean((1, 2, 4), keepdims=True) + 1e-6)
    return y.reshape(x.shape) * scale + offset


def conv(x, kernel, stride: int = 1, groups: int = 1):
    numbers = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * (x.ndim - 2),
        "SAME",
        dimension_numbers=numbers,
        feature_group_count=groups,
    )


# Outputs that are reshaped into heads or blocks and meet a parameter per head: a factor
# of the output axis is batched, not the axis, and the kernel remains one layer.


@case(
    "heads",
    "wk 8x8, bk 8, wv 8x8, query 2x4, wo 8x8",
    X,
    layers="wk<bk wv wo",
    none="query",  # One vector per head: without outputs it is no matrix.
)
def attention_pooling(p, x):
    """A learned query per head, as in class attention."""
    k, v = heads(x @ p["wk"] + p["bk"]), heads(x @ p["wv"])
    weights = jax.nn.softmax(jnp.einsum("hd,bshd->bhs", p["query"], k))
    return joined(jnp.einsum("bhs,bshd->bhd", weights, v)) @ p["wo"]


@case("heads", "w 8x8, a 2x4, o 8x3", X, layers="w o", none="a")
def graph_attention(p, x):
    h = heads(x @ p["w"])
    scores = jnp.einsum("bshd,hd->bsh", h, p["a"])
    return joined(jnp.einsum("bsh,bshd->bhd", jax.nn.softmax(scores, 1), h)) @ p["o"]


@case(
    "heads",
    "w 8x8, a 1x2x8, o 8x3, bias 8",
    array(5, 8),
    array(7, 2, dtype=jnp.int32),
    layers="w<bias o",
    none="a",
)
def graph_attention_by_edges(p, x, edges):
    """The published form: concatenated ends of each edge, a sum of products."""
    h = heads(x @ p["w"] + p["bias"])
    ends = jnp.concatenate([h[edges[:, 0]], h[edges[:, 1]]], axis=-1)
    scores = jnp.exp(jax.nn.leaky_relu((ends * p["a"]).sum(-1)))
    total = jax.ops.segment_sum(scores, edges[:, 1], 5)
    messages = h[edges[:, 0]] * (scores / total[edges[:, 1]])[..., None]
    return joined(jax.ops.segment_sum(messages, edges[:, 1], 5)) @ p["o"]


@case("heads", "source target 8x8, a 2x4, o 8x3", X, layers="source target o", none="a")
def graph_attention_v2(p, x):
    source, target = heads(x @ p["source"]), heads(x @ p["target"])
    pairs = jax.nn.leaky_relu(source[:, :, None] + target[:, None])
    weights = jax.nn.softmax(jnp.einsum("bijhd,hd->bhij", pairs, p["a"]))
    return joined(jnp.einsum("bhij,bjhd->bihd", weights, target)) @ p["o"]


@case(
    "heads",
    "w1 8x8, b1 8, blocks 2x4x4, b2 2x4, w2 8x3",
    X,
    layers="w1<b1 blocks:stack<b2 w2",
)
def block_diagonal(p, x):
    h = heads(jax.nn.gelu(x @ p["w1"] + p["b1"]))
    h = jnp.einsum("bsgd,gde->bsge", h, p["blocks"]) + p["b2"]
    return joined(h) @ p["w2"]


@case("heads", "w1 8x8, out 2x4x6", X, layers="w1 out:out")
def head_maps(p, x):
    """One map per head, summed over the heads: inputs are heads and dimensions."""
    return jnp.einsum("bshd,hde->bse", heads(x @ p["w1"]), p["out"])


@case(
    "heads",
    (
        "wy 8x8, by 8, wx 8x8, bx 8, conv 4x1x8, conv_bias a_param 8, "
        "gate_x 2x4x4, gate_x_bias 2x4, gate_a 2x4x4, gate_a_bias 2x4, "
        "wo 8x8, bo 8"
    ),
    X,
    layers=(
        "wy<by wx<bx conv:wio<conv_bias gate_x:stack<gate_x_bias "
        "gate_a:stack<gate_a_bias wo<bo"
    ),
    free="a_param",
)
def griffin(p, x):
    """The recurrent block of Griffin: block-diagonal gates of a linear recurrence."""
    y = jax.nn.gelu(x @ p["wy"] + p["by"])
    h = x @ p["wx"] + p["bx"]
    h = conv(h, p["conv"], groups=8) + p["conv_bias"]

    def gate(name):
        z = jnp.einsum("bthi,hij->bthj", heads(h), p[name]) + p[f"{name}_bias"]
        return joined(jax.nn.sigmoid(z))

    gate_x, gate_a = gate("gate_x"), gate("gate_a")
    log_a = -8.0 * gate_a * jax.nn.softplus(p["a_param"])
    a, inputs = jnp.exp(log_a), gate_x * h * jnp.sqrt(1 - jnp.exp(2 * log_a))

    def combine(one, two):
        return one[0] * two[0], two[0] * one[1] + two[1]

    _, h = lax.associative_scan(combine, (a, inputs), axis=1)
    return (h * y) @ p["wo"] + p["bo"]


@case(
    "heads",
    "wq wk wv wr wo 8x8, u v 2x4",
    X,
    # Both vectors are added to the queries, one for each of two products.
    layers="wq<u,v wk wv wr wo",
)
def transformer_xl(p, x):
    """Relative positions: a kernel on constant sinusoids, and two biases per head."""
    q, k, v = heads(x @ p["wq"]), heads(x @ p["wk"]), heads(x @ p["wv"])
    angles = np.arange(5.0)[:, None] / 10 ** np.arange(4.0)
    sinusoids = np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)
    r = heads(jnp.asarray(sinusoids) @ p["wr"])
    logits = jnp.einsum("bqhd,bkhd->bhqk", q + p["u"], k)
    logits = logits + jnp.einsum("bqhd,khd->bhqk", q + p["v"], r)
    return joined(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)) @ p["wo"]


@case("heads", "wq wk wv wo 8x8, p1 p2 2x2", X, layers="wq wk wv p1 p2 wo")
def talking_heads(p, x):
    """Two matrices between heads: small, but kernels like any other."""
    q, k, v = heads(x @ p["wq"]), heads(x @ p["wk"]), heads(x @ p["wv"])
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    weights = jax.nn.softmax(jnp.einsum("bhqk,hg->bgqk", logits, p["p1"]))
    weights = jnp.einsum("bhqk,hg->bgqk", weights, p["p2"])
    return joined(jnp.einsum("bhqk,bkhd->bqhd", weights, v)) @ p["wo"]


# The norm of the queries feeds a product of data with data, no layer: it stays with the
# layer before it under both policies.
@case(
    "heads",
    "wq wk wv wo 8x8, gq gk 2x4",
    X,
    layers="wq<gq wk<gk wv wo",
    before="wq<gq wk<gk wv wo",
)
def query_key_norm(p, x):
    """A scale per head and dimension."""
    q, k, v = heads(x @ p["wq"]), heads(x @ p["wk"]), heads(x @ p["wv"])
    return attend(rms_norm(q, p["gq"]), rms_norm(k, p["gk"]), v) @ p["wo"]


# Learned queries and other parts that are computed from parameters alone: axes that are
# given are taken and the rest comes out right; an error names kernels before biases.

_WIDE = shapes("probe 1x1x8, q 8x2x4, bq 2x4, k 8x2x4, bk 2x4, v 8x2x4, o 8x3")
_FLAT = shapes("probe 1x1x8, q 8x8, bq 8, k 8x8, bk 8, v 8x8, o 8x3")


def _map_head(axes, bias):
    q = layer("q", bias, axes)
    return [q, layer("k", "bk", axes), layer("v", "", axes), layer("o")]


@case(
    "queries",
    _WIDE,
    X,
    layers=_map_head(QUERY, "bq"),
    none="probe",
    named="q",
    given=({"q": QUERY}, {"q": QUERY, "bq": None}),
)
def map_head(p, x):
    """Attention pooling with a projected probe, kernels as in Flax."""
    probe = jnp.tile(p["probe"], (2, 1, 1))
    q = jnp.einsum("bqd,dhk->bqhk", probe, p["q"]) + p["bq"]
    k = jnp.einsum("bsd,dhk->bshk", x, p["k"]) + p["bk"]
    return attend(q, k, jnp.einsum("bsd,dhk->bshk", x, p["v"])) @ p["o"]


@case(
    "queries",
    _FLAT,
    X,
    layers=_map_head(DENSE, "bq"),
    none="probe",
    named="q",
    given=({"q": DENSE}, {"q": DENSE, "bq": None}),
)
def map_head_of_matrices(p, x):
    probe = jnp.tile(p["probe"], (2, 1, 1))
    q = heads(probe @ p["q"] + p["bq"])
    return attend(q, heads(x @ p["k"] + p["bk"]), heads(x @ p["v"])) @ p["o"]


_PERCEIVER = shapes("wq wk wv wo w1 w2 8x8, latents 3x8, g1 c1 g2 c2 bk 8")


def _perceiver(after: bool):
    # The first norm acts on latents, behind no layer; the second on their sum with the
    # output of attention.
    q = layer("wq", "" if after else "g1 c1")
    o, w1 = layer("wo", "g2 c2" if after else ""), layer("w1", "" if after else "g2 c2")
    return [q, layer("wk", "bk"), layer("wv"), o, w1, layer("w2")]


@case(
    "queries",
    _PERCEIVER,
    X,
    layers=_perceiver(after=True),
    none="latents g1 c1",
    named="wq",
    given=({"wq": DENSE, "latents": None},),
)
@case(
    "queries",
    _PERCEIVER,
    X,
    layers=_perceiver(after=False),
    none="latents",
    axes={"wq": DENSE},
    norms="before",
)
def perceiver(p, x):
    """Latents that are parameters attend to the inputs."""
    z = jnp.broadcast_to(p["latents"], (2, 3, 8))
    q = heads(layer_norm(z, p["g1"], p["c1"]) @ p["wq"])
    z = z + attend(q, heads(x @ p["wk"] + p["bk"]), heads(x @ p["wv"])) @ p["wo"]
    y = layer_norm(z, p["g2"], p["c2"])
    return z + jax.nn.gelu(y @ p["w1"]) @ p["w2"]


_DETR = shapes(
    "self_q self_k self_v self_o cross_q cross_k cross_v cross_o "
    "8x8, self_q_bias self_k_bias self_v_bias self_o_bias "
    "cross_q_bias cross_k_bias cross_v_bias cross_o_bias 8, queries "
    "3x8, g1 g2 g3 8, w1 8x16, b1 16, w2 16x8, b2 8, classes 8x5, "
    "classes_bias 5, boxes 8x4, boxes_bias 4"
)
_DETR_LAYERS = layers_of(
    "self_q<self_q_bias self_k<self_k_bias self_v<self_v_bias "
    "self_o<self_o_bias,g1 cross_q<cross_q_bias "
    "cross_k<cross_k_bias cross_v<cross_v_bias "
    "cross_o<cross_o_bias,g2 w1<b1 w2<b2,g3 classes<classes_bias "
    "boxes<boxes_bias"
)


@case(
    "queries",
    _DETR,
    X,
    layers=_DETR_LAYERS,
    none="queries",
    named="self_q self_k",
    given=({"self_[qk]": DENSE}, {"self_[qk]": DENSE, "queries": None}),
)
def detr_decoder(p, memory):
    """The first block of a DETR decoder: targets of zeros, learned query positions."""

    def f(name, x):
        return x @ p[name] + p[f"{name}_bias"]

    position = jnp.broadcast_to(p["queries"], (2, 3, 8))
    x = jnp.zeros_like(position)
    q, k = heads(f("self_q", x + position)), heads(f("self_k", x + position))
    x = x + f("self_o", attend(q, k, heads(f("self_v", x))))
    x = rms_norm(x, p["g1"])
    q = heads(f("cross_q", x + position))
    k, v = heads(f("cross_k", memory)), heads(f("cross_v", memory))
    x = rms_norm(x + f("cross_o", attend(q, k, v)), p["g2"])
    y = jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    x = rms_norm(x + y, p["g3"])
    return f("classes", x), jax.nn.sigmoid(f("boxes", x))


@case("queries", "q k v o 8x8, prompts 3x8", X, layers="q k v o", none="prompts")
def soft_prompts(p, x):
    x = jnp.concatenate([jnp.tile(p["prompts"][None], (2, 1, 1)), x], axis=1)
    return x + attend(*(heads(x @ p[n]) for n in "qkv")) @ p["o"]


# Keys that are parameters do multiply data, so that an error is in order; what may not
# happen is that they change the reading of other leaves.
@case(
    "queries",
    "q k v o 8x8, pk pv 3x2x4",
    X,
    layers="q k v o",
    none="pk pv",
    named="pk pv",
    given=({"p[kv]": None},),
)
def prefix_tuning(p, x):
    q, k, v = (heads(x @ p[n]) for n in "qkv")
    k = jnp.concatenate([jnp.tile(p["pk"][None], (2, 1, 1, 1)), k], axis=1)
    v = jnp.concatenate([jnp.tile(p["pv"][None], (2, 1, 1, 1)), v], axis=1)
    return attend(q, k, v) @ p["o"]


@case(
    "queries",
    ("wk wv wq w1 w2 ur uz un vr vz vn 8x8, mu log_sigma g_in g_slots br bz 8"),
    X,
    KEY,
    # Kernels are used in both iterations, each is one layer where it is first used.
    layers="wk wv wq ur vr<br uz vz<bz un vn w1 w2",
    none="g_in",
    free="mu log_sigma g_slots",
)
def slot_attention(p, x, key):
    x = rms_norm(x, p["g_in"])
    k, v = x @ p["wk"], x @ p["wv"]
    noise = jax.random.normal(key, (2, 3, 8))
    slots = p["mu"] + jnp.exp(p["log_sigma"]) * noise
    for _ in range(2):
        q = rms_norm(slots, p["g_slots"]) @ p["wq"]
        weights = jax.nn.softmax(jnp.einsum("bsd,bnd->bns", q, k), -1)
        weights = weights / weights.sum(1, keepdims=True)
        y = jnp.einsum("bns,bnd->bsd", weights, v)
        r = jax.nn.sigmoid(y @ p["ur"] + slots @ p["vr"] + p["br"])
        z = jax.nn.sigmoid(y @ p["uz"] + slots @ p["vz"] + p["bz"])
        n = jnp.tanh(y @ p["un"] + r * (slots @ p["vn"]))
        slots = (1 - z) * n + z * slots
        slots = slots + jax.nn.relu(slots @ p["w1"]) @ p["w2"]
    return slots


@case(
    "queries",
    "z 4, h 4x48, hb 48, o 6x3",
    X,
    layers="h<hb o",
    none="z",
    named="h",
    given=({"h": DENSE},),
)
def hypernetwork(p, x):
    """A kernel that is computed from a learned code."""
    kernel = (p["z"] @ p["h"] + p["hb"]).reshape(8, 6)
    return jnp.tanh(x @ kernel) @ p["o"]


@case("queries", "h 4x48, hb 48, o 6x3", X, array(2, 4), layers="h<hb o")
def hypernetwork_of_data(p, x, code):
    """A kernel that is computed from data is data."""
    kernel = (code @ p["h"] + p["hb"]).reshape(2, 8, 6)
    return jnp.tanh(jnp.einsum("btd,bdf->btf", x, kernel)) @ p["o"]


# Data that is closed over: constants hold no parameter, so they are data.

GRAPH = (np.arange(25).reshape(5, 5) % 3 == 0).astype(np.float32)
FEATURES = np.linspace(-1, 1, 40, dtype=np.float32).reshape(5, 8)


@case("constants", "w1 8x16, w2 16x3", layers="w1 w2")
def full_batch(p):
    """A graph network on its one graph; there are no inputs at all."""
    return GRAPH @ jnp.tanh(GRAPH @ FEATURES @ p["w1"]) @ p["w2"]


@case("constants", "w1 8x16, b1 16, w2 16x3, b2 3", layers="w1<b1 w2<b2")
def full_batch_by_edges(p):
    senders, receivers = np.asarray([0, 1, 2, 4]), np.asarray([1, 2, 3, 0])

    def convolve(x):
        return jax.ops.segment_sum(x[senders], receivers, 5)

    x = jax.nn.relu(convolve(jnp.asarray(FEATURES) @ p["w1"] + p["b1"]))
    return convolve(x @ p["w2"] + p["b2"])


@case("constants", "g1 8x8, c1 8, g2 w 8x8, o 8x3", array(4, 8), layers="g1<c1 g2 w o")
def generator(p, x):
    """Noise of a key that is closed over."""
    z = jax.random.normal(jax.random.key(0), (8,))
    style = jnp.tanh(z @ p["g1"] + p["c1"]) @ p["g2"]
    return style * (x @ p["w"]) @ p["o"]


@case("constants", "c1 2x16, c2 16x8, w 8x8, o 8x3", array(4, 8), layers="c1 c2 w o")
def coordinates(p, x):
    table = jnp.tanh(np.ones((4, 2), np.float32) @ p["c1"]) @ p["c2"]
    return (x @ p["w"] + table) @ p["o"]


@case("constants", "w0 2x16, b0 16, w1 16x16, b1 16, w2 16x3", layers="w0<b0 w1<b1 w2")
def siren(p):
    """A picture as a function of its coordinates."""
    grid = jnp.stack(jnp.meshgrid(jnp.linspace(-1, 1, 4), jnp.linspace(-1, 1, 4)), -1)
    x = jnp.sin(30 * (grid.reshape(-1, 2) @ p["w0"] + p["b0"]))
    return jnp.sin(x @ p["w1"] + p["b1"]) @ p["w2"]


@case("constants", "b 8x16, w 32x3", X, layers="b w")
def learned_fourier_features(p, x):
    y = 2 * jnp.pi * x @ p["b"]
    return jnp.concatenate([jnp.sin(y), jnp.cos(y)], -1) @ p["w"]


@case("constants", "w 32x3", X, layers="w")
def fixed_fourier_features(p, x):
    y = x @ jax.random.normal(jax.random.key(0), (8, 16))
    return jnp.concatenate([jnp.sin(y), jnp.cos(y)], -1) @ p["w"]


@case("constants", "q 8x8, k 6x8, bk 8, v 6x8, o 8x8", X, layers="q k<bk v o")
def attention_to_a_constant(p, x):
    """Keys and values of a text that was encoded beforehand."""
    context = jnp.asarray(np.linspace(0, 1, 84, dtype=np.float32).reshape(2, 7, 6))
    q, k = heads(x @ p["q"]), heads(context @ p["k"] + p["bk"])
    return attend(q, k, heads(context @ p["v"])) @ p["o"]


@case("constants", "table 4x8, w 8x8, o 8x3", X, layers="w o", none="table")
def constant_label(p, x):
    """A constant one-hot vector picks a row: a look-up, no layer."""
    label = jnp.asarray(np.eye(4, dtype=np.float32)[2])
    return jnp.tanh(x @ p["w"] + label @ p["table"]) @ p["o"]


# The same look-up with the one-hot matrix computed in the program, whose entries are
# not in sight as constants.  An error that names the table is lawful, a layer is not.
@case(
    "constants", "table 4x8, w 8x8, o 8x3", X, layers="w o", none="table", named="table"
)
def computed_one_hot(p, x):
    rows = jax.nn.one_hot(jnp.arange(5) % 4, 4)
    return (x @ p["w"] + rows @ p["table"]) @ p["o"]


# A rotation by a constant on the way: the product of the constant with the kernel reads
# the kernel rightly, but it is also computed with before it meets data.
@case("constants", "w 8x6, o 6x3", X, layers="w o", named="w")
def rotated_inputs(p, x):
    hadamard = np.asarray([[1, 1], [1, -1]], np.float32)
    rotation = jnp.asarray(np.kron(np.kron(hadamard, hadamard), hadamard))
    return jnp.tanh(x @ (rotation @ p["w"])) @ p["o"]


@case("constants", "w1 9x16, b1 16, w2 16x8, b2 8", array(2, 8), layers="w1<b1 w2<b2")
def neural_ode(p, x):
    """Runge-Kutta over constant times, as a scan."""

    def field(t, x):
        x = jnp.concatenate([x, jnp.full((2, 1), t)], -1)
        return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    def step(x, t):
        k1 = field(t, x)
        k2 = field(t + 0.05, x + 0.05 * k1)
        return x + 0.1 * k2, None

    return lax.scan(step, x, jnp.arange(3.0) / 10)[0]


# Biases of kernels that run side by side, from the second layer on; of recurrent nets
# that start from zeros; of kernels with noise on them.

_CRITICS = shapes("w1 3x8x16, b1 3x16, w2 3x16x16, b2 3x16, w3 3x16x1, b3 3x1")


def _mlp(p, x):
    x = jnp.tanh(x @ p["w1"] + p["b1"])
    return jnp.tanh(x @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"]


@case(
    "stacks",
    _CRITICS,
    array(5, 8),
    layers=[layer(f"w{i}", f"b{i}", STACK) for i in (1, 2, 3)],
)
def ensemble(p, x):
    """Critics of one input, by vmap."""
    return jax.vmap(_mlp, (0, None))(p, x).min(0)


@case(
    "stacks",
    ("w1 3x8x16, b1 3x16, w2 3x16x16, b2 3x16, w3 3x16x1, b3 3x1, g c 3x16"),
    array(5, 6),
    array(5, 2),
    layers="w1:stack<b1,g,c w2:stack<b2 w3:stack<b3",
)
def double_critic(p, state, action):
    """State and action side by side, a norm behind the first layer of each critic."""

    def critic(p, x):
        x = jax.nn.relu(layer_norm(x @ p["w1"] + p["b1"], p["g"], p["c"]))
        return jax.nn.relu(x @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"]

    x = jnp.concatenate([state, action], -1)
    return jax.vmap(critic, (0, None))(p, x)


_EXPERTS = shapes("w1 3x8x16, b1 3x16, w2 3x16x8, b2 3x8, router 8x3")
_EXPERT_LAYERS = layers_of("w1:stack<b1 w2:stack<b2")


@case("stacks", _EXPERTS, array(5, 8), layers="w1:stack<b1 w2:stack<b2 router")
def experts(p, x):
    h = jax.nn.relu(jnp.einsum("td,edf->tef", x, p["w1"]) + p["b1"])
    y = jnp.einsum("tef,efd->ted", h, p["w2"]) + p["b2"]
    return jnp.einsum("te,ted->td", jax.nn.softmax(x @ p["router"]), y)


@case("stacks", _EXPERTS, array(5, 8), layers="w1:stack<b1 w2:stack<b2 router")
def experts_summed_by_hand(p, x):
    h = jax.nn.relu(jnp.einsum("td,edf->tef", x, p["w1"]) + p["b1"])
    y = jnp.einsum("tef,efd->ted", h, p["w2"]) + p["b2"]
    return (jax.nn.softmax(x @ p["router"])[..., None] * y).sum(1)


@case("stacks", _EXPERTS, array(5, 8), layers="router w1:stack<b1 w2:stack<b2")
def experts_with_capacity(p, x):
    """Tokens are sent to places of experts, and back."""
    gates = jax.nn.softmax(x @ p["router"])
    chosen = jax.nn.one_hot(gates.argmax(-1), 3)
    places = jax.nn.one_hot((jnp.cumsum(chosen, 0) * chosen - 1).astype(int), 4)
    sent = jnp.einsum("tec,td->ecd", places, x)
    h = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", sent, p["w1"]) + p["b1"][:, None])
    y = jnp.einsum("ecf,efd->ecd", h, p["w2"]) + p["b2"][:, None]
    return jnp.einsum("tec,te,ecd->td", places, gates, y)


_SCANNED_EXPERTS = MatrixAxes((2,), (3,), stacked=(0, 1))


@case(
    "stacks",
    "w1 2x3x8x16, b1 2x3x16, w2 2x3x16x8, b2 2x3x8",
    array(5, 8),
    layers=[
        layer(f"w{n}", f"b{n}", _SCANNED_EXPERTS, index=(i, j))
        for i in range(2)
        for n in (1, 2)
        for j in range(3)
    ],
)
def scanned_experts(p, x):
    def block(x, p):
        h = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["w1"]) + p["b1"][:, None])
        y = jnp.einsum("etf,efd->etd", h, p["w2"]) + p["b2"][:, None]
        return x + y.mean(0), None

    return lax.scan(block, x, p)[0]


@case(
    "stacks",
    "a 3x3x3x3x6, ba 3x6, b 3x3x3x6x4, bb 3x4",
    IMAGE,
    layers="a:stacked_hwio<ba b:stacked_hwio<bb",
)
def ensemble_of_convolutions(p, x):
    def member(p, x):
        x = jax.nn.relu(conv(x, p["a"]) + p["ba"])
        return conv(x, p["b"]) + p["bb"]

    return jax.vmap(member, (0, None))(p, x)


@case(
    "stacks",
    "w 8x8, b 8, head 4x8x3, head_bias 4x3",
    array(5, 8),
    array(5, dtype=jnp.int32),
    layers="w<b head:stack<head_bias",
)
def heads_of_tasks(p, x, task):
    """Every example has its own task's head."""
    x = jnp.tanh(x @ p["w"] + p["b"])
    y = jnp.einsum("td,tdk->tk", x, p["head"][task])
    return y + p["head_bias"][task]


@case(
    "stacks",
    "w1 2x4x6, b1 2x6, w2 2x6x4, b2 2x4, o 8x3",
    X,
    layers="w1:stack<b1 w2:stack<b2 o",
)
def blocks_in_a_row(p, x):
    h = jnp.einsum("btgd,gde->btge", heads(x), p["w1"]) + p["b1"]
    h = jnp.einsum("btgd,gde->btge", jax.nn.relu(h), p["w2"]) + p["b2"]
    return joined(h) @ p["o"]


@case(
    "stacks",
    "wx 8x6, wh 6x6, b 6, o 6x3",
    X,
    # A bias of a sum follows its newest term, as in a loop.
    layers="wx wh<b o",
)
def unrolled_from_zeros(p, x):
    h = jnp.zeros((2, 6))
    for t in range(3):
        h = jnp.tanh(x[:, t] @ p["wx"] + h @ p["wh"] + p["b"])
    return h @ p["o"]


@case("stacks", "wi 8x24, wh 6x24, b 24, o 6x3", X, layers="wi wh<b o")
def unrolled_lstm(p, x):
    h = c = jnp.zeros((2, 6))
    for t in range(3):
        z = x[:, t] @ p["wi"] + h @ p["wh"] + p["b"]
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return h @ p["o"]


@case(
    "stacks",
    "wr wz wn 8x6, ur uz un 6x6, br bz bi bh 6",
    X,
    layers="wr ur<br wz uz<bz wn<bi un<bh",
)
def unrolled_gru(p, x):
    h = jnp.zeros((2, 6))
    for t in range(2):
        r = jax.nn.sigmoid(x[:, t] @ p["wr"] + h @ p["ur"] + p["br"])
        z = jax.nn.sigmoid(x[:, t] @ p["wz"] + h @ p["uz"] + p["bz"])
        n = jnp.tanh(x[:, t] @ p["wn"] + p["bi"] + r * (h @ p["un"] + p["bh"]))
        h = (1 - z) * n + z * h
    return h


_NOISY = shapes("w 8x6, b 6, v 6x3, c 3")


# Noise that is drawn from an input is data, and so is its sum with a kernel: an error
# is in order.  Where axes are given, the biases must be right.
@case("stacks", _NOISY, X, KEY, layers="w<b v<c", named="w v", given=({"[wv]": DENSE},))
def weight_noise(p, x, key):
    for w, b in (("w", "b"), ("v", "c")):
        key, own = jax.random.split(key)
        noise = 0.1 * jax.random.normal(own, p[w].shape)
        x = jnp.tanh(x @ (p[w] + noise) + p[b])
    return x


@case("stacks", _NOISY, X, layers="w<b v<c")
def constant_weight_noise(p, x):
    keys = jax.random.split(jax.random.key(0))
    for key, w, b in zip(keys, "wv", "bc", strict=True):
        noise = jax.random.uniform(key, p[w].shape) - 0.5
        x = jnp.tanh(x @ (p[w] + noise / 256) + p[b])
    return x


@case("stacks", _NOISY, X, KEY, layers="w<b v<c", named="w v", given=({"[wv]": DENSE},))
def drop_connect(p, x, key):
    for w, b in (("w", "b"), ("v", "c")):
        key, own = jax.random.split(key)
        keep = jax.random.bernoulli(own, 0.9, p[w].shape)
        x = jnp.tanh(x @ jnp.where(keep, p[w] / 0.9, 0) + p[b])
    return x


@case("stacks", "w sigma 8x6, b 6", X, KEY, named="w sigma")
@case(
    "stacks",
    "w sigma 8x6, b 6",
    X,
    KEY,
    layers="w<b",
    none="sigma",
    axes={"w": DENSE, "sigma": None},
)
def noisy_net(p, x, key):
    """Two leaves of one shape are added: nobody can tell which is the kernel."""
    return x @ (p["w"] + p["sigma"] * jax.random.normal(key, (8, 6))) + p["b"]


# Identities and side uses do not make a clear kernel unclear.

_ONE = shapes("w 8x4, b 4")
_X = array(2, 8)


@case("side uses", _ONE, _X, layers="w<b")
def frozen(p, x):
    return x @ lax.stop_gradient(p["w"]) + p["b"]


@case("side uses", _ONE, _X, layers="w<b")
def straight_through(p, x):
    w = p["w"]
    return x @ (w + lax.stop_gradient(jnp.round(w * 8) / 8 - w)) + p["b"]


@jax.custom_vjp
def _rounded(w):
    return jnp.round(w)


_rounded.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))


@case("side uses", "w 8x4, b s 4", _X, layers="w<b,s")
def learned_step_size(p, x):
    """Quantization with a learned step per output, which the kernel is made from."""
    return x @ (_rounded(p["w"] / p["s"]) * p["s"]) + p["b"]


@case("side uses", _ONE, _X, layers="w<b")
def spectral_norm(p, x):
    w = p["w"]
    s = lax.stop_gradient(w)
    v = jnp.ones(8)
    for _ in range(2):
        u = v @ s
        v = s @ (u / jnp.linalg.norm(u))
    return x @ (w / (lax.stop_gradient(v) @ w @ lax.stop_gradient(u))) + p["b"]


@case("side uses", _ONE, _X, array(4), layers="w<b")
def spectral_norm_with_state(p, x, u):
    v = p["w"] @ u
    v = lax.stop_gradient(v / jnp.linalg.norm(v))
    u = v @ p["w"]
    u = lax.stop_gradient(u / jnp.linalg.norm(u))
    return x @ (p["w"] / (v @ p["w"] @ u)) + p["b"], u


@case("side uses", _ONE, _X, layers="w<b")
def max_norm(p, x):
    w = p["w"]
    return x @ (w * jnp.minimum(1, 3 / jnp.linalg.norm(w, axis=0))) + p["b"]


@case("side uses", _ONE, _X, layers="w<b")
def printed(p, x):
    jax.debug.print("norm {}", jnp.linalg.norm(p["w"]))
    return x @ p["w"] + p["b"]


@case("side uses", _ONE, _X, layers="w<b")
def called(p, x):
    jax.debug.callback(print, p["w"])
    return x @ p["w"] + p["b"]


@case("side uses", _ONE, _X, layers="w<b")
def singular_values(p, x):
    return x @ p["w"] + p["b"], jnp.linalg.svd(p["w"], compute_uv=False).max()


@case("side uses", _ONE, _X, layers="w<b")
def orthogonal_penalty(p, x):
    gram = p["w"].T @ p["w"]
    return x @ p["w"] + p["b"], ((gram - jnp.eye(4)) ** 2).sum()


@case(
    "side uses",
    "w 8x4, b 4, v 4x3, table 5x8",
    array(2, dtype=jnp.int32),
    array(2, 3),
    layers="w<b v",
    none="table",
)
def penalty_in_the_loss(p, tokens, y):
    """A sum of squares of everything, added to the error of the prediction."""
    x = jnp.tanh(p["table"][tokens] @ p["w"] + p["b"]) @ p["v"]
    squares = sum((leaf**2).sum() for leaf in jax.tree.leaves(p))
    return ((x - y) ** 2).mean() + 1e-3 * squares


@case("side uses", "w 8x8, b 8", _X, layers="w<b")
def invertible(p, x):
    """The logarithm of the determinant joins the likelihood."""
    y = x @ p["w"] + p["b"]
    return -(y**2).sum(-1) / 2 + jnp.linalg.slogdet(p["w"])[1]


@case("side uses", "w 8x8, b 8", _X, named="w")
@case("side uses", "w 8x8, b 8", _X, layers="w", none="b", axes={"w": DENSE})
def inverse(p, y):
    """An inverse is computed with its kernel; the bias acts on the input."""
    return (y - p["b"]) @ jnp.linalg.inv(p["w"])


@case("side uses", _ONE, _X, layers="w<b")
def reduced_precision(p, x):
    return x @ lax.reduce_precision(p["w"], 8, 7) + p["b"]


@case("side uses", _ONE, _X, layers="w<b")
def named_for_rematerialization(p, x):
    from jax.ad_checkpoint import checkpoint_name

    policy = jax.checkpoint_policies.save_only_these_names("y")

    def block(w, b, x):
        return checkpoint_name(x @ checkpoint_name(w, "w"), "y") + b

    return jax.checkpoint(block, policy=policy)(p["w"], p["b"], x)


@jax.custom_vjp
def _linear(w, b, x):
    return x @ w + b


_linear.defvjp(
    lambda w, b, x: (x @ w + b, (w, x)),
    lambda kept, g: (kept[1].T @ g, g.sum(0), g @ kept[0].T),
)


@case("side uses", _ONE, _X, layers="w<b")
def own_gradient(p, x):
    return jnp.tanh(_linear(p["w"], p["b"], x))


@jax.custom_jvp
def _clipped(w):
    return jnp.clip(w, -1, 1)


_clipped.defjvp(lambda primals, tangents: (_clipped(*primals), tangents[0]))


@case("side uses", _ONE, _X, layers="w<b")
def own_tangent(p, x):
    return x @ _clipped(p["w"]) + p["b"]


@case(
    "side uses",
    {
        **{"online": dict(_ONE), "target": dict(_ONE)},
        **{"predictor": (4, 4), "predictor_bias": (4,)},
    },
    _X,
    _X,
    layers="online/w<online/b predictor<predictor_bias target/w<target/b",
)
def bootstrap_targets(p, one, two):
    """Two towers, one of them frozen; the loss is a product of data with data."""

    def encode(p, x):
        return x @ p["w"] + p["b"]

    y = encode(p["online"], one) @ p["predictor"] + p["predictor_bias"]
    z = lax.stop_gradient(encode(p["target"], two))
    return -(y * z / jnp.linalg.norm(y) / jnp.linalg.norm(z)).sum()


@case(
    "side uses",
    "w 8x4, b 4, codes 6x4, o 4x8",
    _X,
    # Distances multiply data with the codes: a kernel, as an embedding that is a head.
    layers="w<b codes:turned o",
)
def vector_quantization(p, x):
    z = x @ p["w"] + p["b"]
    distances = (p["codes"] ** 2).sum(-1) - 2 * z @ p["codes"].T
    chosen = p["codes"][distances.argmin(-1)]
    return (z + lax.stop_gradient(chosen - z)) @ p["o"]


# Tables of positions: looked up by constants or sliced, added to data.  They are no
# layer and follow none, whichever sizes happen to be equal.


def _t5(batch: int, width: int, time: int):
    return array(batch, time, width), array(batch, time, dtype=jnp.int32)


_T5 = shapes("q k v o 8x8, table 4x2")
_T5_LAYERS = "q k v o"


def _buckets(time):
    return (np.arange(time)[None] - np.arange(time)[:, None]) % 4


def _t5_attention(p, x, tokens, bias):
    mask = tokens > 0
    mask = jnp.where(mask[:, None, :, None] & mask[:, None, None, :], 0.0, -1e9)
    return attend(*(heads(x @ p[n]) for n in "qkv"), bias=mask + bias) @ p["o"]


@case(
    "positions",
    _T5,
    *_t5(2, 8, 5),
    layers=_T5_LAYERS,
    none="table",
    given=({"table": None},),
)
@case("positions", _T5, *_t5(3, 8, 5), layers=_T5_LAYERS, none="table")
@case(
    "positions",
    "q k v o 4x4, table 4x2",
    *_t5(4, 4, 4),
    layers=_T5_LAYERS,
    none="table",
)
def bias_by_index(p, x, tokens):
    bias = p["table"][_buckets(x.shape[1])].transpose(2, 0, 1)[None]
    return _t5_attention(p, x, tokens, bias)


@case(
    "positions",
    _T5,
    *_t5(2, 8, 5),
    layers=_T5_LAYERS,
    none="table",
    given=({"table": None},),
)
@case("positions", _T5, *_t5(3, 8, 5), layers=_T5_LAYERS, none="table")
def bias_by_one_hot(p, x, tokens):
    chosen = _buckets(x.shape[1])[None] == np.arange(4)[:, None, None]
    bias = jnp.einsum("nh,nqk->hqk", p["table"], jnp.asarray(chosen, jnp.float32))
    return _t5_attention(p, x, tokens, bias[None])


_TWO_BLOCKS = {
    "blocks": [dict.fromkeys("qkvo", (8, 8))] * 2,
    "table": (4, 2),
    "head": (8, 3),
}


@case(
    "positions",
    _TWO_BLOCKS,
    *_t5(2, 8, 5),
    layers=(
        "blocks/0/q blocks/0/k blocks/0/v blocks/0/o blocks/1/q "
        "blocks/1/k blocks/1/v blocks/1/o head"
    ),
    none="table",
)
def bias_of_all_blocks(p, x, tokens):
    bias = p["table"][_buckets(5)].transpose(2, 0, 1)[None]
    for block in p["blocks"]:
        x = x + _t5_attention(block, x, tokens, bias)
    return x @ p["head"]


@case(
    "positions",
    "g1 c1 8, qkv 8x24, qkv_bias 24, table 9x2, o 8x8, o_bias g2 c2 8, w1 8x16, b1 16, "
    "w2 16x8, b2 8, g3 c3 32, merge 32x16",
    array(2, 4, 4, 8),
    layers="qkv<qkv_bias o<o_bias,g2,c2 w1<b1 w2<b2,g3,c3 merge",
    none="g1 c1 table",
    before="qkv<qkv_bias,g1,c1 o<o_bias w1<b1,g2,c2 w2<b2 merge<g3,c3",
)
def swin(p, x):
    """A shifted window block with its table, and patch merging behind it."""
    places = np.indices((2, 2)).reshape(2, 4)
    distance = places[:, :, None] - places[:, None] + 1
    index = distance[0] * 3 + distance[1]
    y = jnp.roll(layer_norm(x, p["g1"], p["c1"]), (-1, -1), (1, 2))
    y = y.reshape(2, 2, 2, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(8, 4, 8)
    qkv = (y @ p["qkv"] + p["qkv_bias"]).reshape(8, 4, 3, 2, 4)
    bias = p["table"][index.reshape(-1)].reshape(4, 4, 2).transpose(2, 0, 1)
    y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], bias[None])
    y = y @ p["o"] + p["o_bias"]
    y = y.reshape(2, 2, 2, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)
    x = x + jnp.roll(y, (1, 1), (1, 2))
    y = layer_norm(x, p["g2"], p["c2"])
    x = x + jax.nn.gelu(y @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    quarters = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
    return layer_norm(jnp.concatenate(quarters, -1), p["g3"], p["c3"]) @ p["merge"]


@case(
    "positions",
    "q k v o 8x8, c1 2x6, b1 6, c2 6x2",
    array(2, 4, 8),
    layers="q k v c1<b1 c2 o",
)
def continuous_bias(p, x):
    """A small network of constant distances makes the bias of the logits."""
    distances = np.stack(np.meshgrid(np.arange(3.0), np.arange(3.0)), -1) - 1
    distances = distances.reshape(-1, 2).astype(np.float32)
    q, k, v = (heads(x @ p[n]) for n in "qkv")
    table = jax.nn.relu(distances @ p["c1"] + p["b1"]) @ p["c2"]
    bias = table[np.arange(16) % 9].reshape(4, 4, 2).transpose(2, 0, 1)
    return attend(q, k, v, 16 * jax.nn.sigmoid(bias)) @ p["o"]


@case(
    "positions",
    "q k v o 8x8, slopes 2",
    X,
    layers="q k v o",
    none="slopes",  # Acts on products of data with data.
)
def learned_slopes(p, x):
    """ALiBi: distances are constants, their slopes parameters."""
    distances = -jnp.abs(jnp.arange(5)[None] - jnp.arange(5)[:, None])
    bias = p["slopes"][:, None, None] * distances
    return attend(*(heads(x @ p[n]) for n in "qkv"), bias=bias) @ p["o"]


# A looked-up row multiplies the query: "looked up by indices: no layer" and "multiplies
# data: a kernel" both apply, so that an error is in order as well.
@case(
    "positions",
    "q k v o 8x8, table 9x4",
    X,
    layers=_T5_LAYERS,
    none="table",
    named="table",
    given=({"table": None},),
)
def looked_up_keys(p, x):
    q, k, v = (heads(x @ p[n]) for n in "qkv")
    keys = p["table"][np.arange(5)[None] - np.arange(5)[:, None] + 4]
    return attend(q, k, v, jnp.einsum("bqhd,qkd->bhqk", q, keys)) @ p["o"]


@case(
    "positions",
    "q k v o 8x8, r 5x4",
    X,
    # Every query is multiplied with all of it: a matrix like any other.
    layers="q k v r:turned o",
)
def relative_logits(p, x):
    q, k, v = (heads(x @ p[n]) for n in "qkv")
    return attend(q, k, v, jnp.einsum("bqhd,rd->bhqr", q, p["r"])) @ p["o"]


for _size in (8, 5, 2):
    # Time as wide as the model, and the batch too: nothing depends on it.
    @case(
        "positions",
        {
            **{"patch": (_size, 8), "patch_bias": (8,), "positions": (8, 8)},
            **{"g": (8,), "w": (8, 8), "b": (8,), "scale": (8,), "head": (8, 3)},
        },
        array(_size, 8, _size),
        layers="patch<patch_bias,g w<b,scale head",
        none="positions",
    )
    def learned_positions(p, x):
        x = x @ p["patch"] + p["patch_bias"] + p["positions"]
        x = x + (rms_norm(x, p["g"]) @ p["w"] + p["b"]) * p["scale"]
        return x @ p["head"]


# Positions of a finer grid are products with constant weights.  They are a table all
# the same.
@case(
    "positions",
    "patch 3x8, positions 1x4x4x8, head 8x3",
    IMAGE,
    layers="patch head",
    none="positions",
)
def resized_positions(p, x):
    x = x @ p["patch"] + jax.image.resize(p["positions"], (1, 8, 8, 8), "bilinear")
    return x.mean((1, 2)) @ p["head"]


@case("positions", "w 8x8, rows 7x8, o 8x3", X, layers="w o", none="rows")
def resized_rows(p, x):
    return (x @ p["w"] + jax.image.resize(p["rows"], (5, 8), "cubic")) @ p["o"]


# Sums of places are no differences: a Fourier transform of constants is data.
@case("positions", "w 8x8, c 5x8, o 8x3", X, layers="w c o")
def cosine_features(p, x):
    @jax.jit
    def waves():
        return jnp.cos(jnp.arange(5.0)[:, None] * jnp.arange(5.0))

    return (x @ p["w"] + waves() @ p["c"]) @ p["o"]


_CLIP = shapes("image 8x4, text 6x4, logit_scale logit_bias ()")


@case(
    "positions",
    _CLIP,
    array(3, 8),
    array(3, 6),
    layers="image text",
    none="logit_scale logit_bias",
)
def contrastive(p, images, texts):
    """A scale and a bias of the products of two towers."""
    one, two = images @ p["image"], texts @ p["text"]
    one = one / jnp.linalg.norm(one, axis=-1, keepdims=True)
    two = two / jnp.linalg.norm(two, axis=-1, keepdims=True)
    return one @ two.T * jnp.exp(p["logit_scale"]) + p["logit_bias"]


# Uses that are each other's transpose have one spectrum: one layer, whose outputs are
# those of the forward use.

_ENERGY = shapes("w1 3x16, b1 16, w2 16x12, b2 12, w3 12x1")
_ENERGY_LAYERS = layers_of("w1<b1 w2<b2 w3")


def _energy(p, x):
    x = jnp.tanh(x @ p["w1"] + p["b1"])
    return (jnp.tanh(x @ p["w2"] + p["b2"]) @ p["w3"]).sum()


@case("transposed", _ENERGY, array(5, 3), layers=_ENERGY_LAYERS)
def forces(p, x):
    return -jax.grad(_energy, 1)(p, x)


@case("transposed", _ENERGY, array(5, 3), layers=_ENERGY_LAYERS)
def laplacian(p, x):
    def one(z):
        return jnp.trace(jax.hessian(lambda z: _energy(p, z[None]))(z))

    return jax.vmap(one)(x)


@case("transposed", _ENERGY, array(5, 3), layers=_ENERGY_LAYERS)
def gradient_penalty(p, x):
    value, slope = jax.value_and_grad(_energy, 1)(p, x)
    return value + ((jnp.linalg.norm(slope, axis=-1) - 1) ** 2).mean()


@case(
    "transposed",
    "a 3x3x3x4, ba 4, b 3x3x4x6, bb 6, w 6x1",
    IMAGE,
    layers="a:hwio<ba b:hwio<bb w",
)
def gradient_penalty_of_convolutions(p, x):
    def critic(x):
        x = jnp.tanh(conv(x, p["a"], stride=2) + p["ba"])
        x = jnp.tanh(conv(x, p["b"]) + p["bb"])
        return (x.mean((1, 2)) @ p["w"]).sum()

    value, slope = jax.value_and_grad(critic)(x)
    return value + (slope**2).sum()


@case(
    "transposed",
    "w1 3x16, b1 16, w2 16x3, b2 3",
    array(5, 3),
    array(5, 3),
    layers="w1<b1 w2<b2",
)
def continuous_flow(p, x, probe):
    """The trace of the Jacobian by a random probe, along Euler steps."""

    def field(x):
        return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    def step(carry, _):
        x, total = carry
        slope, pull = jax.vjp(field, x)
        total = total + (pull(probe)[0] * probe).sum(-1)
        return (x + 0.1 * slope, total), None

    return lax.scan(step, (x, jnp.zeros(5)), length=3)[0]


@case("transposed", _ENERGY, array(5, 3), array(5, 3), layers=_ENERGY_LAYERS)
def wave_equation(p, t, x):
    """Second derivatives by forward over forward, as in physics-informed nets."""

    def along(x, direction):
        def slope(x):
            return jax.jvp(lambda x: _energy(p, x[None]), (x,), (direction,))[1]

        return jax.jvp(slope, (x,), (direction,))[1]

    return jax.vmap(along)(x, t)


# The second bias is added to the output of a product of w too, the transposed one.
@case("transposed", "w 3x2, b 2, c 3", array(5, 3), layers="w<b,c")
def tied_autoencoder(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T + p["c"]


@case(
    "transposed",
    "w1 8x6, b1 6, w2 6x4, b2 4, c2 6, c1 8",
    array(5, 8),
    layers="w1<b1,c1 w2<b2,c2",
)
def deep_tied_autoencoder(p, x):
    x = jax.nn.relu(x @ p["w1"] + p["b1"])
    x = jax.nn.relu(x @ p["w2"] + p["b2"])
    x = jax.nn.relu(x @ p["w2"].T + p["c2"])
    return x @ p["w1"].T + p["c1"]


@case("transposed", "memory 6x8", array(5, 8), layers="memory:turned")
def hopfield_memory(p, x):
    """Scores of all patterns, and their mean: the first use names the outputs."""
    return jax.nn.softmax(x @ p["memory"].T) @ p["memory"]


@case(
    "transposed",
    "w 8x6, visible 8, hidden 6",
    array(5, 8),
    KEY,
    layers="w<hidden,visible",
)
def contrastive_divergence(p, v, key):
    """Gibbs steps of a Boltzmann machine, in a loop."""

    def step(v, key):
        h = jax.nn.sigmoid(v @ p["w"] + p["hidden"])
        h = jax.random.bernoulli(key, h).astype(v.dtype)
        return jax.nn.sigmoid(h @ p["w"].T + p["visible"]), None

    return lax.scan(step, v, jax.random.split(key, 2))[0]


# Norms.

_FUSED = shapes("w0 8x8, g 8, qkv 8x24, o 8x8")


@case("norms", _FUSED, X, layers="w0 qkv<g o", norms="before")
# Split, the norm follows the first part, the queries.
@case(
    "norms",
    _FUSED,
    X,
    layers=[
        layer("w0"),
        layer("qkv", "g", part=(1, 0, 8)),
        *(layer("qkv", part=(1, 8, 16)), layer("qkv", part=(1, 16, 24))),
        layer("o"),
    ],
    norms="before",
    split={"qkv": (1, 3)},
)
# Behind the layer before, no part is asked for.
@case(
    "norms",
    _FUSED,
    X,
    layers=[
        layer("w0", "g"),
        *(layer("qkv", part=(1, 8 * i, 8 * i + 8)) for i in range(3)),
        layer("o"),
    ],
    split={"qkv": (1, 3)},
)
def fused_attention(p, x):
    x = x @ p["w0"]
    q, k, v = jnp.split(rms_norm(x, p["g"]) @ p["qkv"], 3, -1)
    return x + attend(heads(q), heads(k), heads(v)) @ p["o"]


@case(
    "norms",
    "w0 8x8, g 8, qkv 3x8x8, o 8x8",
    X,
    # A norm of one vector cannot follow a whole stack, only its first slice.
    layers=[
        layer("w0"),
        layer("qkv", "g", STACK, index=(0,)),
        *(layer("qkv", "", STACK, index=(i,)) for i in (1, 2)),
        layer("o"),
    ],
    norms="before",
    axes={"qkv": STACK},
)
def stacked_attention(p, x):
    x = x @ p["w0"]
    q, k, v = jnp.einsum("btd,sdh->sbth", rms_norm(x, p["g"]), p["qkv"])
    return x + attend(heads(q), heads(k), heads(v)) @ p["o"]


_CHUNKS = shapes("w0 8x8, b0 g c 8, w1 8x6, b1 6")
_AFTER, _BEFORE = "w0<b0,g,c w1<b1", "w0<b0 w1<b1,g,c"


@case("norms", _CHUNKS, array(6, 8), layers=_AFTER, before=_BEFORE)
def norm_inside_a_loop_over_chunks(p, x):
    def chunk(x):
        x = layer_norm(x @ p["w0"] + p["b0"], p["g"], p["c"])
        return jax.nn.relu(x) @ p["w1"] + p["b1"]

    return lax.map(chunk, x.reshape(3, 2, 8)).reshape(6, 6)


@case("norms", _CHUNKS, array(6, 8), layers=_AFTER, before=_BEFORE)
def layer_inside_a_loop_over_chunks(p, x):
    """The norm stands between two loops over chunks of data, no stacks."""
    x = lax.map(lambda x: x @ p["w0"] + p["b0"], x.reshape(3, 2, 8))
    x = layer_norm(x.reshape(6, 8), p["g"], p["c"])
    x = lax.scan(lambda _, x: (None, x @ p["w1"] + p["b1"]), None, x.reshape(3, 2, 8))[
        1
    ]
    return x.reshape(6, 6)


@case("norms", _CHUNKS, array(6, 8), layers=_AFTER, before=_BEFORE)
def norm_before_a_loop_over_chunks(p, x):
    x = layer_norm(x @ p["w0"] + p["b0"], p["g"], p["c"]).reshape(3, 2, 8)

    def body(i, out):
        own = lax.dynamic_index_in_dim(x, i, keepdims=False)
        return out.at[i].set(own @ p["w1"] + p["b1"])

    return lax.fori_loop(0, 3, body, jnp.zeros((3, 2, 6)))


@case("norms", "w 8x8, g c 5x8, o 8x3", X, layers="w<g,c o", before="w o<g,c")
def norm_of_several_axes(p, x):
    return layer_norm(x @ p["w"], p["g"], p["c"], (1, 2)) @ p["o"]


@case(
    "norms",
    "a 3x3x3x4, g c 8x8x4, b 3x3x4x6",
    IMAGE,
    layers="a:hwio<g,c b:hwio",
    before="a:hwio b:hwio<g,c",
)
def norm_of_whole_images(p, x):
    x = layer_norm(conv(x, p["a"]), p["g"], p["c"], (1, 2, 3))
    return conv(jax.nn.relu(x), p["b"])


@case(
    "norms",
    "stem 8x6, g1 c1 6x5, t1 5x7, t2 7x5, g2 c2 5x6, m1 6x9, m2 9x6, head 6x3",
    X,
    layers="stem<g1,c1 t1 t2<g2,c2 m1 m2 head",
    before="stem t1<g1,c1 t2 m1<g2,c2 m2 head",
)
def mixer_with_whole_norms(p, x):
    """Scales of channels and patches, in the order of each product."""
    x = (x @ p["stem"]).swapaxes(1, 2)
    y = layer_norm(x, p["g1"], p["c1"], (1, 2))
    x = (x + jax.nn.gelu(y @ p["t1"]) @ p["t2"]).swapaxes(1, 2)
    y = layer_norm(x, p["g2"], p["c2"], (1, 2))
    x = x + jax.nn.gelu(y @ p["m1"]) @ p["m2"]
    return x.mean(1) @ p["head"]


@case(
    "norms",
    "stem 3x3x3x8, g1 c1 8, conv1 3x3x8x8, time 6x8, time_bias g2 c2 8, "
    "conv2 3x3x8x8, bias2 8",
    IMAGE,
    array(2, 6),
    layers="stem:hwio<g1,c1 conv1:hwio<g2,c2 time<time_bias conv2:hwio<bias2",
    before="stem:hwio conv1:hwio<g1,c1 time<time_bias conv2:hwio<bias2,g2,c2",
)
def residual_block_with_time(p, x, t):
    """The sum prefers the images to the embedding that is added to all of them."""
    x = conv(x, p["stem"])
    h = conv(jax.nn.silu(group_norm(x, p["g1"], p["c1"])), p["conv1"])
    t = jax.nn.silu(t) @ p["time"] + p["time_bias"]
    h = h + t[:, None, None]
    h = conv(jax.nn.silu(group_norm(h, p["g2"], p["c2"])), p["conv2"])
    return x + h + p["bias2"]


@case(
    "norms",
    "w 8x8, t1 4x8, b1 8, t2 8x8, g 8, o 8x3",
    X,
    layers="w<g t1<b1 t2 o",
    before="w t1<b1 t2 o<g",
)
def constant_time_embedding(p, x):
    """The same where the embedding is computed from constants."""
    h = x @ p["w"]
    t = np.linspace(0, 1, 20, dtype=np.float32).reshape(5, 4)
    h = h + jax.nn.silu(t @ p["t1"] + p["b1"]) @ p["t2"]
    return rms_norm(h, p["g"]) @ p["o"]


@case(
    "norms",
    "w1 8x8, g 8, film 4x16, film_bias 16, w2 8x8",
    X,
    array(2, 4),
    layers="w1<g film<film_bias w2",
    before="w1 film<film_bias w2<g",
)
def modulated(p, x, c):
    h = rms_norm(x @ p["w1"], p["g"])
    scale, shift = jnp.split(c @ p["film"] + p["film_bias"], 2, -1)
    return jax.nn.silu(h * (1 + scale[:, None]) + shift[:, None]) @ p["w2"]


# Messages.


# Scaled entry by entry: no matrix, and behind no layer.  An error is in order.
@case("messages", "mask 5x8, w 8x6, b 6", X, layers="w<b", none="mask", named="mask")
def masked_inputs(p, x):
    return (x * jax.nn.sigmoid(p["mask"])) @ p["w"] + p["b"]


@case("messages", "w v 8x6", X, named="v")
def never_used(p, x):
    return x @ p["w"]


@case("messages", "w 8x6, b 6, v 8x6", X, named="v")
def only_returned(p, x):
    """A leaf that reaches an output and has no reading."""
    return x @ p["w"] + p["b"], (p["v"] ** 2).sum()


@case("messages", "a 8x2, b 2x6, c 6", X, layers="a b", free="c", axes={"[ab]": DENSE})
@case("messages", "a 8x2, b 2x6, c 6", X, named="a b")
def multiplied_before(p, x):
    """A factorized kernel; its bias acts on the outputs of both factors."""
    return x @ (p["a"] @ p["b"]) + p["c"]


@case("messages", "w 3x8x4, o 12x3", X, named="w")
@case(
    "messages",
    "w 3x8x4, o 12x3",
    X,
    layers=[layer("w", "", MatrixAxes((1,), (0, 2))), layer("o")],
    axes={"w": MatrixAxes((1,), (0, 2))},
)
@case("messages", "w 3x8x4, o 12x3", X, layers="w:stack o", axes={"w": STACK})
def heads_or_experts(p, x):
    return joined(jnp.einsum("btd,hdk->bthk", x, p["w"])) @ p["o"]


@case("messages", "re im 8x8x3, w 8x8, b 8", X, named="re im")
def fourier_operator(p, x):
    """Complex products of frequencies: real and imaginary parts are two leaves."""
    modes = jnp.fft.rfft(x, axis=1)
    kernel = lax.complex(p["re"], p["im"])
    y = jnp.fft.irfft(jnp.einsum("btd,dft->btf", modes, kernel), 5, axis=1)
    return jax.nn.gelu(y + x @ p["w"] + p["b"])


# A complex leaf is no kernel; it is left out with that reason, or named as complex.
@case(
    "messages",
    {
        **{"b": array(8, 6, dtype=jnp.complex64), "nu": (6,), "d": (8,)},
        **{"c": array(6, 8, dtype=jnp.complex64), "w": (8, 3)},
    },
    X,
    layers="w",
    none="b c nu",
    free="d",
    named="b c",
    says="complex",
    given=({"[bc]": None},),
)
def linear_recurrence(p, x):
    """A diagonal recurrence in complex numbers."""
    decay = jnp.exp(-jnp.exp(p["nu"])).astype(jnp.complex64)

    def step(h, x):
        h = decay * h + x.astype(jnp.complex64) @ p["b"]
        return h, (h @ p["c"]).real

    y = lax.scan(step, jnp.zeros((2, 6), jnp.complex64), x.swapaxes(0, 1))[1]
    return (y.swapaxes(0, 1) + p["d"] * x) @ p["w"]


# Taps of a convolution that is written as a sum of shifted copies scale the output of a
# layer channel by channel: followers of it or none, but nothing else.
@case(
    "messages",
    "w 8x8, taps 3x8, b 8, o 8x3",
    X,
    layers="w<b o",
    free="taps",
    named="taps",
    given=({"taps": None},),
)
def shifted_sums(p, x):
    x = x @ p["w"]
    shifted = [jnp.pad(x, ((0, 0), (i, 0), (0, 0)))[:, :5] for i in range(3)]
    x = sum(y * p["taps"][i] for i, y in enumerate(shifted)) + p["b"]
    return jax.nn.silu(x) @ p["o"]


# Whole blocks of well-known models.


# The decay rates are multiplied with data that is constant along their second axis, but
# nothing is summed: no matrix product.  It takes more than the shapes to see that.
@case(
    "models",
    "inputs 8x16, conv 4x1x8, conv_bias 8, x_proj 8x10, dt 2x8, dt_bias 8, A_log 8x4, "
    "D 8, out 8x8",
    X,
    layers="inputs conv:wio<conv_bias x_proj dt<dt_bias out",
    none="A_log",
    free="D",
    named="A_log",
    given=({"A_log": None},),
)
def mamba(p, x):
    x, z = jnp.split(x @ p["inputs"], 2, -1)
    x = jax.nn.silu(conv(x, p["conv"], groups=8) + p["conv_bias"])
    dt, b, c = jnp.split(x @ p["x_proj"], [2, 6], -1)
    dt = jax.nn.softplus(dt @ p["dt"] + p["dt_bias"])
    decay = jnp.exp(-dt[..., None] * jnp.exp(p["A_log"]))
    inputs = (dt * x)[..., None] * b[:, :, None]

    def step(h, now):
        decay, inputs, c = now
        h = decay * h + inputs
        return h, jnp.einsum("bdn,bn->bd", h, c)

    by_time = jax.tree.map(lambda a: a.swapaxes(0, 1), (decay, inputs, c))
    y = lax.scan(step, jnp.zeros((2, 8, 4)), by_time)[1].swapaxes(0, 1)
    return ((y + x * p["D"]) * jax.nn.silu(z)) @ p["out"]


@case(
    "models",
    "words 11x8, positions 5x8, types 2x8, g0 c0 8, q k v o 8x8, bq bk bv bo g1 c1 8, "
    "w1 8x16, b1 16, w2 16x8, b2 g2 c2 8, pooler 8x8, pooler_bias 8, cls 8x2",
    TOKENS,
    TOKENS,
    layers="q<bq k<bk v<bv o<bo,g1,c1 w1<b1 w2<b2,g2,c2 pooler<pooler_bias cls",
    none="words positions types g0 c0",
    before="q<bq,g0,c0 k<bk v<bv o<bo w1<b1,g1,c1 w2<b2 pooler<pooler_bias,g2,c2 cls",
)
def bert(p, tokens, types):
    x = p["words"][tokens] + p["positions"] + p["types"][types]
    x = layer_norm(x, p["g0"], p["c0"])
    q, k, v = (heads(x @ p[n] + p[f"b{n}"]) for n in "qkv")
    x = layer_norm(x + attend(q, k, v) @ p["o"] + p["bo"], p["g1"], p["c1"])
    y = jax.nn.gelu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    x = layer_norm(x + y, p["g2"], p["c2"])
    return jnp.tanh(x[:, 0] @ p["pooler"] + p["pooler_bias"]) @ p["cls"]


# Norms without parameters make no difference.
@case(
    "models",
    "patch 8x8, t1 6x8, t2 8x8, label 5x8, mod 8x48, mod_bias 48, q k v o 8x8, "
    "up 8x16, down 16x8, last_mod 8x16, last 8x8",
    X,
    array(2),
    array(2, dtype=jnp.int32),
    layers="patch t1 t2 mod<mod_bias q k v o up down last_mod last",
    none="label",
    before="patch t1 t2 mod<mod_bias q k v o up down last_mod last",
)
def dit(p, x, t, label):
    """Modulation by data, norms without parameters, gates that start at zero."""

    def norm(x):
        return rms_norm(x - x.mean(-1, keepdims=True), 1.0)

    x = x @ p["patch"]
    angles = t[:, None] * jnp.exp(-jnp.arange(3.0))
    t = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    c = jax.nn.silu(jax.nn.silu(t @ p["t1"]) @ p["t2"] + p["label"][label])
    mods = jnp.split((c @ p["mod"] + p["mod_bias"])[:, None], 6, -1)
    y = norm(x) * (1 + mods[1]) + mods[0]
    x = x + mods[2] * (attend(*(heads(y @ p[n]) for n in "qkv")) @ p["o"])
    y = norm(x) * (1 + mods[4]) + mods[3]
    x = x + mods[5] * (jax.nn.gelu(y @ p["up"]) @ p["down"])
    shift, scale = jnp.split((c @ p["last_mod"])[:, None], 2, -1)
    return (norm(x) * (1 + scale) + shift) @ p["last"]


_T5_STACKS = shapes("n1 8x3, q k v 8x3x2x4, o 2x3x4x8, n2 8x3, wi0 wi1 8x3x6, wo 6x3x8")
_SECOND = {
    **dict.fromkeys("qkv", MatrixAxes((0,), (2, 3), stacked=(1,))),
    "o": MatrixAxes((0, 2), (3,), stacked=(1,)),
    **dict.fromkeys(("wi0", "wi1", "wo"), MatrixAxes((0,), (2,), stacked=(1,))),
}


@case(
    "models",
    {"blocks": _T5_STACKS, "embed": (11, 8), "head": (8, 11), "table": (4, 2)},
    TOKENS,
    layers=[
        *slices(
            3,
            *(
                layer(
                    f"blocks/{name}",
                    {"q": "blocks/n1", "wi0": "blocks/n2"}.get(name, ""),
                    axes,
                )
                for name, axes in _SECOND.items()
            ),
        ),
        layer("head"),
    ],
    none="embed table",
    norms="before",
)
def t5_scanned_along_axis_1(p, tokens):
    bias = p["table"][_buckets(5)].transpose(2, 0, 1)[None]

    @jax.checkpoint
    def block(x, b):
        y = rms_norm(x, b["n1"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", y, b[n]) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k) + bias)
        y = jnp.einsum("bhqs,bshk->bqhk", weights, v)
        x = x + jnp.einsum("bthk,hkd->btd", y, b["o"])
        y = rms_norm(x, b["n2"])
        return x + (jax.nn.gelu(y @ b["wi0"]) * (y @ b["wi1"])) @ b["wo"], None

    stacks = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), p["blocks"])
    return lax.scan(block, p["embed"][tokens], stacks)[0] @ p["head"]


_UNET = shapes(
    "t1 4x8, tb1 8, first 3x3x3x4, time 8x4, g1 c1 4, down 3x3x4x8, "
    "down_bias g2 c2 8, mid 3x3x8x8, up 3x3x8x4, g3 c3 8, out "
    "3x3x8x3, out_bias 3"
)


@case(
    "models",
    _UNET,
    IMAGE,
    array(2, 4),
    layers=[
        *(layer("t1", "tb1"), layer("first", "g1 c1", HWIO), layer("time")),
        *(layer("down", "down_bias g2 c2", HWIO), layer("mid", "", HWIO)),
        # Behind a concatenation a norm follows the newest layer, as in a DenseNet.
        *(layer("up", "g3 c3", HWIO), layer("out", "out_bias", HWIO)),
    ],
)
def unet(p, x, t):
    t = jax.nn.silu(t @ p["t1"] + p["tb1"])
    skip = conv(x, p["first"]) + (t @ p["time"])[:, None, None]
    x = jax.nn.silu(group_norm(skip, p["g1"], p["c1"]))
    x = conv(x, p["down"], stride=2) + p["down_bias"]
    x = conv(jax.nn.silu(group_norm(x, p["g2"], p["c2"])), p["mid"])
    x = jax.image.resize(x, (2, 8, 8, 8), "nearest")
    x = jnp.concatenate([conv(x, p["up"]), skip], -1)
    return conv(jax.nn.silu(group_norm(x, p["g3"], p["c3"])), p["out"]) + p["out_bias"]


@case("models", "w 8x6, bias 6, a 8x2, b 2x6, o 6x3", X, layers="w<bias a b o")
def adapter(p, x):
    """LoRA as two products of its own, beside a frozen kernel."""
    y = x @ lax.stop_gradient(p["w"]) + p["bias"]
    return jax.nn.relu(y + 2.0 * (x @ p["a"] @ p["b"])) @ p["o"]


@case(
    "models",
    "w 8x6, a 8x2, b 2x6, bias m 6, o 6x3",
    X,
    # What a kernel is computed from follows it; the magnitude is a gain.
    layers="w<a,b,bias,m o",
)
def decomposed_adapter(p, x):
    """DoRA: a sum of kernel and factors, rescaled to a learned magnitude."""
    w = p["w"] + p["a"] @ p["b"]
    w = w / jnp.linalg.norm(w, axis=0, keepdims=True) * p["m"]
    return jnp.tanh(x @ w + p["bias"]) @ p["o"]


@case(
    "models",
    ("stem 8x6, g1 6, t1 5x7, b1 7, t2 7x5, b2 5, g2 6, m1 6x9, m2 9x6, g 6, head 6x3"),
    X,
    layers="stem<g1 t1<b1 t2<b2,g2 m1 m2<g head",
)
def mixer(p, x):
    x = x @ p["stem"]
    y = rms_norm(x, p["g1"]).swapaxes(1, 2)
    y = jax.nn.gelu(y @ p["t1"] + p["b1"]) @ p["t2"] + p["b2"]
    x = x + y.swapaxes(1, 2)
    y = rms_norm(x, p["g2"])
    x = x + jax.nn.gelu(y @ p["m1"]) @ p["m2"]
    return rms_norm(x, p["g"]).mean(1) @ p["head"]
